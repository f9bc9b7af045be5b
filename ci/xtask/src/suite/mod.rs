//! `cargo xtask test`: every check there is, and the tests, on a machine that has nothing but Rust.

mod batch_run;
mod checks;
mod count;
mod emulator;
mod host;
mod lanes;
mod linux;
mod programs;
mod queue;
mod record;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use guest_images::KernelSource;
use guest_images::kernels::{DEFAULT, KERNELS};

use crate::fuzz;
use crate::lab::interrupted;
use crate::place::Place;
use crate::steps::{Steps, capture, cargo, run};
use crate::workspace::Workspace;
use crate::{images, setup};
use count::Count;
pub use host::run as run_on_host;

/// Runs every check, and the tests
///
/// Style, lints, duplicates among the rust-vmm crates, unit and integration tests, and the tests
/// that boot Linux: on this host's KVM where that is fast enough, else in the lab. Tests that take
/// long, and a bounded run of the fuzz targets, run with --full, or by name. Installs what is
/// missing. The exit status is 0 when all went well.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Only the tests that boot Linux, those whose name contains this, also if they take long
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "")]
    linux: Option<String>,
    /// With --linux: guests of another kernel than the default one
    #[arg(long, value_name = "NAME", value_parser = images::by_name, requires = "linux")]
    kernel: Option<&'static KernelSource>,
    /// Tests that take long, too, and the full form of those that have one: every function, every
    /// place, MTU 9000, hours instead of minutes
    #[arg(long)]
    full: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
}

/// Environment variable that asks tests for their full form.
const FULL: &str = "COFFERDAM_FULL";
/// Exit status after Ctrl-C, as a shell has it.
const INTERRUPTED: i32 = 130;

/// Does all of it.
pub fn main(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    let steps = &Steps::new(match (&args.linux, args.full) {
        (Some(_), _) => 4,
        (None, false) => 9,
        (None, true) => 10,
    });
    let mut count = Count::default();
    let mut linux_findings = linux::Findings::default();
    steps.must("set up", setup::needed)?;
    if args.linux.is_none() {
        checks::quick(workspace, steps);
    }
    // The lab's and those that tests ask for, whatever else the guests are of.
    let kernels: Vec<&KernelSource> = KERNELS
        .iter()
        .filter(|kernel| kernel.tested || args.kernel == Some(*kernel))
        .collect();
    // Much of the one is waiting for the network, and for one processor.
    let (has_images, is_built) = lanes::beside(
        || {
            if args.linux.is_none() {
                steps.may("wanted", || Ok(setup::wanted()));
            }
            steps.may("images", || images::run(workspace, &kernels, false))
        },
        || steps.may("build", || build(workspace)),
    );
    let findings = &mut linux_findings;
    let mut all_else = || all_else(workspace, args.full, steps, &mut count);
    match (is_built, has_images) {
        // There is nothing to be tested.
        (false, _) => {}
        (true, false) if args.linux.is_some() => {}
        (true, false) => all_else(),
        (true, true) if args.linux.is_some() => linux_tests(workspace, args, steps, findings),
        (true, true) if lanes::has_room(workspace) => {
            let linux_tests = || {
                linux_tests(workspace, args, steps, findings);
                if interrupted() {
                    // The labs have ended in order; nothing waits for the rest.
                    if let Err(error) = tell(args, steps, findings, findings.count()) {
                        eprintln!("{error:#}");
                    }
                    std::process::exit(INTERRUPTED);
                }
            };
            lanes::beside(linux_tests, || {
                lanes::give_way();
                all_else();
            });
        }
        (true, true) => {
            all_else();
            linux_tests(workspace, args, steps, findings);
        }
    }
    count += linux_findings.count();
    tell(args, steps, &linux_findings, count)
}

/// The tests that boot Linux.
fn linux_tests(workspace: &Workspace, args: &Args, steps: &Steps, findings: &mut linux::Findings) {
    steps.may("Linux tests", || {
        let place = Place::find(&workspace.path("target/debug/cofferdam"))?;
        let filter = args.linux.as_deref().unwrap_or_default();
        let guests = linux::Guests {
            place,
            images: workspace.images_of(args.kernel.unwrap_or(DEFAULT)),
            full: args.full,
        };
        linux::run(workspace, &guests, filter, findings)
            .with_context(|| format!("after {}", findings.count()))?;
        verdict(findings.count(), &format!("on the {}", place.word()))
    });
}

