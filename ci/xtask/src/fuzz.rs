//! The fuzz targets, on the stable toolchain: `cargo-fuzz` is not needed for that, only the
//! compiler's coverage instrumentation that libFuzzer reads. As many run at a time as there are
//! processors.
//!
//! ```text
//! fuzz/src/NAME.rs              what a target does with an input
//! fuzz/fuzz_targets/NAME.rs     the target
//! fuzz/seeds/NAME/              inputs that it begins with, in the repository: few and small
//! target/fuzz/corpus/NAME/      what it found new ways with, kept from run to run
//! target/fuzz/findings/         what it found faults with
//! ```

use std::num::NonZero;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread::available_parallelism;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::steps::{Progress, Steps, capture, cargo};
use crate::workspace::Workspace;

/// The instrumentation; the same that `cargo fuzz --sanitizer none` uses.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks";
/// Named, so that build scripts are not instrumented.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// For each target in a full run of the tests: enough to reach deep states from no corpus.
const TEST_SECONDS: u32 = 4;
/// An input that takes longer, in seconds, is a finding.
const INPUT_LIMIT: u32 = 20;
/// Most lines of a target that found something.
const LINES: usize = 40;

/// Runs the fuzz targets, each for a while
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Only these; all of them when not given
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each is run, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
}

/// Runs those that were asked for.
pub fn main(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    let steps = Steps::new(1);
    steps.may("fuzz", || {
        let mut programs = build(workspace)?;
        if let Some(unknown) = (args.targets.iter())
            .find(|name| !programs.iter().any(|program| program.name == **name))
        {
            let names: Vec<&str> = programs.iter().map(|program| &*program.name).collect();
            bail!("there is no fuzz target {unknown}: {}", names.join(", "));
        }
        programs.retain(|program| args.targets.is_empty() || args.targets.contains(&program.name));
        run_all(workspace, &programs, args.seconds)
    });
    steps.summary();
    Ok(ExitCode::from(u8::from(steps.failed())))
}

/// A short run of all targets, as part of the full form of the tests: they take longer to build than
/// to run. Each has a test without instrumentation, too (`fuzz/src/blind.rs`), in every run.
pub fn test(workspace: &Workspace) -> anyhow::Result<String> {
    run_all(workspace, &build(workspace)?, TEST_SECONDS)
}

/// A target that is built.
struct Program {
    name: String,
    path: PathBuf,
}

/// What cargo says of what it built.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
}

fn build(workspace: &Workspace) -> anyhow::Result<Vec<Program>> {
    let words = "build --package cofferdam-fuzz --bins --features libfuzzer --profile fuzz --quiet \
        --locked --message-format json --target";
    let messages = capture(
        cargo()
            .args(words.split_whitespace())
            .arg(TARGET)
            .arg("--target-dir")
            .arg(workspace.path("target/fuzz"))
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", RUSTFLAGS)
            .current_dir(workspace.root()),
    )?;
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message =
            serde_json::from_str(line).context("cannot understand cargo's message")?;
        let ("compiler-artifact", Some(path)) = (&*message.reason, message.executable) else {
            continue;
        };
        let name = path.file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        // Programs of dependencies are not built.
        programs.push(Program { name, path });
    }
    programs.sort_by(|one, other| one.name.cmp(&other.name));
    if programs.is_empty() {
        bail!("there is no fuzz target");
    }
    Ok(programs)
}

fn run_all(workspace: &Workspace, programs: &[Program], seconds: u32) -> anyhow::Result<String> {
    let (mut notes, mut findings) = (Vec::new(), Vec::new());
    for programs in programs.chunks(available_parallelism().map_or(1, NonZero::get)) {
        let names: Vec<&str> = programs.iter().map(|program| &*program.name).collect();
        let _progress = Progress::new(&format!("{} for {seconds} s", names.join(", ")));
        let run = |program| run_target(workspace, program, seconds);
        let runs: Vec<_> = std::thread::scope(|scope| {
            let spawn = |program| scope.spawn(move || run(program));
            let threads: Vec<_> = programs.iter().map(spawn).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for (name, run) in names.into_iter().zip(runs) {
            match run {
                Ok(Ok(inputs)) => notes.push(format!("{name} {inputs} inputs")),
                Ok(Err(finding)) => findings.push(format!("{finding:#}")),
                Err(_) => findings.push(format!("the run of {name} panicked")),
            }
        }
    }
    match findings.is_empty() {
        true => Ok(notes.join(", ")),
        false => bail!("{}", findings.join("\n")),
    }
}

fn run_target(workspace: &Workspace, program: &Program, seconds: u32) -> anyhow::Result<String> {
    let name = &program.name;
    let folder = |path: &str| -> anyhow::Result<PathBuf> {
        let path = workspace.path(path);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    };
    let findings = folder("target/fuzz/findings")?;
    let corpus = folder(&format!("target/fuzz/corpus/{name}"))?;
    let seeds = workspace.path(&format!("fuzz/seeds/{name}"));
    let mut command = Command::new(&program.path);
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_LIMIT}"))
        .arg(format!("-artifact_prefix={}/{name}-", findings.display()))
        .args(["-len_control=0", "-print_final_stats=1", "-verbosity=0"])
        // What is new goes into the first one.
        .arg(corpus)
        .args(Some(seeds).filter(|seeds| seeds.is_dir()));
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", program.path.display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        bail!(
            "{name} found something ({}), the input is in {}:\n  {}",
            output.status,
            findings.display(),
            last_lines(&said).join("\n  ")
        );
    }
    read_inputs(&said).with_context(|| format!("{name} did not say how many inputs it tried"))
}

fn last_lines(said: &str) -> Vec<&str> {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].to_vec()
}

fn read_inputs(said: &str) -> Option<String> {
    let number = said
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?
        .trim();
    (number != "0").then(|| number.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_tried_nothing_is_no_success() {
        assert_eq!(
            read_inputs("x\nstat::number_of_executed_units: 4711\n").as_deref(),
            Some("4711")
        );
        assert_eq!(read_inputs("stat::number_of_executed_units: 0"), None);
        assert_eq!(read_inputs(""), None);
    }

    #[test]
    fn every_target_has_its_place_in_the_manifest_and_few_seeds() {
        let workspace = Workspace::find().unwrap();
        let manifest = std::fs::read_to_string(workspace.path("fuzz/Cargo.toml")).unwrap();
        for entry in std::fs::read_dir(workspace.path("fuzz/fuzz_targets")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            let Ok(seeds) = std::fs::read_dir(workspace.path(&format!("fuzz/seeds/{name}"))) else {
                continue;
            };
            let sizes = seeds.map(|seed| seed.unwrap().metadata().unwrap().len());
            assert!(
                sizes.sum::<u64>() < 512 << 10,
                "the seeds of {name} are many"
            );
        }
    }
}
