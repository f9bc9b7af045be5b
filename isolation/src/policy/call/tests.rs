//! Calls of a make-believe driver in a make-believe guest with a slab allocator.

mod answered;
mod handed_out;
mod red_zones;
mod rehearsal;

use proptest::prelude::*;

use super::*;
use crate::guest::btf::TypeId;
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::{TestGuest, TestMemory};
use crate::guest::paging::{Entry, Levels};
use crate::guest::symbols::read_kallsyms;

const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const VMALLOC: u64 = 0xffff_c900_0000_0000;
const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
const BASES: u64 = 0xffff_ffff_8200_0000;
const NAMESPACES: u64 = BASES + 0x100;
const MODULE: u64 = 0xffff_ffff_c000_0000;
const VARIABLES: u64 = MODULE + 0x1000;
const PER_CPU: u64 = DIRECT + 0x1_0000;
/// `struct kmem_cache`s: of packets, and of 256 bytes.
const CACHES: [u64; 2] = [DIRECT, DIRECT + 0x100];
/// Slabs of one page each.
const PACKETS: u64 = DIRECT + 0x2000;
const OBJECTS: u64 = DIRECT + 0x3000;
/// The interface is the second object of 256 bytes.
const DEVICE: u64 = OBJECTS + 256;
const HEAD: u64 = DIRECT + 0x4000;
const STACK: u64 = VMALLOC + 0x4000;
/// Functions of the kernel's.
const BREAD: u64 = 0xffff_ffff_8100_0000;
const KERN_PATH: u64 = BREAD + 0x100;

/// What kernel functions answer with, and links of lists, of which this returns the type.
fn listed_and_answered(e: &mut Encoder, pointer: TypeId, int: TypeId) -> TypeId {
    let list = e.structure(
        "list_head",
        16,
        &[("next", pointer, 0), ("prev", pointer, 8)],
    );
    let block = [
        ("b_state", pointer, 0),
        ("b_size", pointer, 8),
        ("b_data", pointer, 16),
        ("b_count", int, 24),
    ];
    e.structure("buffer_head", 64, &block);
    let inode = e.structure("inode", 64, &[("i_mode", int, 0), ("i_state", pointer, 24)]);
    let inode = e.pointer(inode);
    let dentry = e.structure("dentry", 64, &[("d_inode", inode, 48)]);
    let dentry = e.pointer(dentry);
    e.structure("path", 16, &[("mnt", pointer, 0), ("dentry", dentry, 8)]);
    list
}

