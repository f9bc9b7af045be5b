//! The agent and the host's client over a socket pair, in this process: real programs, real files.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests are outside of #[test] functions"
)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_protocol::client::Channel;
use agent_protocol::message::*;
use agent_protocol::{Client, ClientError, PROTOCOL_VERSION, frame};
use guest_agent::server::{Powers, serve};

/// The host's end of a channel whose other end an agent serves.
fn agent() -> UnixStream {
    let (host, guest) = UnixStream::pair().unwrap();
    std::thread::spawn(move || serve(File::from(OwnedFd::from(guest)), Powers::Nothing));
    host
}

/// A client of that agent, and a second handle on its stream.
fn client() -> (Client, UnixStream) {
    let host = agent();
    let other = host.try_clone().unwrap();
    (client_of(host), other)
}

fn client_of(host: UnixStream) -> Client {
    let mut client = Client::new(move || Ok(Box::new(host.try_clone()?)));
    client.set_limit(Duration::from_secs(60));
    client
}

fn shell(script: &str) -> Exec {
    Exec {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        ..Exec::default()
    }
}

fn limited(script: &str) -> Exec {
    Exec {
        limit_ms: Some(100),
        ..shell(script)
    }
}

#[test]
fn hello_tells_who_answers() {
    let (mut client, _) = client();
    let agent = client.hello(Duration::from_secs(60)).unwrap();
    assert_eq!(agent.version, PROTOCOL_VERSION);
    assert_eq!(agent.pid, std::process::id());
    let first = client.ping().unwrap();
    let second = client.ping().unwrap();
    assert!(first.received.mono_ns <= first.sent.mono_ns);
    assert!(first.sent.mono_ns <= second.received.mono_ns);
}

#[test]
fn program_gets_everything_and_gives_everything_back() {
    let (mut client, _) = client();
    let exec = Exec {
        env: vec![("WORD".into(), "from the host".into())],
        cwd: Some("/proc".into()),
        stdin: Bytes(vec![b'x'; 300_000]),
        ..shell("pwd; echo $WORD; wc -c; echo problem >&2; exit 7")
    };
    let result = client.exec(exec).unwrap();
    assert_eq!(result.end, ExecEnd::Exited(7));
    assert_eq!(result.stdout_text(), "/proc\nfrom the host\n300000\n");
    assert_eq!(result.stderr, b"problem\n");
    assert!(!result.success());
}

#[test]
fn input_and_output_larger_than_any_pipe_flow_at_the_same_time() {
    let (mut client, _) = client();
    let input: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let exec = Exec {
        argv: vec!["cat".into()],
        stdin: Bytes(input.clone()),
        ..Exec::default()
    };
    let result = client.exec(exec).unwrap();
    assert_eq!(result.end, ExecEnd::Exited(0));
    assert!(result.stdout == input);
}

#[test]
fn output_over_the_callers_limit_ends_the_call_and_the_next_one_works() {
    let (mut client, _) = client();
    client.set_collect_limit(1 << 20);
    let endless = client.exec(Exec {
        argv: vec!["yes".into()],
        ..Exec::default()
    });
    assert!(
        matches!(endless, Err(ClientError::TooMuch(_))),
        "{endless:?}"
    );
    assert_eq!(
        client.run(&["echo", "still here"]).unwrap().stdout,
        b"still here\n"
    );
}

#[test]
fn program_whose_time_is_up_is_killed_with_its_children() {
    let (mut client, _) = client();
    let directory = tempfile::tempdir().unwrap();
    let pids = directory.path().join("pids");
    let script = format!("sleep 1000 & echo $! $$ >{}; wait", pids.display());
    let result = client.exec(limited(&script)).unwrap();
    assert_eq!(result.end, ExecEnd::TimeLimit);
    for pid in std::fs::read_to_string(pids).unwrap().split_whitespace() {
        wait_until_gone(pid);
    }
}

