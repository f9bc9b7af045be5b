//! Arguments of make-believe functions in a make-believe guest.

mod drivers;
mod tag_sets;

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::guest::allocations::{Allocation, AllocationKind};
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::{TestGuest, TestMemory};
use crate::guest::paging::{Entry, Levels};
use crate::policy::abort_value::REGISTER_ARGUMENTS;

const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
const DEVICE: u64 = 0xffff_8880_0001_0000;
const PRIVATE: u64 = DEVICE + 0x60;
const RING: u64 = 0xffff_8880_0002_0000;
const SLOTS: u64 = 0xffff_8880_0003_0000;
const PACKET: u64 = 0xffff_8880_0004_0000;
const PACKET_HEAD: u64 = 0xffff_8880_0005_0000;
const NET: u64 = 0xffff_8880_0006_0000;
const QUEUES: u64 = 0xffff_8880_0007_0000;
const PER_CPU_BASE: u64 = 0xffff_8880_0008_0000;
const STACK: u64 = 0xffff_c900_0000_8000;
const BUFFER: u64 = 0xffff_c900_0010_0000;

/// Allocations by first byte, with their length.
struct Known(BTreeMap<u64, u64>);

impl FindAllocation for Known {
    fn allocation_at(&self, at: Gva) -> Option<Allocation> {
        let (first, len) = self.0.range(..=at.0).next_back()?;
        let range = GvaRange::new(Gva(*first), *len).filter(|range| range.contains(at))?;
        let kind = match *first {
            BUFFER => AllocationKind::Pages,
            first if first >> 16 == PER_CPU_BASE >> 16 => AllocationKind::PerCpu,
            _ => AllocationKind::Slab,
        };
        Some(Allocation {
            range,
            kind,
            cache: None,
        })
    }

    /// The only one is that of [`BUFFER`], in front of which it lies.
    fn page_address(&self, description: Gva) -> Option<Gva> {
        (description.0 == BUFFER - 64).then_some(Gva(BUFFER))
    }
}

fn types() -> Arc<Btf> {
    let mut e = Encoder::new(None);
    let int = e.int("int", 4, 1);
    let long = e.int("long unsigned int", 8, 0);
    let byte = e.int("unsigned char", 1, 0);
    let bytes = e.pointer(byte);
    let net = e.structure("net", 64, &[("x", int, 0)]);
    let net = e.pointer(net);
    let queue = e.structure("netdev_queue", 40, &[]);
    let queues = e.pointer(queue);
    let counters = e.structure("pcpu_lstats", 16, &[]);
    let counters = e.pointer(counters);
    let stats = e.composite(5, "", 8, &[("lstats", counters, 0)]);
    e.structure(
        "net_device",
        0x48,
        &[
            ("mtu", int, 0),
            ("num_tx_queues", int, 4),
            ("nd_net", net, 8),
            ("_tx", queues, 16),
            ("", stats, 24),
        ],
    );
    e.structure("skb_shared_info", 320, &[]);
    let packet = e.structure("sk_buff", 232, &[("end", int, 8), ("head", bytes, 16)]);
    let packet = e.pointer(packet);
    e.structure("napi_struct", 16, &[("state", long, 0), ("skb", packet, 8)]);
    let base = Arc::new(Btf::parse(&e.bytes(), None).unwrap());

    let mut e = Encoder::new(Some(&base));
    let device = e.pointer(base.find_struct("net_device").unwrap());
    let packet = e.pointer(base.find_struct("sk_buff").unwrap());
    let napi = base.find_struct("napi_struct").unwrap();
    let slot = e.structure("my_slot", 16, &[("skb", packet, 0), ("dma", long, 8)]);
    let slots = e.pointer(slot);
    let ring = e.structure("my_ring", 24, &[("slots", slots, 0), ("count", int, 8)]);
    let ring = e.pointer(ring);
    let rings = e.array(ring, 2);
    e.structure("small", 8, &[("netdev", device, 0)]);
    e.structure(
        "my_private",
        96,
        &[
            ("netdev", device, 0),
            ("rings", rings, 8),
            ("napi", napi, 32),
            ("net", net, 64),
            ("self", device, 72),
        ],
    );
    let const_device = e.refer(10, "", base.find_struct("net_device").unwrap());
    let const_device = e.pointer(const_device);
    let longs = e.pointer(long);
    let void = e.pointer(TypeId::VOID);
    let napi = e.pointer(napi);
    e.function("my_xmit", int, &[("skb", packet), ("netdev", device)]);
    e.function("my_stats", int, &[("", device), ("data", longs)]);
    e.function("my_const", int, &[("dev", const_device)]);
    e.function("my_poll", int, &[("napi", napi), ("budget", int)]);
    e.function("my_irq", int, &[("irq", int), ("data", void)]);
    Arc::new(Btf::parse(&e.bytes(), Some(base)).unwrap())
}

