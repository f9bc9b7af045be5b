//! `cargo xtask bench` and `cargo xtask demo`: measurements by `cofferdam bench`, in the place
//! where Linux guests run, gathered in one report.

pub mod demo;
mod service;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use guest_images::kernels::DEFAULT;

use crate::lab::{CABLED, Ended, Kind, Lab, Request, Settings, pass_on, watch_interrupts};
use crate::place::Place;
use crate::steps::{Steps, capture, cargo, run};
use crate::suite::run_on_host;
use crate::workspace::Workspace;
use crate::{images, setup};

/// For one measuring command in the lab: five reboots, a hundred rollbacks of each entry point and
/// more.
const COMMAND_LIMIT: Duration = Duration::from_secs(1800);

/// Measures, and writes what came of it
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, Subcommand)]
enum What {
    /// Time from the start of the process to /init, against QEMU; each boot in a fresh lab
    Boot {
        #[command(flatten)]
        common: Common,
        /// Only ours or only QEMU's
        #[arg(long, value_enum)]
        only: Option<Monitor>,
    },
    /// Time the network is gone: rollback of a failed call, driver restart, guest reboot
    Recovery {
        #[command(flatten)]
        common: Common,
        /// Rollbacks of each entry point of the driver
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
        rollbacks: u16,
    },
    /// Packet rate and throughput with functions of the driver isolated, against none
    Isolation {
        #[command(flatten)]
        common: Common,
        /// How long each kind of traffic runs with each set of functions
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
    },
    /// Snapshots, restores, marks and rewinds, against a boot
    Suspend {
        #[command(flatten)]
        common: Common,
        /// Sizes of guest memory, in MiB
        #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [256, 1024])]
        memory: Vec<u32>,
    },
    /// A NIC that moves between two running guests: switches of the device host, against unplug and
    /// plug
    Switch {
        #[command(flatten)]
        common: Common,
        /// Switches of the device host of each kind; --runs is how many moves by unplug and plug
        /// there are
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
        switches: u16,
        /// Sizes of the memory of each guest, in MiB
        #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [256, 1024])]
        memory: Vec<u32>,
    },
    /// Faults in a driver on purpose, natively and isolated, and what became of them
    Campaign {
        #[command(flatten)]
        common: Common,
        /// The driver's module
        #[arg(long, value_name = "MODULE", default_value = demo::DRIVER)]
        driver: String,
        /// How many faults
        #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
        trials: u32,
    },
    /// Memory of the service, a request against a start of the program, and listeners to events.
    /// Needs no images and no lab
    Service(service::Args),
    /// Send traffic through the NIC and check every byte of it
    Traffic {
        #[command(flatten)]
        common: Common,
        /// How long each kind is sent
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
        seconds: u64,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// How often
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    runs: u16,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Monitor {
    Cofferdam,
    Qemu,
}

impl Monitor {
    fn word(self) -> &'static str {
        match self {
            Self::Cofferdam => "cofferdam",
            Self::Qemu => "qemu",
        }
    }
}

/// Does `cargo xtask bench`.
pub fn main(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    if let What::Service(args) = &args.what {
        service::main(workspace, args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let measured = match args.what {
        What::Switch { .. } => 2,
        _ => 1,
    };
    let steps = Steps::new(3 + measured);
    let mut bench = Bench::prepare(workspace, "target/bench", &steps)?;
    let (common, name) = match &args.what {
        What::Boot { common, only } => {
            steps.must("boot", || {
                let monitors =
                    only.map_or(vec![Monitor::Cofferdam, Monitor::Qemu], |one| vec![one]);
                bench.boots(common.runs, &monitors)
            })?;
            (common, "boot")
        }
        What::Recovery { common, rollbacks } => {
            steps.must("recovery", || bench.recovery(common.runs, *rollbacks))?;
            (common, "recovery")
        }
        What::Isolation { common, seconds } => {
            steps.must("isolation", || bench.isolation(*seconds))?;
            (common, "isolation")
        }
        What::Suspend { common, memory } => {
            steps.must("suspend", || bench.suspend(common.runs, memory))?;
            (common, "suspend")
        }
        What::Switch {
            common,
            switches,
            memory,
        } => {
            steps.must("switch", || bench.switch(*switches, common.runs, memory))?;
            steps.must("switch of a function", || {
                bench.function_switch(*switches, common.runs, memory, &["--large-pages"])
            })?;
            (common, "switch")
        }
        What::Campaign {
            common,
            driver,
            trials,
        } => {
            steps.must("campaign", || bench.campaign(driver, "", *trials))?;
            (common, "campaign")
        }
        What::Service(_) => bail!("this needs none of what was prepared"),
        What::Traffic { common, seconds } => {
            steps.must("traffic", || bench.traffic(*seconds))?;
            (common, "traffic")
        }
    };
    bench.finish(&workspace.path("target/bench"), name, common.json)?;
    steps.summary();
    Ok(ExitCode::SUCCESS)
}

/// The part in which the start of a process counts.
const SUSPEND: &str = "suspend";
/// Has the program, which is `$0`, in the lab's memory as it would be in a host's: pages of a file
/// of 9p take a round trip each.
const FROM_MEMORY: &str = "cp \"$0\" /tmp/cofferdam && exec /tmp/cofferdam \"$@\"";

/// A measurement under way.
struct Bench {
    cofferdam: PathBuf,
    workspace: Workspace,
    place: Place,
    /// Absent on a host that needs none.
    lab: Option<Lab>,
    /// Where the parts are written, here and in the lab.
    scratch: PathBuf,
    parts: Vec<PathBuf>,
}

impl Bench {
    fn prepare(workspace: &Workspace, scratch: &str, steps: &Steps) -> anyhow::Result<Self> {
        steps.must("set up", setup::run)?;
        steps.must("images", || images::run(workspace, &[DEFAULT], false))?;
        steps.must("build", || build(workspace))?;
        let cofferdam = workspace.path("target/release/cofferdam");
        let place = Place::find(&cofferdam)?;
        let (lab, scratch) = match place {
            Place::Host => {
                watch_interrupts()?;
                (None, workspace.path(scratch))
            }
            Place::Lab => {
                eprintln!(
                    "      Linux guests are too slow on this host's KVM: measuring in the lab"
                );
                let settings = Settings::new(workspace);
                let scratch = settings.machine.out.clone();
                (Some(Lab::open(settings, Kind::Fresh)?), scratch)
            }
        };
        std::fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot make {}", scratch.display()))?;
        Ok(Self {
            cofferdam,
            workspace: workspace.clone(),
            place,
            lab,
            scratch,
            parts: Vec::new(),
        })
    }

    /// Each boot in a fresh lab: in a used one translated code is there already, or thrown away.
    fn boots(&mut self, runs: u16, monitors: &[Monitor]) -> anyhow::Result<String> {
        for number in 1..=runs {
            for monitor in monitors {
                self.renew()?;
                eprintln!("      {}, {number} of {runs}", monitor.word());
                let part = format!("boot-{}-{number}", monitor.word());
                self.measure(&part, &["boot", "--runs", "1", "--vmm", monitor.word()])?;
            }
        }
        Ok(format!("{} boots", usize::from(runs) * monitors.len()))
    }

    /// As [`Self::boots`], but ours only, and one of QEMU to compare with.
    fn demo_boots(&mut self, runs: u16) -> anyhow::Result<String> {
        self.boots(1, &[Monitor::Qemu])?;
        self.boots(runs, &[Monitor::Cofferdam])
    }

    /// All ways of recovery in one lab, so that their ratios mean something. It has one emulated
    /// processor: with two a guest was lost now and then after hundreds of rollbacks
    /// (`docs/lab.md`).
    fn recovery(&mut self, runs: u16, rollbacks: u16) -> anyhow::Result<String> {
        self.lab.as_mut().map_or(Ok(()), |lab| lab.renew_with(1))?;
        let (runs, rollbacks) = (runs.to_string(), rollbacks.to_string());
        self.measure(
            "recovery",
            &["recovery", "--runs", &runs, "--rollbacks", &rollbacks],
        )
    }

    fn isolation(&mut self, seconds: u64) -> anyhow::Result<String> {
        self.renew()?;
        self.measure(
            "isolation",
            &["isolation", "--seconds", &seconds.to_string()],
        )
    }

    /// All in one lab, as [`Self::recovery`].
    fn suspend(&mut self, runs: u16, memory: &[u32]) -> anyhow::Result<String> {
        self.lab.as_mut().map_or(Ok(()), |lab| lab.renew_with(1))?;
        let memory: Vec<_> = memory.iter().map(u32::to_string).collect();
        let (runs, memory) = (runs.to_string(), memory.join(","));
        self.measure(SUSPEND, &["suspend", "--runs", &runs, "--memory", &memory])
    }

    /// All in one lab, as [`Self::recovery`].
    fn switch(&mut self, switches: u16, moves: u16, memory: &[u32]) -> anyhow::Result<String> {
        self.lab.as_mut().map_or(Ok(()), |lab| lab.renew_with(1))?;
        let memory: Vec<_> = memory.iter().map(u32::to_string).collect();
        let (switches, moves) = (switches.to_string(), moves.to_string());
        let memory = memory.join(",");
        self.measure(
            "switch",
            &[
                "switch",
                "--switches",
                &switches,
                "--moves",
                &moves,
                "--memory",
                &memory,
            ],
        )
    }

    /// The same with the lab's own card in place of a model. Elsewhere it is not known which card
    /// of the host may be given away.
    fn function_switch(
        &mut self,
        switches: u16,
        moves: u16,
        memory: &[u32],
        more: &[&str],
    ) -> anyhow::Result<String> {
        let Some(lab) = &mut self.lab else {
            return Ok(
                "not measured: say which card with `cofferdam bench switch --vfio`".to_owned(),
            );
        };
        lab.renew_with(1)?;
        let [address, driver, far_end] = CABLED;
        let memory: Vec<_> = memory.iter().map(u32::to_string).collect();
        let (switches, moves) = (switches.to_string(), moves.to_string());
        let memory = memory.join(",");
        let mut words = vec!["switch", "--vfio", address, "--driver", driver];
        words.extend(["--far-end", far_end, "--switches", &switches]);
        words.extend(["--moves", &moves, "--memory", &memory]);
        words.extend(more);
        self.measure("function", &words)
    }

    /// With one emulated processor, as [`Self::recovery`].
    fn campaign(&mut self, driver: &str, kinds: &str, trials: u32) -> anyhow::Result<String> {
        self.lab.as_mut().map_or(Ok(()), |lab| lab.renew_with(1))?;
        let trials = trials.to_string();
        let mut words = vec!["campaign", "--driver", driver, "--trials", &trials];
        if !kinds.is_empty() {
            words.extend(["--kinds", kinds]);
        }
        self.measure("campaign", &words)
    }

    fn traffic(&mut self, seconds: u64) -> anyhow::Result<String> {
        self.renew()?;
        self.measure("traffic", &["traffic", "--seconds", &seconds.to_string()])
    }

    fn renew(&mut self) -> anyhow::Result<()> {
        self.lab.as_mut().map_or(Ok(()), Lab::renew)
    }

    fn measure(&mut self, part: &str, words: &[&str]) -> anyhow::Result<String> {
        let json = self.scratch.join(format!("{part}.json"));
        if json.exists() {
            std::fs::remove_file(&json)
                .with_context(|| format!("cannot remove {}", json.display()))?;
        }
        let mut argv = match part == SUSPEND && self.lab.is_some() {
            true => vec!["sh".into(), "-c".into(), FROM_MEMORY.into()],
            false => Vec::new(),
        };
        argv.extend([text(&self.cofferdam), "bench".into()]);
        argv.extend(words.iter().map(|word| word.to_string()));
        argv.extend([
            "--images".into(),
            text(&self.workspace.images()),
            "--json".into(),
            text(&json),
        ]);
        let mut request = Request::new(argv, COMMAND_LIMIT)?;
        request.env.retain(|(name, _)| name != "COFFERDAM_WHERE");
        request
            .env
            .push(("COFFERDAM_WHERE".into(), self.place.word().into()));
        // Its progress only: its numbers are shown once, at the end, with those of the other parts.
        let mut progress = |is_stderr: bool, bytes: &[u8]| match is_stderr {
            true => pass_on(true, bytes),
            false => Ok(()),
        };
        let ended = match &mut self.lab {
            Some(lab) => lab.run(&request, &mut progress)?.ended,
            None => run_on_host(&request, &mut progress)?,
        };
        if ended != Ended::Exited(0) {
            bail!("`cofferdam bench {}` ended: {ended:?}", words.join(" "));
        }
        self.parts.push(json);
        Ok(String::new())
    }

    /// Merges the parts into `directory/name.json` and `.html`.
    fn finish(self, directory: &Path, name: &str, print: bool) -> anyhow::Result<PathBuf> {
        if let Some(lab) = self.lab {
            lab.close()?;
        }
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let report = directory.join(format!("{name}.json"));
        let mut merge = Command::new(&self.cofferdam);
        merge.args(["report", "merge"]).args(&self.parts);
        merge
            .arg("--json")
            .arg(&report)
            .arg("--html")
            .arg(report.with_extension("html"));
        capture(&mut merge)?;
        let shown = match print {
            true => std::fs::read_to_string(&report)
                .with_context(|| format!("cannot read {}", report.display()))?,
            false => capture(
                Command::new(&self.cofferdam)
                    .args(["report", "show"])
                    .arg(&report),
            )?,
        };
        writeln!(std::io::stdout().lock(), "{}", shown.trim_end())
            .context("cannot write to standard output")?;
        Ok(report)
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Builds the release program; the report names the commit it was built from.
pub fn build(workspace: &Workspace) -> anyhow::Result<String> {
    let words = ["build", "--release", "--locked", "-p", "cofferdam"];
    run(cargo()
        .args(words)
        .env("COFFERDAM_COMMIT", commit(workspace))
        .current_dir(workspace.root()))?;
    Ok("target/release/cofferdam".into())
}

/// The commit that is built, and whether something was changed since; "unknown" outside a checkout.
pub fn commit(workspace: &Workspace) -> String {
    let git = |words: &[&str]| {
        capture(
            Command::new("git")
                .args(words)
                .current_dir(workspace.root()),
        )
    };
    // Outside a checkout there is no commit to name.
    let Ok(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".into();
    };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|text| !text.is_empty());
    commit.trim().to_owned() + if changed { "+changes" } else { "" }
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

    #[test]
    fn absurd_counts_are_refused() {
        let parse = |words: &[&str]| {
            Cli::try_parse_from(std::iter::once(&"bench").chain(words)).map(|cli| cli.args.what)
        };
        assert!(matches!(
            parse(&["boot", "--runs", "3"]).unwrap(),
            What::Boot {
                common: Common { runs: 3, .. },
                only: None
            }
        ));
        for words in [
            &["boot", "--runs", "0"][..],
            &["recovery", "--runs", "-1"],
            &["traffic", "--seconds", "0"],
            &[],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
