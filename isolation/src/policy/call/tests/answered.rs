//! What kernel functions have answered a call with, and what is in lists of the driver's variables.

use super::*;
use crate::domain::supervisor::Answer;
use crate::guest::allocations::{Allocation, FindAllocation};

/// A `struct buffer_head`, or a `struct dentry`.
const OBJECT: u64 = OBJECTS + 512;
const INODE: u64 = OBJECTS + 768;
/// A list's head among the variables.
const LIST: u64 = VARIABLES + 0x40;

fn guest_with_objects() -> TestGuest {
    let mut guest = guest();
    for object in [OBJECT, INODE] {
        guest.put(Gva(object + 128), &words(&[0]), DATA);
    }
    guest
}

/// A block of so many bytes.
fn block(bytes: u64) -> TestGuest {
    let mut guest = guest_with_objects();
    guest.put(Gva(OBJECT), &words(&[0, bytes, HEAD, 1]), DATA);
    guest
}

/// A kernel function returns to the call.
fn returns(
    policy: &mut DriverPolicy,
    guest: &TestGuest,
    function: u64,
    arguments: [u64; 6],
    result: u64,
) -> Option<Answer> {
    let memory: CallMemory<'_, TestMemory> = CallMemory {
        private: guest.virt(),
        before: MemoryBefore::new(guest.virt().memory),
        stack: GvaRange::new(Gva(STACK), 0x2000),
        per_cpu_base: PER_CPU,
    };
    let call = KernelCall {
        function,
        arguments,
    };
    policy.answered(&memory, &call, result)
}

fn error(number: i64) -> u64 {
    (-number).cast_unsigned()
}

/// `fat_set_state`.
#[test]
fn of_a_block_that_was_read_the_bytes_and_the_state_may_be_written_by_the_call_that_read_it() {
    let guest = block(1024);
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &guest, HEAD, 1), "nobody's");
    let answer = returns(&mut policy, &guest, BREAD, [0; 6], OBJECT);
    let told = Answer {
        function: BREAD,
        at: OBJECT,
    };
    assert_eq!(answer, Some(told));
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(HEAD, 1024) && !may(HEAD + 1024, 1));
    assert!(may(OBJECT, 8) && may(OBJECT + 24, 4));
    assert!(!may(OBJECT + 8, 8) && !may(OBJECT + 16, 8), "where it is");
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &guest, HEAD, 1), "another call");
    // The same one, that comes back from the guest.
    policy.was_answered(&[told]);
    assert!(ask(&mut policy, &guest, &guest, HEAD, 1));
}

