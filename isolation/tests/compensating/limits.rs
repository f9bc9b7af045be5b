//! Calls that go on in the guest and fail, of which much would have to be kept.

use super::*;

#[test]
fn a_call_may_call_as_many_kernel_functions_as_the_largest_rings_take() {
    const DESCRIPTORS: u64 = 4096;
    let mut bench = Bench::new(&[]);
    let kernel_functions = [ALLOC, SWITCH_ON, SWITCH_OFF, ALLOC, FREE];
    bench.guest.code(DRIVER_TEXT, |a| {
        // Waits for a reset, takes a ring down, and sets another one up: each descriptor is
        // allocated, mapped, and so on.
        a.push(rbx).unwrap();
        a.call(WAITS).unwrap();
        a.mov(rbx, DESCRIPTORS).unwrap();
        let mut next = a.create_label();
        a.set_label(&mut next).unwrap();
        for function in kernel_functions {
            a.mov(rdi, rbx).unwrap();
            a.call(function).unwrap();
        }
        a.dec(rbx).unwrap();
        a.jnz(next).unwrap();
        a.call(WAITS).unwrap();
        a.pop(rbx).unwrap();
        a.ud2().unwrap();
    });
    bench.redirect_calls();
    let result = bench.begin();
    let result = bench.go_on(&result, 0);
    assert!(result.stats.runs > 9 * DESCRIPTORS, "{:?}", result.stats);
    assert!(matches!(result.end, CallEnd::Spilled(..)), "{result:?}");
    assert_eq!(bench.guest.read(ALLOCATED), 2 * DESCRIPTORS);
    let end = bench.go_on(&result, 0);
    // What was switched on and off again is no concern; what was freed was not yet.
    let taken_back = calls(&end);
    assert_eq!(taken_back.len() as u64, 2 * DESCRIPTORS);
    assert!(taken_back.iter().all(|(function, _)| *function == FREE));
    assert!(!violation(&end).stays());
    assert_eq!(bench.guest.read(FREED), 0);
}

#[test]
fn a_call_of_more_kernel_functions_than_are_kept_stays_and_is_not_slowed_down_by_them() {
    let mut bench = Bench::new(&[]);
    let all = MAX_CALLS as u64 + 1000;
    bench.guest.code(DRIVER_TEXT, |a| {
        a.push(rbx).unwrap();
        a.call(WAITS).unwrap();
        a.mov(rbx, all).unwrap();
        let mut next = a.create_label();
        a.set_label(&mut next).unwrap();
        a.call(ALLOC).unwrap();
        a.dec(rbx).unwrap();
        a.jnz(next).unwrap();
        a.call(WAITS).unwrap();
        a.pop(rbx).unwrap();
        a.ud2().unwrap();
    });
    bench.redirect_calls();
    let result = bench.begin();
    let result = bench.go_on(&result, 0);
    // Two exits for each that is kept, and none for the others.
    let exits = result.stats.runs;
    assert!(exits > 2 * MAX_CALLS as u64 && exits < 2 * MAX_CALLS as u64 + 100);
    let end = bench.go_on(&result, 0);
    assert_eq!(*published(&end), Published::Stays(Stays::TooManyCalls));
}

#[test]
fn open_calls_together_have_the_host_keep_no_more_than_there_is_room_for() {
    const LIMIT: u64 = 2 << 20;
    let steps = [Do::Store(0, 11), Do::Call(FREE, 1), WAIT, Do::Fault];
    let mut guest = Guest::new();
    guest.host_memory = HostMemory::new(LIMIT);
    let account = guest.host_memory.clone();
    let mut bench = Bench::in_guest(guest, &steps, |_| {});
    // So much that two calls have room for it, and not three.
    bench.kernel.more_restorable = 1500 * PAGE;
    let mut open = Vec::new();
    let refused = loop {
        let result = bench.begin();
        assert!(account.used() <= LIMIT, "{}", account.used());
        match result.end {
            CallEnd::Spilled(..) => open.push(result),
            other => break other,
        }
    };
    assert!(
        matches!(
            refused,
            CallEnd::PassThrough(PassThroughReason::TrappedFunction)
        ),
        "{refused:?}"
    );
    // There was room for the calls themselves when there was none for what takes them back, and the
    // first have that.
    assert!(open.len() > 100, "{}", open.len());
    let end = bench.go_on(&open[0], 0);
    assert!(matches!(published(&end), Published::Undone { .. }));
    let last = open.pop().unwrap();
    let end = bench.go_on(&last, 0);
    assert_eq!(*published(&end), Published::Stays(Stays::TooMuchMemory));
    // What a failed call has yet to give back is charged until that is done.
    drop((open, last));
    assert!(account.used() > 0);
    drop(end);
    assert_eq!(account.used(), 0);
    let result = bench.begin();
    let end = bench.go_on(&result, 0);
    assert!(matches!(published(&end), Published::Undone { .. }));
}

#[test]
fn a_call_of_which_more_would_have_to_be_kept_than_there_is_room_for_stays() {
    let mut bench = Bench::new(&[Do::Store(0, 11), WAIT, Do::Fault]);
    bench.kernel.more_restorable = u64::MAX / 2;
    let end = bench.run();
    assert_eq!(bench.data(0), 11);
    assert_eq!(*published(&end), Published::Stays(Stays::TooMuchMemory));
}

#[test]
fn a_call_that_does_not_go_on_in_the_guest_pays_nothing() {
    let steps = [Do::Call(ALLOC, 0), Do::Store(0, 1), Do::Call(FREE, 1)];
    let mut bench = Bench::new(&steps);
    for _ in 0..4 {
        bench.run();
    }
    let with = bench.run();
    assert!(matches!(with.end, CallEnd::Committed));
    assert_eq!((with.stats.runs, with.stats.other_syscalls), (1, 0));
    assert_eq!(calls(&with), []);
    assert_eq!(bench.guest.read(FREED), 5);
}
