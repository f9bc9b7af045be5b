//! The command line: what there is to type, and which function does it.

mod analyze;
mod bench;
mod campaign;
mod control;
mod debug;
mod device;
mod device_host;
mod disturb;
mod errors;
mod exec;
mod image;
mod images;
mod inject;
mod inject_code;
mod isolation;
mod keep;
mod logging;
mod man;
mod marks;
mod mouse;
mod plug;
mod report;
mod run;
mod run_file;
mod serve;
mod snapshot;
mod suspend_device;
mod sweep;
mod switch;
mod top;
mod trace;
mod try_module;
mod upgrade;
mod violations;
mod when;

use std::ffi::OsString;

use clap::{CommandFactory, Parser, Subcommand};

pub use errors::usage_error;
pub use logging::LogOptions;

pub use crate::ending::Ending;
pub use crate::error_text::one_line;
use crate::table;

/// A lightweight VMM for driver fault isolation.
#[derive(Debug, Parser)]
#[command(
    name = "cofferdam",
    version,
    max_term_width = 100,
    propagate_version = false
)]
#[command(after_help = "\
Examples:
  cofferdam image build --kernel debian:6.1
  cofferdam try ./my.ko --run 'ip link set my0 up'
  cofferdam run --kernel target/images/vmlinux --initrd target/images/initrd.cpio --net user
  cofferdam status
  cofferdam exec -- ip addr
  cofferdam bench recovery --method restart,reboot --runs 5 --json report.json

Each command has examples in its own --help.")]
pub struct Cli {
    #[command(flatten)]
    log: LogOptions,
    #[command(subcommand)]
    command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
enum Command {
    /// Try a module of your own in a guest: boot, insert, isolate, run a command, say what became
    /// of its calls
    Try(Box<try_module::TryOptions>),
    /// Build guest images of Debian's kernels, or list those that are there
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Boot a guest in this terminal
    Run(Box<run::RunOptions>),
    /// List the VMs that run
    List(control::ListOptions),
    /// Watch all VMs and shared NICs, live: rates, isolated drivers, recoveries, turns
    Top(top::TopOptions),
    /// Show how a VM is: state, memory, exits, NIC
    Status(control::StatusOptions),
    /// Hold a VM's processors
    Pause(control::VmOptions),
    /// Let a VM's processors go on
    Resume(control::VmOptions),
    /// Reset a VM, as its reset button would
    Reset(control::VmOptions),
    /// Wake a guest that has suspended itself (`echo freeze > /sys/power/state`)
    Wake(control::VmOptions),
    /// Shut a VM down, or end it at once with --force
    Stop(control::StopOptions),
    /// Write all of a VM's state to disk, to go on from there; look at such snapshots
    Snapshot(snapshot::SnapshotOptions),
    /// Set a mark where a guest is, to rewind it there
    Mark(marks::MarkOptions),
    /// Take a guest back to a mark, in place and at once
    Rewind(marks::RewindOptions),
    /// Show a VM's marks, or forget one
    Marks(marks::MarksOptions),
    /// Plug a NIC into a guest that runs
    Plug(plug::PlugOptions),
    /// Take a NIC out of a guest that runs
    Unplug(plug::UnplugOptions),
    /// Move a guest's mouse, press its buttons, turn its wheel
    Mouse(mouse::MouseOptions),
    /// Run a command inside a guest, through its agent
    Exec(exec::ExecOptions),
    /// Put functions of a guest's driver into a domain of their own
    Isolate(isolation::IsolateOptions),
    /// Take a guest's driver out of its domain
    Release(isolation::ReleaseOptions),
    /// Put another build of a driver in the place of the one that runs
    Upgrade(upgrade::UpgradeOptions),
    /// Have a driver suspend its devices, with its own function, and leave them so
    SuspendDevice(suspend_device::SuspendDeviceOptions),
    /// Have a driver resume its devices, or suspend and resume them, with its own functions
    ResumeDevice(suspend_device::ResumeDeviceOptions),
    /// Show what calls of an isolated driver did wrong
    Violations(violations::ViolationsOptions),
    /// Record calls of an isolated driver, and say where their time went; for Perfetto, too
    Trace(trace::TraceOptions),
    /// Look at a guest at the fault of an isolated call, by hand or with gdb
    Debug(debug::DebugOptions),
    /// Make calls of an isolated driver fail, to see it recover
    Inject(inject::InjectOptions),
    /// Try faults by the hundred, natively and isolated, and say what became of each
    Campaign(Box<campaign::CampaignArgs>),
    /// Isolate all functions of one module after the other, and say what came of each
    Sweep(Box<sweep::SweepArgs>),
    /// Have a NIC fail as hardware does, to see what its driver makes of it
    Disturb(disturb::DisturbOptions),
    /// Say what a driver's module does, from its file: entries, what waits, doubtful code, what
    /// could be isolated
    Analyze(analyze::AnalyzeOptions),
    /// Serve a NIC that guests share by turns; prepare PCI functions of the host for guests
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// Serve all guests and devices over HTTP, on a unix socket
    Serve(serve::ServeOptions),
    /// Give the turn at a shared NIC to another guest
    Switch(switch::SwitchOptions),
    /// Measure boots, recovery and traffic
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Say what this host can do, and what to do about what is missing
    Doctor(crate::doctor::Args),
    /// Show, merge and draw what was measured
    #[command(subcommand)]
    Report(report::ReportCommand),
    /// Print the completions of a shell
    #[command(after_help = "\
Examples:
  cofferdam completions bash > /etc/bash_completion.d/cofferdam
  cofferdam completions zsh > ~/.zfunc/_cofferdam
  cofferdam completions fish > ~/.config/fish/completions/cofferdam.fish")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of all commands
    Man(man::ManOptions),
}

/// A command line of `run`, which is the one that somebody waits for: with all commands beside it
/// the table is some twenty times as large, and is half of what the process does until it begins.
#[derive(Debug, Parser)]
#[command(name = "cofferdam run", max_term_width = 100)]
struct RunAlone {
    #[command(flatten)]
    log: LogOptions,
    #[command(flatten)]
    options: run::RunOptions,
}

/// The command line in `words`, the first of which is the program's name.
///
/// # Errors
/// It cannot be understood, or asks for help or the version.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let words: Vec<OsString> = words.into_iter().collect();
    if words.get(1).is_some_and(|word| word == "run")
        && let Ok(alone) = RunAlone::try_parse_from(&words[1..])
    {
        return Ok(Cli {
            log: alone.log,
            command: Command::Run(Box::new(alone.options)),
        });
    }
    // What is wrong, and help, are said as of one command among the others.
    Cli::try_parse_from(words)
}