#[test]
fn errors_and_what_cannot_be_are_no_answers() {
    let guest = block(1 << 17);
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    for result in [0, error(5), error(4095)] {
        let answer = returns(&mut policy, &guest, BREAD, [0; 6], result);
        assert_eq!(answer, None, "{result:#x}");
    }
    assert_eq!(returns(&mut policy, &guest, MODULE, [0; 6], OBJECT), None);
    assert!(!ask(&mut policy, &guest, &guest, OBJECT, 8));
    // No block is as large.
    assert!(returns(&mut policy, &guest, BREAD, [0; 6], OBJECT).is_some());
    assert!(ask(&mut policy, &guest, &guest, OBJECT, 8));
    assert!(!ask(&mut policy, &guest, &guest, HEAD, 1));
    // Nor can it be read.
    assert!(returns(&mut policy, &guest, BREAD, [0; 6], 0x10).is_some());
    assert!(!ask(&mut policy, &guest, &guest, HEAD, 1));
    // Begun anew, it was answered with nothing yet.
    let mut memory: CallMemory<'_, TestMemory> = CallMemory {
        private: guest.virt(),
        before: MemoryBefore::new(guest.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    policy.begin_again(&mut memory);
    assert!(!ask(&mut policy, &guest, &guest, OBJECT, 8));
}

/// `ovl_inuse_trylock`.
#[test]
fn answers_by_a_pointer_are_read_when_the_function_returns() {
    let mut guest = guest_with_objects();
    guest.put(Gva(OBJECT + 48), &words(&[INODE]), DATA);
    guest.put(Gva(STACK + 0x100), &words(&[0, OBJECT]), DATA);
    let arguments = [0, 0, STACK + 0x100, 0, 0, 0];
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    let failed = returns(&mut policy, &guest, KERN_PATH, arguments, error(2));
    assert_eq!(failed, None, "what is there is left from before");
    let answer = returns(&mut policy, &guest, KERN_PATH, arguments, 0);
    assert_eq!(answer.map(|answer| answer.at), Some(OBJECT));
    // The driver has put something else there since.
    guest.put(Gva(STACK + 0x108), &words(&[HEAD]), DATA);
    let mut may = |at, bytes| ask(&mut policy, &guest, &guest, at, bytes);
    assert!(may(INODE + 24, 8));
    assert!(!may(INODE, 4) && !may(OBJECT, 8));
    let nowhere = [0, 0, 0x10, 0, 0, 0];
    assert_eq!(returns(&mut policy, &guest, KERN_PATH, nowhere, 0), None);
}

#[test]
fn only_so_many_answers_are_kept_and_the_latest_ones_are_among_them() {
    let guest = block(1024);
    let mut policy = policy(&guest);
    policy.begin("my_irq", [0; 6]);
    for _ in 0..10_000 {
        policy.was_answered(&[Answer {
            function: BREAD,
            at: 0,
        }]);
        assert!(policy.answers.kept() <= 2048);
    }
    let answer = returns(&mut policy, &guest, BREAD, [0; 6], OBJECT);
    assert!(answer.is_some());
    assert!(ask(&mut policy, &guest, &guest, HEAD, 1));
}

#[test]
fn only_so_many_links_of_all_lists_are_looked_at() {
    let mut guest = guest_with_objects();
    let link = OBJECT + 16;
    guest.put(Gva(LIST), &words(&[link, link]), DATA);
    guest.put(Gva(link), &words(&[LIST, LIST]), DATA);
    let policy = policy(&guest);
    let memory: CallMemory<'_, TestMemory> = CallMemory {
        private: guest.virt(),
        before: MemoryBefore::new(guest.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    let allocations = Allocations::new(&policy.memory, memory.private);
    let object = allocations.allocation_at(Gva(OBJECT)).unwrap();
    let mut budget = 3;
    let mut is_listed = |heads: &[Gva], object: &Allocation| {
        policy.reach(memory.private, &memory, |reach| {
            reach.is_listed(heads, object, &mut budget)
        })
    };
    assert!(is_listed(&[Gva(LIST)], &object));
    let other = allocations.allocation_at(Gva(INODE)).unwrap();
    assert!(!is_listed(&[Gva(LIST); 8], &other));
    assert!(!is_listed(&[Gva(LIST)], &object), "it is used up");
}

/// `llc_sap_find`.
#[test]
fn objects_in_a_list_of_the_drivers_variables_are_its_own() {
    let mut listed = guest_with_objects();
    let link = OBJECT + 16;
    listed.put(Gva(LIST), &words(&[link, link]), DATA);
    listed.put(Gva(link), &words(&[LIST, LIST]), DATA);
    let mut policy = policy(&listed);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &listed, &listed, OBJECT, 256));
    assert!(!ask(&mut policy, &listed, &listed, INODE, 8), "not in it");
    policy.end(true);
    // Taken out of it by this call.
    let mut taken_out = listed.clone();
    taken_out.put(Gva(LIST), &words(&[LIST, LIST]), DATA);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &taken_out, &listed, OBJECT, 8));
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &taken_out, &taken_out, OBJECT, 8));
}

