//! Where drivers of several kinds keep what is theirs: behind a block I/O, in a structure without a
//! way back, in per-CPU memory, in a ring of pointers.

mod chains;
mod network;

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
/// A discipline with its operations, and a socket.
const QDISC: u64 = AT + 0xe40;
const QDISC_OPS: u64 = AT + 0xec0;
const SOCKET: u64 = AT + 0xf00;
/// Nodes of an xarray, and an object that is kept in it, which has a page.
const NODES: [u64; 2] = [AT + 0x900, AT + 0xb40];
const KEPT: u64 = AT + 0xe00;
/// A page, and its `struct page` as [`Known`] has it.
const PAGE: u64 = super::BUFFER;
const DESCRIPTION: u64 = PAGE - 64;

#[expect(clippy::too_many_lines, reason = "one table of types")]
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
    let part = [
        ("bi_size", half, 8),
        ("bi_idx", half, 12),
        ("bi_bvec_done", half, 16),
    ];
    let part = e.structure("bvec_iter", 20, &part);
    let bio = [
        ("bi_next", word, 0),
        ("bi_bdev", bdev, 8),
        ("bi_opf", half, 16),
        ("bi_vcnt", short, 20),
        ("bi_io_vec", pieces, 24),
        ("bi_iter", part, 32),
    ];
    let bio = e.structure("bio", 64, &bio);
    let bio = e.pointer(bio);
    let queue = e.structure("request_queue", 64, &[("queuedata", void, 16)]);
    let queue = e.pointer(queue);
    let request = [("bio", bio, 0), ("q", queue, 8), ("rq_next", word, 16)];
    let request = e.structure("request", 32, &request);
    let requests = e.pointer(request);
    let list = [("head", requests, 0), ("tail", requests, 8)];
    let list = e.structure("rq_list", 16, &list);
    e.pointer(list);
    e.structure("ptr_ring", 32, &[("queue", voids, 8)]);
    let array = e.structure("xarray", 16, &[("xa_head", void, 8)]);
    e.structure("idr", 24, &[("idr_rt", array, 8)]);
    let slots = e.array(void, 64);
    e.structure("xa_node", 576, &[("slots", slots, 40)]);
    let count = e.structure("refcount_struct", 4, &[("refs", half, 0)]);
    let address = [
        ("dev", word, 0),
        ("refcnt", count, 8),
        ("n", half, 12),
        ("cnf", word, 24),
    ];
    let addresses = e.structure("in_device", 64, &address);
    let addresses = e.pointer(addresses);
    let device = [("ip_ptr", addresses, 40), ("rx_handler_data", void, 48)];
    e.structure("net_device", 64, &device);
    e.structure("list_head", 16, &[("next", word, 0)]);
    e.structure("vlan_dev_priv", 16, &[("disk", disk, 8)]);
    e.structure("page", 64, &[]);
    let ops = e.structure("Qdisc_ops", 64, &[("priv_size", half, 24)]);
    let ops = e.pointer(ops);
    let packet = e.structure("sk_buff", 64, &[("next", word, 0), ("end", half, 8)]);
    let packet = e.pointer(packet);
    let queue = [("head", packet, 0), ("tail", packet, 8)];
    let queue = e.structure("qdisc_skb_head", 24, &queue);
    let discipline = [("ops", ops, 24), ("q", queue, 40)];
    let discipline = e.structure("Qdisc", 64, &discipline);
    let sync = e.structure("gnet_stats_basic_sync", 16, &[]);
    let sync = e.pointer(sync);
    let byte = e.int("u8", 1, 0);
    let action = [
        ("cpu_bstats", sync, 8),
        ("used_hw_stats", byte, 40),
        ("used_hw_stats_valid", byte, 41),
    ];
    let action = e.structure("tc_action", 64, &action);
    let action = e.pointer(action);
    let actions = [("actions", e.pointer(action), 0), ("nr_actions", half, 8)];
    e.structure("tcf_exts", 16, &actions);
    e.pointer(discipline);
    let socket = e.structure("sock", 32, &[("n", word, 0)]);
    e.pointer(socket);
    let own = e.array(word, 4);
    let connection = [("sk", socket, 0), ("icsk_ca_priv", own, 64)];
    e.structure("inet_connection_sock", 96, &connection);
    e.structure("sk_buff_head", 24, &[("next", word, 0)]);
    let work = e.structure("work_struct", 16, &[("data", word, 0)]);
    e.pointer(work);
    e.structure("delayed_work", 32, &[("work", work, 0)]);
    let buckets = e.structure("bucket_table", 64, &[]);
    let buckets = e.pointer(buckets);
    e.structure("rhashtable", 16, &[("ht", word, 0), ("tbl", buckets, 8)]);
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
        ("pages", base.find_struct("xarray").unwrap(), 56),
        ("numbers", base.find_struct("idr").unwrap(), 72),
    ];
    e.structure("my_disk", 96, &mine);
    let table = base.find_struct("rhashtable").unwrap();
    let table = e.structure("my_table", 24, &[("n", counts, 0), ("names", table, 8)]);
    let table = e.pointer(table);
    let page = pointer(&mut e, "page");
    e.function("my_forget", TypeId::VOID, &[("table", table)]);
    e.function("my_read", TypeId::VOID, &[("page", page)]);
    // Only one structure is as large as the discipline's private data.
    let rows = e.pointer(word);
    e.structure("my_sched", 40, &[("n", word, 0), ("rows", rows, 16)]);
    e.structure("cdg", 16, &[("n", word, 0), ("rows", rows, 8)]);
    let queue = base.find_struct("sk_buff_head").unwrap();
    let later = base.find_struct("delayed_work").unwrap();
    let worker = [
        ("later", later, 8),
        ("rows", rows, 40),
        ("queue", queue, 48),
    ];
    e.structure("my_worker", 72, &worker);
    let list = base.find_struct("list_head").unwrap();
    e.structure("team_port", 32, &[("rows", rows, 0), ("list", list, 16)]);
    let team = e.structure("team", 24, &[("port_list", list, 8)]);
    let team = e.pointer(team);
    e.function("my_join", TypeId::VOID, &[("team", team)]);
    let actions = base.find_struct("tcf_exts").unwrap();
    let filter = [("exts", actions, 0), ("list", list, 16)];
    e.structure("cls_fl_filter", 32, &filter);
    e.structure(
        "fl_flow_mask",
        32,
        &[("filters", list, 0), ("list", list, 16)],
    );
    let head = e.structure("cls_fl_head", 16, &[("masks", list, 0)]);
    let head = e.pointer(head);
    e.function("my_walk", TypeId::VOID, &[("head", head)]);
    let common = base.find_struct("tc_action").unwrap();
    e.structure("my_gact", 72, &[("common", common, 0), ("n", word, 64)]);
    let action = e.refer(10, "", base.find_struct("tc_action").unwrap());
    let action = e.pointer(action);
    e.function("my_act", TypeId::VOID, &[("it", action)]);
    let packets = pointer(&mut e, "sk_buff");
    let packets = e.pointer(packets);
    e.function("my_handle", TypeId::VOID, &[("packet", packets)]);
    for (function, of) in [
        ("my_enqueue", "Qdisc"),
        ("my_avoid", "sock"),
        ("my_work", "work_struct"),
    ] {
        let argument = pointer(&mut e, of);
        e.function(function, TypeId::VOID, &[("it", argument)]);
    }
    let int = e.int("int", 4, 1);
    let inner = e.structure("ifb_q_private", 32, &[]);
    let inner = e.pointer(inner);
    e.structure("ifb_dev_private", 8, &[("tx_private", inner, 0)]);
    e.function("my_submit", TypeId::VOID, &[("bio", bio)]);
    e.function("my_complete", TypeId::VOID, &[("rq", request)]);
    let requests = e.pointer(request);
    e.function("my_complete_all", TypeId::VOID, &[("rqs", requests)]);
    let list = pointer(&mut e, "rq_list");
    e.function("my_complete_list", TypeId::VOID, &[("rqs", list)]);
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
    call_in("", guest, function, argument)
}

