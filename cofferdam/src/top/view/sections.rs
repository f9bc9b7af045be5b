//! The parts of the overview. Each is a head and lines, those first that matter most.

use ratatui::text::Line;
use recovery::ladder::State;

use super::table::{Column, Row, head_style, lines};
use crate::control::protocol::VmState;
use crate::top::happened::{Happened, state_text};
use crate::top::model::{Model, Process};
use crate::top::reading::{Guest, Host, Module};
use crate::top::text::{count, cut, memory, width, wrap};
use crate::words::duration;

/// Lines of one happening in the overview.
const MOST_LINES: usize = 4;
/// Last switches of all device hosts together.
const MOST_SWITCHES: usize = 8;

/// All that have something to show.
pub fn all(model: &Model, selected: Option<&str>, columns: usize) -> Vec<Vec<Line<'static>>> {
    let all = [
        guests(model, selected, columns),
        modules(model, columns),
        devices(model, columns),
        happened(model, columns),
    ];
    all.into_iter().filter(|lines| !lines.is_empty()).collect()
}

const fn column(head: &'static str, columns: usize, right: bool, from: usize) -> Column {
    Column {
        head,
        columns,
        right,
        from,
    }
}

fn guests(model: &Model, selected: Option<&str>, columns: usize) -> Vec<Line<'static>> {
    if model.guests.is_empty() {
        let text = match model.listed {
            true => "no VM is running",
            false => "...",
        };
        return vec![Line::from(cut(text, columns))];
    }
    let all = [
        column("GUEST", 10, false, 0),
        column("STATE", 8, false, 0),
        column("vCPUs", 5, true, 56),
        column("memory", 6, true, 56),
        column("rss", 5, true, 56),
        column("exits/s", 7, true, 0),
        column("in/s", 5, true, 70),
        column("out/s", 5, true, 70),
        column("isolated", 8, true, 80),
    ];
    let rows = model.guests.iter().map(|(name, process)| {
        let row = match (model.silence(process), &process.last) {
            (None, Some(guest)) => guest_row(name, process, guest),
            (why, _) => {
                let why = why.unwrap_or_default();
                let alarming = why.len() > 3;
                Row::new(vec![name.clone(), why]).alarming(alarming)
            }
        };
        row.selected(Some(name.as_str()) == selected)
    });
    lines(&all, rows.collect(), columns)
}

fn guest_row(name: &str, process: &Process<Guest>, guest: &Guest) -> Row {
    let [received, sent] = process.frames_per_second();
    let rss = guest.guest_rss_kib.saturating_add(guest.vmm_rss_kib);
    Row::new(vec![
        name.to_owned(),
        state(guest).to_owned(),
        guest.vcpus.to_string(),
        memory(guest.memory_mib.saturating_mul(1024)),
        memory(rss),
        count(process.exits_per_second()),
        count(received),
        count(sent),
        guest.modules.len().to_string(),
    ])
    .alarming(guest.panic.is_some())
}

/// What a guest does, in a word.
pub fn state(guest: &Guest) -> &'static str {
    match (guest.state, &guest.panic) {
        (VmState::Running, Some(_)) => "panicked",
        (state, _) => state.name(),
    }
}

fn modules(model: &Model, columns: usize) -> Vec<Line<'static>> {
    let all = [
        column("ISOLATED", 8, false, 0),
        column("IN", 10, false, 0),
        column("functions", 9, true, 64),
        column("calls/s", 7, true, 48),
        column("aborts", 6, true, 0),
        column("RECOVERY", 12, false, 0),
    ];
    let mut rows = Vec::new();
    for (guest, process) in &model.guests {
        if model.silence(process).is_some() {
            continue;
        }
        let modules = process.last.iter().flat_map(|guest| &guest.modules);
        rows.extend(modules.map(|(name, module)| module_row(guest, process, name, module)));
    }
    match rows.is_empty() {
        true => Vec::new(),
        false => lines(&all, rows, columns),
    }
}

fn module_row(guest: &str, process: &Process<Guest>, name: &str, module: &Module) -> Row {
    let (recovery, alarming) = recovery(module);
    Row::new(vec![
        name.to_owned(),
        guest.to_owned(),
        module.calls.len().to_string(),
        count(process.calls_per_second(name)),
        count(Some(module.all_aborts())),
        recovery,
    ])
    .alarming(alarming)
}

