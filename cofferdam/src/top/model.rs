//! What is known of all processes, from what the lister and the pollers told.

use std::collections::BTreeMap;
use std::time::Duration;

use super::happened::{Log, compare};
use super::poll::{Kind, Told, Who};
use super::rates::all_per_second;
use super::reading::{Guest, Host};
use super::text::clean;

/// How long a process may be silent beyond the interval before it is said to be.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is said of a process then.
const SILENT: &str = "does not answer";

/// See the module.
#[derive(Debug)]
pub struct Model {
    /// The guests by name.
    pub guests: BTreeMap<String, Process<Guest>>,
    /// The device hosts by name.
    pub hosts: BTreeMap<String, Process<Host>>,
    /// What happened.
    pub log: Log,
    /// Why it is not known which processes run.
    pub trouble: Option<String>,
    /// The time (`CLOCK_MONOTONIC`).
    pub now_ns: u64,
    /// Time between two readings.
    pub interval: Duration,
    /// Whether it is known yet which processes run.
    pub listed: bool,
}

/// A process that runs.
#[derive(Debug)]
pub struct Process<R> {
    /// Its number, if it is known.
    pub pid: Option<u32>,
    /// The last reading.
    pub last: Option<R>,
    /// The one before it.
    pub before: Option<R>,
    /// That the last question was not answered, and why.
    no_answer: Option<String>,
    heard_ns: u64,
}

impl<R> Process<R> {
    fn new(pid: Option<u32>, now_ns: u64) -> Self {
        Self {
            pid,
            last: None,
            before: None,
            no_answer: None,
            heard_ns: now_ns,
        }
    }

    fn take(&mut self, name: &str, reading: Result<R, String>, now_ns: u64) {
        match reading {
            Ok(reading) => {
                self.before = self.last.replace(reading);
                self.no_answer = None;
                self.heard_ns = now_ns;
            }
            Err(error) => {
                let of_it = error.strip_prefix(name).map(str::trim_start);
                let said = of_it.filter(|words| words.starts_with(SILENT));
                let said = said.map_or_else(|| format!("{SILENT}: {error}"), str::to_owned);
                self.no_answer = Some(clean(&said));
            }
        }
    }

    fn is_settled(&self) -> bool {
        self.before.is_some() || self.no_answer.is_some()
    }
}

impl Process<Guest> {
    /// Exits per second; `None` where it cannot be known.
    pub fn exits_per_second(&self) -> Option<u64> {
        self.rate(|guest| guest.exits.clone())
    }

    /// Frames per second that came and that were sent.
    pub fn frames_per_second(&self) -> [Option<u64>; 2] {
        [0, 1].map(|way| self.rate(|guest| guest.frames().into_iter().nth(way).unwrap_or_default()))
    }

    /// Calls per second of an isolated module.
    pub fn calls_per_second(&self, module: &str) -> Option<u64> {
        self.rate(|guest| {
            let module = guest.modules.get(module);
            module.map_or_else(BTreeMap::new, |module| module.calls.clone())
        })
    }

    /// What some counters together went up by per second.
    pub fn rate(&self, counters: impl Fn(&Guest) -> BTreeMap<String, u64>) -> Option<u64> {
        let (before, now) = (self.before.as_ref()?, self.last.as_ref()?);
        let elapsed_ns = now.at_ns.saturating_sub(before.at_ns);
        all_per_second(&counters(before), &counters(now), elapsed_ns)
    }
}

impl Model {
    /// Nothing is known yet.
    pub fn new(interval: Duration) -> Self {
        Self {
            guests: BTreeMap::new(),
            hosts: BTreeMap::new(),
            log: Log::default(),
            trouble: None,
            now_ns: 0,
            interval,
            listed: false,
        }
    }

    /// Takes in what was told at `now_ns`.
    pub fn take(&mut self, told: Told, now_ns: u64) {
        self.now_ns = now_ns;
        match told {
            Told::Running(running) => {
                self.trouble = None;
                let log = &mut self.log;
                list(
                    &mut self.guests,
                    Kind::Guest,
                    &running,
                    self.listed,
                    log,
                    now_ns,
                );
                list(
                    &mut self.hosts,
                    Kind::Host,
                    &running,
                    self.listed,
                    log,
                    now_ns,
                );
                self.listed = true;
            }
            Told::NotListed(error) => self.trouble = Some(clean(&error)),
            Told::Guest(who, reading) => {
                let process = self.guests.get_mut(&who.name);
                // It may have ended, and another one may have its name.
                let Some(process) = process.filter(|process| process.pid == who.pid) else {
                    return;
                };
                match &reading {
                    Ok(now) => {
                        if process.no_answer.is_some() {
                            self.log.say(now_ns, &who.name, "answers again");
                        }
                        compare(&mut self.log, &who.name, process.last.as_ref(), now);
                    }
                    Err(_) if process.no_answer.is_none() => {
                        self.log.say(now_ns, &who.name, SILENT);
                    }
                    Err(_) => {}
                }
                process.take(&who.name, reading.map(|guest| *guest), now_ns);
            }
            Told::Host(who, reading) => {
                let process = self.hosts.get_mut(&who.name);
                if let Some(process) = process.filter(|process| process.pid == who.pid) {
                    process.take(&who.name, reading.map(|host| *host), now_ns);
                }
            }
        }
    }

    /// Whether of each process there are two readings, or it is known not to answer.
    pub fn is_settled(&self) -> bool {
        let guests = self.guests.values().all(Process::is_settled);
        let hosts = self.hosts.values().all(Process::is_settled);
        self.trouble.is_some() || (self.listed && guests && hosts)
    }

    /// Why there is nothing to be shown of a process, if there is not.
    pub fn silence<R>(&self, process: &Process<R>) -> Option<String> {
        if let Some(error) = &process.no_answer {
            return Some(error.clone());
        }
        let silent_ns = u128::from(self.now_ns.saturating_sub(process.heard_ns));
        let silent = silent_ns > (self.interval + PATIENCE).as_nanos();
        match (silent, &process.last) {
            (true, _) => Some(SILENT.to_owned()),
            (false, None) => Some("...".to_owned()),
            (false, Some(_)) => None,
        }
    }
}

/// Takes in which processes of a kind run.
fn list<R>(
    known: &mut BTreeMap<String, Process<R>>,
    kind: Kind,
    running: &[Who],
    listed: bool,
    log: &mut Log,
    now_ns: u64,
) {
    known.retain(|name, process| {
        let named = |who: &&Who| who.kind == kind && who.name == *name;
        let pid = running.iter().find(named).map(|who| who.pid);
        // A number comes to be known soon after the name.
        let stays = pid.is_some_and(|pid| process.pid.is_none() || pid == process.pid);
        match pid {
            Some(pid) if stays => process.pid = pid,
            _ => log.say(now_ns, name, "has ended"),
        }
        stays
    });
    for who in running.iter().filter(|who| who.kind == kind) {
        if !known.contains_key(&who.name) {
            if listed {
                log.say(now_ns, &who.name, "has begun");
            }
            known.insert(who.name.clone(), Process::new(who.pid, now_ns));
        }
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
