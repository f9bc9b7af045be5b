//! What kernel functions hand out to a call is its own.

use super::*;

#[test]
fn objects_handed_out_to_the_call_may_be_written_until_it_is_taken_back() {
    let before = guest();
    let mut now = before.clone();
    let fresh = OBJECTS + 512;
    now.put(Gva(fresh + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &before, &before, fresh, 8), "still free");
    assert!(ask(&mut policy, &now, &before, fresh, 256));
    assert!(
        policy
            .owner(Gva(fresh))
            .unwrap()
            .label
            .starts_with("kmalloc-256 handed out")
    );
    policy.end(false);
    policy.begin("my_irq", [0; 6]);
    assert!(
        !ask(&mut policy, &now, &now, fresh, 8),
        "the call was taken back"
    );
}

#[test]
fn what_was_handed_out_to_a_committed_call_stays_the_drivers() {
    let before = guest();
    let mut now = before.clone();
    let fresh = OBJECTS + 512;
    now.put(Gva(fresh + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &now, &before, fresh, 8));
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &now, &now, fresh, 256));
    // The slab is gone; nobody has memory there.
    put_page(&mut now, OBJECTS, 0, 0, 0);
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &now, &now, fresh, 8));
}

#[test]
fn an_object_handed_out_on_a_page_that_is_open_already_stays_the_drivers_too() {
    let (first, second, third, others) = (OBJECTS + 512, OBJECTS + 768, OBJECTS + 1024, OBJECTS);
    let mut before = guest();
    for free in [second, third] {
        before.put(Gva(free + 128), &words(&[0xfeed_f00d]), DATA);
    }
    let mut now = before.clone();
    now.put(Gva(first + 128), &words(&[0]), DATA);
    now.put(Gva(second + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    let memory = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    let changed = |at| GvaRange::new(Gva(at), 256).unwrap();
    // No page was opened: somebody else's business.
    policy.begin("my_irq", [0; 6]);
    policy.committing(&memory, changed(second));
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &now, &now, second, 8));
    // The call is asked about the first only.
    assert!(ask(&mut policy, &now, &before, first, 8));
    for at in [second, others] {
        policy.committing(&memory, changed(at));
    }
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &now, &now, first, 8));
    assert!(ask(&mut policy, &now, &now, second, 256));
    assert!(!ask(&mut policy, &now, &now, others, 8), "it was not new");
    policy.end(true);
    // The page stays open: of another object there nobody is asked in a later call either.
    let mut later = now.clone();
    later.put(Gva(third + 128), &words(&[0]), DATA);
    let memory = CallMemory {
        private: later.virt(),
        before: MemoryBefore::new(now.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    policy.begin("my_irq", [0; 6]);
    policy.committing(&memory, changed(third));
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &later, &later, third, 256));
}

#[test]
fn what_was_handed_out_after_a_mark_is_somebody_elses_after_the_rewind() {
    let (fresh, later) = (OBJECTS + 512, OBJECTS + 768);
    let mut before = guest();
    before.put(Gva(later + 128), &words(&[0xfeed_f00d]), DATA);
    let mut now = before.clone();
    now.put(Gva(fresh + 128), &words(&[0]), DATA);
    let mut last = now.clone();
    last.put(Gva(later + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &now, &before, fresh, 8));
    policy.end(true);
    let kept = policy.keep();
    for _ in 0..3 {
        policy.begin("my_irq", [0; 6]);
        assert!(ask(&mut policy, &last, &now, later, 8));
        policy.end(true);
        policy.begin("my_irq", [0; 6]);
        assert!(ask(&mut policy, &last, &last, later, 8));
        policy.put_back(&kept);
        policy.begin("my_irq", [0; 6]);
        assert!(!ask(&mut policy, &last, &last, later, 8));
        assert!(ask(&mut policy, &last, &last, fresh, 8));
        policy.end(true);
    }
}