fn types() -> Arc<Btf> {
    let mut e = Encoder::new(None);
    let int = e.int("unsigned int", 4, 0);
    let byte = e.int("unsigned char", 1, 0);
    let pointer = e.pointer(TypeId::VOID);
    let bytes = e.pointer(byte);
    e.memory_management();
    e.structure("skb_shared_info", 64, &[]);
    let count = e.structure("refcount_struct", 4, &[("refs", int, 0)]);
    let packet = [("end", int, 8), ("head", bytes, 16), ("users", count, 184)];
    e.structure("sk_buff", 192, &packet);
    e.structure(
        "net_device",
        96,
        &[
            ("netdev_ops", pointer, 8),
            ("dev_list", pointer, 16),
            ("pcpu_refcnt", pointer, 24),
            ("priv_flags", int, 40),
        ],
    );
    e.structure(
        "task_struct",
        128,
        &[
            ("pagefault_disabled", int, 0x40),
            ("flags", int, 0x44),
            ("prio", int, 0x48),
            ("journal_info", pointer, 0x50),
            ("backing_dev_info", pointer, 0x58),
        ],
    );
    let short = e.int("short unsigned int", 2, 0);
    let xmit = [("recursion", short, 0), ("more", short, 2)];
    let xmit = e.composite(4, "", 4, &xmit);
    e.structure("softnet_data", 64, &[("xmit", xmit, 16)]);
    let common = e.structure("ns_common", 8, &[("inum", int, 0), ("count", count, 4)]);
    let module = [("percpu", pointer, 8), ("percpu_size", int, 16)];
    e.structure("module", 64, &module);
    let settings = e.structure("ipv4_devconf", 24, &[]);
    let settings = e.pointer(settings);
    let ipv4 = e.structure("netns_ipv4", 8, &[("devconf_all", settings, 0)]);
    let net = [
        ("ipv4", ipv4, 40),
        ("dev_base_head", pointer, 8),
        ("list", pointer, 16),
        ("gen", pointer, 24),
        ("ns", common, 32),
    ];
    e.structure("net", 64, &net);
    let list = listed_and_answered(&mut e, pointer, int);
    let base = Arc::new(Btf::parse(&e.bytes(), None).unwrap());
    let mut e = Encoder::new(Some(&base));
    e.structure("my_sap", 160, &[("list", list, 16)]);
    let device = e.pointer(base.find_struct("net_device").unwrap());
    let void = e.pointer(TypeId::VOID);
    let int = e.int("int", 4, 1);
    let packet = e.pointer(base.find_struct("sk_buff").unwrap());
    let packets = e.array(packet, 12);
    let ring = e.structure("my_ring", 128, &[("packets", packets, 32)]);
    let ring = e.pointer(ring);
    e.structure("my_private", 16, &[("dev", device, 0), ("ring", ring, 8)]);
    e.function("my_open", int, &[("dev", device)]);
    e.function("my_irq", int, &[("irq", int), ("data", void)]);
    let pointers = e.pointer(void);
    let names = ["a", "b", "c", "d", "e", "f"];
    let mut many: Vec<_> = names.iter().map(|name| (*name, int)).collect();
    many.extend([("arg", pointers), ("dev", device)]);
    e.function("my_change", int, &many);
    Arc::new(Btf::parse(&e.bytes(), Some(base)).unwrap())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn put_page(guest: &mut TestGuest, at: u64, flags: u64, cache: u64, count: u32) {
    let page = VMEMMAP + ((at - DIRECT) >> 12) * 64;
    guest.put(Gva(page), &[0; 64], DATA);
    guest.put(Gva(page), &words(&[flags, 0, 0, cache]), DATA);
    guest.put(Gva(page + 52), &count.to_le_bytes(), DATA);
}

fn guest() -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    guest.put(Gva(BASES), &words(&[DIRECT, VMALLOC, VMEMMAP]), DATA);
    guest.put(Gva(MODULE), &[0x90; 64], 0);
    guest.put(Gva(VARIABLES), &[0; 512], DATA);
    for page in [CACHES[0], PACKETS, OBJECTS, HEAD, PER_CPU] {
        guest.put(Gva(page), &[0; 4096], DATA);
    }
    let names = DIRECT + 0x800;
    guest.put(Gva(names), b"skbuff_head_cache\0", DATA);
    guest.put(Gva(names + 64), b"kmalloc-256\0", DATA);
    guest.put(Gva(CACHES[0]), &words(&[256 | 192 << 32, 64, names]), DATA);
    guest.put(
        Gva(CACHES[1]),
        &words(&[256 | 256 << 32, 128, names + 64]),
        DATA,
    );
    put_page(&mut guest, CACHES[0], 0, 0, 1);
    put_page(&mut guest, PACKETS, 1 << 9, CACHES[0], 1);
    put_page(&mut guest, OBJECTS, 1 << 9, CACHES[1], 1);
    put_page(&mut guest, HEAD, 0, 0, 1);
    put_page(&mut guest, PER_CPU, 0, 0, 1);
    guest.put(Gva(CACHES[1] + 24), &words(&[1]), DATA);
    guest.put(Gva(DEVICE), &words(&[0, VARIABLES]), DATA);
    // Free objects are linked in the middle.
    guest.put(Gva(OBJECTS + 512 + 128), &words(&[0xfeed_f00d]), DATA);
    guest.put(Gva(PACKETS + 256 + 64), &words(&[0xfeed_f00d]), DATA);
    guest.put(Gva(STACK), &[0; 0x2000], DATA);
    guest
}

