//! `cargo xtask lab`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Subcommand;

use super::ledger::Ledger;
use super::request::{Ended, Request};
use super::session::{Kind, Lab};
use super::settings::Settings;
use crate::workspace::Workspace;

/// Runs a program of this host inside the emulated server
///
/// The program sees this host's files read-only, its own /tmp and /run, the environment and the
/// working directory it was called with, and target/lab/out, which it may write. Output is passed
/// on as it comes; the exit status is the program's, 124 when its time was up, 130 after Ctrl-C,
/// 125 when the lab failed.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: Run,
}

#[derive(Clone, Debug, clap::Args)]
struct Run {
    /// Use a new server even where `lab start` left one running
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    machine: MachineArgs,
    /// End the program after this time
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    time_limit: u64,
    /// Program and arguments, after `--`
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Clone, Debug, clap::Args)]
struct MachineArgs {
    /// Processors of a new server
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,
    /// Memory of a new server
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1024..=65_536))]
    memory: u32,
}

impl MachineArgs {
    fn settings(&self, workspace: &Workspace) -> Settings {
        let mut settings = Settings::new(workspace);
        settings.machine.cpus = self.cpus;
        settings.machine.memory_mib = self.memory;
        settings
    }
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// Bring a server up and leave it running for the commands to come
    Start(MachineArgs),
    /// End the server that was left running
    Stop,
    /// Say whether a server is running, and how often one hung
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Does what `cargo xtask lab` was told.
pub fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    match &args.action {
        Some(Action::Start(machine)) => start(machine.settings(workspace)),
        Some(Action::Stop) => {
            let text = match Lab::stop_kept(&Settings::new(workspace))? {
                true => "lab: stopped",
                false => "lab: none was running",
            };
            eprintln!("{text}");
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Status { json }) => status(&Settings::new(workspace), *json),
        None if args.run.command.is_empty() => {
            bail!("which command? Write it after `--`, as in: cargo xtask lab -- uname -a")
        }
        None => Ok(execute(workspace, &args.run).unwrap_or_else(|error| {
            eprintln!("lab: {error:#}");
            ExitCode::from(125)
        })),
    }
}

fn start(settings: Settings) -> anyhow::Result<ExitCode> {
    let mut lab = Lab::open(settings, Kind::Kept)?;
    let begin = std::time::Instant::now();
    lab.bring_up()?;
    let pid = lab.pid().context("the lab ended again")?;
    lab.close()?;
    eprintln!(
        "lab: up after {:.1} s, process {pid}; `cargo xtask lab stop` ends it",
        begin.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

fn status(settings: &Settings, json: bool) -> anyhow::Result<ExitCode> {
    let ledger = Ledger::new(&settings.directory);
    let counts = ledger.read()?;
    let kept = Lab::kept(settings);
    let text = if json {
        serde_json::to_string_pretty(&serde_json::json!({
            "running": kept.is_some(),
            "pid": kept.as_ref().map(|(pid, _)| pid),
            "directory": kept.as_ref().map(|(_, directory)| directory),
            "counts": counts,
        }))?
    } else {
        let running = match &kept {
            Some((pid, directory)) => format!("running, process {pid}, {}", directory.display()),
            None => "not running".into(),
        };
        let last = counts
            .newest
            .last()
            .map(|retry| format!("\nlast retry  {}", retry.reason))
            .unwrap_or_default();
        format!(
            "lab         {running}\nstarts      {}\ncommands    {}\nretries     {} ({}){last}",
            counts.starts,
            counts.commands,
            counts.retries,
            ledger.path().display()
        )
    };
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn execute(workspace: &Workspace, run: &Run) -> anyhow::Result<ExitCode> {
    let kind = if run.fresh { Kind::Fresh } else { Kind::Any };
    let mut lab = Lab::open(run.machine.settings(workspace), kind)?;
    let request = Request::new(run.command.clone(), Duration::from_secs(run.time_limit))?;
    let outcome = lab.run(&request, &mut pass_on)?;
    lab.close()?;
    if outcome.retries > 0 {
        eprintln!(
            "lab: the command ran {} times because the lab hung",
            outcome.retries + 1
        );
    }
    if outcome.ended == Ended::TimeLimit {
        eprintln!(
            "lab: the command was ended after {} s: give it longer with --time-limit",
            run.time_limit
        );
    }
    Ok(ExitCode::from(outcome.ended.status()))
}

/// Output of a command in the lab to where our own goes.
pub fn pass_on(is_stderr: bool, bytes: &[u8]) -> std::io::Result<()> {
    if is_stderr {
        return std::io::stderr().write_all(bytes);
    }
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Args, String> {
        let words = std::iter::once("lab").chain(words.iter().copied());
        Cli::try_parse_from(words)
            .map(|cli| cli.args)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn options_of_the_command_are_not_ours() {
        let args = parse(&["--fresh", "--", "ls", "--json", "-l"]).unwrap();
        assert!(args.run.fresh);
        assert_eq!(args.run.command, ["ls", "--json", "-l"]);
        assert_eq!(args.run.time_limit, 300);
    }

    #[test]
    fn a_command_named_like_an_action_is_a_command() {
        let args = parse(&["--", "stop"]).unwrap();
        assert!(args.action.is_none());
        assert_eq!(args.run.command, ["stop"]);
    }

    #[test]
    fn actions_take_their_own_options() {
        assert!(matches!(
            parse(&["status", "--json"]).unwrap().action,
            Some(Action::Status { json: true })
        ));
        let Some(Action::Start(machine)) = parse(&["start", "--cpus", "4"]).unwrap().action else {
            panic!("not start")
        };
        assert_eq!(machine.cpus, 4);
    }

    #[test]
    fn absurd_sizes_and_times_are_refused() {
        for words in [
            &["--time-limit", "0", "--", "ls"][..],
            &["--time-limit", "-1", "--", "ls"],
            &["start", "--cpus", "0"],
            &["start", "--memory", "1"],
            &["start", "--memory", "99999999999"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