/// Until there is no such process, or only what its parent has not yet asked for.
fn wait_until_gone(pid: &str) {
    let start = Instant::now();
    while std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z "))
    {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "process {pid} lives on"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn program_left_in_the_background_does_not_hold_up_the_answer() {
    let (mut client, _) = client();
    let result = client.exec(shell("sleep 1000 & echo $!")).unwrap();
    assert_eq!(result.end, ExecEnd::Exited(0));
    let status = client.run(&["kill", result.stdout_text().trim()]).unwrap();
    assert!(status.success());
}

#[test]
fn background_program_that_writes_for_ever_does_not_hold_up_the_answer() {
    let (mut client, _) = client();
    let result = client.exec(shell("yes & echo $! >&2")).unwrap();
    assert_eq!(result.end, ExecEnd::Exited(0));
    // Its pipe has no reader any more.
    wait_until_gone(String::from_utf8(result.stderr).unwrap().trim());
}

#[test]
fn programs_that_cannot_run_and_signals_are_told_apart() {
    let (mut client, _) = client();
    let missing = client.run(&["/no/such/program"]).unwrap_err();
    assert_eq!(missing.errno(), Some(libc::ENOENT));
    let nothing = client.exec(Exec::default()).unwrap_err();
    assert!(matches!(nothing, ClientError::Agent(_)), "{nothing:?}");
    assert_eq!(
        client.exec(shell("kill -9 $$")).unwrap().end,
        ExecEnd::Signaled(9)
    );
}

#[test]
fn chroot_is_the_programs_own() {
    let (mut client, _) = client();
    let root = tempfile::tempdir().unwrap();
    let exec = Exec {
        root: Some(root.path().to_str().unwrap().into()),
        ..shell("true")
    };
    let failed = client.exec(exec).unwrap_err();
    // Not root: no chroot. Root: an empty directory has no shell.
    assert!(
        matches!(failed.errno(), Some(libc::EPERM | libc::ENOENT)),
        "{failed:?}"
    );
    assert!(client.exec(shell("true")).unwrap().success());
}

#[test]
fn files_of_any_size_go_both_ways() {
    let (mut client, _) = client();
    let directory = tempfile::tempdir().unwrap();
    for size in [0, 1, CHUNK, 3 * CHUNK + 17] {
        let path = directory.path().join(format!("{size}"));
        let content: Vec<u8> = (0..size).map(|i| (i * 7 % 256) as u8).collect();
        client
            .write_file(path.to_str().unwrap(), &content, 0o640)
            .unwrap();
        assert!(std::fs::read(&path).unwrap() == content, "{size}");
        assert!(
            client.read_file(path.to_str().unwrap()).unwrap() == content,
            "{size}"
        );
    }
    assert_eq!(
        client.read_file("/no/such/file").unwrap_err().errno(),
        Some(libc::ENOENT)
    );
    assert!(!client.read_file("/proc/cpuinfo").unwrap().is_empty());
}

#[test]
fn interfaces_and_symbols_are_reported() {
    let (mut client, _) = client();
    assert!(client.interfaces().unwrap().iter().any(|i| i.name == "lo"));
    let names = vec!["schedule".to_string()];
    let filter = SymbolFilter {
        names: Some(names),
        module: Some(String::new()),
        ..SymbolFilter::default()
    };
    let symbols = client.symbols(filter).unwrap();
    assert!(
        symbols
            .iter()
            .all(|s| s.name == "schedule" && s.module.is_none()),
        "{symbols:?}"
    );
}

#[test]
fn an_interface_that_is_not_there_or_no_ethernet_gets_no_address_and_says_why() {
    let (mut client, _) = client();
    let mac = Some([2, 0, 0, 0, 0, 7]);
    for interface in ["cof-none", "", "a/b", "name-that-is-far-too-long"] {
        let refused = client.readdress(interface, mac, None, None).unwrap_err();
        assert!(matches!(refused, ClientError::Agent(_)), "{refused:?}");
        assert!(refused.to_string().contains("hardware address"));
        let address = Some("10.0.0.7/24".parse().unwrap());
        let refused = client.readdress(interface, None, address, None);
        assert!(matches!(refused, Err(ClientError::Agent(_))), "{refused:?}");
    }
    client.readdress("lo", None, None, None).unwrap();
}

#[test]
fn agent_of_another_machine_refuses_to_end_it_or_to_set_its_clock() {
    let (mut client, _) = client();
    for refused in [client.power_off(), client.reboot(), client.set_time(1)] {
        assert!(matches!(refused, Err(ClientError::Agent(_))), "{refused:?}");
    }
    client.ping().unwrap();
}

#[test]
fn new_client_on_the_same_channel_stops_the_old_ones_program() {
    let host = agent();
    let directory = tempfile::tempdir().unwrap();
    let pid = directory.path().join("pid");
    let script = format!(
        "echo $$ >{0}.new; mv {0}.new {0}; exec sleep 1000",
        pid.display()
    );
    let mut old = client_of(host.try_clone().unwrap());
    old.hello(Duration::from_secs(60)).unwrap();
    // An old client that dies in the middle: its request is sent, and half of another one.
    let mut raw = host.try_clone().unwrap();
    let request = agent_protocol::Request {
        id: 77,
        call: Call::Exec(shell(&script)),
    };
    frame::send(&mut raw, &serde_json::to_vec(&request).unwrap()).unwrap();
    raw.write_all(&1000u32.to_le_bytes()).unwrap();
    raw.write_all(b"{\"id\":78,").unwrap();
    let start = Instant::now();
    while !pid.exists() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the program was not started"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut new = client_of(host);
    assert_eq!(new.run(&["echo", "new"]).unwrap().stdout, b"new\n");
    wait_until_gone(std::fs::read_to_string(pid).unwrap().trim());
}

#[test]
fn client_that_was_not_answered_in_time_can_go_on() {
    let (mut client, _) = client();
    let fifo = tempfile::tempdir().unwrap();
    let path = fifo.path().join("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    client.hello(Duration::from_secs(60)).unwrap();
    client.set_limit(Duration::from_millis(50));
    // Opening a pipe that nobody writes blocks the agent's worker for ever.
    let blocked = client.read_file(path.to_str().unwrap());
    assert!(matches!(blocked, Err(ClientError::Time(..))), "{blocked:?}");
    client.set_limit(Duration::from_secs(60));
    assert!(!client.read_file("/proc/version").unwrap().is_empty());
}

#[test]
fn agent_that_starts_anew_is_noticed_and_found_again() {
    let current = Arc::new(Mutex::new(agent()));
    let connect_to = current.clone();
    let mut client = Client::new(move || Ok(Box::new(connect_to.lock().unwrap().try_clone()?)));
    client.set_limit(Duration::from_secs(60));
    client.ping().unwrap();
    // The agent goes away and another one comes.
    let old = std::mem::replace(&mut *current.lock().unwrap(), agent());
    old.shutdown(std::net::Shutdown::Both).unwrap();
    let broken = client.ping();
    assert!(matches!(broken, Err(ClientError::Channel(_))), "{broken:?}");
    client.ping().unwrap();
}

/// A host channel that gives what a hostile guest would send.
struct Hostile {
    input: io::Cursor<Vec<u8>>,
}

impl Read for Hostile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.read(buffer)
    }
}

impl Write for Hostile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel for Hostile {
    fn set_time_limit(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn agent_that_restarts_while_it_is_asked_is_reported() {
    let (host, guest) = UnixStream::pair().unwrap();
    let answers = std::thread::spawn(move || {
        let mut guest = guest;
        let (mut decoder, mut buffer) = (frame::Decoder::new(), [0; 4096]);
        let info = AgentInfo {
            version: PROTOCOL_VERSION,
            boot_id: "1".into(),
            kernel: "k".into(),
            pid: 1,
        };
        let say = |guest: &mut UnixStream, id, body| {
            let now = Stamp::default();
            let response = agent_protocol::Response {
                id,
                received: now,
                sent: now,
                body,
            };
            frame::send(guest, &serde_json::to_vec(&response).unwrap()).unwrap();
        };
        loop {
            let n = guest.read(&mut buffer).unwrap();
            let mut input = &buffer[..n];
            while let Some(item) = decoder.next(&mut input) {
                let frame::Item::Frame(payload) = item else {
                    continue;
                };
                let request: agent_protocol::Request = serde_json::from_slice(&payload).unwrap();
                match request.call {
                    Call::Hello { nonce } => {
                        say(
                            &mut guest,
                            request.id,
                            Body::Done(Done::Hello {
                                nonce,
                                agent: info.clone(),
                            }),
                        );
                    }
                    _ => {
                        frame::send_mark(&mut guest).unwrap();
                        say(&mut guest, 0, Body::Ready(info));
                        return;
                    }
                }
            }
        }
    });
    let result = client_of(host).ping();
    assert!(matches!(result, Err(ClientError::Restarted)), "{result:?}");
    answers.join().unwrap();
}

mod hostile {
    use super::*;
    use proptest::prelude::*;

    fn answer() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "[{}\\[\\]\":a-z0-9,]{0,60}".prop_map(|s| frame::encode(s.as_bytes()).unwrap()),
            (0u64..4).prop_map(|id| {
                let now = Stamp::default();
                let body = Body::Stdout(Bytes(vec![0; 100]));
                let response = agent_protocol::Response {
                    id,
                    received: now,
                    sent: now,
                    body,
                };
                frame::encode(&serde_json::to_vec(&response).unwrap()).unwrap()
            }),
            Just(frame::MARK.to_vec()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_that_an_agent_sends_makes_the_client_panic_or_wait_for_ever(
            answers in prop::collection::vec(answer(), 0..12),
        ) {
            let bytes = answers.concat();
            let mut client = Client::new(move || Ok(Box::new(Hostile { input: io::Cursor::new(bytes.clone()) })));
            client.set_limit(Duration::from_millis(5));
            prop_assert!(client.ping().is_err());
        }

        #[test]
        fn nothing_that_a_host_sends_ends_the_agent(rubbish in prop::collection::vec(any::<u8>(), 0..400)) {
            let (mut client, mut raw) = client();
            raw.write_all(&rubbish).unwrap();
            client.ping().unwrap();
        }
    }
}
