//! Life of a machine: I/O, power-off, reset, pause.

mod common;

use common::{Guest, config, start};
use vmm::{ExitReason, OnGuestReset, Refused, VmState};

guest_code!(
    reports_then_powers_off,
    "mov edx, 0x500",
    "mov eax, 0x11223344",
    "out dx, al",
    "out dx, ax",
    "out dx, eax",
    "in eax, dx", // one less than the last report
    "out dx, eax",
    "mov edx, 0x600",
    "mov al, 0x34", // SLP_EN, S5
    "out dx, al",
    "1: hlt",
    "jmp 1b",
);

#[test]
fn port_accesses_keep_their_width_and_acpi_sleep_turns_off() {
    let guest = start(reports_then_powers_off(), 1);
    assert_eq!(guest.report_with_width(), (1, 0x44));
    assert_eq!(guest.report_with_width(), (2, 0x3344));
    assert_eq!(guest.report_with_width(), (4, 0x1122_3344));
    assert_eq!(guest.report_with_width(), (4, 0x1122_3343));
    let handle = guest.handle.clone();
    assert_eq!(guest.end().unwrap(), ExitReason::GuestPowerOff);
    assert_eq!(handle.state(), VmState::Stopped);
    assert_eq!(handle.pause(), Err(Refused::Stopped));
    assert_eq!(handle.reset(), Err(Refused::Stopped));
    let status = handle.status();
    assert_eq!((status.exits[0].io_out, status.exits[0].io_in), (5, 1));
}

guest_code!(
    resets_twice,
    "mov edx, 0x500",
    "mov eax, [0x200000]", // zero again after each reset
    "out dx, eax",
    "mov dword ptr [0x200000], 7",
    "in eax, dx",
    "mov rcx, cr4", // a register that a reset has to put back
    "or ecx, 0x10",
    "mov cr4, rcx",
    "mov edx, 0xcf9",
    "mov al, 6",
    "out dx, al",
    "1: jmp 1b",
);

#[test]
fn reset_port_starts_again_with_empty_memory_until_the_host_ends_it() {
    let guest = start(resets_twice(), 2);
    for _ in 0..3 {
        assert_eq!(guest.report(), 0);
    }
    assert!(guest.handle.status().resets >= 2);
    guest.power_off();
}

#[test]
fn reset_ends_the_machine_where_that_was_asked_for() {
    let mut config = config(resets_twice(), 1);
    config.on_guest_reset = OnGuestReset::Exit;
    assert_eq!(
        Guest::new(config).start().end().unwrap(),
        ExitReason::GuestReset
    );
}