#[test]
fn what_no_structure_of_the_drivers_has_a_link_for_is_not_in_a_list_nor_is_one_that_does_not_lead_back()
 {
    let mut guest = guest_with_objects();
    let mut policy = policy(&guest);
    let mut is_listed = |guest: &TestGuest| {
        policy.begin("my_irq", [0; 6]);
        let may = ask(&mut policy, guest, guest, OBJECT, 8);
        policy.end(true);
        may
    };
    // A link where none of its structures has one.
    let link = OBJECT + 24;
    guest.put(Gva(LIST), &words(&[link, link]), DATA);
    guest.put(Gva(link), &words(&[LIST, LIST]), DATA);
    assert!(!is_listed(&guest));
    let link = OBJECT + 16;
    for (first, last, next, previous) in [
        (link, link, LIST, 0),
        (link, 0, LIST, LIST),
        (link, LIST, LIST, LIST),
    ] {
        guest.put(Gva(LIST), &words(&[first, last]), DATA);
        guest.put(Gva(link), &words(&[next, previous]), DATA);
        assert!(
            !is_listed(&guest),
            "{first:x} {last:x} {next:x} {previous:x}"
        );
    }
    // Something else than the links before and behind leads to it.
    let [a, b] = [INODE + 16, HEAD + 16];
    guest.put(Gva(LIST), &words(&[a, b]), DATA);
    guest.put(Gva(a), &words(&[link, LIST]), DATA);
    guest.put(Gva(link), &words(&[b, b]), DATA);
    guest.put(Gva(b), &words(&[LIST, a]), DATA);
    assert!(!is_listed(&guest));
    // It goes round and round.
    let other = INODE + 16;
    guest.put(Gva(LIST), &words(&[other, other]), DATA);
    guest.put(Gva(other), &words(&[LIST, LIST]), DATA);
    assert!(!is_listed(&guest));
    guest.put(Gva(other), &words(&[other, LIST]), DATA);
    assert!(!is_listed(&guest));
    // In no variable of the size.
    guest.put(Gva(LIST), &words(&[0, 0]), DATA);
    guest.put(Gva(VARIABLES + 0x60), &words(&[link, link]), DATA);
    let head = VARIABLES + 0x60;
    guest.put(Gva(link), &words(&[head, head]), DATA);
    assert!(!is_listed(&guest));
}

/// `fat_cache_inval_inode`.
#[test]
fn objects_of_a_slab_cache_that_is_the_drivers_alone_are_its_own() {
    let cache = VARIABLES + 0x80;
    let mut guest = guest_with_objects();
    guest.put(Gva(cache), &words(&[CACHES[1]]), DATA);
    let mut policy = policy(&guest);
    let may = |policy: &mut DriverPolicy, guest: &TestGuest, at| {
        policy.begin("my_irq", [0; 6]);
        let may = ask(policy, guest, guest, at, 8);
        policy.end(true);
        may
    };
    assert!(!may(&mut policy, &guest, OBJECT), "nobody knows of it");
    policy.own_variables.caches.insert(Gva(cache));
    assert!(may(&mut policy, &guest, OBJECT));
    assert!(!may(&mut policy, &guest, PACKETS), "another cache");
    assert!(!may(&mut policy, &guest, HEAD), "no object");
    // Somebody else has asked for one of the same size.
    guest.put(Gva(CACHES[1] + 24), &words(&[2]), DATA);
    assert!(!may(&mut policy, &guest, OBJECT));
    guest.put(Gva(CACHES[1] + 24), &words(&[1]), DATA);
    guest.put(Gva(cache), &words(&[0x10]), DATA);
    assert!(!may(&mut policy, &guest, OBJECT));
    // In a free object is the list of those.
    let list = VMEMMAP + ((OBJECTS - DIRECT) >> 12) * 64 + 32;
    let mut free = guest.clone();
    free.put(Gva(cache), &words(&[CACHES[1]]), DATA);
    free.put(Gva(list), &words(&[OBJECT]), DATA);
    assert!(!may(&mut policy, &free, OBJECT));
    assert!(may(&mut policy, &free, INODE));
    // The call has had it point there itself.
    let before = guest.clone();
    guest.put(Gva(cache), &words(&[CACHES[1]]), DATA);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &before, OBJECT, 8));
    assert!(!ask(&mut policy, &before, &guest, OBJECT, 8));
    policy.end(true);
    assert!(may(&mut policy, &guest, OBJECT));
}
