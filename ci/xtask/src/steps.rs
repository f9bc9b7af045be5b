//! Tells a person what is being done, how long it took, and what came of it.
//!
//! Everything goes to standard error; standard output belongs to results.

use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Signal, set_parent_process_death_signal};
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

/// The steps of one task. Several threads may have one each under way.
pub struct Steps {
    total: usize,
    begin: Instant,
    /// In the order of their beginnings; of those under way there is none yet.
    records: Mutex<Vec<Option<Record>>>,
}

impl Steps {
    /// A task of `total` steps.
    pub fn new(total: usize) -> Self {
        Self {
            total,
            begin: Instant::now(),
            records: Mutex::default(),
        }
    }

    /// Does a step that the rest depends on. The work returns what to remember.
    ///
    /// # Errors
    /// The work's.
    pub fn must(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        self.step(name, work)
            .with_context(|| format!("{name} failed"))
    }

    /// Does a step whose failure is told at the end. `false` when it failed.
    pub fn may(&self, name: &str, work: impl FnOnce() -> anyhow::Result<String>) -> bool {
        self.step(name, work).is_ok()
    }

    fn step(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let index = {
            let mut records = self.locked();
            records.push(None);
            records.len() - 1
        };
        eprintln!("[{}/{}] {name}", index + 1, self.total);
        let begin = Instant::now();
        let result = work();
        let seconds = begin.elapsed().as_secs_f64();
        let (state, note) = match &result {
            Ok(note) => (State::Ok, note.clone()),
            Err(error) => (State::Failed, format!("{error:#}")),
        };
        let word = if state == State::Ok { "done" } else { "FAILED" };
        let colon = if note.is_empty() { "" } else { ": " };
        let number = index + 1;
        eprintln!(
            "[{number}/{}] {name} {word} in {}{colon}{note}",
            self.total,
            duration(seconds)
        );
        self.locked()[index] = Some(Record {
            name: name.to_owned(),
            state,
            seconds,
            note,
        });
        result.map(drop)
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Option<Record>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The steps that are over, in the order of their beginnings.
    pub fn records(&self) -> Vec<Record> {
        self.locked().iter().flatten().cloned().collect()
    }

    /// Whether one failed.
    pub fn failed(&self) -> bool {
        let failed = |record: &Record| record.state == State::Failed;
        self.locked().iter().flatten().any(failed)
    }

    /// Prints all steps with their times.
    pub fn summary(&self) {
        let records = self.records();
        let width = records
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
        } in &records
        {
            let word = if *state == State::Ok {
                "ok    "
            } else {
                "FAILED"
            };
            let note = note.lines().next().unwrap_or_default();
            eprintln!("{word}  {name:width$}  {:>8}  {note}", duration(*seconds));
        }
        let all = duration(self.begin.elapsed().as_secs_f64());
        let worked = processor_seconds().map_or_else(String::new, |seconds| {
            format!("{seconds:.0} s of processor time")
        });
        eprintln!("        {:width$}  {all:>8}  {worked}", "all");
    }
}

/// Ticks of a processor's time that Linux counts a second for programs, on x86.
const TICKS: f64 = 100.0;

/// Processor time of this process and of all that it has waited for, in seconds: what a run costs,
/// also on a machine that does other things.
fn processor_seconds() -> Option<f64> {
    read_processor_seconds(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

/// proc_pid_stat(5): fields 14 to 17. The name, field 2, may hold blanks and parentheses.
fn read_processor_seconds(stat: &str) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let times = fields.split_whitespace().skip(11).take(4);
    let times: Vec<u64> = times.map(str::parse).collect::<Result<_, _>>().ok()?;
    (times.len() == 4).then(|| times.iter().map(|ticks| *ticks as f64 / TICKS).sum())
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
    ends_with_us(&mut cargo);
    cargo
}

/// Has a command asked to end when we have ended before it: by a signal, most likely.
fn ends_with_us(command: &mut Command) {
    let ask = || Ok(set_parent_process_death_signal(Some(Signal::TERM))?);
    // SAFETY: between fork and exec it makes one system call, and touches no memory that another
    // thread could have been changing.
    unsafe { command.pre_exec(ask) };
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
        let steps = Steps::new(3);
        assert!(steps.may("one", || Ok("fine".into())));
        assert!(!steps.may("two", || bail!("broken")));
        assert!(steps.may("three", || Ok(String::new())));
        assert!(steps.failed());
        let records = steps.records();
        let states: Vec<_> = records.iter().map(|r| (r.state, r.note.as_str())).collect();
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
    fn steps_side_by_side_are_told_in_the_order_of_their_beginnings() {
        let steps = Steps::new(2);
        let steps = &steps;
        std::thread::scope(|scope| {
            steps.may("first", || {
                let second = scope.spawn(|| steps.may("second", || Ok(String::new())));
                assert!(second.join().unwrap());
                Ok(String::new())
            });
        });
        let names: Vec<String> = steps.records().into_iter().map(|one| one.name).collect();
        assert_eq!(names, ["first", "second"]);
    }

    /// Set in the process that starts a command and is killed.
    const STARTS: &str = "COFFERDAM_TEST_STARTS";

    #[test]
    fn a_command_ends_with_who_was_killed_while_it_ran() {
        if std::env::var_os(STARTS).is_some() {
            let mut command = Command::new("sleep");
            command.arg("600");
            ends_with_us(&mut command);
            let mut child = command.spawn().unwrap();
            println!("child {}.", child.id());
            child.wait().unwrap();
            return;
        }
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let name = "steps::tests::a_command_ends_with_who_was_killed_while_it_ran";
        alone
            .args(["--exact", name, "--nocapture"])
            .env(STARTS, "1");
        let mut alone = alone.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let said = std::io::BufReader::new(alone.stdout.take().unwrap());
        let child = std::io::BufRead::lines(said).find_map(|line| {
            let line = line.unwrap();
            let (_, rest) = line.split_once("child ")?;
            rest.split_once('.').map(|(child, _)| child.to_owned())
        });
        let child = child.expect("it says what it has started");
        let is_there = || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z")
        };
        assert!(is_there());
        alone.kill().unwrap();
        alone.wait().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while is_there() {
            assert!(Instant::now() < deadline, "the command still runs");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn processor_time_is_read_whatever_the_program_is_called() {
        let stat = "7 (a) R 1 (b) S 1 7 7 0 -1 4194304 1 2 3 4 100 50 2000 25 20 0 1";
        assert_eq!(read_processor_seconds(stat), Some(21.75));
        assert_eq!(read_processor_seconds("7 (a) S 1 7 7"), None);
        assert!(processor_seconds().is_some());
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
