//! Duties of make-believe drivers.

use super::*;
use crate::guest::btf::TypeId;
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::TestGuest;
use crate::guest::paging::{Entry, Levels};
use crate::guest::symbols::read_kallsyms;

const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
const BASE: u64 = 0xffff_8880_0000_0000;
/// Objects, one behind the other.
const BIO: u64 = BASE;
const BDEV: u64 = BASE + 0x100;
const DISK: u64 = BASE + 0x200;
const FOPS: u64 = BASE + 0x300;
const REQUEST: u64 = BASE + 0x400;
const QUEUE: u64 = BASE + 0x500;
const MQ_OPS: u64 = BASE + 0x600;
const PACKET: u64 = BASE + 0x700;
const DEVICE: u64 = BASE + 0x800;
const TX: u64 = BASE + 0x900;
const NAPI: u64 = BASE + 0xc00;
const QDISCS: [u64; 2] = [BASE + 0xa00, BASE + 0xb00];

const SUBMIT: u64 = 0xffff_ffff_c000_0000;
const COMPLETE: u64 = 0xffff_ffff_c000_0100;
const BIO_ENDIO: u64 = 0xffff_ffff_8100_0000;
const END_REQUEST: u64 = 0xffff_ffff_8100_0100;
const POLL: u64 = 0xffff_ffff_c000_0200;
const POLLED: u64 = 0xffff_ffff_8100_0400;
const FREE: u64 = 0xffff_ffff_8100_0200;
const SET_UP: u64 = 0xffff_ffff_8100_0500;
const ALLOCATES: u64 = 0xffff_ffff_8100_0600;
const AFTER: u64 = 0xffff_ffff_8100_0680;

fn completions() -> Completions {
    let mut e = Encoder::new(None);
    let word = e.int("u64", 8, 0);
    let (half, short, byte) = (e.int("u32", 4, 0), e.int("u16", 2, 0), e.int("u8", 1, 0));
    let fops = e.structure("block_device_operations", 64, &[("submit_bio", word, 8)]);
    let fops = e.pointer(fops);
    let disk = e.structure("gendisk", 64, &[("fops", fops, 16)]);
    let disk = e.pointer(disk);
    let bdev = e.structure("block_device", 64, &[("bd_disk", disk, 24)]);
    let bdev = e.pointer(bdev);
    e.structure("bio", 64, &[("bi_bdev", bdev, 8), ("bi_status", byte, 26)]);
    let ops = e.structure("blk_mq_ops", 64, &[("complete", word, 32)]);
    let ops = e.pointer(ops);
    let queue = e.structure("request_queue", 64, &[("mq_ops", ops, 40)]);
    let queue = e.pointer(queue);
    e.structure("request", 64, &[("q", queue, 0)]);
    e.structure("napi_struct", 64, &[("poll", word, 48)]);
    e.structure("sk_buff", 64, &[("queue_mapping", short, 8)]);
    let device = [("_tx", word, 0), ("num_tx_queues", half, 8)];
    e.structure("net_device", 64, &device);
    e.structure("netdev_queue", 32, &[("qdisc", word, 8)]);
    e.structure("Qdisc", 64, &[("enqueue", word, 0)]);
    e.enumeration_of("skb_free_reason", &[("SKB_REASON_DROPPED", 1)]);
    let types = Btf::parse(&e.bytes(), None).unwrap();
    let text = format!(
        "{BIO_ENDIO:x} T bio_endio\n{END_REQUEST:x} T blk_mq_end_request\n{FREE:x} T __dev_kfree_skb_any\n{POLLED:x} T napi_complete_done\n{SET_UP:x} t blackhole_netdev_setup\n{ALLOCATES:x} T alloc_netdev_mqs\n{AFTER:x} T free_netdev\n"
    );
    let symbols = read_kallsyms(text.as_bytes(), |_| true).unwrap();
    Completions::new(&types, &symbols)
}

fn guest() -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    guest.put(Gva(BASE), &[0; 4096], DATA);
    let words = [
        (BIO + 8, BDEV),
        (BDEV + 24, DISK),
        (DISK + 16, FOPS),
        (FOPS + 8, SUBMIT),
        (REQUEST, QUEUE),
        (QUEUE + 40, MQ_OPS),
        (MQ_OPS + 32, COMPLETE),
        (NAPI + 48, POLL),
        (DEVICE, TX),
        (DEVICE + 8, 2),
        (TX + 8, QDISCS[0]),
        (TX + 32 + 8, QDISCS[1]),
        (QDISCS[1], 0xffff_ffff_8100_0300),
    ];
    for (at, word) in words {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }
    guest
}

fn of(guest: &TestGuest, gate: u64, flags: (bool, bool), first: u64) -> Option<Completion> {
    completions().of(
        guest.virt(),
        gate,
        flags,
        &[first, DEVICE, 0, 0, 0, 0],
        None,
    )
}

#[test]
fn an_io_that_was_not_submitted_ends_with_an_error() {
    let done = of(&guest(), SUBMIT, (false, false), BIO).unwrap();
    assert_eq!(done.store, Some((Gva(BIO + 26), 10)));
    assert_eq!(done.call, (BIO_ENDIO, [BIO, 0, 0, 0, 0, 0]));
    assert_eq!(done.value, None);
    // A gate behind `endbr64`.
    assert!(of(&guest(), SUBMIT + 4, (false, false), BIO).is_some());
}

