//! The question that is asked before there is a call.

use super::*;

fn rehearse(policy: &mut DriverPolicy, guest: &TestGuest) {
    let memory: CallMemory<'_, TestMemory> = CallMemory {
        private: guest.virt(),
        before: MemoryBefore::new(guest.virt().memory),
        stack: None,
        per_cpu_base: PER_CPU,
    };
    policy.rehearse(&memory, ["my_open", "my_irq", "no_such"].into_iter());
}

/// The guest with its interface in the list of the first namespace.
fn listed() -> TestGuest {
    let mut guest = guest();
    let (head, link) = (BASES + 32 + 8, DEVICE + 16);
    guest.put(Gva(head), &words(&[link]), DATA);
    guest.put(Gva(link), &words(&[head]), DATA);
    guest
}

#[test]
fn what_is_asked_before_there_is_a_call_opens_nothing_and_changes_no_answer() {
    for guest in [guest(), listed()] {
        let (mut asked, mut fresh) = (policy(&guest), policy(&guest));
        let open = asked.table().len();
        rehearse(&mut asked, &guest);
        assert_eq!(asked.table().len(), open);
        let places = [
            VARIABLES + 8,
            DEVICE,
            DEVICE + 96,
            DEVICE + 250,
            OBJECTS,
            MODULE,
            BASES,
            HEAD,
            PACKETS,
            PER_CPU + 0x180 + 16,
        ];
        for (function, argument) in [("my_open", DEVICE), ("my_irq", 0)] {
            for at in places {
                let answers = [&mut asked, &mut fresh].map(|policy| {
                    policy.begin(function, [argument, 0, 0, 0, 0, 0]);
                    let may = ask(policy, &guest, &guest, at, 8);
                    policy.end(true);
                    may
                });
                assert_eq!(answers[0], answers[1], "{function} at {at:#x}");
            }
        }
        assert_eq!(asked.table().len(), open);
    }
}

#[test]
fn the_interfaces_that_were_found_are_forgotten_and_each_call_looks_for_its_own() {
    let mut guest = listed();
    let mut policy = policy(&guest);
    rehearse(&mut policy, &guest);
    assert!(policy.interfaces.is_empty());
    assert!(!policy.listed, "a call looks for them");
    policy.begin("my_irq", [0; 6]);
    assert!(ask(&mut policy, &guest, &guest, DEVICE, 8));
    policy.end(true);
    // Its memory is somebody else's by now, and looks as it did.
    let mut policy = self::policy(&guest);
    rehearse(&mut policy, &guest);
    let head = BASES + 32 + 8;
    guest.put(Gva(head), &words(&[head]), DATA);
    policy.begin("my_irq", [0; 6]);
    assert!(!ask(&mut policy, &guest, &guest, DEVICE, 8));
}

#[test]
fn a_damaged_list_and_memory_that_is_not_there_do_no_harm() {
    let mut guest = guest();
    let (head, link) = (BASES + 32 + 8, DEVICE + 16);
    for next in [0, link, u64::MAX, DIRECT + 0x77_0000, head + 1] {
        guest.put(Gva(head), &words(&[link]), DATA);
        guest.put(Gva(link), &words(&[next]), DATA);
        let mut policy = policy(&guest);
        rehearse(&mut policy, &guest);
        policy.begin("my_open", [DEVICE, 0, 0, 0, 0, 0]);
        assert!(ask(&mut policy, &guest, &guest, DEVICE, 8), "{next:#x}");
    }
}
