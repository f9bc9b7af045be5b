//! `cargo xtask bench service`: memory of `cofferdam serve`, a request against a start of the
//! program, and listeners to events, some of whom are too slow.
//!
//! Its guests do nothing and are no Linux, so that this host's KVM suffices wherever it is. All is
//! done by clients of the unix socket, as anybody's would be.

mod client;
mod listeners;
mod place;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;

use super::{build, commit};
use crate::steps::capture;
use crate::workspace::Workspace;
use client::Client;
use listeners::{Listened, listen};
use place::{Memory, Place};

/// Most resident memory that the service is to have with 16 guests, in KiB.
const AIM_KIB: u64 = 12 << 10;

/// The part of a start of `cofferdam status` that a request is to take at most.
const AIM_PART: f64 = 1.0 / 20.0;

/// How long nothing is asked before memory is looked at once more: longer than the service keeps
/// what requests have needed.
const REST: Duration = Duration::from_secs(15);

/// Looks at a guest that are made before any is timed.
const WARM: usize = 50;

/// How the service is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How many guests there are
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(2..=64))]
    guests: u16,
    /// How many clients listen to events
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=238))]
    listeners: u16,
    /// How long they do
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// How often a request and a start of `cofferdam status` are timed
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    requests: u16,
    /// Measure this program in place of building one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// What was measured: `target/bench/service.json`.
#[derive(Debug, Serialize)]
struct Report {
    /// The commit that was measured.
    commit: String,
    /// What the processor calls itself.
    cpu: String,
    guests: u16,
    memory: Vec<Memory>,
    requests: Requests,
    listened: Listened,
    ratios: Ratios,
}

/// A look at one guest, in three ways, by turns.
#[derive(Debug, Serialize)]
struct Requests {
    /// Over a connection that is there.
    kept_us: Times,
    /// Over a new one each.
    new_us: Times,
    /// A start of `cofferdam status NAME --json`, to its end.
    status_us: Times,
}

/// Numbers of a set of samples, in microseconds.
#[derive(Debug, Serialize)]
struct Times {
    n: usize,
    min: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

/// What is to be judged; all are of this run alone.
#[derive(Debug, Clone, Copy, Serialize)]
struct Ratios {
    /// Memory with guests and without requests, of what it is to be at most.
    memory_at_rest_of_aim: f64,
    /// The most with guests, at whatever time, of what it is to be at most.
    memory_of_aim: f64,
    /// The same without pages of files, which all processes of the program share.
    anonymous_of_aim: f64,
    /// A request over a kept connection, of a start of `cofferdam status`.
    kept_of_status: f64,
    /// The same over a new connection.
    new_of_status: f64,
}

impl Times {
    fn of(mut samples: Vec<f64>) -> anyhow::Result<Self> {
        samples.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let rank = (samples.len() * percent).div_ceil(100).max(1);
            samples.get(rank - 1).copied()
        };
        let none = "nothing was timed";
        Ok(Self {
            n: samples.len(),
            min: samples.first().copied().context(none)?,
            p50: at(50).context(none)?,
            p99: at(99).context(none)?,
            max: samples.last().copied().context(none)?,
        })
    }

    fn row(&self, name: &str) -> String {
        format!(
            "{name:34} {:>8.0} {:>8.0} {:>8.0} {:>8.0}  (n = {})\n",
            self.min, self.p50, self.p99, self.max, self.n
        )
    }
}

/// Measures, prints what came of it and writes it to `target/bench/service.json`.
///
/// # Errors
/// Something cannot be started, a listener has lost something or was not told why it was dropped,
/// or the service has more memory or takes longer than it is to.
pub fn main(workspace: &Workspace, args: &Args) -> anyhow::Result<()> {
    let (program, commit) = match &args.program {
        // It is not known of what it was built.
        Some(program) => (std::path::absolute(program)?, "unknown".to_owned()),
        None => {
            build(workspace)?;
            (
                workspace.path("target/release/cofferdam"),
                commit(workspace),
            )
        }
    };
    let report = measure(&program, args, commit)?;
    let json = serde_json::to_string_pretty(&report)? + "\n";
    let folder = workspace.path("target/bench");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = folder.join("service.json");
    std::fs::write(&path, &json).with_context(|| path.display().to_string())?;
    let shown = match args.json {
        true => json,
        false => report.text(),
    };
    write!(std::io::stdout().lock(), "{shown}").context("cannot write to standard output")?;
    report.listened.judge()?;
    report.ratios.judge()
}

fn measure(program: &Path, args: &Args, commit: String) -> anyhow::Result<Report> {
    let mut place = Place::new(program)?;
    place.serve()?;
    let mut memory = vec![place.memory("started")?];
    let names: Vec<String> = (0..args.guests)
        .map(|number| format!("g{number}"))
        .collect();
    eprintln!("      starting {} guests", names.len());
    for name in &names {
        place.start_guest(name)?;
    }
    place.forget_peak()?;
    memory.push(place.memory("guests run")?);
    let mut client = Client::connect(&place.socket())?;
    for _ in 0..WARM {
        client.get("/v1/guests")?;
        client.get("/metrics")?;
        client.get("/openapi.json")?;
    }
    memory.push(place.memory("guests looked at")?);
    eprintln!("      requests");
    let requests = requests(&place, &mut client, &names, args.requests)?;
    memory.push(place.memory("requests were timed")?);
    std::thread::sleep(REST);
    let at_rest = place.memory("nothing was asked for a while")?;
    memory.push(at_rest.clone());
    eprintln!("      {} listeners, {} s", args.listeners, args.seconds);
    let time = Duration::from_secs(args.seconds);
    let listened = listen(&mut place, &names, args.listeners, time, &mut memory)?;
    memory.push(place.memory("listeners gone")?);
    place.end()?;
    let with_guests = memory.get(1..).unwrap_or_default();
    let largest = |of: fn(&Memory) -> u64| with_guests.iter().map(of).max().unwrap_or(0) as f64;
    Ok(Report {
        commit,
        cpu: cpu(),
        guests: args.guests,
        ratios: Ratios {
            memory_at_rest_of_aim: at_rest.rss_kib as f64 / AIM_KIB as f64,
            memory_of_aim: largest(|memory| memory.peak_kib) / AIM_KIB as f64,
            anonymous_of_aim: largest(|memory| memory.anon_kib) / AIM_KIB as f64,
            kept_of_status: requests.kept_us.p50 / requests.status_us.p50,
            new_of_status: requests.new_us.p50 / requests.status_us.p50,
        },
        memory,
        requests,
        listened,
    })
}