#[test]
fn what_was_handed_out_to_the_call_is_its_own_though_the_guest_has_it_already() {
    let before = guest();
    let mut now = before.clone();
    let fresh = OBJECTS + 512;
    now.put(Gva(fresh + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    let mut memory = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(now.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    let range = GvaRange::new(Gva(fresh), 8).unwrap();
    assert!(!policy.may_write(&memory, range), "nothing says it is new");
    let virt = before.virt();
    let gpa = virt.space.walk(virt.memory, Gva(OBJECTS)).unwrap().gpa.0;
    let mut page = [0; 4096];
    before.virt().read(Gva(OBJECTS), &mut page).unwrap();
    memory.before.keep(gpa, &page);
    assert!(policy.may_write(&memory, range));
}

#[test]
fn what_was_handed_out_to_an_attempt_is_not_that_of_the_next_one() {
    let before = guest();
    let mut now = before.clone();
    let fresh = OBJECTS + 512;
    now.put(Gva(fresh + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    // The kernel calls the driver back with the interface.
    policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
    assert!(ask(&mut policy, &now, &before, fresh, 8));
    let mut memory: CallMemory<'_, TestMemory> = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    memory.before.keep(0, &[7; 4096]);
    policy.begin_again(&mut memory);
    assert_eq!(
        policy.calls.len(),
        1,
        "the call-back has not happened in it"
    );
    let mut first = [0; 1];
    memory
        .before
        .read(vm_memory::GuestAddress(0), &mut first)
        .ok();
    assert_ne!(first, [7], "the page that was kept");
    assert!(!ask(&mut policy, &before, &before, fresh, 8), "free again");
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(
        !ask(&mut policy, &now, &now, fresh, 8),
        "handed out to somebody else meanwhile"
    );
}

#[test]
fn what_was_handed_out_and_is_held_when_the_call_goes_on_in_the_guest_stays_the_drivers() {
    let before = guest();
    let mut now = before.clone();
    let (fresh, other) = (OBJECTS + 512, OBJECTS);
    now.put(Gva(fresh + 128), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    let memory = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    policy.leave(&memory, &[0, 7, other, fresh, MODULE, u64::MAX]);
    policy.end(true);
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &now, &now, fresh, 256));
    assert!(!ask(&mut policy, &now, &now, other, 8), "it was not new");
}

#[test]
fn a_packet_allocated_by_the_call_brings_its_data() {
    let before = guest();
    let mut now = before.clone();
    let packet = PACKETS + 256;
    now.put(Gva(packet), &words(&[0, 0x100, HEAD]), DATA);
    now.put(Gva(packet + 64), &words(&[0]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    assert!(
        !ask(&mut policy, &now, &before, HEAD, 8),
        "nothing says so yet"
    );
    assert!(ask(&mut policy, &now, &before, packet + 100, 8));
    assert!(ask(&mut policy, &now, &before, HEAD, 0x140));
    assert!(!ask(&mut policy, &now, &before, HEAD + 0x140, 1));
}

#[test]
fn a_packet_that_a_kernel_function_returned_brings_its_data_before_anything_is_stored_to_it() {
    let before = guest();
    let mut now = before.clone();
    // Its head is a piece of a page that is nobody's news.
    let packet = PACKETS;
    now.put(Gva(packet), &words(&[0, 0x100, HEAD]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &now, &before, HEAD + 0x100, 8));
    let memory = CallMemory {
        private: now.virt(),
        before: MemoryBefore::new(before.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    // A pointer into it is no packet, and neither is one that the call was not given.
    policy.hold(&memory, &[packet + 8, PACKETS + 256, OBJECTS, 7, u64::MAX]);
    assert!(!ask(&mut policy, &now, &before, HEAD + 0x100, 8));
    policy.hold(&memory, &[packet]);
    assert!(ask(&mut policy, &now, &before, HEAD + 0x100, 8));
    assert!(
        !ask(&mut policy, &now, &before, HEAD + 0x140, 8),
        "behind it"
    );
}

#[test]
fn a_packet_from_stock_is_the_calls_once_the_kernel_has_filled_it_in() {
    let before = guest();
    let mut now = before.clone();
    // It is linked with no free object; nothing but its head changes.
    let packet = PACKETS;
    now.put(Gva(packet), &words(&[0, 0x100, HEAD]), DATA);
    let mut policy = policy(&before);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &before, &before, packet, 8));
    assert!(ask(&mut policy, &now, &before, packet, 8));
    assert!(ask(&mut policy, &now, &before, HEAD, 8));
}
