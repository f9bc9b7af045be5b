//! Threads that look which processes run, and ask each how it is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use devices::clock::monotonic_ns;
use recovery::violations::Violations;

use super::reading::{Guest, Host};
use crate::control::client::{Connection, ControlClient};
use crate::control::protocol::{Reply, Request, Status};
use crate::device::protocol::{self as device, DeviceProtocol};
use crate::error_text::one_line;
use crate::runtime_dir::{RunningVm, RuntimeRoot};

/// How long a process may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Modules of a guest whose violations are asked for.
const MOST_MODULES: usize = 64;

/// What a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A guest.
    Guest,
    /// A device host.
    Host,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Who {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its number, if it is known.
    pub pid: Option<u32>,
}

/// What the lister and the pollers tell.
#[derive(Debug)]
pub enum Told {
    /// All that run now.
    Running(Vec<Who>),
    /// Why that is not known.
    NotListed(String),
    /// A reading of a guest, or why there is none.
    Guest(Who, Result<Box<Guest>, String>),
    /// A reading of a device host, or why there is none.
    Host(Who, Result<Box<Host>, String>),
}

/// Where they tell it; `false` when nobody listens any more.
type Tell = Arc<dyn Fn(Told) -> bool + Send + Sync>;

/// Starts the lister for `root`, and with it a poller for each process there.
///
/// # Errors
/// The lister's thread cannot be started.
pub fn start(
    root: RuntimeRoot,
    interval: Duration,
    tell: impl Fn(Told) -> bool + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let tell: Tell = Arc::new(tell);
    thread::Builder::new()
        .name("lister".to_owned())
        .spawn(move || list(&root, interval, &tell))
        .context("cannot start the thread that lists VMs")?;
    Ok(())
}

fn list(root: &RuntimeRoot, interval: Duration, tell: &Tell) {
    // A poller ends when its sender is dropped.
    let mut pollers: HashMap<Who, Sender<()>> = HashMap::new();
    loop {
        let told = match running(root) {
            Ok(running) => {
                pollers.retain(|who, _| running.iter().any(|(other, _)| other == who));
                let all = running.iter().map(|(who, _)| who.clone()).collect();
                // Before its first reading, which is of nobody otherwise.
                let heard = tell(Told::Running(all));
                for (who, process) in running {
                    let of = who.clone();
                    let start = || start_poller(&of, process, interval, tell);
                    pollers.entry(who).or_insert_with(start);
                }
                heard
            }
            Err(error) => tell(Told::NotListed(one_line(&error))),
        };
        if !told {
            return;
        }
        thread::sleep(interval);
    }
}

fn running(root: &RuntimeRoot) -> anyhow::Result<Vec<(Who, RunningVm)>> {
    let mut all = Vec::new();
    for (kind, processes) in [
        (Kind::Guest, root.running()?),
        (Kind::Host, root.devices().running()?),
    ] {
        all.extend(processes.into_iter().map(|process| {
            let who = Who {
                kind,
                name: process.name.to_string(),
                pid: process.pid,
            };
            (who, process)
        }));
    }
    Ok(all)
}

fn start_poller(who: &Who, process: RunningVm, interval: Duration, tell: &Tell) -> Sender<()> {
    let (poller, ended) = channel();
    let (of, heard) = (who.clone(), Arc::clone(tell));
    let work = move || match of.kind {
        Kind::Guest => {
            let mut known = Known::default();
            poll(interval, &ended, || {
                heard(guest(&of, read_guest(&process, &mut known)))
            });
        }
        Kind::Host => poll(interval, &ended, || heard(host(&of, read_host(&process)))),
    };
    let started = thread::Builder::new().name("poller".to_owned()).spawn(work);
    if let Err(error) = started {
        let error = anyhow::Error::new(error).context("it is not asked, no thread can be started");
        // Whether anybody listens is seen where the next thing is told.
        let _ = match who.kind {
            Kind::Guest => tell(guest(who, Err(error))),
            Kind::Host => tell(host(who, Err(error))),
        };
    }
    poller
}

fn guest(who: &Who, read: anyhow::Result<Guest>) -> Told {
    let read = read.map(Box::new).map_err(|error| one_line(&error));
    Told::Guest(who.clone(), read)
}

fn host(who: &Who, read: anyhow::Result<Host>) -> Told {
    let read = read.map(Box::new).map_err(|error| one_line(&error));
    Told::Host(who.clone(), read)
}

/// Reads again and again until the process has ended or nobody listens.
fn poll(interval: Duration, ended: &Receiver<()>, mut read: impl FnMut() -> bool) {
    while read() && ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {}
}

/// Violations of modules with their number: they are asked for again when there are more.
type Known = BTreeMap<String, (u64, Vec<Violations>)>;

fn read_guest(process: &RunningVm, known: &mut Known) -> anyhow::Result<Guest> {
    let deadline = Instant::now() + ANSWER_TIME;
    let mut client = ControlClient::to(process, ANSWER_TIME)?;
    let status: Status = client.status()?;
    let at_ns = monotonic_ns();
    let modules = status.isolation.iter().take(MOST_MODULES);
    known.retain(|name, _| modules.clone().any(|module| module.module == *name));
    for module in modules {
        let name = &module.module;
        let is_known = |(count, _): &(u64, Vec<Violations>)| *count == module.violations;
        if known.get(name).is_some_and(is_known) || Instant::now() >= deadline {
            continue;
        }
        // It may be released meanwhile: then there is nothing to be told.
        let request = Request::Violations {
            module: name.clone(),
        };
        if let Reply::Violations { all, .. } = client.ask(&request)? {
            known.insert(name.clone(), (module.violations, all));
        }
    }
    let violations = known
        .iter()
        .map(|(name, (_, all))| (name.clone(), all.clone()));
    Ok(Guest::new(at_ns, status, violations.collect()))
}

fn read_host(process: &RunningVm) -> anyhow::Result<Host> {
    let mut client = Connection::<DeviceProtocol>::to(process, ANSWER_TIME)?;
    match client.ask(&device::Request::Status {})? {
        device::Reply::Status(status) => Ok(Host::new(*status)),
        _ => bail!("the device host answered something else"),
    }
}