fn policy(guest: &TestGuest) -> DriverPolicy {
    let text = format!(
        "{:x} D page_offset_base\n{:x} D vmalloc_base\n{:x} D vmemmap_base\n40 A __preempt_count\n48 A current_task\n180 A softnet_data\n{:x} D init_net\n{:x} D net_namespace_list\n{:x} d my_net_id\t[my]\n\
         {:x} d my_list\t[my]\n{:x} d my_flag\t[my]\n{BREAD:x} T __bread_gfp\n{KERN_PATH:x} T kern_path\n",
        BASES,
        BASES + 8,
        BASES + 16,
        BASES + 32,
        NAMESPACES,
        VARIABLES + 16,
        VARIABLES + 0x40,
        VARIABLES + 0x60,
    );
    let symbols = read_kallsyms(text.as_bytes(), |_| true).unwrap();
    let sections = [
        (own_per_cpu::THIS_MODULE.to_owned(), VARIABLES + 0x100),
        (".text".to_owned(), MODULE),
        (".data".to_owned(), VARIABLES),
    ];
    let layout = ModuleLayout::new("my", &sections, None, &guest.virt()).unwrap();
    let memory = MemoryModel::new(&types(), &symbols, &guest.virt()).unwrap();
    DriverPolicy::new(types(), memory, &layout, &symbols).unwrap()
}

/// Asks whether the call may write `bytes` at `at`, with `now` and `before` as memory.
fn ask(
    policy: &mut DriverPolicy,
    now: &TestGuest,
    before: &TestGuest,
    at: u64,
    bytes: u64,
) -> bool {
    let memory: CallMemory<'_, TestMemory> = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: GvaRange::new(Gva(STACK), 0x2000),
        per_cpu_base: PER_CPU,
    };
    policy.may_write(&memory, GvaRange::new(Gva(at), bytes).unwrap())
}

/// `ip6tunnel_xmit` of Linux 6.12.
#[test]
fn of_a_variable_of_each_processor_one_member_may_be_written() {
    let guest = guest();
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, PER_CPU + at, bytes);
    assert!(may(0x180 + 16, 2));
    assert!(!may(0x180 + 18, 2) && !may(0x180, 8));
}

#[test]
fn arguments_and_the_drivers_variables_may_be_written_others_may_not() {
    let guest = guest();
    let mut policy = policy(&guest);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(VARIABLES + 8, 8));
    assert!(may(DEVICE, 96));
    assert!(may(DEVICE + 96, 160), "the private area");
    assert!(!may(DEVICE + 250, 8), "into the next object");
    assert!(!may(OBJECTS, 1), "another live object of the same size");
    assert!(!may(MODULE, 1), "text");
    assert!(!may(BASES, 8), "the kernel's variables");
    assert!(
        !may(STACK, 8),
        "stacks are not asked for, and are no allocation of the call"
    );
}

