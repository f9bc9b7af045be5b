//! The guest's agent and its `/init`, from outside.

use std::time::Duration;

use agent_protocol::Client;
use agent_protocol::message::{ExecEnd, RestartDriver, StepName, SymbolFilter};

use cofferdam::bench::network::{ADDRESS, GATEWAY, INTERFACE};

use super::shared;
use crate::BOOT_TIME;

const EEXIST: i32 = libc::EEXIST;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
#[expect(
    clippy::too_many_lines,
    reason = "one story: each step begins where the last ended"
)]
fn the_agent_says_of_modules_and_symbols_what_the_kernel_says() {
    let mut guest = shared();
    let agent = guest.agent();

    let e1000 = agent.modules(Some("e1000")).unwrap().remove(0);
    assert_eq!((e1000.state.as_str(), e1000.refcnt), ("live", Some(0)));
    let text = e1000
        .sections
        .iter()
        .find(|(name, _)| name == ".text")
        .unwrap()
        .1;
    let named = |name: &str| SymbolFilter {
        module: Some("e1000".into()),
        names: Some(vec![name.into()]),
        ..SymbolFilter::default()
    };
    let open = agent.symbols(named("e1000_open")).unwrap().remove(0);
    assert!(
        (text..text + e1000.size).contains(&open.address),
        "{open:?} {e1000:?}"
    );
    assert!(agent.symbols(named("schedule")).unwrap().is_empty());
    let all = agent.symbols(SymbolFilter::default()).unwrap();
    let lines = agent
        .run(&["wc", "-l", "/proc/kallsyms"])
        .unwrap()
        .stdout_text();
    assert!(
        lines.starts_with(&all.len().to_string()),
        "{} of {lines}",
        all.len()
    );

    let (records, next) = agent.kmsg(0).unwrap();
    assert!(records.iter().any(|r| r.text.contains("e1000")));
    assert_eq!(records.last().unwrap().seq + 1, next);
    agent
        .write_file("/dev/kmsg", b"a word from the host\n", 0)
        .unwrap();
    let (new, _) = agent.kmsg(next).unwrap();
    assert!(
        new.iter().any(|r| r.text == "a word from the host"),
        "{new:?}"
    );

    agent.load_module("dummy", "numdummies=2").unwrap();
    assert_eq!(
        agent.load_module("dummy", "").unwrap_err().errno(),
        Some(EEXIST)
    );
    assert!(
        agent
            .interfaces()
            .unwrap()
            .iter()
            .any(|i| i.name == "dummy1")
    );
    agent.remove_module("dummy").unwrap();
    assert_eq!(
        agent.remove_module("dummy").unwrap_err().errno(),
        Some(libc::ENOENT)
    );
    let missing = agent.load_module("no_such_module", "").unwrap_err();
    assert!(missing.to_string().contains("no_such_module"), "{missing}");

    let restart = RestartDriver {
        module: "e1000".into(),
        params: String::new(),
        interface: INTERFACE.into(),
        address: ADDRESS,
        gateway: Some(GATEWAY),
        wait_carrier: true,
        limit_ms: 60_000,
    };
    let (steps, answer) = agent.restart_driver(restart).unwrap();
    let names: Vec<StepName> = steps.iter().map(|s| s.step).collect();
    use StepName::{Address, Carrier, Insert, Interface, Remove, Up};
    assert_eq!(names, [Remove, Insert, Interface, Address, Up, Carrier]);
    let mut times = vec![answer.received.mono_ns];
    times.extend(steps.iter().flat_map(|s| [s.begin.mono_ns, s.end.mono_ns]));
    times.push(answer.sent.mono_ns);
    assert!(times.is_sorted(), "{times:?}");
    let nic = agent
        .interfaces()
        .unwrap()
        .into_iter()
        .find(|i| i.name == INTERFACE)
        .unwrap();
    assert_eq!(
        (nic.ipv4, nic.carrier, nic.driver.as_deref()),
        (vec![ADDRESS], Some(true), Some("e1000"))
    );
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn an_agent_that_is_killed_comes_back_and_no_process_stays_a_zombie() {
    let mut guest = shared();
    let agent = guest.agent();
    let first = agent.hello(BOOT_TIME).unwrap();
    // Its parent ends before it does: process 1 has to wait for it.
    let orphan = agent
        .run(&["sh", "-c", "(sleep 0.1 & echo $!)"])
        .unwrap()
        .stdout_text();
    // It cannot answer that; how its end shows depends on what notices it first.
    let killed = agent.run(&["kill", "-9", &first.pid.to_string()]);
    assert!(killed.is_err(), "{killed:?}");
    let second = agent.hello(BOOT_TIME).unwrap();
    assert_eq!(first.boot_id, second.boot_id);
    assert_ne!(first.pid, second.pid);
    let wait = format!("while [ -e /proc/{} ]; do sleep 0.1; done", orphan.trim());
    let gone = agent.run(&["timeout", "20", "sh", "-c", &wait]).unwrap();
    assert_eq!(gone.end, ExecEnd::Exited(0));
    let states = agent
        .run(&["sh", "-c", "cat /proc/[0-9]*/stat"])
        .unwrap()
        .stdout_text();
    assert!(!states.contains(") Z "), "{states}");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn clients_that_come_and_go_at_once_keep_nobody_out() {
    let mut guest = shared();
    let socket = guest.paths().agent_socket();
    for round in 0..40 {
        guest.agent().run(&["true"]).unwrap();
        guest.agent().disconnect();
        let mut other = Client::unix(socket.clone());
        if round % 2 == 0 {
            // It leaves before the guest knows of it, with a word that nobody has read.
            let _too_soon = other.hello(Duration::from_millis(1));
            other.disconnect();
        }
        other.modules(None).unwrap_or_else(|error| {
            panic!("client {round}: {error}{}", guest.what_it_does());
        });
    }
}