/// Does what was asked.
pub fn dispatch(cli: Cli) -> anyhow::Result<Ending> {
    cli.log.start()?;
    match cli.command {
        Command::Try(options) => options.run(),
        Command::Image(command) => command.run(),
        Command::Run(options) => options.run(),
        Command::List(options) => options.run(),
        Command::Top(options) => options.run(),
        Command::Status(options) => options.run(),
        Command::Pause(options) => options.pause(),
        Command::Resume(options) => options.resume(),
        Command::Reset(options) => options.reset(),
        Command::Wake(options) => options.wake(),
        Command::Stop(options) => options.run(),
        Command::Snapshot(options) => options.run(),
        Command::Mark(options) => options.run(),
        Command::Rewind(options) => options.run(),
        Command::Marks(options) => options.run(),
        Command::Plug(options) => options.run(),
        Command::Unplug(options) => options.run(),
        Command::Mouse(options) => options.run(),
        Command::Exec(options) => options.run(),
        Command::Isolate(options) => options.run(),
        Command::Release(options) => options.run(),
        Command::Upgrade(options) => options.run(),
        Command::SuspendDevice(options) => options.run(),
        Command::ResumeDevice(options) => options.run(),
        Command::Violations(options) => options.run(),
        Command::Trace(options) => options.run(),
        Command::Debug(options) => options.run(),
        Command::Inject(options) => options.run(),
        Command::Campaign(options) => options.run(),
        Command::Sweep(options) => options.run(),
        Command::Disturb(options) => options.run(),
        Command::Analyze(options) => options.run(),
        Command::Device(command) => command.run(),
        Command::Serve(options) => options.run(),
        Command::Switch(options) => options.run(),
        Command::Bench(command) => command.run(),
        Command::Doctor(options) => crate::doctor::run(&options).map(Ending::Status),
        Command::Report(command) => command.run(),
        Command::Man(options) => options.run(),
        Command::Completions { shell } => {
            // Made in memory first: the library panics where its output goes nowhere.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cofferdam", &mut script);
            print_bytes(&script)?;
            Ok(Ending::SUCCESS)
        }
    }
}

/// Writes `bytes` to standard output. A reader that has gone away (`| head`) is no error.
pub fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}

/// Writes a value to standard output as JSON that a person can read as well.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print_bytes(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        RunAlone::command().debug_assert();
    }

    /// `run` is read by itself: as it would be among the other commands, wherever the options of
    /// the log stand, and with their complaints.
    #[test]
    fn a_command_line_of_run_means_the_same_by_itself() {
        for line in [
            "cofferdam run --kernel k",
            "cofferdam run -vv --kernel k --net user,nic=virtio --nic device=lan --log-file l --vcpus 3",
            "cofferdam run --snapshot d --lazy --name one --allow-dir / --jail",
            "cofferdam run --kernel=k --append=-a --append b -v --disk d,ro --memory 1G",
            "cofferdam -v run --kernel k",
            "cofferdam status",
        ] {
            let words = || line.split(' ').map(OsString::from);
            let (alone, among) = (
                parse(words()).unwrap(),
                Cli::try_parse_from(words()).unwrap(),
            );
            assert_eq!(format!("{alone:?}"), format!("{among:?}"), "{line}");
        }
        for line in [
            "cofferdam run",
            "cofferdam run --lazy",
            "cofferdam run --kernel k --bogus",
            "cofferdam run --help",
            "cofferdam run --version",
            "cofferdam",
            "cofferdam fly",
        ] {
            let words = || line.split(' ').map(OsString::from);
            let (alone, among) = (parse(words()), Cli::try_parse_from(words()));
            let (alone, among) = (alone.unwrap_err(), among.unwrap_err());
            assert_eq!(alone.to_string(), among.to_string(), "{line}");
        }
    }
}
