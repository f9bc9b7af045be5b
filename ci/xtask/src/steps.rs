//! Tells a person what is being done, how long it took, and what came of it.
//!
//! Everything goes to standard error; standard output belongs to results.

use std::io::IsTerminal;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// All went well.
    Ok,
    /// It failed.
    Failed,
}

/// A step that is over.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub state: State,
    /// How long it took.
    pub seconds: f64,
    /// What to remember of it, such as a count; the error of one that failed.
    pub note: String,
}

/// The steps of one task.
pub struct Steps {
    total: usize,
    begin: Instant,
    records: Vec<Record>,
}

impl Steps {
    /// A task of `total` steps.
    pub fn new(total: usize) -> Self {
        Self {
            total,
            begin: Instant::now(),
            records: Vec::new(),
        }
    }

    /// Does a step that the rest depends on. The work returns what to remember.
    ///
    /// # Errors
    /// The work's.
    pub fn must(
        &mut self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        self.step(name, work)
            .with_context(|| format!("{name} failed"))
    }

    /// Does a step whose failure is told at the end. `false` when it failed.
    pub fn may(&mut self, name: &str, work: impl FnOnce() -> anyhow::Result<String>) -> bool {
        self.step(name, work).is_ok()
    }

    fn step(
        &mut self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        eprintln!("[{}/{}] {name}", self.records.len() + 1, self.total);
        let begin = Instant::now();
        let result = work();
        let seconds = begin.elapsed().as_secs_f64();
        let (state, note) = match &result {
            Ok(note) => (State::Ok, note.clone()),
            Err(error) => (State::Failed, format!("{error:#}")),
        };
        let word = if state == State::Ok { "done" } else { "FAILED" };
        let colon = if note.is_empty() { "" } else { ": " };
        eprintln!("      {word} in {}{colon}{note}", duration(seconds));
        self.records.push(Record {
            name: name.to_owned(),
            state,
            seconds,
            note,
        });
        result.map(drop)
    }

    /// The steps that are over.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Whether one failed.
    pub fn failed(&self) -> bool {
        self.records
            .iter()
            .any(|record| record.state == State::Failed)
    }

    /// Prints all steps with their times.
    pub fn summary(&self) {
        let width = self
            .records
            .iter()
            .map(|record| record.name.chars().count())
            .max()
            .unwrap_or(0);
        eprintln!();
        for Record {
            name,
            state,
            seconds,
            note,
        } in &self.records
        {
            let word = if *state == State::Ok {
                "ok    "
            } else {
                "FAILED"
            };
            let note = note.lines().next().unwrap_or_default();
            eprintln!("{word}  {name:width$}  {:>8}  {note}", duration(*seconds));
        }
        eprintln!(
            "        {:width$}  {:>8}",
            "all",
            duration(self.begin.elapsed().as_secs_f64())
        );
    }
}

/// A duration as a person says it.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 0.1 => format!("{:.0} ms", s * 1000.0),
        s if s < 60.0 => format!("{s:.1} s"),
        s => format!("{}:{:02} min", s as u64 / 60, s as u64 % 60),
    }
}

/// Shows that something is going on: a spinner on a terminal, a line elsewhere.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// Begins to show `message`.
    pub fn new(message: &str) -> Self {
        let progress = Self(std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("      {spinner} {msg} ({elapsed})")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        }));
        progress.say(message);
        progress
    }

    /// Shows another message.
    pub fn say(&self, message: &str) {
        match &self.0 {
            Some(bar) => bar.set_message(message.to_owned()),
            None => eprintln!("      {message}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Set by `cargo run` for us; another crate's build scripts and tests are not to see it.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "CARGO_PKG_VERSION"] {
        cargo.env_remove(name);
    }
    cargo
}

/// The command as a person would type it.
fn words(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
    command
        .get_args()
        .fold(program, |line, word| line + " " + &word.to_string_lossy())
}

/// Runs a command on our own output.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    eprintln!("      $ {}", words(command));
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", words(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", words(command));
    }
    Ok(())
}

/// Runs a command and returns what it wrote; on failure its last error lines are in the error.
///
/// # Errors
/// When it cannot be started or fails.
pub fn capture(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start `{}`", words(command)))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(8)..].join("\n  ");
        bail!(
            "`{}` ended with {}:\n  {tail}",
            words(command),
            output.status
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_step_is_remembered_and_later_ones_go_on() {
        let mut steps = Steps::new(3);
        assert!(steps.may("one", || Ok("fine".into())));
        assert!(!steps.may("two", || bail!("broken")));
        assert!(steps.may("three", || Ok(String::new())));
        assert!(steps.failed());
        let states: Vec<_> = steps
            .records()
            .iter()
            .map(|r| (r.state, r.note.as_str()))
            .collect();
        assert_eq!(
            states,
            [
                (State::Ok, "fine"),
                (State::Failed, "broken"),
                (State::Ok, "")
            ]
        );
    }

    #[test]
    fn error_of_a_command_holds_its_last_words() {
        let error = capture(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("why") && text.contains('3'), "{text}");
    }

    #[test]
    fn durations_are_readable() {
        assert_eq!(duration(0.0123), "12 ms");
        assert_eq!(duration(5.25), "5.2 s");
        assert_eq!(duration(61.9), "1:01 min");
    }
}
