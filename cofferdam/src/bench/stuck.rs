//! What the process of a VM does whose guest does not answer: is a vCPU idle, at work, or waiting
//! for somebody?

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::control::client::ControlClient;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// A thread at one moment.
struct Thread {
    name: String,
    /// Its state, such as `S`, and its time in user and kernel mode in clock ticks (proc(5),
    /// `/proc/pid/stat`).
    state: String,
    ticks: u64,
    /// Where in the kernel it waits, as far as that is shown.
    waits_in: String,
}

fn threads(pid: u32) -> BTreeMap<String, Thread> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let known = tasks.filter_map(|task| {
        let id = task.file_name().to_string_lossy().into_owned();
        Some((id, thread(&task.path())?))
    });
    known.collect()
}

fn thread(task: &Path) -> Option<Thread> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(task.join(name));
        text.unwrap_or_default().trim().to_owned()
    };
    let stat = read("stat");
    // The name is in parentheses, and may have any character itself.
    let fields: Vec<_> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Thread {
        name: read("comm"),
        state: (*fields.first()?).to_owned(),
        ticks: ticks(11)? + ticks(12)?,
        waits_in: read("wchan"),
    })
}

fn exits(control: &Path) -> BTreeMap<String, u64> {
    let status = ControlClient::connect(control).and_then(|mut client| client.status());
    status.map(|status| status.exits).unwrap_or_default()
}

/// What the threads of the process did within a second, and the exits of its vCPUs; one line each.
pub fn what_it_does(pid: u32, control: &Path) -> String {
    let (before, exits_before) = (threads(pid), exits(control));
    std::thread::sleep(INTERVAL);
    let (after, exits_after) = (threads(pid), exits(control));
    let mut text = format!("--- threads of the VM, and what they did in {INTERVAL:?}:\n");
    for (id, now) in &after {
        let ticks = before
            .get(id)
            .map_or(0, |then| now.ticks.saturating_sub(then.ticks));
        let Thread {
            name,
            state,
            waits_in,
            ..
        } = now;
        let _ = writeln!(text, "{name} ({id}): {state}, {ticks} ticks, in {waits_in}");
    }
    match exits_after.is_empty() {
        true => text.push_str("its control socket does not answer\n"),
        false => {
            for (reason, now) in &exits_after {
                let then = exits_before.get(reason).copied().unwrap_or(0);
                let _ = writeln!(
                    text,
                    "exits {reason}: {now}, {} more",
                    now.saturating_sub(then)
                );
            }
        }
    }
    text
}