/// `e1000_clean_rx_irq` of `e1000e`.
#[test]
fn a_packet_that_the_call_has_taken_out_of_a_long_ring_may_be_written() {
    let ring = OBJECTS + 512;
    let mut before = guest();
    before.put(Gva(DEVICE + 96), &words(&[DEVICE, ring]), DATA);
    let mut now = before.clone();
    before.put(Gva(ring + 32 + 10 * 8), &words(&[PACKETS]), DATA);
    now.put(Gva(ring + 32 + 10 * 8), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(ask(&mut policy, &now, &before, PACKETS + 0x70, 4));
    assert!(!ask(&mut policy, &now, &before, PACKETS + 256, 4));
    policy.end(true);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(!ask(&mut policy, &now, &now, PACKETS + 0x70, 4), "gone");
}

#[test]
fn what_was_in_the_drivers_structures_when_the_call_began_may_be_written_when_it_is_not_there_any_more()
 {
    let ring = OBJECTS + 512;
    let mut before = guest();
    before.put(Gva(ring + 128), &words(&[0]), DATA);
    let mut now = before.clone();
    before.put(Gva(DEVICE + 96), &words(&[DEVICE, ring]), DATA);
    now.put(Gva(DEVICE + 96), &words(&[DEVICE, 0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(ask(&mut policy, &now, &before, ring, 64));
    policy.end(true);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(!ask(&mut policy, &now, &now, ring, 64), "it was not there");
    policy.end(true);
    // Nor is it the next call's.
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(!ask(&mut policy, &now, &now, ring, 64));
}

#[test]
fn references_to_network_namespaces_are_counted_and_what_a_driver_keeps_in_each_is_its_own() {
    let (other, kept) = (OBJECTS + 512, OBJECTS + 768);
    let mut guest = guest();
    guest.put(Gva(other + 128), &words(&[0]), DATA);
    guest.put(Gva(NAMESPACES), &words(&[other + 16]), DATA);
    guest.put(Gva(other + 16), &words(&[NAMESPACES, HEAD]), DATA);
    guest.put(Gva(VARIABLES + 16), &words(&[3]), DATA);
    guest.put(Gva(HEAD + 3 * 8), &words(&[kept]), DATA);
    guest.put(Gva(other + 40), &words(&[HEAD + 0x400]), DATA);
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    for net in [BASES + 32, other] {
        assert!(may(net + 36, 4));
        assert!(!may(net + 32, 4), "its number");
        assert!(!may(net + 40, 1));
    }
    assert!(may(kept, 256));
    assert!(may(HEAD + 0x400, 24), "what is set for all interfaces");
    assert!(!may(HEAD + 0x418, 1));
    assert!(!may(HEAD, 8), "the table of what drivers keep there");
    // An interface of somebody else's in the other one.
    assert!(!may(PER_CPU + 0x80, 4));
    guest.put(Gva(other + 8), &words(&[OBJECTS + 16]), DATA);
    guest.put(Gva(OBJECTS + 16), &words(&[other + 8, 0x80]), DATA);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(PER_CPU + 0x80, 4));
    assert!(!may(PER_CPU + 0x84, 1));
    assert!(may(OBJECTS + 40, 4), "what it is to others");
    assert!(!may(OBJECTS + 36, 4) && !may(OBJECTS + 44, 1));
    guest.put(Gva(VARIABLES + 16), &words(&[4]), DATA);
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(
        !ask(&mut policy, &guest, &guest, kept, 8),
        "another driver's"
    );
    // An end that leads nowhere, and a number that cannot be.
    guest.put(Gva(other + 16), &words(&[8, u64::MAX]), DATA);
    guest.put(Gva(VARIABLES + 16), &words(&[u64::MAX]), DATA);
    assert!(!ask(&mut policy, &guest, &guest, kept, 8));
}

/// `u32_change` of Linux 6.12.
#[test]
fn what_arguments_on_the_stack_point_at_may_be_written() {
    let guest = guest();
    let mut policy = policy(&guest);
    policy.begin("my_change", [STACK + 0x200; 6]);
    assert!(
        !ask(&mut policy, &guest, &guest, STACK + 0x200, 8),
        "numbers"
    );
    policy.end(true);
    policy.begin("my_change", [0; 6]);
    policy.has_on_stack([STACK + 0x200, DEVICE, STACK + 0x800, STACK + 0x800]);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(STACK + 0x200, 8) && may(DEVICE, 96));
    assert!(!may(STACK + 0x800, 8), "there are no more arguments");
    policy.end(true);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    policy.has_on_stack([STACK + 0x200; STACK_ARGUMENTS]);
    assert!(
        !ask(&mut policy, &guest, &guest, STACK + 0x200, 8),
        "it has one"
    );
}

#[test]
fn what_inline_functions_write_is_permitted() {
    let mut guest = guest();
    guest.put(Gva(PER_CPU + 0x48), &words(&[HEAD]), DATA);
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(VMEMMAP + 4 * 64 + 52, 4), "a page's reference count");
    assert!(!may(VMEMMAP + 4 * 64, 8), "a page's flags");
    assert!(!may(PER_CPU + 0x200, 1));
    assert!(may(PER_CPU + 0x40, 4), "the preemption count");
    assert!(!may(PER_CPU + 0x44, 1));
    assert!(may(HEAD + 0x40, 4), "the running thread's page fault count");
    assert!(may(HEAD + 0x44, 4), "its flags");
    assert!(!may(HEAD + 0x48, 1), "its priority");
    assert!(may(HEAD + 0x50, 8), "the transaction that it is in");
    assert!(may(HEAD + 0x58, 8), "whose pages it writes");
    assert!(!may(OBJECTS + 0x50, 8), "of another thread");
    assert!(may(PACKETS + 184, 4), "references to a packet of others");
    assert!(!may(PACKETS + 180, 4) && !may(PACKETS + 188, 1));
    assert!(!may(OBJECTS + 184, 4), "an object of another cache");
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    guest.put(Gva(VARIABLES + 0x108), &words(&[0x200, 12]), DATA);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(PER_CPU + 0x200, 12), "the driver's of this processor");
    assert!(!may(PER_CPU + 0x20c, 1));
}

