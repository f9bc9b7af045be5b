//! The lab's watchdog and retry, with a QEMU that only sleeps and an agent that does as the test
//! says.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use agent_protocol::frame::{self, Decoder, Item};
use agent_protocol::message::{AgentInfo, Body, Bytes, Call, Done, Response, Stamp};
use agent_protocol::{PROTOCOL_VERSION, Request as Message};

use super::super::machine::{AGENT_SOCKET, Machine};
use super::*;

/// What the agent of one boot does.
#[derive(Clone, Copy, Debug)]
enum Agent {
    /// Never says anything.
    Mute,
    /// Answers until the command comes, then no more.
    HangsInCommand,
    /// Closes the channel when the command comes.
    BreaksInCommand,
    /// Runs the command: writes its last argument, ends with this status.
    Works(i32),
    /// Tells that the time limit killed the command.
    TimeLimit,
}

struct Fixture {
    /// Removed with it.
    _directory: tempfile::TempDir,
    settings: Settings,
}

impl Fixture {
    /// `qemu` is a shell script. Agents are used up, one for each boot.
    fn new(qemu: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        for name in ["vmlinuz", "initrd"] {
            fs::write(file(name), "").unwrap();
        }
        fs::write(file("qemu"), format!("#!/bin/sh\n{qemu}\n")).unwrap();
        fs::set_permissions(file("qemu"), fs::Permissions::from_mode(0o755)).unwrap();
        let machine = Machine {
            qemu: file("qemu"),
            kernel: file("vmlinuz"),
            initrd: file("initrd"),
            out: file("out"),
            cpus: 1,
            memory_mib: 1024,
        };
        let settings = Settings {
            machine,
            directory: file("lab"),
            workspace: file("workspace"),
            number: 0,
            boot_limit: Duration::from_millis(1500),
            silence_limit: Duration::from_millis(1200),
        };
        Self {
            _directory: directory,
            settings,
        }
    }

    /// Runs one command in a lab whose boots meet these agents; what it wrote comes along.
    fn run(&self, agents: &[Agent]) -> (anyhow::Result<Outcome>, String) {
        self.run_in(Kind::Fresh, agents, || {})
    }

    /// The same in a lab of this kind; `meanwhile` is called beside it.
    fn run_in(
        &self,
        kind: Kind,
        agents: &[Agent],
        meanwhile: impl FnOnce() + Send,
    ) -> (anyhow::Result<Outcome>, String) {
        let directory = match kind {
            Kind::Kept => self.settings.kept(),
            _ => {
                let name = format!("once-{}-0", std::process::id());
                self.settings.directory.join(name)
            }
        };
        let socket = directory.join(AGENT_SOCKET);
        let done = AtomicBool::new(false);
        let written = Mutex::new(String::new());
        let result = std::thread::scope(|scope| {
            scope.spawn(|| serve(&socket, agents, &done));
            scope.spawn(meanwhile);
            let mut lab = Lab::open(self.settings.clone(), kind).unwrap();
            let argv = vec!["say".into(), "hello".into()];
            let request = Request::new(argv, Duration::from_secs(600)).unwrap();
            let result = lab.run(&request, &mut |_, bytes| {
                written
                    .lock()
                    .unwrap()
                    .push_str(std::str::from_utf8(bytes).unwrap());
                Ok(())
            });
            lab.close().unwrap();
            done.store(true, Ordering::SeqCst);
            result
        });
        (result, written.into_inner().unwrap())
    }

    fn counts(&self) -> super::super::ledger::Counts {
        Ledger::new(&self.settings.directory).read().unwrap()
    }
}

const SLEEPING_QEMU: &str = "exec sleep 600";