fn guest() -> (TestGuest, Known) {
    let mut guest = TestGuest::new(Levels::Four);
    let mut put = |at: u64, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.put(Gva(at), &bytes, DATA);
    };
    put(DEVICE, &[1500 | 3 << 32, NET, QUEUES, 0x100]);
    put(QUEUES, &[0]);
    put(PER_CPU_BASE, &[0]);
    put(PRIVATE, &[DEVICE, RING, 0, 0, 0, 0, 0, 0, NET, DEVICE]);
    put(RING, &[SLOTS, 256, 0]);
    put(SLOTS, &[PACKET, 0]);
    put(PACKET, &[0, 0xc0, PACKET_HEAD]);
    put(PACKET_HEAD, &[0]);
    put(NET, &[0]);
    put(STACK, &[0; 8]);
    put(BUFFER, &[0; 8]);
    let known = [
        (DEVICE, 0x200),
        (RING, 24),
        (SLOTS, 256 * 16),
        (PACKET, 232),
        (PACKET_HEAD, 0x400),
        (NET, 64),
        (STACK, 0x4000),
        (BUFFER, 0x1000),
    ];
    (guest, Known(known.into()))
}

fn reach<'a>(
    types: &'a Btf,
    guest: &'a TestGuest,
    allocations: &'a Known,
) -> Reach<'a, TestMemory, Known> {
    let stack = GvaRange::new(Gva(STACK), 0x4000);
    Reach {
        types,
        names: Box::leak(Box::default()),
        virt: guest.virt(),
        allocations,
        stack,
        per_cpu_base: Some(PER_CPU_BASE),
        per_cpu_handed_out: Some(0x800),
        own_too: Box::leak(Box::default()),
        rules: Rules::linux(),
    }
}

/// First byte, length and label of what a call reaches.
fn call(function: &str, arguments: &[u64]) -> Vec<(u64, u64, String)> {
    let (types, (guest, known)) = (types(), guest());
    let mut registers = [0; REGISTER_ARGUMENTS];
    registers[..arguments.len()].copy_from_slice(arguments);
    let function = types.find_function(function).unwrap();
    let reach = reach(&types, &guest, &known);
    let found = reach.objects(&function, &registers, &[]).objects;
    // What is near is part of it.
    for near in reach.near_objects(&function, &registers, |_| true) {
        assert!(found.iter().any(|one| one.range == near.range), "{near:?}");
    }
    found
        .into_iter()
        .map(|o| (o.range.first().0, o.range.len_bytes(), o.label))
        .collect()
}

/// `e1000e`'s receive ring: packets were put into it long before.
#[test]
fn what_a_slot_of_a_long_ring_points_at_is_found_by_its_address() {
    let (types, (mut guest, known)) = (types(), guest());
    let far = PACKET_HEAD + 0x8000;
    let slot = |index: u64| Gva(SLOTS + index * 16);
    guest.put(slot(0), &[0; 256 * 16], DATA);
    guest.put(slot(200), &PACKET.to_le_bytes(), DATA);
    let function = types.find_function("my_xmit").unwrap();
    let reach = reach(&types, &guest, &known);
    let found = reach.objects(&function, &[0, DEVICE, 0, 0, 0, 0], &[]);
    assert!(
        found
            .objects
            .iter()
            .all(|one| one.range.first().0 != PACKET)
    );
    let object = |at| known.allocation_at(Gva(at)).map(|found| found.range);
    let held = reach
        .held_in(&found.slots, object(PACKET).unwrap())
        .unwrap();
    assert_eq!(
        (held.at, held.name.contains("slot 200")),
        (Gva(PACKET), true)
    );
    let packet = reach.objects_held(held).objects;
    let places: Vec<_> = packet.iter().map(|one| one.range.first().0).collect();
    assert_eq!(places, [PACKET, PACKET_HEAD], "with its data");
    // Nothing has these: an object that no slot has, the number behind a slot's pointer.
    assert_eq!(reach.held_in(&found.slots, object(NET).unwrap()), None);
    let number = GvaRange::new(Gva(far), 8).unwrap();
    guest.put(Gva(SLOTS + 100 * 16 + 8), &far.to_le_bytes(), DATA);
    let reach = super::tests::reach(&types, &guest, &known);
    assert_eq!(reach.held_in(&found.slots, number), None);
}

#[test]
fn of_a_drivers_structure_only_members_that_lead_somewhere_are_looked_at() {
    let (types, (guest, known)) = (types(), guest());
    let reach = reach(&types, &guest, &known);
    let leading = |name: &str| -> Vec<&str> {
        let members = reach.leading_members(types.find_struct(name).unwrap());
        let names = members.iter().map(|member| types.string(member.name_at));
        names.collect()
    };
    // `napi` is the kernel's, and has a rule.
    assert_eq!(
        leading("my_private"),
        ["netdev", "rings", "napi", "net", "self"]
    );
    assert_eq!(leading("my_ring"), ["slots"]);
    assert_eq!(leading("my_slot"), ["skb"]);
    assert_eq!(leading("my_slot"), ["skb"], "asked again");
}

