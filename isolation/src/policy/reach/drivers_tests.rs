//! Where drivers of several kinds keep what is theirs: behind a block I/O, in a structure without a way back, in per-CPU
//! memory, in a ring of pointers.

use std::sync::Arc;

use super::super::*;
use super::{DATA, Known, PER_CPU_BASE};
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::Levels;
use crate::guest::paging::testing::TestGuest;

const AT: u64 = 0xffff_8880_0000_0000;
const BIO: u64 = AT;
const BDEV: u64 = AT + 0x100;
const DISK: u64 = AT + 0x200;
const MINE: u64 = AT + 0x300;
const PIECES: u64 = AT + 0x400;
const RING: u64 = AT + 0x500;
const REQUEST: u64 = AT + 0x600;
const QUEUE: u64 = AT + 0x700;
const DEVICE: u64 = AT + 0x800;
const STATISTICS: u64 = 0x1000;
/// A page, and its `struct page` as [`Known`] has it.
const PAGE: u64 = super::BUFFER;
const DESCRIPTION: u64 = PAGE - 64;

fn types() -> Arc<Btf> {
    let mut e = Encoder::new(None);
    let word = e.int("u64", 8, 0);
    let (half, short) = (e.int("u32", 4, 0), e.int("u16", 2, 0));
    let void = e.pointer(TypeId::VOID);
    let voids = e.pointer(void);
    let disk = e.structure("gendisk", 64, &[("private_data", void, 8)]);
    let disk = e.pointer(disk);
    let bdev = e.structure("block_device", 64, &[("bd_disk", disk, 0)]);
    let bdev = e.pointer(bdev);
    let page = e.pointer(TypeId::VOID);
    let piece = [
        ("bv_page", page, 0),
        ("bv_len", half, 8),
        ("bv_offset", half, 12),
    ];
    let piece = e.structure("bio_vec", 16, &piece);
    let pieces = e.pointer(piece);
    let bio = [
        ("bi_next", word, 0),
        ("bi_bdev", bdev, 8),
        ("bi_opf", half, 16),
        ("bi_vcnt", short, 20),
        ("bi_io_vec", pieces, 24),
    ];
    let bio = e.structure("bio", 64, &bio);
    let bio = e.pointer(bio);
    let queue = e.structure("request_queue", 64, &[("queuedata", void, 16)]);
    let queue = e.pointer(queue);
    let request = [("bio", bio, 0), ("q", queue, 8)];
    let request = e.structure("request", 32, &request);
    e.pointer(request);
    e.structure("ptr_ring", 32, &[("queue", voids, 8)]);
    e.structure("net_device", 64, &[]);
    let base = Arc::new(Btf::parse(&e.bytes(), None).unwrap());

    let mut e = Encoder::new(Some(&base));
    let pointer = |e: &mut Encoder, name| e.pointer(base.find_struct(name).unwrap());
    let (bio, disk) = (pointer(&mut e, "bio"), pointer(&mut e, "gendisk"));
    let (request, device) = (pointer(&mut e, "request"), pointer(&mut e, "net_device"));
    let queue = pointer(&mut e, "request_queue");
    let counts = e.structure("my_counts", 24, &[]);
    let counts = e.pointer(counts);
    let ring = base.find_struct("ptr_ring").unwrap();
    let mine = [
        ("disk", disk, 0),
        ("queue", queue, 8),
        ("counts", counts, 16),
        ("ring", ring, 24),
    ];
    e.structure("my_disk", 64, &mine);
    let int = e.int("int", 4, 1);
    let inner = e.structure("ifb_q_private", 32, &[]);
    let inner = e.pointer(inner);
    e.structure("ifb_dev_private", 8, &[("tx_private", inner, 0)]);
    e.function("my_submit", TypeId::VOID, &[("bio", bio)]);
    e.function("my_complete", TypeId::VOID, &[("rq", request)]);
    e.function("my_init", int, &[("dev", device)]);
    Arc::new(Btf::parse(&e.bytes(), Some(base)).unwrap())
}