/// Binds the socket anew for each boot, whose directory is made anew.
fn serve(socket: &Path, agents: &[Agent], done: &AtomicBool) {
    let boots = AtomicUsize::new(0);
    while !done.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
        if socket.exists() || !socket.parent().unwrap().join("pid").exists() {
            continue;
        }
        let Ok(listener) = UnixListener::bind(socket) else {
            continue;
        };
        let agent = agents
            .get(boots.fetch_add(1, Ordering::SeqCst))
            .copied()
            .unwrap_or(Agent::Mute);
        listener.set_nonblocking(true).unwrap();
        while socket.exists() && !done.load(Ordering::SeqCst) {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    serve_client(stream, agent);
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

fn serve_client(mut stream: UnixStream, agent: Agent) {
    let mut decoder = Decoder::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let mut input = &buffer[..count];
        while let Some(item) = decoder.next(&mut input) {
            let Item::Frame(payload) = item else { continue };
            let message: Message = serde_json::from_slice(&payload).unwrap();
            if !answer(&mut stream, agent, message) {
                return;
            }
        }
    }
}

/// `false` when the channel is to be closed.
fn answer(stream: &mut UnixStream, agent: Agent, message: Message) -> bool {
    let mut send = |body: Body| {
        let stamp = Stamp::default();
        let response = Response {
            id: message.id,
            received: stamp,
            sent: stamp,
            body,
        };
        // The other side may have given up already: then nobody waits for it.
        let _ = stream.write_all(&frame::encode(&serde_json::to_vec(&response).unwrap()).unwrap());
    };
    let exec = match message.call {
        _ if matches!(agent, Agent::Mute) => return true,
        Call::Hello { nonce } => {
            let agent = AgentInfo {
                version: PROTOCOL_VERSION,
                boot_id: "boot".into(),
                kernel: "6.1".into(),
                pid: 1,
            };
            send(Body::Done(Done::Hello { nonce, agent }));
            return true;
        }
        Call::Exec(exec) if exec.root.is_some() => exec,
        Call::Exec(_) => {
            send(Body::Done(Done::Exec(ExecEnd::Exited(0))));
            return true;
        }
        _ => return true,
    };
    match agent {
        Agent::Works(status) => {
            send(Body::Stdout(Bytes(
                exec.argv.last().unwrap().clone().into_bytes(),
            )));
            send(Body::Done(Done::Exec(ExecEnd::Exited(status))));
        }
        Agent::TimeLimit => send(Body::Done(Done::Exec(ExecEnd::TimeLimit))),
        Agent::BreaksInCommand => return false,
        Agent::Mute | Agent::HangsInCommand => {}
    }
    true
}

#[test]
fn status_and_output_of_a_command_come_back() {
    let fixture = Fixture::new(SLEEPING_QEMU);
    let (result, written) = fixture.run(&[Agent::Works(7)]);
    let outcome = result.unwrap();
    assert_eq!((outcome.ended, outcome.retries), (Ended::Exited(7), 0));
    assert_eq!(written, "hello");
    let counts = fixture.counts();
    assert_eq!((counts.starts, counts.commands, counts.retries), (1, 1, 0));
}

#[test]
fn lab_that_hangs_is_replaced_once_and_counted() {
    for hung in [Agent::HangsInCommand, Agent::BreaksInCommand, Agent::Mute] {
        let fixture = Fixture::new(SLEEPING_QEMU);
        let (result, written) = fixture.run(&[hung, Agent::Works(0)]);
        let outcome = result.unwrap();
        assert_eq!(
            (outcome.ended, outcome.retries),
            (Ended::Exited(0), 1),
            "{hung:?}"
        );
        assert_eq!(written, "hello");
        let counts = fixture.counts();
        assert_eq!((counts.starts, counts.retries), (2, 1), "{hung:?}");
        assert_eq!(counts.newest[0].command, ["say", "hello"]);
        let diagnosis = counts.newest[0].diagnosis.as_ref().unwrap();
        assert!(diagnosis.join("processors.txt").is_file());
    }
}

#[test]
fn lab_that_hangs_twice_is_an_error() {
    let fixture = Fixture::new(SLEEPING_QEMU);
    let (result, _) = fixture.run(&[Agent::HangsInCommand, Agent::HangsInCommand]);
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("hung twice") && error.contains("no sign of life"),
        "{error}"
    );
}

#[test]
fn lab_that_is_stopped_while_a_command_runs_ends_it_and_is_not_started_again() {
    let fixture = Fixture::new(SLEEPING_QEMU);
    let settings = &fixture.settings;
    let stop = || {
        // The command is counted when it is about to be sent.
        while fixture.counts().commands == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(Lab::stop_kept(settings).unwrap());
    };
    let (result, _) = fixture.run_in(Kind::Kept, &[Agent::HangsInCommand], stop);
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.contains("stopped by `lab stop`"), "{error}");
    let counts = fixture.counts();
    assert_eq!((counts.starts, counts.retries), (1, 0));
}

#[test]
fn limits_follow_how_long_the_lab_took_to_come_up() {
    let fixture = Fixture::new(SLEEPING_QEMU);
    let mut lab = Lab::open(fixture.settings.clone(), Kind::Fresh).unwrap();
    assert_eq!(lab.pace(), 1.0);
    lab.boot = Some(IDLE_BOOT * 3);
    assert_eq!(lab.pace(), 3.0);
    lab.boot = Some(IDLE_BOOT / 2);
    assert_eq!(lab.pace(), 1.0);
}

#[test]
fn command_that_takes_too_long_is_not_tried_again() {
    let fixture = Fixture::new(SLEEPING_QEMU);
    let (result, _) = fixture.run(&[Agent::TimeLimit]);
    let outcome = result.unwrap();
    assert_eq!((outcome.ended, outcome.retries), (Ended::TimeLimit, 0));
    assert_eq!(outcome.ended.status(), 124);
}

#[test]
fn qemu_that_ends_at_once_tells_why() {
    let fixture = Fixture::new("echo 'qemu: bad option' >&2; exit 1");
    let (result, _) = fixture.run(&[]);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("bad option"), "{error}");
    assert_eq!(fixture.counts().retries, 0);
}

#[test]
fn missing_image_names_the_command_that_makes_it() {
    let fixture = Fixture::new(SLEEPING_QEMU);
    fs::remove_file(&fixture.settings.machine.initrd).unwrap();
    let (result, _) = fixture.run(&[]);
    assert!(format!("{:#}", result.unwrap_err()).contains("cargo xtask images"));
}

#[test]
fn nothing_is_left_running_or_lying_about() {
    let fixture = Fixture::new("echo $$ > ../qemu.pid; exec sleep 600");
    let (result, _) = fixture.run(&[Agent::Works(0)]);
    result.unwrap();
    let pid = fs::read_to_string(fixture.settings.directory.join("qemu.pid")).unwrap();
    assert!(
        !Path::new("/proc").join(pid.trim()).exists(),
        "QEMU still runs"
    );
    let left: Vec<_> = fs::read_dir(&fixture.settings.directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("once-"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn exit_statuses_are_those_of_a_shell() {
    assert_eq!(Ended::Exited(3).status(), 3);
    assert_eq!(Ended::Exited(256 + 3).status(), 3);
    assert_eq!(Ended::Signaled(9).status(), 137);
    assert_eq!(Ended::Interrupted.status(), 130);
}
