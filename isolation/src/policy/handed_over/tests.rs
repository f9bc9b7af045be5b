//! What a make-believe driver hands over in a make-believe guest with a slab allocator.

use std::sync::Arc;

use super::*;
use crate::guest::btf::TypeId;
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::TestGuest;
use crate::guest::paging::{Entry, Levels};
use crate::guest::symbols::read_kallsyms;
use crate::policy::call::MemoryBefore;

const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const VMALLOC: u64 = 0xffff_c900_0000_0000;
const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
const BASES: u64 = 0xffff_ffff_8200_0000;
const MODULE: u64 = 0xffff_ffff_c000_0000;
const PER_CPU: u64 = DIRECT + 0x1_0000;
const PREEMPT_COUNT: u64 = 0x40;
/// `struct kmem_cache`s: of packets, and of others of the same size.
const CACHES: [u64; 2] = [DIRECT, DIRECT + 0x100];
/// Slabs of one page each.
const PACKETS: u64 = DIRECT + 0x2000;
const OTHERS: u64 = DIRECT + 0x3000;
/// A buffer for a packet's data, and one for a fragment, of a page each.
const HEAD: u64 = DIRECT + 0x4000;
const FRAGMENT: u64 = DIRECT + 0x5000;
const DEVICE: u64 = DIRECT + 0x6000;
const NAPI: u64 = DIRECT + 0x7000;
/// Bytes of a buffer in front of what is shared.
const END: u64 = 0x800;

const RECEIVES: u64 = 0xffff_ffff_8100_0000;
const COMPLETES: u64 = 0xffff_ffff_8100_0100;
const FREES: u64 = 0xffff_ffff_8100_0200;
const SCHEDULES: u64 = 0xffff_ffff_8100_0300;

// Offsets in a `struct sk_buff` of 256 bytes.
const NEXT: u64 = 0;
const DEV: u64 = 16;
const SOCK: u64 = 24;
const LENGTH: u64 = 112;
const DATA_LENGTH: u64 = 116;
const BITS: u64 = 126;
const LINK_HEADER: u64 = 180;
const TAIL: u64 = 184;
const BUFFER_END: u64 = 188;
const BUFFER: u64 = 192;
const USERS: u64 = 212;
// In a `struct skb_shared_info` of 320.
const FLAGS: u64 = 0;
const COUNT: u64 = 2;
const LIST: u64 = 8;
const REFERENCES: u64 = 32;
const FRAGMENTS: u64 = 48;
// In a `struct napi_struct` of 128.
const STATE: u64 = 16;
const WEIGHT: u64 = 24;
const POLL: u64 = 40;
const NAPI_DEVICE: u64 = 48;

