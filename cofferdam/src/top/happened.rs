//! What happened between two readings of a guest, and the list of it.
//!
//! What happens again and again (a call that fails a thousand times a second) is one entry, which
//! says how often and when last; so a guest cannot push out what others did.

use std::collections::VecDeque;

use recovery::ladder::{Rungs, State};

use super::reading::{Guest, Module};
use super::text::clean;
use crate::control::protocol::VmState;

/// Entries that are kept.
const MOST: usize = 200;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// When, or when last (`CLOCK_MONOTONIC`).
    pub at_ns: u64,
    /// Name of the guest or device host.
    pub who: String,
    /// What.
    pub text: String,
    /// What it is an instance of, if it is one entry however often it happens.
    again: Option<Again>,
}

/// What tells like happenings of one guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Again {
    module: String,
    what: String,
    first_ns: u64,
}

/// What happened, the latest first.
#[derive(Debug, Default)]
pub struct Log(VecDeque<Happened>);

impl Log {
    /// Adds something, in the place of an earlier entry of the same kind.
    pub fn add(&mut self, happened: Happened) {
        if happened.again.is_some() {
            let same = |old: &Happened| old.who == happened.who && old.again == happened.again;
            self.0.retain(|old| !same(old));
        }
        let later = |old: &Happened| old.at_ns > happened.at_ns;
        let at = self.0.iter().take_while(|old| later(old)).count();
        self.0.insert(at, happened);
        self.0.truncate(MOST);
    }

    /// Adds a plain sentence.
    pub fn say(&mut self, at_ns: u64, who: &str, text: impl Into<String>) {
        self.add(Happened {
            at_ns,
            who: who.to_owned(),
            text: text.into(),
            again: None,
        });
    }

    /// The latest first.
    pub fn latest(&self) -> impl Iterator<Item = &Happened> {
        self.0.iter()
    }
}

/// Adds to `log` what happened to `who` from one reading to the next. Of the first reading that is
/// what was done wrong before.
pub fn compare(log: &mut Log, who: &str, before: Option<&Guest>, now: &Guest) {
    let at_ns = now.at_ns;
    if let Some(before) = before {
        if before.state != now.state {
            log.say(at_ns, who, state_changed(now.state));
        }
        let resets = now.resets.saturating_sub(before.resets);
        if resets > 0 {
            log.say(at_ns, who, format!("was reset ({} in all)", now.resets));
        }
        for name in before.modules.keys() {
            if !now.modules.contains_key(name) {
                log.say(at_ns, who, format!("{name}: is isolated no more"));
            }
        }
    }
    if let Some(panic) = &now.panic
        && before.is_none_or(|before| before.panic.as_ref() != Some(panic))
    {
        log.say(at_ns, who, format!("has panicked: {panic}"));
    }
    for (name, module) in &now.modules {
        let old = before.map(|before| before.modules.get(name));
        if old == Some(None) {
            let functions = module.calls.len();
            log.say(
                at_ns,
                who,
                format!("{name}: isolated, functions: {functions}"),
            );
        }
        let old = old.flatten();
        wrong(log, who, name, old, module);
        if let Some(old) = old {
            recovered(log, at_ns, who, name, old, module);
        }
    }
}

fn state_changed(state: VmState) -> String {
    match state {
        VmState::Running => "goes on".to_owned(),
        state => format!("is {}", state.name()),
    }
}

/// What calls did wrong.
fn wrong(log: &mut Log, who: &str, name: &str, old: Option<&Module>, now: &Module) {
    for violations in &now.violations {
        let known = old.is_some_and(|old| old.violations.contains(violations));
        if known {
            continue;
        }
        let times = match violations.count {
            1 => String::new(),
            count => format!(" ({count} times)"),
        };
        log.add(Happened {
            at_ns: violations.last_ns,
            who: who.to_owned(),
            text: clean(&format!("{name}: {}{times}", violations.text)),
            again: Some(Again {
                module: name.to_owned(),
                what: violations.entry.clone(),
                first_ns: violations.first_ns,
            }),
        });
    }
}

/// What was done about it.
fn recovered(log: &mut Log, at_ns: u64, who: &str, name: &str, old: &Module, now: &Module) {
    let (before, rungs) = (&old.ladder.rungs, &now.ladder.rungs);
    type Rung = (&'static str, fn(&Rungs) -> u64);
    let all: [Rung; 10] = [
        ("failed calls that returned an error", |r| r.errors),
        ("failed calls that were run again", |r| r.retries),
        ("times that a function of it rested", |r| r.rests),
        ("resumes of its device", |r| r.resumes),
        ("resumes that failed", |r| r.failed_resumes),
        ("restarts", |r| r.restarts),
        ("restarts that failed", |r| r.failed_restarts),
        ("times that the guest goes back to a mark", |r| r.rewinds),
        ("resets of the guest", |r| r.resets),
        ("times that it was stopped", |r| r.stops),
    ];
    for (what, of) in all {
        let count = of(rungs);
        if count > of(before) {
            log.add(Happened {
                at_ns,
                who: who.to_owned(),
                text: format!("{name}: {what}: {count}"),
                again: Some(Again {
                    module: name.to_owned(),
                    what: what.to_owned(),
                    first_ns: 0,
                }),
            });
        }
    }
    if old.ladder.state != now.ladder.state {
        let why = now.ladder.gave_up.as_ref();
        let why = why.map_or_else(String::new, |why| format!(" because {why}"));
        let state = state_text(now.ladder.state);
        log.say(at_ns, who, format!("{name}: {state}{why}"));
    }
    if let Some(broken) = &now.broken
        && old.broken.is_none()
    {
        log.say(
            at_ns,
            who,
            format!("{name}: NOT isolated any more: {broken}"),
        );
    }
}

/// Where a driver stands, in a word or two.
pub fn state_text(state: State) -> &'static str {
    match state {
        State::Running => "runs",
        State::Resuming => "resuming its device",
        State::Restarting => "restarting",
        State::Resetting => "guest being reset",
        State::Stopped => "STOPPED",
        State::Unisolated => "NOT isolated",
    }
}
