//! What a trace says in short: the time of all its calls by phase.

use std::collections::BTreeMap;

use isolation::dispatch::call_trace::CallTrace;
use isolation::domain::recorder::{Ended, Happened};
use serde::Serialize;

use super::chrome::{Recorded, without_exit};
use super::phases::{Phase, spans};
use crate::table::{number, table};
use crate::words::counted;

/// A trace in short.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Name of the module.
    module: String,
    /// How many calls were asked for.
    asked: u32,
    /// Each that was recorded.
    calls: Vec<CallSummary>,
    /// Time of all of them by phase; phases that no call had are left out.
    phases: Vec<PhaseTime>,
}

/// A phase of all calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct PhaseTime {
    phase: &'static str,
    times: u64,
    /// In nanoseconds.
    ns: u64,
}

/// A call in short.
#[derive(Debug, Serialize)]
struct CallSummary {
    function: String,
    vcpu: u8,
    attempt: u32,
    comes_back: bool,
    /// How it ended, if it did so while it was recorded.
    ended: Option<Ended>,
    violation: Option<String>,
    /// From the first event to the last, in nanoseconds.
    total_ns: u64,
    events: u64,
    events_left_out: u64,
    crossings: u64,
    /// Those of which nobody knows when they were.
    crossings_without_exit: u64,
    handed_over: u32,
    phases: Vec<PhaseTime>,
}

/// The time of calls by phase.
fn times<'a>(calls: impl Iterator<Item = &'a CallTrace>) -> Vec<PhaseTime> {
    let mut times: BTreeMap<Phase, PhaseTime> = BTreeMap::new();
    for span in calls.flat_map(spans) {
        let time = times.entry(span.phase).or_insert(PhaseTime {
            phase: span.phase.name(),
            times: 0,
            ns: 0,
        });
        time.times += 1;
        time.ns = time
            .ns
            .saturating_add(span.end_ns.saturating_sub(span.begin_ns));
    }
    times.into_values().collect()
}

impl CallSummary {
    fn new(call: &CallTrace) -> Self {
        let (first, last) = (call.events.first(), call.events.last());
        let total_ns = first.zip(last);
        let mut from_last = call.events.iter().rev();
        Self {
            function: call.function.clone(),
            vcpu: call.vcpu,
            attempt: call.attempt,
            comes_back: call.comes_back,
            ended: from_last.find_map(|event| match event.what {
                Happened::Ended(how) => Some(how),
                _ => None,
            }),
            violation: call.violation.clone(),
            total_ns: total_ns.map_or(0, |(first, last)| last.at_ns.saturating_sub(first.at_ns)),
            events: call.events.len() as u64,
            events_left_out: call.left_out,
            crossings: call.crossings,
            crossings_without_exit: without_exit(call),
            handed_over: call.handed_over,
            phases: times(std::iter::once(call)),
        }
    }

    /// How it ended, in words.
    fn ending(&self) -> String {
        let ended = match self.ended {
            Some(Ended::Committed) => "committed".to_owned(),
            Some(Ended::TakenBack) => "taken back".to_owned(),
            Some(Ended::PassedThrough(reason)) => format!("run by the guest: {}", reason.name()),
            Some(Ended::GoesOnInGuest(reason)) => {
                format!("goes on in the guest: {}", reason.name())
            }
            Some(Ended::DomainFailed) => "the domain failed".to_owned(),
            None => "not known".to_owned(),
        };
        match self.comes_back {
            true => format!("{ended} (came back from the guest)"),
            false => ended,
        }
    }
}

impl Summary {
    /// Of what was recorded of `module`, of which `asked` calls were asked for.
    pub fn new(module: &str, asked: u32, recorded: &Recorded) -> Self {
        Self {
            module: module.to_owned(),
            asked,
            calls: recorded.calls.iter().map(CallSummary::new).collect(),
            phases: times(recorded.calls.iter()),
        }
    }

    /// For a person.
    pub fn text(&self) -> String {
        let us = |ns: u64| number(format!("{:.1}", ns as f64 / 1000.0));
        let mut calls = table(&["call", "us", "exits", "crossings", "ended"]);
        for call in &self.calls {
            let mut domain = call.phases.iter();
            let domain = domain.find(|time| time.phase == Phase::Domain.name());
            calls.add_row(vec![
                call.function.clone().into(),
                us(call.total_ns),
                number(domain.map_or(0, |time| time.times)),
                number(call.crossings),
                call.ending().into(),
            ]);
        }
        let mut phases = table(&["phase", "times", "us", "% of all"]);
        let all: u64 = self.phases.iter().map(|time| time.ns).sum();
        for time in &self.phases {
            let share = time.ns as f64 * 100.0 / all.max(1) as f64;
            phases.add_row(vec![
                time.phase.into(),
                number(time.times),
                us(time.ns),
                number(format!("{share:.1}")),
            ]);
        }
        let mut text = format!("{calls}\n\n{phases}\n");
        let sum = |of: fn(&CallSummary) -> u64| self.calls.iter().map(of).sum::<u64>();
        let unseen = sum(|call| call.crossings_without_exit);
        if unseen > 0 {
            text.push_str(&format!(
                "{} called without an exit, in the time in the domain: nobody sees when\n",
                counted(unseen, "kernel function was", "kernel functions were")
            ));
        }
        let left_out = sum(|call| call.events_left_out);
        if left_out > 0 {
            text.push_str(&format!(
                "{} left out: there were too many\n",
                counted(left_out, "event was", "events were")
            ));
        }
        for violation in self.calls.iter().filter_map(|call| call.violation.as_ref()) {
            text.push_str(&format!("{violation}\n"));
        }
        let recorded = self.calls.len() as u64;
        if recorded < u64::from(self.asked) {
            text.push_str(&format!(
                "{} of {} came in time\n",
                recorded,
                counted(self.asked.into(), "call", "calls")
            ));
        }
        text
    }
}
