//! All that is known of one guest.

use std::collections::BTreeMap;

use ratatui::text::Line;

use super::sections::{happening, recovery, state};
use super::table::{Column, Row, head_style, lines as table};
use crate::top::model::{Model, Process};
use crate::top::reading::{Guest, Module, Nic};
use crate::top::text::{count, cut, memory, wrap};
use crate::words::{duration, rungs};

/// The lines of the guest called `name`.
pub fn lines(model: &Model, name: &str, columns: usize) -> Vec<Line<'static>> {
    let mut lines = vec![Line::styled(cut(name, columns), head_style())];
    let say = |lines: &mut Vec<Line<'static>>, text: &str| {
        lines.extend(wrap(text, columns).into_iter().map(Line::from));
    };
    match model.guests.get(name) {
        None => say(&mut lines, "has ended; Esc goes back"),
        Some(process) => {
            if let Some(why) = model.silence(process) {
                say(&mut lines, &why);
            } else if let Some(guest) = &process.last {
                for fact in facts(process, guest) {
                    say(&mut lines, &fact);
                }
                lines.extend(modules(process, guest, columns));
                lines.extend(exits(process, guest, columns));
            }
        }
    }
    let happened: Vec<_> = model
        .log
        .latest()
        .filter(|happened| happened.who == name)
        .flat_map(|happened| happening(model.now_ns, happened, columns, usize::MAX))
        .collect();
    if !happened.is_empty() {
        lines.push(Line::styled(cut("WHAT HAPPENED", columns), head_style()));
        lines.extend(happened);
    }
    lines
}

fn facts(process: &Process<Guest>, guest: &Guest) -> Vec<String> {
    let pid = process
        .pid
        .map_or_else(|| "?".to_owned(), |pid| pid.to_string());
    let mut facts = vec![format!(
        "{}, process {pid}, up {}, resets: {}",
        state(guest),
        duration(guest.uptime_ms),
        guest.resets
    )];
    if let Some(panic) = &guest.panic {
        facts.push(format!("has panicked: {panic}"));
    }
    facts.push(format!(
        "vCPUs: {}, memory {}, of it resident {}, beyond it {}",
        guest.vcpus,
        memory(guest.memory_mib.saturating_mul(1024)),
        memory(guest.guest_rss_kib),
        memory(guest.vmm_rss_kib)
    ));
    facts.push(format!("kernel {}", guest.kernel));
    for nic in &guest.nics {
        facts.push(format!("NIC {}", nic.name));
        let rate = |of: fn(&Nic) -> Option<u64>| {
            process.rate(|guest| {
                let nics = guest.nics.iter().filter(|other| other.name == nic.name);
                nics.filter_map(|nic| Some((nic.name.clone(), of(nic)?)))
                    .collect()
            })
        };
        if let (Some(received), Some(sent)) = (nic.received, nic.sent) {
            facts.push(format!(
                "  frames in {received} ({}/s), out {sent} ({}/s)",
                count(rate(|nic| nic.received)),
                count(rate(|nic| nic.sent))
            ));
        }
    }
    facts
}

const fn counter(head: &'static str) -> Column {
    Column {
        head,
        columns: 9,
        right: true,
        from: 0,
    }
}

const fn names(head: &'static str) -> Column {
    Column {
        head,
        columns: 10,
        right: false,
        from: 0,
    }
}

fn modules(process: &Process<Guest>, guest: &Guest, columns: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for (name, module) in &guest.modules {
        let text = format!("{name}: {}", recovery(module).0);
        let wrapped = wrap(&text, columns).into_iter();
        lines.extend(wrapped.map(|line| Line::styled(line, head_style())));
        lines.extend(wrap(&failures(module), columns).into_iter().map(Line::from));
        let all = [
            names("function"),
            counter("calls/s"),
            counter("calls"),
            counter("aborts"),
        ];
        let rows = module.calls.iter().map(|(function, calls)| {
            let rate = process.rate(|guest| {
                let module = guest.modules.get(name);
                one(module.map(|module| &module.calls), function)
            });
            Row::new(vec![
                function.clone(),
                count(rate),
                calls.to_string(),
                count(module.aborts.get(function).copied()),
            ])
        });
        lines.extend(table(&all, rows.collect(), columns));
    }
    lines
}

fn failures(module: &Module) -> String {
    let used = &module.ladder.rungs;
    format!("{}; stops: {}", rungs(used), used.stops)
}

fn exits(process: &Process<Guest>, guest: &Guest, columns: usize) -> Vec<Line<'static>> {
    if guest.exits.is_empty() {
        return Vec::new();
    }
    let all = [names("exits"), counter("per s"), counter("in all")];
    let mut rows: Vec<_> = guest
        .exits
        .iter()
        .map(|(reason, all)| {
            let rate = process.rate(|guest| one(Some(&guest.exits), reason));
            (rate, reason, all)
        })
        .collect();
    rows.sort_by_key(|(rate, _, _)| std::cmp::Reverse(*rate));
    let rows = rows
        .into_iter()
        .map(|(rate, reason, all)| Row::new(vec![reason.clone(), count(rate), count(Some(*all))]));
    table(&all, rows.collect(), columns)
}

/// One counter of many.
fn one(counters: Option<&BTreeMap<String, u64>>, name: &str) -> BTreeMap<String, u64> {
    let counter = counters.and_then(|counters| counters.get_key_value(name));
    counter
        .map(|(name, count)| (name.clone(), *count))
        .into_iter()
        .collect()
}