fn types() -> Arc<Btf> {
    let mut e = Encoder::new(None);
    let long = e.int("long unsigned int", 8, 0);
    let int = e.int("unsigned int", 4, 0);
    let short = e.int("short unsigned int", 2, 0);
    let byte = e.int("unsigned char", 1, 0);
    let pointer = e.pointer(TypeId::VOID);
    e.memory_management();
    e.enumeration_of("gro_result", &[("GRO_NORMAL", 3)]);
    let states = [
        ("NAPI_STATE_SCHED", 0),
        ("NAPI_STATE_MISSED", 1),
        ("NAPI_STATE_NPSVC", 3),
        ("NAPI_STATE_IN_BUSY_POLL", 6),
    ];
    e.enumeration_of("napi_states", &states);
    let whole = |name, id, byte: u32| (name, id, byte * 8, 0);
    let bits = |name, bit: u32, bits: u32| (name, byte, 126 * 8 + bit, bits);
    let packet = [
        whole("next", pointer, 0),
        whole("dev", pointer, 16),
        whole("sk", pointer, 24),
        whole("len", int, 112),
        whole("data_len", int, 116),
        bits("cloned", 0, 1),
        bits("fclone", 2, 2),
        bits("head_frag", 5, 1),
        bits("pp_recycle", 7, 1),
        whole("mac_header", short, 180),
        whole("tail", int, 184),
        whole("end", int, 188),
        whole("head", pointer, 192),
        whole("data", pointer, 200),
        whole("users", int, 212),
    ];
    e.structure_with_bits("sk_buff", 256, &packet);
    let piece = [
        ("bv_page", pointer, 0),
        ("bv_len", int, 8),
        ("bv_offset", int, 12),
    ];
    let piece = e.structure("bio_vec", 16, &piece);
    let pieces = e.array(piece, 17);
    let shared = [
        ("flags", byte, 0),
        ("nr_frags", byte, 2),
        ("frag_list", pointer, 8),
        ("dataref", int, 32),
        ("frags", pieces, 48),
    ];
    e.structure("skb_shared_info", 320, &shared);
    let napi = [
        ("state", long, 16),
        ("weight", int, 24),
        ("poll", pointer, 40),
        ("dev", pointer, 48),
        ("defer_hard_irqs_count", int, 56),
    ];
    e.structure("napi_struct", 128, &napi);
    e.structure("net_device", 256, &[("napi_defer_hard_irqs", int, 64)]);
    Arc::new(Btf::parse(&e.bytes(), None).unwrap())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A guest in which `at`, a packet of 60 bytes and one fragment of 40, has been received, in a poll.
fn guest() -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    guest.put(Gva(BASES), &words(&[DIRECT, VMALLOC, VMEMMAP]), DATA);
    guest.put(Gva(MODULE), &[0x90; 64], 0);
    for page in [
        CACHES[0], PACKETS, OTHERS, HEAD, FRAGMENT, DEVICE, NAPI, PER_CPU,
    ] {
        guest.put(Gva(page), &[0; 4096], DATA);
    }
    let names = DIRECT + 0x800;
    guest.put(Gva(names), b"skbuff_head_cache\0", DATA);
    guest.put(Gva(names + 64), b"kmalloc-256\0", DATA);
    for (cache, name) in CACHES.into_iter().zip([names, names + 64]) {
        guest.put(Gva(cache), &words(&[256 | 256 << 32, 128, name]), DATA);
    }
    let mut page = |at: u64, flags: u64, cache: u64| {
        let description = VMEMMAP + ((at - DIRECT) >> 12) * 64;
        guest.put(
            Gva(description),
            &words(&[flags, 0, 0, cache, 0, 0, 1 << 32, 0]),
            DATA,
        );
    };
    page(PACKETS, 1 << 9, CACHES[0]);
    page(OTHERS, 1 << 9, CACHES[1]);
    for at in [CACHES[0], HEAD, FRAGMENT, DEVICE, NAPI, PER_CPU] {
        page(at, 0, 0);
    }
    guest.put(Gva(PER_CPU + PREEMPT_COUNT), &0x100u32.to_le_bytes(), DATA);
    receive(&mut guest, PACKETS);
    receive(&mut guest, OTHERS);
    guest.put(Gva(NAPI + STATE), &words(&[1]), DATA);
    guest.put(Gva(NAPI + POLL), &words(&[MODULE + 8, DEVICE]), DATA);
    guest
}

fn put32(guest: &mut TestGuest, at: u64, value: u32) {
    guest.put(Gva(at), &value.to_le_bytes(), DATA);
}

