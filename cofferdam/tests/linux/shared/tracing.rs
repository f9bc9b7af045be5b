//! `cofferdam trace` on a live guest.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::shared;
use crate::isolation::{ask, refused};
use crate::ping;

/// What no call takes to come while there is traffic.
const LONG: Duration = Duration::from_secs(300);

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn calls_of_a_driver_are_recorded_with_names_and_registers_while_it_works() {
    let mut guest = shared();
    refused(&mut guest, "trace guest e1000", "e1000 is not isolated");
    ask(
        &mut guest,
        "isolate guest e1000 --entry e1000_xmit_frame --entry e1000_intr --budget-us 10000000",
    );
    let no_function = "trace guest e1000 --function e1000_open";
    refused(&mut guest, no_function, "e1000_open is not isolated");
    let none =
        "trace guest e1000 --function e1000_xmit_frame --limit 1 --calls 64 --output /nowhere/t";
    refused(&mut guest, none, "cannot write /nowhere/t");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let root = guest.paths().dir.parent().unwrap().to_owned();
    let mut tracing = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .env("COFFERDAM_RUNTIME_DIR", root)
        .args("trace guest e1000 --calls 6 --limit 300 --json --output".split(' '))
        .arg(&path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LONG;
    while tracing.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "{}", guest.last_words());
        ping(&mut guest, "10.0.2.2", 56);
    }
    let output = tracing.wait_with_output().unwrap();
    assert!(output.status.success());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{summary:#}");
    let calls = summary["calls"].as_array().unwrap();
    assert_eq!(calls.len(), 6);
    for call in calls {
        let phases = call["phases"].as_array().unwrap();
        let sum: u64 = phases.iter().map(|one| one["ns"].as_u64().unwrap()).sum();
        assert_eq!(call["total_ns"], sum, "{call}");
        assert_eq!(call["ended"], "committed", "{call}");
    }
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let has = |part: &str| {
        let mut names = events.iter().filter_map(|event| event["name"].as_str());
        names.any(|name| name.contains(part))
    };
    for part in ["e1000_xmit_frame", "e1000_intr", "BAR 0 + 0x", "commit"] {
        assert!(has(part), "no {part} in {}", path.display());
    }
    // Nothing is recorded any more, and what is isolated goes on.
    ping(&mut guest, "10.0.2.2", 56);
    ask(&mut guest, "release guest e1000");
    refused(&mut guest, "trace guest e1000", "e1000 is not isolated");
}
