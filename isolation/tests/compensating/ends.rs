//! What nobody but the failed call would end: it is ended also where something else of it stays.

use super::*;

/// The kernel functions that are called when a call fails that has done this, something that nothing
/// takes back, and then this.
fn ended(first: &[Do], then: &[Do]) -> Vec<(u64, u64)> {
    let mut bench =
        Bench::new(&[first, &[Do::Call(FOREVER, 1), WAIT], then, &[Do::Fault]].concat());
    let end = bench.run();
    assert_eq!(
        *published(&end),
        Published::Stays(Stays::Irrevocable { function: FOREVER })
    );
    calls(&end)
}

#[test]
fn locks_that_a_call_holds_are_let_go_last_one_first_and_before_what_it_let_go_of() {
    let locks = [Do::Call(LOCK, 1), Do::Call(FREE, 3), Do::Call(LOCK, 2)];
    assert_eq!(ended(&locks, &[]), [(UNLOCK, 2), (UNLOCK, 1), (FREE, 3)]);
    // One was released in a part that is in the guest, another one in the part that is dropped.
    let then = [Do::Call(UNLOCK, 2), WAIT, Do::Call(UNLOCK, 1)];
    assert_eq!(ended(&locks, &then), [(UNLOCK, 1), (FREE, 3)]);
    // What it did not begin it does not end.
    assert_eq!(ended(&[Do::Call(UNLOCK, 5), Do::Call(ALLOC, 0)], &[]), []);
}

#[test]
fn what_is_about_an_object_on_its_stack_is_taken_back_and_what_is_about_its_callers_is_not() {
    let bench = Bench::new(&[]);
    let return_address = bench.guest.entry_regs().rsp;
    let about = |object: u64| ended(&[Do::Call(SWITCH_ON, object)], &[]);
    assert_eq!(
        about(return_address - 0x40),
        [(SWITCH_OFF, return_address - 0x40)]
    );
    assert_eq!(about(return_address + 8), []);
    assert_eq!(about(DRIVER_DATA), []);
}

#[test]
fn nothing_is_ended_where_not_all_calls_are_known() {
    let mut bench = Bench::new(&[]);
    bench.guest.code(DRIVER_TEXT, |a| {
        a.push(rbx).unwrap();
        a.mov(rdi, 1u64).unwrap();
        a.call(LOCK).unwrap();
        a.mov(rbx, MAX_CALLS as u64 + 1).unwrap();
        let mut next = a.create_label();
        a.set_label(&mut next).unwrap();
        a.call(ALLOC).unwrap();
        a.dec(rbx).unwrap();
        a.jnz(next).unwrap();
        // Not seen any more.
        a.mov(rdi, 1u64).unwrap();
        a.call(UNLOCK).unwrap();
        a.call(WAITS).unwrap();
        a.pop(rbx).unwrap();
        a.ud2().unwrap();
    });
    bench.redirect_calls();
    let end = bench.run();
    assert_eq!(*published(&end), Published::Stays(Stays::TooManyCalls));
    assert_eq!(calls(&end), []);
}

#[test]
fn a_kernel_function_that_called_the_driver_back_cannot_be_abandoned() {
    let guest_callback = DRIVER_TEXT + 0x800;
    let calls_back = KERNEL_TEXT + 0x400;
    let mut bench = Bench::with(&[Do::Call(calls_back, 0)], |guest| {
        guest.code(calls_back, |a| {
            a.mov(rax, guest_callback).unwrap();
            a.call(rax).unwrap();
            a.ret().unwrap();
        });
        guest.code(guest_callback, |a| {
            a.call(WAITS).unwrap();
            a.xor(eax, eax).unwrap();
            a.mov(rax, qword_ptr(rax)).unwrap();
            a.ret().unwrap();
        });
    });
    bench.domain.redirect(guest_callback, WAITS).unwrap();
    bench.effects.harmless.insert(calls_back);
    bench.kernel.driver_functions.insert(guest_callback);
    let end = bench.run();
    assert_eq!(
        *published(&end),
        Published::Stays(Stays::KernelFunctionOpen)
    );
}