/// The same in the module of that name.
fn call_in(module: &str, guest: &TestGuest, function: &str, argument: u64) -> Vec<(u64, u64)> {
    let own = [(MINE, 96), (RING, 128), (DEVICE, 128), (PAGE, 4096)];
    call_with(&own, module, guest, function, argument)
}

/// The same where `sizes` are all allocations that are known.
fn call_with(
    sizes: &[(u64, u64)],
    module: &str,
    guest: &TestGuest,
    function: &str,
    argument: u64,
) -> Vec<(u64, u64)> {
    let (types, known) = (types(), Known(sizes.iter().copied().collect()));
    let mut reach = super::reach(&types, guest, &known);
    let own_too = reach.rules.own_of(module, &types);
    reach.own_too = &own_too;
    let function = types.find_function(function).unwrap();
    let found = reach.objects(&function, &[argument, 0, 0, 0, 0, 0], &[]);
    let places = found.objects.iter();
    places
        .map(|object| (object.range.first().0, object.range.len_bytes()))
        .collect()
}

#[test]
fn a_block_drivers_own_data_is_reached_from_what_is_submitted_and_what_is_on_the_way_is_not() {
    let found = call(&guest(1), "my_submit", BIO);
    assert!(found.contains(&(MINE, 96)), "{found:x?}");
    for way in [BDEV, PIECES] {
        assert!(found.iter().all(|(at, _)| *at != way), "{found:x?}");
    }
    let found = call(&guest(1), "my_complete", REQUEST);
    assert!(found.contains(&(MINE, 96)), "{found:x?}");
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
fn all_requests_of_a_chain_are_the_drivers_that_is_given_the_chain() {
    let piece = (PAGE + 1024, 512);
    let (second, first_of) = (REQUEST + 0x40, REQUEST + 0x80);
    let mut guest = guest(0);
    for (at, word) in [
        (REQUEST, 0),
        (REQUEST + 16, second),
        (second, BIO),
        // Round and round.
        (second + 16, REQUEST),
        (first_of, REQUEST),
    ] {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }
    for function in ["my_complete_all", "my_complete_list"] {
        let found = call(&guest, function, first_of);
        assert!(found.contains(&piece) && found.contains(&(second, 32)));
    }
    // What was once behind a request that comes alone is somebody else's.
    let found = call(&guest, "my_complete", REQUEST);
    assert!(!found.contains(&piece) && !found.contains(&(second, 32)));
}

#[test]
fn a_part_of_a_block_io_may_be_read_into_as_far_as_it_goes() {
    let part = |bytes: u64, index: u64, done: u64| {
        let mut guest = guest(0);
        // Without pieces of its own; of those of another, the second is this.
        guest.put(Gva(BIO + 20), &[0; 2], DATA);
        let piece = [DESCRIPTION, 512 | 2048 << 32].map(u64::to_le_bytes);
        guest.put(Gva(PIECES + 16), &piece.concat(), DATA);
        let words = [bytes | index << 32, done].map(u64::to_le_bytes);
        guest.put(Gva(BIO + 32 + 8), &words.concat(), DATA);
        let of_page = |(at, _): &(u64, u64)| (PAGE..PAGE + 4096).contains(at);
        let found = call(&guest, "my_submit", BIO).into_iter();
        found.filter(of_page).collect::<Vec<_>>()
    };
    assert_eq!(part(512, 0, 0), [(PAGE + 1024, 512)]);
    assert_eq!(
        part(300, 0, 400),
        [(PAGE + 1024 + 400, 112), (PAGE + 2048, 188)]
    );
    assert_eq!(part(100, 1, 12), [(PAGE + 2048 + 12, 100)]);
    // Nonsense: begins behind its piece, has no bytes, goes on where there is none.
    assert_eq!(part(100, 1, 1000), []);
    assert_eq!(part(0, 0, 0), []);
    assert_eq!(part(4096, 1, 0), [(PAGE + 2048, 512)]);
    assert_eq!(part(u32::MAX.into(), u32::MAX.into(), u64::MAX), []);
}

/// First byte and length of what the driver keeps by number, of `objects` that are known.
fn kept(guest: &TestGuest, objects: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let sizes = [(MINE, 96), (PAGE, 4096)];
    let (types, known) = (
        types(),
        Known(sizes.iter().chain(objects).copied().collect()),
    );
    let reach = super::reach(&types, guest, &known);
    let function = types.find_function("my_submit").unwrap();
    let found = reach.objects(&function, &[BIO, 0, 0, 0, 0, 0], &[]);
    assert_eq!(found.arrays, [MINE + 56, MINE + 72 + 8].map(Gva));
    let mut kept = Vec::new();
    reach.kept_in(&found.arrays, &mut |found| {
        kept.push((found.range.first().0, found.range.len_bytes()));
        true
    });
    kept
}

#[test]
fn what_a_driver_keeps_by_number_is_found_with_its_pages() {
    let mut guest = guest(1);
    assert_eq!(kept(&guest, &[]), []);
    let put = |guest: &mut TestGuest, at: u64, word: u64| {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    };
    // A page alone, where only number 0 is used.
    put(&mut guest, MINE + 56 + 8, DESCRIPTION);
    assert_eq!(kept(&guest, &[]), [(PAGE, 4096)]);
    // Two levels; marks and numbers among the entries.
    put(&mut guest, MINE + 56 + 8, NODES[0] + 2);
    let slot = |node: u64, slot: u64| node + 40 + slot * 8;
    put(&mut guest, slot(NODES[0], 63), NODES[1] + 2);
    put(&mut guest, slot(NODES[0], 5), 4 << 2 | 2);
    put(&mut guest, slot(NODES[1], 0), 7);
    put(&mut guest, slot(NODES[1], 1), KEPT);
    put(&mut guest, KEPT + 16, DESCRIPTION);
    assert_eq!(kept(&guest, &[]), []);
    let object = (KEPT, 64);
    assert_eq!(kept(&guest, &[object]), [object, (PAGE, 4096)]);
    assert_eq!(kept(&guest, &[(KEPT, 16)]), [(KEPT, 16)]);
    // Of two arrays; and one that leads to itself ends.
    put(&mut guest, MINE + 72 + 8 + 8, KEPT);
    assert_eq!(kept(&guest, &[object]).len(), 4);
    put(&mut guest, slot(NODES[1], 2), NODES[0] + 2);
    assert_eq!(kept(&guest, &[object]).len(), 4);
}

#[test]
fn per_cpu_memory_that_was_handed_out_is_reached_and_the_kernels_own_is_not() {
    let mut guest = guest(1);
    let counts = (PER_CPU_BASE + STATISTICS, 24);
    assert!(call(&guest, "my_submit", BIO).contains(&counts));
    for other in [0x7ff, 8, PER_CPU_BASE] {
        guest.put(Gva(MINE + 16), &other.to_le_bytes(), DATA);
        let found = call(&guest, "my_submit", BIO);
        let own = [(MINE, 96), (RING, 128), (BIO, 64), (DISK, 64), (QUEUE, 64)];
        assert!(
            found.iter().all(|at| own.contains(at) || at.0 == other),
            "{found:x?}"
        );
    }
}

/// `batman_adv` has one counter's type for a row of them.
#[test]
fn per_cpu_memory_is_reached_to_the_end_of_what_was_handed_out() {
    let at = PER_CPU_BASE + STATISTICS;
    let found = call_with(&[(MINE, 96), (at, 56)], "", &guest(1), "my_submit", BIO);
    assert!(found.contains(&(at, 56)), "{found:x?}");
}

/// `sch_choke`.
/// What a call reaches of [`RING`], `sizes` being all allocations that are known besides.
fn ring(guest: &TestGuest, sizes: &[(u64, u64)], function: &str, argument: u64) -> bool {
    let sizes = [sizes, &[(RING, 128)]].concat();
    let found = call_with(&sizes, "", guest, function, argument);
    found.contains(&(RING, 128))
}

#[test]
fn private_data_is_the_only_structure_that_is_as_large_as_it_was_asked_for() {
    let mut guest = guest(1);
    let words = [
        (QDISC + 24, QDISC_OPS),
        (QDISC_OPS + 24, 40 | 7 << 32),
        (QDISC + 64 + 16, RING),
    ];
    for (at, word) in words {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }
    let reached = |guest: &TestGuest| ring(guest, &[(QDISC, 128)], "my_enqueue", QDISC);
    assert!(reached(&guest));
    guest.put(Gva(QDISC_OPS + 24), &[24], DATA);
    assert!(!reached(&guest), "two are as large");
    guest.put(Gva(QDISC_OPS + 24), &[16], DATA);
    assert!(
        !reached(&guest),
        "another structure, without a pointer there"
    );
}

/// `tcp_cdg`.
#[test]
fn private_data_in_a_connection_is_what_the_rules_say() {
    let mut guest = guest(1);
    guest.put(Gva(SOCKET + 64 + 8), &RING.to_le_bytes(), DATA);
    assert!(ring(&guest, &[(SOCKET, 128)], "my_avoid", SOCKET));
}

#[test]
fn work_leads_to_the_structure_that_it_is_part_of() {
    let mut guest = guest(1);
    guest.put(Gva(SOCKET + 40), &RING.to_le_bytes(), DATA);
    assert!(ring(&guest, &[(SOCKET, 128)], "my_work", SOCKET + 8));
    assert!(
        !ring(&guest, &[(SOCKET, 128)], "my_work", SOCKET + 16),
        "nothing has it there"
    );
    assert!(
        !ring(&guest, &[(SOCKET, 64)], "my_work", SOCKET + 8),
        "too small"
    );
}

#[test]
fn a_ring_of_pointers_is_reached_to_its_end() {
    assert!(call(&guest(1), "my_submit", BIO).contains(&(RING, 128)));
}

#[test]
fn what_is_in_a_page_that_an_argument_stands_for_may_be_written() {
    let found = call(&guest(1), "my_read", DESCRIPTION);
    assert!(found.contains(&(PAGE, 4096)), "{found:x?}");
    let found = call(&guest(1), "my_read", DESCRIPTION - 64);
    assert!(found.iter().all(|(at, _)| *at != PAGE), "{found:x?}");
}

#[test]
fn what_the_kernel_defines_and_a_module_keeps_is_followed_in_that_module_only() {
    let mut guest = guest(1);
    guest.put(Gva(DEVICE + 64 + 8), &DISK.to_le_bytes(), DATA);
    let disk = |module| call_in(module, &guest, "my_init", DEVICE).contains(&(DISK, 64));
    assert!(disk("8021q"));
    assert!(!disk("e1000"));
}

#[test]
fn a_private_area_without_a_way_back_is_what_the_rules_say() {
    let found = call(&guest(1), "my_init", DEVICE);
    assert!(found.contains(&(RING, 128)), "{found:x?}");
}
