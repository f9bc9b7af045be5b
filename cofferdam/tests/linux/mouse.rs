//! The stock driver of a PS/2 mouse on our keyboard controller, isolated, and its faults.

use cofferdam::bench::guest::Guest;

use super::isolation::{ask, ask_json, isolated, refused};
use super::{assert_log_is_healthy, boot, options, shell, wait_until};

/// The mouse's port in the guest's bus of such devices.
const PORT: &str = "/sys/bus/serio/devices/serio1";
/// Event types and codes (include/uapi/linux/input-event-codes.h).
const KEY: u16 = 1;
const RELATIVE: u16 = 2;
const LEFT: u16 = 0x110;
const RIGHT: u16 = 0x111;
const WHEEL: u16 = 8;

/// Reads what the guest's one input device reports from now on into a file.
fn read_events(guest: &mut Guest) {
    // It sees what comes once it has the device open.
    shell(
        guest,
        "killall cat; rm -f /tmp/events; cat /dev/input/event* > /tmp/events 2>/dev/null < /dev/null & \
         for t in $(seq 1 400); do ls -l /proc/$!/fd 2>/dev/null | grep -q /dev/input/event && exit 0; sleep 0.05; done; \
         exit 1",
    );
}

/// Type, code and value of what it has reported since, without the ends of reports.
fn events(guest: &mut Guest) -> Vec<(u16, u16, i32)> {
    let bytes = guest.agent().read_file("/tmp/events").unwrap();
    // `struct input_event` of a 64-bit kernel: a time of 16 bytes before.
    let all = bytes.chunks_exact(24).map(|event| {
        let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
        let value = i32::from_le_bytes(event[20..24].try_into().unwrap());
        (word(16), word(18), value)
    });
    all.filter(|(kind, ..)| *kind != 0).collect()
}

/// These come, in this order, and no others.
#[track_caller]
fn come(guest: &mut Guest, expected: &[(u16, u16, i32)]) {
    wait_until("the mouse's events", || {
        events(guest).len() >= expected.len()
    });
    assert_eq!(events(guest), expected);
    shell(guest, ": > /tmp/events");
    let counts = ask_json(guest, "mouse guest status");
    assert_eq!(counts["steps"], counts["packets"], "{counts}");
    assert_eq!(counts["waiting"], 0, "{counts}");
}

/// The mouse moves, when its driver has switched it on, and the guest sees it.
#[track_caller]
fn mouse_works(guest: &mut Guest) {
    let moves = || vec!["mouse", "guest", "move", "3", "-4"];
    wait_until("the mouse", || {
        guest.agent().disconnect();
        super::isolation::command(guest, &moves().join(" "))
            .status
            .success()
    });
    come(guest, &[(RELATIVE, 0, 3), (RELATIVE, 1, -4)]);
}

/// The same where calls of the driver fail. Where one takes more than half a second, as on a busy
/// machine, `psmouse` by its own rule throws away the packet that the byte belongs to
/// (drivers/input/mouse/psmouse-base.c, `psmouse_interrupt`, "lost synchronization"), and the mouse
/// moves once more.
#[track_caller]
fn mouse_works_through_faults(guest: &mut Guest) {
    for lost in 0..5 {
        let before = losses(guest);
        wait_until("the mouse", || {
            guest.agent().disconnect();
            super::isolation::command(guest, "mouse guest move 3 -4")
                .status
                .success()
        });
        let mut is_lost = false;
        wait_until("the mouse's events, or their loss", || {
            is_lost = losses(guest) > before;
            is_lost || events(guest).len() >= 2
        });
        if !is_lost {
            return come(guest, &[(RELATIVE, 0, 3), (RELATIVE, 1, -4)]);
        }
        assert!(events(guest).is_empty(), "part of a packet");
        eprintln!("psmouse threw away {} packets that came late", lost + 1);
    }
    panic!("each packet is lost");
}

/// How many packets `psmouse` has thrown away as too late.
fn losses(guest: &mut Guest) -> u32 {
    let count = "dmesg | grep -c 'lost synchronization, throwing' || true";
    shell(guest, count).trim().parse().unwrap()
}

/// How often a call of `function` failed so far.
fn aborts(guest: &mut Guest, function: &str) -> u64 {
    let modules = isolated(guest);
    let entries = modules[0]["entries"].as_array().unwrap();
    let entry = entries.iter().find(|entry| entry["name"] == function);
    entry.unwrap()["aborts"].as_u64().unwrap()
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_mouse_goes_on_under_its_isolated_driver_and_through_faults_in_it() {
    let options = options().initrd("initrd-hardware.cpio");
    let mut guest = boot(&options.with("--mouse --memory 256M"));
    refused(&mut guest, "mouse guest move 1 1", "does not listen");
    shell(&mut guest, "modprobe psmouse; modprobe evdev");
    let found = format!(
        "for t in $(seq 1 200); do [ -e {PORT}/protocol ] && ls /dev/input/event* && break; sleep 0.1; done; cat {PORT}/protocol"
    );
    assert!(shell(&mut guest, &found).ends_with("ImPS/2\n"));
    read_events(&mut guest);
    ask(
        &mut guest,
        "isolate guest psmouse --entries all --budget-us 10000000",
    );
    what_happens_is_seen(&mut guest);
    // Rate and resolution are told to the mouse by calls that wait for its answers.
    let set = format!("cd {PORT}; echo 40 > rate; echo 100 > resolution; cat rate resolution");
    assert_eq!(shell(&mut guest, &set), "40\n100\n");
    mouse_works(&mut guest);
    let status = ask_json(&mut guest, "violations guest psmouse");
    assert_eq!(
        status["violations"].as_array().unwrap().len(),
        0,
        "{status}"
    );
    // A byte comes once: the call that it was given to is run again.
    for place in ["first", "last"] {
        let before = aborts(&mut guest, "psmouse_interrupt");
        let fault = format!("inject guest psmouse psmouse_interrupt --at {place}");
        ask(&mut guest, &fault);
        mouse_works_through_faults(&mut guest);
        ask(&mut guest, "inject guest psmouse --undo");
        assert!(aborts(&mut guest, "psmouse_interrupt") > before, "{place}");
    }
    what_happens_is_seen(&mut guest);
    // It goes back with the guest, and is as it was there.
    ask(&mut guest, "mark guest");
    ask(&mut guest, "mouse guest press left");
    come(&mut guest, &[(KEY, LEFT, 1)]);
    ask(&mut guest, "rewind guest");
    ask(&mut guest, "mouse guest click");
    come(&mut guest, &[(KEY, LEFT, 1), (KEY, LEFT, 0)]);
    assert_log_is_healthy(&mut guest, &[]);
}

/// All that a mouse can do comes as it was sent.
#[track_caller]
fn what_happens_is_seen(guest: &mut Guest) {
    for event in [
        "move 10 -5",
        "move 600 0",
        "click",
        "wheel -3",
        "press right",
        "release right",
    ] {
        ask(guest, &format!("mouse guest {event}"));
    }
    let expected = [
        (RELATIVE, 0, 10),
        (RELATIVE, 1, -5),
        (RELATIVE, 0, 255),
        (RELATIVE, 0, 255),
        (RELATIVE, 0, 90),
        (KEY, LEFT, 1),
        (KEY, LEFT, 0),
        (RELATIVE, WHEEL, -3),
        (KEY, RIGHT, 1),
        (KEY, RIGHT, 0),
    ];
    come(guest, &expected);
}
