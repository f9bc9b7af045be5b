//! What becomes of the device of calls that go on in the guest and fail.

use super::*;

#[test]
fn the_device_is_put_back_part_by_part() {
    let mut bench = Bench::new(&[
        Do::Device(1),
        Do::Load,
        Do::Device(2),
        WAIT,
        Do::Call(HARMLESS, 0),
        WAIT,
        Do::Device(3),
        WAIT,
        Do::Device(4),
        Do::Fault,
    ]);
    bench.run();
    // Two stores in the first part, none in the second, one in the third; the fourth never
    // happened.
    assert_eq!(bench.kernel.undone_parts, [(0, 2), (2, 3)]);
}

#[test]
fn packets_are_kept_out_from_the_part_on_that_changed_the_transmitter() {
    let mut bench = Bench::new(&[
        Do::Device(1),
        WAIT,
        Do::Device(2),
        Do::Device(TRANSMITTER),
        WAIT,
        Do::Store(0, 11),
        WAIT,
        Do::Device(3),
        WAIT,
        // Dropped with the part that it is in.
        Do::Fault,
    ]);
    let mut kept_out = Vec::new();
    let mut result = bench.begin();
    while let CallEnd::Spilled(_, call) = &result.end {
        kept_out.push(call.keeps_packets_out());
        result = bench.go_on(&result, 0);
    }
    assert_eq!(kept_out, [false, true, true, true]);
    assert!(!violation(&result).stays());
}

#[test]
fn a_call_that_cannot_be_taken_back_anyhow_keeps_no_packets_out() {
    let mut bench = Bench::new(&[Do::Device(TRANSMITTER), WAIT]);
    let request = CallRequest {
        effects: None,
        ..Bench::request(&bench.guest, &bench.effects, bench.guest.entry_regs())
    };
    let result = bench.domain.call(&request, &mut bench.kernel).unwrap();
    assert!(!spilled(&result).keeps_packets_out());
}