/// Where a driver stands and how it came there, and whether that is bad.
pub fn recovery(module: &Module) -> (String, bool) {
    let ladder = &module.ladder;
    if let Some(broken) = &module.broken {
        return (format!("NOT isolated any more: {broken}"), true);
    }
    let mut text = state_text(ladder.state).to_owned();
    let rungs = &ladder.rungs;
    if let Some(why) = &ladder.gave_up {
        text.push_str(&format!(": {why}"));
    }
    for (what, times) in [
        ("retries", rungs.retries),
        ("resumes", rungs.resumes),
        ("restarts", rungs.restarts),
        ("rewinds", rungs.rewinds),
        ("resets", rungs.resets),
    ] {
        if times > 0 {
            text.push_str(&format!(", {what} {}", count(Some(times))));
        }
    }
    (text, ladder.state != State::Running)
}

fn devices(model: &Model, columns: usize) -> Vec<Line<'static>> {
    if model.hosts.is_empty() {
        return Vec::new();
    }
    let all = [
        column("DEVICE", 8, false, 0),
        column("TURN", 12, false, 0),
        column("switches", 8, true, 0),
        column("failed", 6, true, 48),
        column("ATTACHED", 12, false, 48),
    ];
    let rows =
        model.hosts.iter().map(
            |(name, process)| match (model.silence(process), &process.last) {
                (None, Some(host)) => host_row(name, host),
                (why, _) => {
                    let why = why.unwrap_or_default();
                    let alarming = why.len() > 3;
                    Row::new(vec![name.clone(), why]).alarming(alarming)
                }
            },
        );
    let mut section = lines(&all, rows.collect(), columns);
    let mut switches: Vec<_> = model
        .hosts
        .iter()
        .filter_map(|(name, process)| Some((name, process.last.as_ref()?)))
        .flat_map(|(name, host)| host.switches.iter().map(move |switch| (name, switch)))
        .collect();
    switches.sort_by_key(|(_, (begin_ns, _))| std::cmp::Reverse(*begin_ns));
    for (name, (begin_ns, sentence)) in switches.into_iter().take(MOST_SWITCHES) {
        let ago = ago(model.now_ns, *begin_ns);
        section.push(Line::from(cut(
            &format!("{ago} {name} {sentence}"),
            columns,
        )));
    }
    section
}

fn host_row(name: &str, host: &Host) -> Row {
    let turn = host.turn.as_deref().unwrap_or("nobody");
    let every = host
        .every_ms
        .map_or_else(String::new, |ms| format!("; every {ms} ms"));
    let contexts = host.contexts.iter();
    let contexts: Vec<_> = contexts.map(|(vm, at)| format!("{vm} {at}")).collect();
    Row::new(vec![
        name.to_owned(),
        turn.to_owned(),
        count(Some(host.switch_count)),
        count(Some(host.failed_switches)),
        format!("{}{every}; {}", contexts.join(", "), host.card),
    ])
}

fn happened(model: &Model, columns: usize) -> Vec<Line<'static>> {
    let mut section: Vec<Line> = Vec::new();
    for happened in model.log.latest() {
        section.extend(happening(model.now_ns, happened, columns, MOST_LINES));
    }
    if !section.is_empty() {
        let head = cut("WHAT HAPPENED, the latest first", columns);
        section.insert(0, Line::styled(head, head_style()));
    }
    section
}

/// Something that happened, in so many lines at most.
pub fn happening(
    now_ns: u64,
    happened: &Happened,
    columns: usize,
    most: usize,
) -> Vec<Line<'static>> {
    let ago = ago(now_ns, happened.at_ns);
    let indent = width(&ago) + 1;
    let text = format!("{} {}", happened.who, happened.text);
    let wrapped = wrap(&text, columns.saturating_sub(indent));
    let all = wrapped.iter().take(most).enumerate();
    all.map(|(at, line)| {
        let first = if at == 0 { ago.as_str() } else { "" };
        let more = at + 1 == most && wrapped.len() > most;
        let more = if more { " …" } else { "" };
        Line::from(cut(&format!("{first:indent$}{line}{more}"), columns))
    })
    .collect()
}

/// How long ago something was, in eleven columns.
fn ago(now_ns: u64, at_ns: u64) -> String {
    let ms = now_ns.saturating_sub(at_ns) / 1_000_000;
    // What changes every tenth of a second cannot be read.
    let text = match ms {
        0..60_000 => format!("{} s", ms / 1000),
        _ => duration(ms),
    };
    format!("{text:>11}")
}
