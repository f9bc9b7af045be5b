//! A bounded run of the fuzz targets, on the stable toolchain: `cargo-fuzz` is not needed for that,
//! only the compiler's coverage instrumentation that libFuzzer reads. As many run at a time as
//! there are processors. For long hunts with sanitizers there is `cargo fuzz`.

use std::num::NonZero;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context, bail};

use crate::steps::{Progress, cargo, run as run_command};
use crate::workspace::Workspace;

/// The instrumentation; the same that `cargo fuzz --sanitizer none` uses.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks";
/// Named, so that build scripts are not instrumented.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// For each target. Long enough to reach deep states from no corpus, short enough for every run of
/// the tests.
const SECONDS: u32 = 8;
/// An input that takes longer, in seconds, is a finding.
const INPUT_LIMIT: u32 = 20;

/// Builds and runs every target.
pub fn run(workspace: &Workspace) -> anyhow::Result<String> {
    let sources = workspace.path("fuzz/fuzz_targets");
    let targets = targets(&sources)?;
    if targets.is_empty() {
        bail!("there is no fuzz target in {}", sources.display());
    }
    let built = workspace.path("target/fuzz");
    run_command(
        cargo()
            .args([
                "build",
                "--release",
                "--quiet",
                "--locked",
                "--target",
                TARGET,
            ])
            .arg("--manifest-path")
            .arg(workspace.path("fuzz/Cargo.toml"))
            .arg("--target-dir")
            .arg(&built)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", RUSTFLAGS)
            .current_dir(workspace.root()),
    )?;
    let findings = built.join("findings");
    std::fs::create_dir_all(&findings)
        .with_context(|| format!("cannot make {}", findings.display()))?;
    let programs = built.join(TARGET).join("release");
    let mut notes = Vec::new();
    for targets in targets.chunks(available_parallelism().map_or(1, NonZero::get)) {
        let _progress = Progress::new(&format!("{} for {SECONDS} s", targets.join(", ")));
        let run = |target: &String| run_target(&programs.join(target), &findings, target);
        let runs: Vec<_> = std::thread::scope(|scope| {
            let spawn = |target| scope.spawn(move || run(target));
            let threads: Vec<_> = targets.iter().map(spawn).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for (target, run) in targets.iter().zip(runs) {
            let inputs = run.map_err(|_| anyhow::anyhow!("the run of {target} panicked"))??;
            notes.push(format!("{target} {inputs} inputs"));
        }
    }
    Ok(notes.join(", "))
}

fn targets(sources: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    let entries =
        std::fs::read_dir(sources).with_context(|| format!("cannot read {}", sources.display()))?;
    for entry in entries {
        let path = entry?.path();
        if let (Some("rs"), Some(stem)) = (
            path.extension().and_then(|e| e.to_str()),
            path.file_stem().and_then(|s| s.to_str()),
        ) {
            names.push(stem.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn run_target(program: &Path, findings: &Path, name: &str) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command
        .arg(format!("-max_total_time={SECONDS}"))
        .arg(format!("-timeout={INPUT_LIMIT}"))
        .arg(format!("-artifact_prefix={}/{name}-", findings.display()))
        .args(["-len_control=0", "-print_final_stats=1", "-verbosity=0"]);
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n  ");
        bail!(
            "{name} found something ({}), the input is in {}:\n  {tail}",
            output.status,
            findings.display()
        );
    }
    read_inputs(&said).with_context(|| format!("{name} did not say how many inputs it tried"))
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
    fn every_target_is_found() {
        let workspace = Workspace::find().unwrap();
        assert!(
            targets(&workspace.path("fuzz/fuzz_targets"))
                .unwrap()
                .contains(&"e1000_registers".to_owned())
        );
    }
}