/// Times all three ways by turns, so that whatever else the machine does strikes all of them, and
/// each of them first, second and third as often: who comes behind another finds the guest awake.
fn requests(
    place: &Place,
    client: &mut Client,
    names: &[String],
    count: u16,
) -> anyhow::Result<Requests> {
    let (mut kept, mut new, mut status) = (Vec::new(), Vec::new(), Vec::new());
    let socket = place.socket();
    for (round, name) in names.iter().cycle().take(count.into()).enumerate() {
        let path = format!("/v1/guests/{name}");
        for turn in 0..3 {
            match (round + turn) % 3 {
                0 => kept.push(timed(|| client.get(&path).map(drop))?),
                1 => new.push(timed(|| Client::connect(&socket)?.get(&path).map(drop))?),
                _ => {
                    let mut command: Command = place.command();
                    command.args(["status", name, "--json"]);
                    status.push(timed(|| {
                        let said = capture(&mut command)?;
                        ensure!(said.contains("running"), "it says {said}");
                        Ok(())
                    })?);
                }
            }
        }
    }
    Ok(Requests {
        kept_us: Times::of(kept)?,
        new_us: Times::of(new)?,
        status_us: Times::of(status)?,
    })
}

/// How long something takes, in microseconds.
fn timed(what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let begun = Instant::now();
    what()?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

/// Model name of the processor (proc_cpuinfo(5)).
fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = line.and_then(|line| line.split_once(':'));
    name.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

impl Ratios {
    /// # Errors
    /// The service has more memory than it is to have, or a look takes longer.
    fn judge(&self) -> anyhow::Result<()> {
        for (what, ratio, most) in [
            ("memory with guests, of 12 MiB", self.memory_of_aim, 1.0),
            (
                "a look over a kept connection, of cofferdam status",
                self.kept_of_status,
                AIM_PART,
            ),
            (
                "a look over a new connection, of cofferdam status",
                self.new_of_status,
                AIM_PART,
            ),
        ] {
            ensure!(ratio <= most, "{what}: {ratio:.3}, more than {most}");
        }
        Ok(())
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "{:34} {:>8} {:>8} {:>8} {:>8}\n",
            "memory of the service, KiB", "RssAnon", "RssFile", "Rss", "peak"
        );
        for memory in &self.memory {
            text += &format!(
                "{:34} {:>8} {:>8} {:>8} {:>8}\n",
                memory.when, memory.anon_kib, memory.file_kib, memory.rss_kib, memory.peak_kib
            );
        }
        text += &format!(
            "\n{:34} {:>8} {:>8} {:>8} {:>8}\n",
            "a look at one guest, us", "smallest", "median", "p99", "largest"
        );
        text += &self.requests.kept_us.row("kept connection");
        text += &self.requests.new_us.row("new connection");
        text += &self.requests.status_us.row("cofferdam status");
        let of = |ratio: f64, aim: f64| match ratio <= aim {
            true => format!("{ratio:.3} (at most {aim:.3})\n"),
            false => format!("{ratio:.3} (MORE than {aim:.3})\n"),
        };
        let ratios = &self.ratios;
        text += "\nmemory at rest, of 12 MiB            ";
        text += &of(ratios.memory_at_rest_of_aim, 1.0);
        text += "the most with guests                 ";
        text += &of(ratios.memory_of_aim, 1.0);
        text += "the most seen without pages of files ";
        text += &of(ratios.anonymous_of_aim, 1.0);
        text += "kept connection of cofferdam status  ";
        text += &of(ratios.kept_of_status, AIM_PART);
        text += "new connection of cofferdam status   ";
        text += &of(ratios.new_of_status, AIM_PART);
        text + "\n" + &self.listened.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_memory_and_too_long_a_look_are_failures() {
        let fine = Ratios {
            memory_at_rest_of_aim: 0.5,
            memory_of_aim: 0.9,
            anonymous_of_aim: 0.3,
            kept_of_status: 0.04,
            new_of_status: 0.05,
        };
        fine.judge().unwrap();
        let much = Ratios {
            memory_of_aim: 1.01,
            ..fine
        };
        assert!(much.judge().unwrap_err().to_string().contains("1.010"));
        let slow = Ratios {
            kept_of_status: 0.051,
            ..much
        };
        assert!(
            Ratios {
                memory_of_aim: 1.0,
                ..slow
            }
            .judge()
            .is_err()
        );
    }

    #[test]
    fn percentiles_are_samples_that_were_taken() {
        let times = Times::of((1..=200).rev().map(f64::from).collect()).unwrap();
        assert_eq!((times.min, times.p50, times.p99), (1.0, 100.0, 198.0));
        assert_eq!((times.max, times.n), (200.0, 200));
        assert!(Times::of(Vec::new()).is_err());
    }
}