#[test]
fn a_transmit_reaches_packet_interface_and_the_drivers_rings() {
    let found = call("my_xmit", &[PACKET, DEVICE]);
    let found: Vec<_> = found
        .iter()
        .map(|(at, len, label)| (*at, *len, label.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            (PACKET, 232, "struct sk_buff (skb)"),
            (PACKET_HEAD, 0xc0 + 320, "struct sk_buff (skb->head)"),
            (DEVICE, 0x48, "struct net_device (netdev)"),
            (PRIVATE, 0x200 - 0x60, "struct net_device (netdev->private)"),
            (QUEUES, 3 * 40, "struct netdev_queue (netdev->_tx)"),
            (
                PER_CPU_BASE + 0x100,
                16,
                "struct pcpu_lstats (netdev->lstats)"
            ),
            (RING, 24, "struct my_ring (netdev->private->rings[0])"),
            (
                SLOTS,
                4096,
                "struct my_slot (netdev->private->rings[0]->slots)"
            ),
        ]
    );
}

#[test]
fn buffers_go_to_the_end_of_their_allocation_but_not_on_the_stack() {
    let found = call("my_stats", &[DEVICE, BUFFER + 8]);
    assert!(found.contains(&(BUFFER + 8, 0xff8, "long unsigned int (data)".into())));
    let found = call("my_stats", &[DEVICE, STACK + 16]);
    assert!(found.contains(&(STACK + 16, 256, "long unsigned int (data)".into())));
    let found = call("my_irq", &[11, DEVICE]);
    assert_eq!(found, [(DEVICE, 0x200, "void (data)".into())]);
    // What has no type there may be a buffer of bytes.
    let found = call("my_irq", &[11, STACK + 16]);
    assert_eq!(found, [(STACK + 16, 256, "void (data)".into())]);
}

#[test]
fn a_structure_that_drivers_embed_opens_what_it_is_embedded_in() {
    let found = call("my_poll", &[PRIVATE + 32, 64]);
    let whole = (DEVICE, 0x200, "struct napi_struct (napi)".to_owned());
    assert!(found.contains(&whole), "{found:?}");
}

#[test]
fn a_poll_reaches_the_packet_that_napi_keeps_from_poll_to_poll() {
    let (types, (mut guest, known)) = (types(), guest());
    let napi = PRIVATE + 32;
    guest.put(Gva(napi + 8), &PACKET.to_le_bytes(), DATA);
    let function = types.find_function("my_poll").unwrap();
    let found = reach(&types, &guest, &known)
        .objects(&function, &[napi, 64, 0, 0, 0, 0], &[])
        .objects;
    let found: Vec<_> = found
        .iter()
        .map(|o| (o.range.first().0, o.range.len_bytes()))
        .collect();
    for object in [(PACKET, 232), (PACKET_HEAD, 0xc0 + 320)] {
        assert!(found.contains(&object), "{found:x?}");
    }
}

#[test]
fn const_objects_bad_pointers_and_the_kernels_own_are_left_out() {
    assert_eq!(call("my_const", &[DEVICE]), []);
    for bad in [
        0,
        0x1000,
        0x7fff_0000_0000,
        u64::MAX - 11,
        0xffff_8880_7000_0000,
    ] {
        assert_eq!(call("my_xmit", &[bad, bad]), []);
    }
    assert!(
        call("my_xmit", &[PACKET, DEVICE])
            .iter()
            .all(|(at, ..)| *at != NET)
    );
}

#[test]
fn known_objects_of_the_driver_are_starts_of_their_own() {
    let (types, (guest, known)) = (types(), guest());
    let function = types.find_function("my_irq").unwrap();
    let start = Start {
        at: Gva(DEVICE),
        type_id: types.find_struct("net_device").unwrap(),
        name: "eth0".into(),
    };
    let reach = reach(&types, &guest, &known);
    let found = reach
        .objects(&function, &[0; REGISTER_ARGUMENTS], &[start])
        .objects;
    assert!(
        found
            .iter()
            .any(|object| object.label == "struct my_ring (eth0->private->rings[0])")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_pointers_are_followed_without_harm(
        words in prop::collection::vec((0usize..8, 0u64..12, 0usize..9, 0u64..256), 0..60),
        lengths in prop::collection::vec((0usize..8, any::<u64>()), 0..8),
    ) {
        let places = [DEVICE, PRIVATE, RING, SLOTS, PACKET, PACKET_HEAD, NET, STACK, u64::MAX - 0x2_0000];
        let (types, (mut guest, mut known)) = (types(), guest());
        for (at, word, to, offset) in words {
            let target = places[to].wrapping_add(offset);
            guest.put(Gva(places[at] + word * 8), &target.to_le_bytes(), DATA);
        }
        for (at, len) in lengths {
            known.0.insert(places[at], len.max(1));
        }
        let reach = reach(&types, &guest, &known);
        for name in ["my_xmit", "my_stats", "my_poll", "my_irq"] {
            let function = types.find_function(name).unwrap();
            let found = reach.objects(&function, &[PACKET, DEVICE, PACKET, DEVICE, 1, 2], &[]).objects;
            prop_assert!(found.len() <= MAX_OBJECTS + walk::MAX_DATA);
            prop_assert!(found.iter().all(|object| object.label.len() <= 200));
        }
    }
}