fn guest(opf: u64) -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    guest.put(Gva(AT), &[0; 4096], DATA);
    guest.put(Gva(PAGE), &[0; 4096], DATA);
    guest.put(Gva(PER_CPU_BASE + STATISTICS), &[0; 64], DATA);
    let words = [
        (BIO + 8, BDEV),
        (BIO + 16, opf | 1 << 32),
        (BIO + 24, PIECES),
        (BDEV, DISK),
        (DISK + 8, MINE),
        (PIECES, DESCRIPTION),
        (PIECES + 8, 512 | 1024 << 32),
        (MINE, DISK),
        (MINE + 8, QUEUE),
        (MINE + 16, STATISTICS),
        (MINE + 24 + 8, RING),
        (REQUEST, BIO),
        (REQUEST + 8, QUEUE),
        (QUEUE + 16, MINE),
        (DEVICE + 64, RING),
    ];
    for (at, word) in words {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }
    guest
}

/// First byte and length of what a call reaches.
fn call(guest: &TestGuest, function: &str, argument: u64) -> Vec<(u64, u64)> {
    let sizes = [(MINE, 64), (RING, 128), (DEVICE, 128)];
    let (types, known) = (types(), Known(sizes.into()));
    let reach = super::reach(&types, guest, &known);
    let function = types.find_function(function).unwrap();
    let found = reach.objects(&function, &[argument, 0, 0, 0, 0, 0], &[]);
    let places = found.iter();
    places
        .map(|object| (object.range.first().0, object.range.len_bytes()))
        .collect()
}

#[test]
fn a_block_drivers_own_data_is_reached_from_what_is_submitted_and_what_is_on_the_way_is_not() {
    let found = call(&guest(1), "my_submit", BIO);
    assert!(found.contains(&(MINE, 64)), "{found:x?}");
    for way in [BDEV, PIECES] {
        assert!(found.iter().all(|(at, _)| *at != way), "{found:x?}");
    }
    let found = call(&guest(1), "my_complete", REQUEST);
    assert!(found.contains(&(MINE, 64)), "{found:x?}");
}

#[test]
fn what_is_read_into_may_be_written_and_what_is_written_from_may_not() {
    let piece = (PAGE + 1024, 512);
    for (function, argument) in [("my_submit", BIO), ("my_complete", REQUEST)] {
        assert!(call(&guest(0), function, argument).contains(&piece));
        assert!(!call(&guest(1), function, argument).contains(&piece));
    }
    let mut endless = guest(0);
    endless.put(Gva(BIO), &BIO.to_le_bytes(), DATA);
    endless.put(Gva(BIO + 20), &[0xff; 2], DATA);
    assert!(call(&endless, "my_complete", REQUEST).contains(&piece));
}

#[test]
fn per_cpu_memory_that_was_handed_out_is_reached_and_the_kernels_own_is_not() {
    let mut guest = guest(1);
    let counts = (PER_CPU_BASE + STATISTICS, 24);
    assert!(call(&guest, "my_submit", BIO).contains(&counts));
    for other in [0x7ff, 8, PER_CPU_BASE] {
        guest.put(Gva(MINE + 16), &other.to_le_bytes(), DATA);
        let found = call(&guest, "my_submit", BIO);
        let own = [(MINE, 64), (RING, 128), (BIO, 64), (DISK, 64), (QUEUE, 64)];
        assert!(
            found.iter().all(|at| own.contains(at) || at.0 == other),
            "{found:x?}"
        );
    }
}

#[test]
fn a_ring_of_pointers_is_reached_to_its_end() {
    assert!(call(&guest(1), "my_submit", BIO).contains(&(RING, 128)));
}

#[test]
fn a_private_area_without_a_way_back_is_what_the_rules_say() {
    let found = call(&guest(1), "my_init", DEVICE);
    assert!(found.contains(&(RING, 128)), "{found:x?}");
}
