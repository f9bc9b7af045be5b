//! `cofferdam isolate` and its like on a live guest, by the command line.

use std::process::{Command, Output};

use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, LINK_TIME};
use serde_json::Value;

use super::{BOOT_TIME, boot, options, ping};

/// Runs `cofferdam` with these words on the guest's VM.
pub fn command(guest: &Guest, words: &str) -> Output {
    let root = guest.paths().dir.parent().unwrap();
    Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .env("COFFERDAM_RUNTIME_DIR", root)
        .args(words.split_whitespace())
        .output()
        .unwrap()
}

/// The same; it must succeed.
#[track_caller]
pub fn ask(guest: &mut Guest, words: &str) -> String {
    // The VM asks the agent itself, which listens to one client at a time.
    guest.agent().disconnect();
    let output = command(guest, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{words}: {error}{}",
        guest.last_words()
    );
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
pub fn ask_json(guest: &mut Guest, words: &str) -> Value {
    serde_json::from_str(&ask(guest, &format!("{words} --json"))).unwrap()
}

/// It must fail with one line that says `says`.
#[track_caller]
pub fn refused(guest: &mut Guest, words: &str, says: &str) {
    guest.agent().disconnect();
    let output = command(guest, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}: {error}");
    assert_eq!(error.lines().count(), 1, "{words}: {error}");
    assert!(error.contains(says), "{words}: no {says:?} in: {error}");
}

/// Modules that `status` shows as isolated.
pub fn isolated(guest: &mut Guest) -> Vec<Value> {
    let status = ask_json(guest, "status guest");
    status["isolation"].as_array().cloned().unwrap_or_default()
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn isolation_ends_with_a_guest_that_crashes() {
    let mut guest = boot(&options().with("--net user --nic e1000"));
    network::bring_up(&mut guest, "e1000").unwrap();
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    ask(
        &mut guest,
        "isolate guest e1000 --entry e1000_xmit_frame --entry e1000_clean --entry e1000_intr --budget-us 10000000",
    );
    ping(&mut guest, "10.0.2.2", 56);
    assert_eq!(isolated(&mut guest).len(), 1);
    begins_anew(&mut guest, |guest| {
        // It cannot answer that.
        drop(
            guest
                .agent()
                .run(&["sh", "-c", "echo c > /proc/sysrq-trigger"]),
        );
    });
    network::bring_up(&mut guest, "e1000").unwrap();
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    ping(&mut guest, "10.0.2.2", 56);
}

/// Waits until the guest has booted again after what `end` does, with nothing isolated.
#[track_caller]
pub fn begins_anew(guest: &mut Guest, end: fn(&mut Guest)) {
    let boot = guest.agent().hello(BOOT_TIME).unwrap().boot_id.clone();
    let resets = guest.control().unwrap().status().unwrap().resets;
    end(guest);
    let deadline = std::time::Instant::now() + BOOT_TIME;
    while guest.control().unwrap().status().unwrap().resets == resets {
        assert!(
            std::time::Instant::now() < deadline,
            "{}",
            guest.last_words()
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    guest.agent().disconnect();
    guest.wait_for_agent(BOOT_TIME).unwrap();
    assert_ne!(guest.agent().agent().unwrap().boot_id, boot);
    assert_eq!(isolated(guest).len(), 0);
}