/// Says what came of it.
fn tell(
    args: &Args,
    steps: &Steps,
    linux_findings: &linux::Findings,
    count: Count,
) -> anyhow::Result<ExitCode> {
    steps.summary();
    for name in linux_findings.unsteady() {
        eprintln!(
            "unsteady  {name}: failed at first, passed at a second try: see above for what it said"
        );
    }
    for name in linux_findings.failed() {
        eprintln!("FAILED  {name}: see above for what it said");
    }
    if linux_findings.retries > 0 {
        let times = linux_findings.retries;
        eprintln!("the lab hung {times} times; target/lab/retries.json tells more");
    }
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let document = serde_json::json!({
            "steps": steps.records(), "linux": linux_findings, "count": count,
        });
        writeln!(stdout, "{}", serde_json::to_string_pretty(&document)?)?;
    } else {
        writeln!(stdout, "{count}")?;
    }
    let failed = steps.failed() || count.failed > 0 || count.passed == 0;
    Ok(ExitCode::from(u8::from(failed)))
}

/// All that needs no images: the tests of this host first, for what they find is wanted soonest.
fn all_else(workspace: &Workspace, full: bool, steps: &Steps, count: &mut Count) {
    let all = ["tests", "lints", "fuzz"];
    for step in &all[..if full { 3 } else { 2 }] {
        steps.may(step, || match *step {
            _ if interrupted() => bail!("interrupted"),
            "tests" => tests(workspace, full, count),
            "lints" => checks::lints(workspace),
            _ => fuzz::test(workspace),
        });
    }
}

fn build(workspace: &Workspace) -> anyhow::Result<String> {
    // That makes the programs too: tests start them.
    let words = ["test", "--workspace", "--locked", "--no-run", "--quiet"];
    run(cargo().args(words).current_dir(workspace.root()))?;
    Ok(String::new())
}

fn tests(workspace: &Workspace, full: bool, count: &mut Count) -> anyhow::Result<String> {
    let mut total = Count::default();
    let skipped = workspace.path("target/tmp/skipped.txt");
    if let Some(directory) = skipped.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    std::fs::write(&skipped, "").with_context(|| format!("cannot write {}", skipped.display()))?;
    let nextest = capture(cargo().args(["nextest", "--version"])).is_ok();
    let suites: &[&[&str]] = match nextest {
        true => &[
            &[
                "nextest",
                "run",
                "--workspace",
                "--locked",
                "--no-fail-fast",
            ],
            &[
                "test",
                "--workspace",
                "--locked",
                "--no-fail-fast",
                "--doc",
                "--quiet",
            ],
        ],
        false => &[&["test", "--workspace", "--locked", "--no-fail-fast"]],
    };
    let mut ended_well = true;
    for words in suites {
        let mut command = cargo();
        command
            .args(*words)
            .current_dir(workspace.root())
            .env(skipped::LIST, &skipped);
        if full {
            command.env(FULL, "1");
        }
        ended_well &= run_counted(&mut command, &mut total)?;
    }
    let list = std::fs::read_to_string(&skipped)
        .with_context(|| format!("cannot read {}", skipped.display()))?;
    list.lines()
        .for_each(|test| eprintln!("      skipped  {test}"));
    total.skip(list.lines().count() as u64);
    *count += total;
    match verdict(total, "") {
        Ok(_) if !ended_well => bail!("{total}, but the test runner failed"),
        verdict => verdict,
    }
}

/// Runs a test runner on our own output and counts along.
fn run_counted(command: &mut Command, count: &mut Count) -> anyhow::Result<bool> {
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("cannot start cargo")?;
    // The command holds the pipe's other end open until it is given another.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.context("cannot read what the tests say")?;
        let line = String::from_utf8_lossy(&line);
        count.read_line(&line);
        eprintln!("{line}");
    }
    Ok(child.wait().context("cannot wait for cargo")?.success())
}

fn verdict(count: Count, place: &str) -> anyhow::Result<String> {
    let text = format!("{count} {place}");
    match count {
        Count { failed: 1.., .. } => bail!("{}", text.trim()),
        _ => Ok(text.trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_counted_and_make_the_step_fail() {
        let mut count = Count::default();
        let script = "echo 'test result: FAILED. 2 passed; 1 failed; 0 ignored'; exit 101";
        let ended_well = run_counted(Command::new("sh").args(["-c", script]), &mut count).unwrap();
        assert!(!ended_well);
        assert_eq!(
            count,
            Count {
                passed: 2,
                failed: 1,
                skipped: 0,
            }
        );
        assert!(verdict(count, "").is_err());
    }
}