#[test]
fn a_request_that_was_not_completed_ends_with_an_error() {
    let done = of(&guest(), COMPLETE, (false, false), REQUEST).unwrap();
    assert_eq!(done.call, (END_REQUEST, [REQUEST, 10, 0, 0, 0, 0]));
    assert_eq!((done.store, done.value), (None, None));
}

#[test]
fn a_device_is_polled_again_unless_its_driver_is_stopped() {
    let done = of(&guest(), POLL, (false, true), NAPI).unwrap();
    assert_eq!(done.call, (POLLED, [NAPI, 0, 0, 0, 0, 0]));
    assert_eq!((done.store, done.value), (None, Some(0)));
    assert_eq!(of(&guest(), POLL, (false, false), NAPI), None);
    // Another function of the driver's that gets one.
    assert_eq!(of(&guest(), POLL + 0x40, (false, true), NAPI), None);
}

/// An `end_io` function gets a `bio` too, and ending it once more would be the end of the guest.
#[test]
fn nothing_is_ended_that_another_function_has_to_end() {
    assert_eq!(of(&guest(), SUBMIT + 0x40, (false, false), BIO), None);
    assert_eq!(of(&guest(), COMPLETE, (false, false), BIO), None);
    for nonsense in [0, 7, BASE + 0x2000, u64::MAX - 3] {
        assert_eq!(of(&guest(), SUBMIT, (false, false), nonsense), None);
        assert_eq!(of(&guest(), SUBMIT, (true, true), nonsense), None);
    }
    let none = Completions::default();
    let arguments = [BIO, DEVICE, 0, 0, 0, 0];
    assert_eq!(
        none.of(guest().virt(), SUBMIT, (false, false), &arguments, None),
        None
    );
    assert_eq!(
        none.of(guest().virt(), SUBMIT, (true, true), &arguments, None),
        None
    );
}

#[test]
fn a_packet_is_dropped_where_nobody_would_keep_it() {
    let mut guest = guest();
    let dropped = Some(Completion {
        store: None,
        call: (FREE, [PACKET, 1, 0, 0, 0, 0]),
        value: Some(0),
        what: "the packet is dropped",
        is_makeshift: false,
    });
    assert_eq!(
        of(&guest, SUBMIT, (true, false), PACKET),
        dropped,
        "no queue"
    );
    guest.put(Gva(PACKET + 8), &1u16.to_le_bytes(), DATA);
    assert_eq!(of(&guest, SUBMIT, (true, false), PACKET), None, "a queue");
    assert_eq!(of(&guest, SUBMIT, (true, true), PACKET), dropped, "stopped");
    guest.put(Gva(PACKET + 8), &2u16.to_le_bytes(), DATA);
    assert_eq!(
        of(&guest, SUBMIT, (true, true), PACKET),
        None,
        "no such queue"
    );
}

#[test]
fn functions_that_complete_requests_later_are_told_by_their_types() {
    let mut e = Encoder::new(None);
    e.structure("gendisk", 64, &[]);
    e.structure("work_struct", 32, &[]);
    e.structure("net_device", 64, &[]);
    let base = std::sync::Arc::new(Btf::parse(&e.bytes(), None).unwrap());
    let module = |member: &str| {
        let mut e = Encoder::new(Some(&base));
        let to = |e: &mut Encoder, name| e.pointer(base.find_struct(name).unwrap());
        let (member, work) = (to(&mut e, member), to(&mut e, "work_struct"));
        e.structure("mine", 16, &[("it", member, 8)]);
        let int = e.int("int", 4, 1);
        e.function("later", TypeId::VOID, &[("work", work)]);
        e.function("at_once", int, &[("work", work)]);
        e.function("opened", TypeId::VOID, &[("it", member)]);
        Btf::parse(&e.bytes(), Some(base.clone())).unwrap()
    };
    let types = module("gendisk");
    assert!(serves_blocks(&types) && !serves_blocks(&module("net_device")));
    let later = |name| completes_requests(&types, &types.find_function(name).unwrap());
    assert!(later("later") && !later("at_once") && !later("opened"));
}

/// `dummy_setup`: its caller takes whatever it has made of the memory for an interface.
#[test]
fn an_interface_that_was_not_set_up_is_set_up_as_one_that_drops_all_packets() {
    let called_by = |caller| {
        let arguments = [DEVICE, 1, 2, 3, 4, 5];
        let caller = Some(Gva(caller));
        completions().of(guest().virt(), SUBMIT, (false, false), &arguments, caller)
    };
    for caller in [ALLOCATES + 5, AFTER - 1] {
        let done = called_by(caller).unwrap();
        assert_eq!(done.call, (SET_UP, [DEVICE, 1, 2, 3, 4, 5]));
        assert_eq!((done.store, done.value), (None, None));
        assert!(done.is_makeshift);
    }
    // Others call functions of the driver's with an interface, too.
    for caller in [ALLOCATES - 1, AFTER, 0] {
        assert_eq!(called_by(caller), None);
    }
}