fn receive(guest: &mut TestGuest, at: u64) {
    guest.put(Gva(at + DEV), &words(&[DEVICE]), DATA);
    guest.put(Gva(at + BUFFER), &words(&[HEAD, HEAD + 64]), DATA);
    for (offset, value) in [(LENGTH, 100), (DATA_LENGTH, 40), (TAIL, 124), (USERS, 1)] {
        put32(guest, at + offset, value);
    }
    put32(guest, at + BUFFER_END, END as u32);
    guest.put(Gva(at + LINK_HEADER), &64u16.to_le_bytes(), DATA);
    guest.put(Gva(at + BITS), &[1 << 5 | 1 << 6], DATA);
    let shared = HEAD + END;
    put32(guest, shared + REFERENCES, 1);
    guest.put(Gva(shared + COUNT), &[1], DATA);
    let description = VMEMMAP + ((FRAGMENT - DIRECT) >> 12) * 64;
    let piece = words(&[description, 40 | 128 << 32]);
    guest.put(Gva(shared + FRAGMENTS), &piece, DATA);
}

fn symbols() -> SymbolTable {
    let text = format!(
        "{:x} D page_offset_base\n{:x} D vmalloc_base\n{:x} D vmemmap_base\n40 A __preempt_count\n{RECEIVES:x} T napi_gro_receive\n{COMPLETES:x} T napi_complete_done\n{FREES:x} T consume_skb\n{SCHEDULES:x} T __napi_schedule\n",
        BASES,
        BASES + 8,
        BASES + 16,
    );
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

fn hand_overs(guest: &TestGuest) -> (HandOvers, MemoryModel) {
    let symbols = symbols();
    let sections = [(".text".to_owned(), MODULE), (".data".to_owned(), BASES)];
    let layout = ModuleLayout::new("my", &sections, None, &guest.virt()).unwrap();
    let model = MemoryModel::new(&types(), &symbols, &guest.virt()).unwrap();
    (HandOvers::new(&types(), &symbols, &layout).unwrap(), model)
}

fn call(function: u64, first: u64, second: u64) -> KernelCall {
    KernelCall {
        function,
        arguments: [first, second, 0, 0, 0, 0],
    }
}

/// What comes of looking at `calls`, with `now` and `before` as memory.
fn look(now: &TestGuest, before: &TestGuest, calls: &[KernelCall]) -> Option<Option<usize>> {
    let (mut hand_overs, model) = hand_overs(before);
    let memory = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    hand_overs.look(&memory, &model, calls)
}

const RECEIVED: KernelCall = KernelCall {
    function: RECEIVES,
    arguments: [NAPI, PACKETS, 0, 0, 0, 0],
};
const COMPLETE: KernelCall = KernelCall {
    function: COMPLETES,
    arguments: [NAPI, 1, 0, 0, 0, 0],
};

#[test]
fn the_callers_of_those_that_wait_are_told_what_the_kernel_calls_it() {
    let answers = answers(&types(), &symbols());
    let expected = [(RECEIVES, 3), (COMPLETES, 1), (FREES, 0), (SCHEDULES, 0)];
    assert_eq!(answers, expected.into());
}

#[test]
fn they_wait_only_where_no_softirq_comes_between() {
    let mut guest = guest();
    let (hand_overs, _) = hand_overs(&guest);
    for (count, may) in [
        (0x100, true),
        (0x200, true),
        (0x1_0001, true),
        (0x8000_0000, false),
        (0x8000_0001, false),
    ] {
        put32(&mut guest, PER_CPU + PREEMPT_COUNT, count);
        let memory = CallMemory {
            private: guest.virt(),
            before: MemoryBefore::new(guest.virt().memory),
            stack: None,
            per_cpu_base: PER_CPU,
        };
        assert_eq!(hand_overs.may_wait(&memory), may, "{count:#x}");
    }
}

#[test]
fn packets_that_were_received_wait_and_stores_wait_for_the_end_of_the_poll() {
    let guest = guest();
    assert_eq!(look(&guest, &guest, &[RECEIVED]), Some(None));
    assert_eq!(look(&guest, &guest, &[RECEIVED, COMPLETE]), Some(Some(1)));
    assert_eq!(look(&guest, &guest, &[COMPLETE]), Some(Some(0)));
    assert_eq!(look(&guest, &guest, &[]), Some(None));
    assert_eq!(
        look(&guest, &guest, &[COMPLETE, RECEIVED]),
        None,
        "not polled any more"
    );
    assert_eq!(look(&guest, &guest, &[RECEIVED, RECEIVED]), None, "twice");
    let mut two = guest.clone();
    receive(&mut two, PACKETS + 256);
    let second = call(RECEIVES, NAPI, PACKETS + 256);
    assert_eq!(look(&two, &two, &[second]), Some(None));
    assert_eq!(
        look(&two, &two, &[RECEIVED, second]),
        None,
        "one buffer for two"
    );
    let freed = call(FREES, PACKETS, 0);
    assert_eq!(
        look(&guest, &guest, &[RECEIVED, freed]),
        None,
        "given away before"
    );
    assert_eq!(
        look(&guest, &guest, &[call(BASES, 0, 0)]),
        None,
        "another function"
    );
}

#[test]
fn what_is_no_packet_that_can_have_been_received_does_not_wait() {
    let whole = guest();
    let of_others = call(RECEIVES, NAPI, OTHERS);
    assert_eq!(
        look(&whole, &whole, &[of_others]),
        None,
        "an object of another cache"
    );
    for wrong in [PACKETS + 8, PACKETS + 512, HEAD, MODULE, 0, u64::MAX] {
        let received = call(RECEIVES, NAPI, wrong);
        assert_eq!(look(&whole, &whole, &[received]), None, "{wrong:#x}");
    }
    let shared = HEAD + END;
    let fragment = shared + FRAGMENTS;
    for (at, value, what) in [
        (PACKETS + NEXT, 8, "in a list"),
        (PACKETS + SOCK, DEVICE, "somebody's"),
        (PACKETS + DEV, DEVICE + 64, "of another interface"),
        (
            PACKETS + LENGTH,
            101 | 40 << 32,
            "longer than what is there",
        ),
        (
            PACKETS + LENGTH,
            39 | 40 << 32,
            "shorter than its fragments",
        ),
        (PACKETS + LENGTH, 101 | 41 << 32, "longer fragments"),
        (PACKETS + TAIL, 125 | END << 32, "another tail"),
        (PACKETS + TAIL, 124 | 123 << 32, "behind its end"),
        (
            PACKETS + TAIL,
            124 | 0xff0 << 32,
            "a buffer that is too short",
        ),
        (PACKETS + BUFFER, HEAD + 65, "data in front of it"),
        (PACKETS + BUFFER, BASES, "a buffer that was not handed out"),
        (PACKETS + USERS, 2, "somebody else has it"),
        (PACKETS + USERS, 0, "nobody has it"),
        (
            PACKETS + LINK_HEADER - 4,
            0x8888 << 32,
            "a header elsewhere",
        ),
        (
            PACKETS + LINK_HEADER - 4,
            65 << 32,
            "a header behind its data",
        ),
        (PACKETS + LINK_HEADER - 4, 0xffff << 32, "no header"),
        (
            PACKETS + BITS - 6,
            1 << 54,
            "a buffer that is given back to a slab",
        ),
        (PACKETS + BITS - 6, 1 << 53 | 1 << 48, "cloned"),
        (PACKETS + BITS - 6, 1 << 53 | 1 << 51, "one of two"),
        (shared + FLAGS, 1 << 16 | 1, "not copied"),
        (shared + LIST, PACKETS, "more of them"),
        (shared + REFERENCES, 2, "its data is shared"),
        (shared + FLAGS, 0, "no fragment"),
        (shared + FLAGS, 2 << 16, "a fragment that is none"),
        (shared + FLAGS, 60 << 16, "too many"),
        (fragment, BASES, "a page that is none"),
        (fragment + 8, 40 | 4090 << 32, "behind the page"),
        (fragment + 8, 128 << 32, "empty"),
    ] {
        let mut guest = guest();
        guest.put(Gva(at), &words(&[value]), DATA);
        assert_eq!(look(&guest, &whole, &[RECEIVED]), None, "{what}");
    }
}

#[test]
fn what_is_not_polled_by_the_driver_does_not_wait() {
    let whole = guest();
    let elsewhere = call(RECEIVES, HEAD, PACKETS);
    assert_eq!(look(&whole, &whole, &[elsewhere]), None);
    for (at, value, what) in [
        (NAPI + STATE, 0, "not scheduled"),
        (NAPI + POLL, RECEIVES, "another's"),
        (NAPI + NAPI_DEVICE, DEVICE + 64, "another interface"),
        (NAPI + WEIGHT, 7, "changed by the call"),
    ] {
        let mut guest = guest();
        guest.put(Gva(at), &words(&[value]), DATA);
        assert_eq!(look(&guest, &whole, &[RECEIVED]), None, "{what}");
    }
    for (at, value, what) in [
        (NAPI + STATE, 1 | 1 << 1, "asked for meanwhile"),
        (NAPI + STATE, 1 | 1 << 3, "by netpoll"),
        (NAPI + STATE, 1 | 1 << 6, "by somebody who waits"),
        (NAPI + 56, 1, "interrupts wait"),
        (DEVICE + 64, 1, "its interrupts are to wait"),
    ] {
        let mut guest = guest();
        guest.put(Gva(at), &words(&[value]), DATA);
        assert_eq!(look(&guest, &guest, &[RECEIVED, COMPLETE]), None, "{what}");
        assert_eq!(look(&guest, &guest, &[RECEIVED]), Some(None), "{what}");
    }
}

#[test]
fn what_the_driver_is_to_be_asked_for_waits_if_it_is_its_own_and_was_asked_for() {
    let idle = guest();
    let mut guest = guest();
    let scheduled = [call(SCHEDULES, NAPI, 0)];
    // The call has set the bit itself.
    guest.put(Gva(NAPI + STATE), &words(&[0x10]), DATA);
    assert_eq!(look(&idle, &guest, &scheduled), Some(None));
    assert_eq!(look(&guest, &guest, &scheduled), None, "not asked for");
    assert_eq!(look(&idle, &idle, &scheduled), None, "in a list already");
    let twice = [scheduled[0], scheduled[0]];
    assert_eq!(look(&idle, &guest, &twice), None, "twice");
    let polled = [scheduled[0], RECEIVED];
    assert_eq!(look(&idle, &guest, &polled), None, "not polled yet");
    guest.put(Gva(NAPI + STATE), &words(&[1, 0, 0, RECEIVES]), DATA);
    assert_eq!(look(&guest, &guest, &scheduled), None, "another's");
}

#[test]
fn packets_that_the_call_has_not_changed_can_be_freed_whoever_has_them() {
    let freed = call(FREES, PACKETS, 0);
    let mut sent = guest();
    // One that was sent, with its data shared, and a socket that counts it.
    sent.put(Gva(PACKETS + SOCK), &words(&[DEVICE]), DATA);
    put32(&mut sent, HEAD + END + REFERENCES, 2);
    assert_eq!(look(&sent, &sent, &[freed]), Some(None));
    let mut changed = sent.clone();
    changed.put(Gva(PACKETS + SOCK), &words(&[DEVICE + 64]), DATA);
    assert_eq!(look(&changed, &sent, &[freed]), None);
    let mut changed = sent.clone();
    put32(&mut changed, HEAD + END + REFERENCES, 3);
    assert_eq!(look(&changed, &sent, &[freed]), None);
    let mut gone = sent.clone();
    put32(&mut gone, PACKETS + USERS, 0);
    assert_eq!(look(&gone, &gone, &[freed]), None);
    // One that was made in the call.
    assert_eq!(look(&guest(), &sent, &[freed]), Some(None));
    assert_eq!(look(&guest(), &sent, &[freed, freed]), None);
}
