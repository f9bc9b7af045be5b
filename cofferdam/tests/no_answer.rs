//! VMs that do not answer, and guests that cannot: every command ends, and says why.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use std::time::{Duration, Instant};

mod common;

use common::place::{LIMIT, Place, end, finish, signal};
use common::{ECHO_CODE, EM_X86_64, elf};

/// A kernel that prints `text` and then does nothing for ever.
fn printing_kernel(text: &str) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        // mov al, byte; out dx, al
        code.extend([0xb0, byte, 0xee]);
    }
    // hlt; jmp to it
    code.extend([0xf4, 0xeb, 0xfd]);
    elf(EM_X86_64, &code)
}

/// A command's status and what it says.
fn say(place: &Place, words: &str) -> (i32, String) {
    let output = finish(place.command().args(words.split(' ')).spawn().unwrap());
    let mut said = String::from_utf8(output.stdout).unwrap();
    said.push_str(&String::from_utf8(output.stderr).unwrap());
    (output.status.code().unwrap(), said)
}

#[test]
fn a_vm_that_is_stopped_holds_up_nobody() {
    let place = Place::new();
    let other = place.idle("");
    let stopped = place.start("still", &place.idle_kernel(), "");
    signal(&stopped, libc::SIGSTOP);
    let list: serde_json::Value = serde_json::from_str(&place.ask("list --json")).unwrap();
    assert_eq!(list[0]["status"]["state"], "running", "{list}");
    assert_eq!(list[1]["name"], "still");
    let why = list[1]["no_answer"].as_str().unwrap();
    assert!(why.contains("its process is stopped"), "{why}");
    assert!(place.ask("list").contains("does not answer"));
    let kill = format!("kill -CONT {}", stopped.id());
    for (words, status) in [
        ("status still", 1),
        ("pause still", 1),
        ("stop still", 1),
        ("isolate still e1000 --entries all", 1),
        ("exec still -- true", 125),
    ] {
        let (code, said) = say(&place, words);
        assert_eq!(code, status, "{words}: {said}");
        assert!(said.contains(&kill), "{words}: {said}");
        assert_eq!(said.lines().count(), 1, "{words}: {said}");
    }
    // What was asked of it is done when it goes on: nobody was told otherwise.
    signal(&stopped, libc::SIGCONT);
    end(&place, other, &["still"]);
    end(&place, stopped, &[]);
}

#[test]
fn a_vm_that_is_stopped_can_be_ended_by_force() {
    let place = Place::new();
    let mut stopped = place.idle("");
    signal(&stopped, libc::SIGSTOP);
    let (code, said) = say(&place, "stop idle --force");
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("it was killed"), "{said}");
    stopped.wait().unwrap();
    place.assert_empty();
}

#[test]
fn a_guest_that_panicked_is_said_to_have() {
    let place = Place::new();
    let text = "[    1.5] Kernel panic - not syncing: for a test\r\n";
    let kernel = place.file("panicking", &printing_kernel(text));
    let vm = place.start("idle", &kernel, "");
    let deadline = Instant::now() + LIMIT;
    let line = "Kernel panic - not syncing: for a test";
    while place.status()["guest_panic"] != line {
        assert!(Instant::now() < deadline, "{}", place.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(place.ask("list").contains("panicked"));
    assert!(place.ask("status").contains(line));
    for (words, status) in [
        ("exec idle -- true", 125),
        ("isolate idle e1000 --entries all", 1),
        ("resume-device idle e1000", 1),
    ] {
        let (code, said) = say(&place, words);
        assert_eq!(code, status, "{words}: {said}");
        assert!(said.contains(line), "{words}: {said}");
        assert!(said.contains("cofferdam reset"), "{words}: {said}");
    }
    end(&place, vm, &[]);
}

#[test]
fn nothing_is_asked_of_a_guest_that_is_paused() {
    let place = Place::new();
    let vm = place.idle("");
    place.ask("pause idle");
    for (words, status) in [
        ("isolate idle e1000 --entries all", 1),
        ("resume-device idle e1000", 1),
        ("exec idle -- true", 125),
    ] {
        let (code, said) = say(&place, words);
        assert_eq!(code, status, "{words}: {said}");
        assert!(said.contains("paused"), "{words}: {said}");
        assert!(said.contains("cofferdam resume"), "{words}: {said}");
    }
    end(&place, vm, &[]);
}

#[test]
fn tables_fit_a_terminal_of_80_columns() {
    let place = Place::new();
    let long = "a-name-that-is-as-long-as-names-of-virtual-machines-can-ever-be";
    let vm = place.start(long, &place.idle_kernel(), "--net user");
    for words in ["list", "status"] {
        let output = place
            .command()
            .arg(words)
            .env("COLUMNS", "80")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        assert!(text.lines().count() > 3, "{text}");
    }
    end(&place, vm, &[]);
}

/// What `top --once` says of a VM, by cell.
fn top_of(text: &str, vm: &str) -> Vec<String> {
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("{vm} ")));
    let cells = line.unwrap_or_else(|| panic!("no {vm} in:\n{text}"));
    cells.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn top_without_a_terminal_prints_one_frame_and_a_vm_that_is_stopped_does_not_spoil_it() {
    let place = Place::new();
    let (code, said) = say(&place, "top");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("top --once"), "{said}");
    assert_eq!(say(&place, "top --once --interval 0").0, 2);
    let none = place.ask("top --once --interval 0.1");
    assert!(none.ends_with("no VM is running\n"), "{none}");
    // It asks its serial port again and again, with an exit each time.
    let kernel = place.file("echo", &elf(EM_X86_64, &ECHO_CODE));
    let busy = place.start("busy", &kernel, "--net user");
    let stopped = place.start("still", &place.idle_kernel(), "");
    signal(&stopped, libc::SIGSTOP);
    let deadline = Instant::now() + LIMIT;
    loop {
        let text = place.ask("top --once --interval 0.2");
        let still = top_of(&text, "still").join(" ");
        assert!(still.contains("does not answer"), "{text}");
        assert!(still.contains("its process is stopped"), "{text}");
        let cells = top_of(&text, "busy");
        assert_eq!(cells[1..3], ["running", "1"], "{text}");
        assert!(!text.contains('\x1b'), "{text}");
        // It has no driver, and so no frames, but a NIC that counts them.
        if !matches!(cells[5].as_str(), "-" | "0") && cells[6..8] == ["0", "0"] {
            break;
        }
        assert!(Instant::now() < deadline, "no rates in:\n{text}");
    }
    signal(&stopped, libc::SIGCONT);
    end(&place, busy, &["still"]);
    end(&place, stopped, &[]);
}

#[test]
fn escapes_in_a_guests_last_words_do_not_reach_a_persons_terminal() {
    let place = Place::new();
    let text = "[    1.5] Kernel panic - not syncing: \x1b]0;x\x07for a test\r\n";
    let kernel = place.file("panicking", &printing_kernel(text));
    let vm = place.start("idle", &kernel, "");
    let deadline = Instant::now() + LIMIT;
    while place.status()["guest_panic"].is_null() {
        assert!(Instant::now() < deadline, "{}", place.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    let text = place.ask("top --once --interval 0.1");
    assert_eq!(top_of(&text, "idle")[1], "panicked", "{text}");
    assert!(text.contains("for a test"), "{text}");
    assert!(!text.contains(['\x1b', '\x07']), "{text}");
    end(&place, vm, &[]);
}