#[test]
fn an_interface_seen_once_is_the_drivers_in_interrupts_until_it_is_gone() {
    let mut guest = guest();
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &guest, DEVICE, 8));
    policy.end(true);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &guest, &guest, DEVICE, 8));
    policy.end(true);
    // Its memory is another object now.
    guest.put(Gva(DEVICE), &words(&[0, 0]), DATA);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &guest, DEVICE, 8));
}

#[test]
fn interfaces_that_no_call_was_about_are_found_in_the_kernels_list() {
    let mut guest = guest();
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &guest, DEVICE, 8));
    policy.end(true);
    // Its list has another driver's interface, then ours.
    let (head, other) = (BASES + 32 + 8, OBJECTS);
    guest.put(Gva(head), &words(&[other + 16]), DATA);
    guest.put(Gva(other + 8), &words(&[BASES, DEVICE + 16]), DATA);
    guest.put(Gva(DEVICE + 16), &words(&[head]), DATA);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &guest, &guest, DEVICE, 8));
    assert!(!ask(&mut policy, &guest, &guest, other, 8));
}

#[test]
fn what_the_call_hung_into_its_objects_is_reached_from_them() {
    let mut guest = guest();
    let mut policy = policy(&guest);
    let ring = OBJECTS + 512;
    guest.put(Gva(DEVICE + 96), &words(&[DEVICE, 0]), DATA);
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(ask(&mut policy, &guest, &guest, DEVICE + 104, 8));
    assert!(!ask(&mut policy, &guest, &guest, ring, 8));
    // Published already, as before a load from the device: both views have it.
    guest.put(Gva(DEVICE + 104), &words(&[ring]), DATA);
    assert!(ask(&mut policy, &guest, &guest, ring, 8));
}

#[test]
fn memory_is_named_by_the_guests_allocator() {
    let guest = guest();
    let policy = policy(&guest);
    let whose = |at| policy.whose(guest.virt(), Gva(at));
    assert_eq!(
        whose(DEVICE + 16).as_deref(),
        Some("kmalloc-256 object + 0x10")
    );
    assert_eq!(
        whose(HEAD + 1).as_deref(),
        Some("4096 bytes of pages + 0x1")
    );
    assert_eq!(
        whose(STACK + 8).as_deref(),
        Some("8192 bytes of vmalloc area + 0x8")
    );
    assert_eq!(whose(BASES), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the guest writes into its bookkeeping and objects: text, stacks and the kernel's
    /// own variables stay closed.
    #[test]
    fn hostile_memory_opens_no_text_and_no_kernel_variables(
        changes in prop::collection::vec((0usize..6, 0u64..64, any::<u64>()), 0..40),
        arguments in prop::array::uniform6(0usize..8),
        irq in any::<bool>(),
    ) {
        let places = [DEVICE, PACKETS, OBJECTS, CACHES[0], VMEMMAP, HEAD, STACK, BASES];
        let before = guest();
        let mut now = before.clone();
        for (at, word, value) in changes {
            let value = if value % 2 == 0 { places[value as usize % 8] } else { value };
            now.put(Gva(places[at] + word * 8), &words(&[value]), DATA);
        }
        let mut policy = policy(&before);
        policy.begin(if irq { "my_irq" } else { "my_open" }, arguments.map(|a| places[a.min(6)]));
        prop_assert!(!ask(&mut policy, &now, &before, MODULE, 1));
        for probe in [DEVICE, PACKETS, OBJECTS + 256, HEAD] {
            ask(&mut policy, &now, &before, probe, 8);
        }
        prop_assert!(policy.table().len() < 3000);
        policy.end(true);
        prop_assert!(policy.table().len() == 1);
    }
}
