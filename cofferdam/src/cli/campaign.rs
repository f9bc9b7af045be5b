//! `campaign`: faults by the thousand, and what became of each.

mod alarms;
mod document;
mod figures;
mod stream;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use isolation::attach::request::Contain;
use recovery::campaign::Way;
use recovery::campaign::kind::TrialKind;
use recovery::campaign::record::{Header, Record};
use recovery::campaign::summary::Summary;
use recovery::campaign::workload::{MAX_WORKLOAD, Steps, Workload, checks};

use super::images::Images;
use super::isolation::StoresArgs;
use super::{Ending, print_bytes, print_json};
use crate::bench::guest::GuestOptions;
use crate::bench::network::DRIVER;
use crate::bench::together::Together;
use crate::campaign::worker::Setup;
use crate::campaign::{self, CampaignOptions, Progress};
use crate::json_lines::Elsewhere;
use crate::report;
use crate::table::table;
use crate::words::counted;
use figures::show;
pub(super) use figures::text;
use stream::Told;

/// `campaign`
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Each trial begins at a mark: the guest is rewound, one instruction of the driver is changed or its device fails, and the
guest works: what a workload says, with checked contents. Once in the guest's own text, and with the driver isolated
twice: with the fault taken out after a call came to it, and left in. The guest's kernel checks its heap and its free pages. One line of JSON
a trial goes into the file; a campaign that was interrupted goes on where its file ends.

Examples:
  cofferdam campaign --trials 100 --seed 1 --file campaign.jsonl
  cofferdam campaign --driver null_blk --trials 100 --jobs 4 --file null_blk.jsonl
  cofferdam campaign --workload my_driver.toml --trials 20 --file mine.jsonl
  cofferdam campaign --trials 50 --kinds null_dereference,pointer,missing_call --functions e1000_clean --file few.jsonl
  cofferdam campaign --trials 40 --kinds edge --file device.jsonl
  cofferdam campaign false-alarms --driver e1000 --minutes 10
  cofferdam campaign show campaign.jsonl --plots plots
  cofferdam campaign replay campaign.jsonl 17
  cofferdam campaign kinds"
)]
pub struct CampaignArgs {
    #[command(subcommand)]
    command: Option<CampaignCommand>,
    #[command(flatten)]
    run: RunArgs,
}

/// What else can be done.
#[derive(Debug, clap::Subcommand)]
enum CampaignCommand {
    /// Show the figures of a campaign's file
    Show {
        /// The file
        file: PathBuf,
        /// Draw them into this folder: by kind and by function, and how soon calls were taken back
        /// (SVG)
        #[arg(long, value_name = "FOLDER")]
        plots: Option<PathBuf>,
        /// As JSON
        #[arg(long, conflicts_with_all = ["markdown", "reasons"])]
        json: bool,
        /// What became of the faults that harm natively, as a table for a document
        #[arg(long, conflicts_with = "reasons")]
        markdown: bool,
        /// Each run that was not recovered from, and why, as a table for a document
        #[arg(long)]
        reasons: bool,
    },
    /// Make one trial of a campaign's file again, alone, and show all that was seen then and now
    Replay {
        /// The file
        file: PathBuf,
        /// Number of the trial
        trial: u32,
        #[command(flatten)]
        images: Images,
        #[command(flatten)]
        told: Told,
    },
    /// Look for false alarms: the guest works in random order with its driver isolated and without
    /// a fault, and no call is to be taken back
    FalseAlarms(Box<alarms::AlarmsArgs>),
    /// List the kinds of faults, with their sources
    Kinds {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// What the guest does.
#[derive(Debug, clap::Args)]
struct WorkArgs {
    /// The driver's module, one for which there is a workload: e1000, null_blk, dummy
    #[arg(long, value_name = "MODULE", default_value = DRIVER, value_parser = parse_driver)]
    driver: Workload,
    /// What the guest does, for a driver of one's own (docs/campaigns.md)
    #[arg(long, value_name = "FILE", conflicts_with = "driver")]
    workload: Option<PathBuf>,
}

impl WorkArgs {
    fn workload(self) -> anyhow::Result<Workload> {
        match &self.workload {
            Some(path) => read_workload(path),
            None => Ok(self.driver),
        }
    }
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    #[command(flatten)]
    images: Images,
    #[command(flatten)]
    work: WorkArgs,
    /// Kinds of faults, or code or edge for all in the driver's code or at its device's edge; all
    /// without it
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = parse_kinds)]
    kinds: Vec<Kinds>,
    /// Functions that are isolated and get faults; those that the workload names without it
    #[arg(long, value_name = "FUNCTION", value_delimiter = ',')]
    functions: Vec<String>,
    /// In which ways each fault is tried
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [WayName::Native, WayName::Once, WayName::Stays])]
    ways: Vec<WayName>,
    /// What the guest does in a trial of a fault in the driver's code
    #[arg(long, value_enum, default_value_t = StepsName::Called)]
    steps: StepsName,
    /// Runs without a fault from which it is learnt which memory changes by itself: what else
    /// changes, of what is in use, when the driver is isolated with a fault is an escape. 0: memory is not compared
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=100))]
    twins: u32,
    #[command(flatten)]
    stores: StoresArgs,
    /// How many faults
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    trials: u32,
    /// In how many VMs at a time: no more than there are processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: u32,
    /// What decides which ones
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Where the trials are written
    #[arg(long, value_name = "FILE", default_value = "campaign.jsonl")]
    file: PathBuf,
    /// The figures as JSON
    #[arg(long, conflicts_with = "stream")]
    json: bool,
    #[command(flatten)]
    told: Told,
}

/// A [`Way`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WayName {
    /// In the guest's own text
    Native,
    /// Isolated, and taken out when a call has come to it
    Once,
    /// Isolated, and left in
    Stays,
}

impl From<WayName> for Way {
    fn from(name: WayName) -> Self {
        match name {
            WayName::Native => Self::Native,
            WayName::Once => Self::Once,
            WayName::Stays => Self::Stays,
        }
    }
}

/// [`Steps`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StepsName {
    /// All of its work
    All,
    /// The first steps that call the function, and what is always done
    Called,
}

impl From<StepsName> for Steps {
    fn from(name: StepsName) -> Self {
        match name {
            StepsName::All => Self::All,
            StepsName::Called => Self::Called,
        }
    }
}

/// Those that a word stands for.
pub(super) type Kinds = Vec<TrialKind>;

/// One of all there are, or `code` or `edge` for all of these.
pub(super) fn parse_kinds(name: &str) -> Result<Kinds, String> {
    let of_code = |kind: &TrialKind| matches!(kind, TrialKind::Code(_));
    let all = TrialKind::all();
    match name {
        "code" => Ok(all.filter(of_code).collect()),
        "edge" => Ok(all.filter(|kind| !of_code(kind)).collect()),
        _ => parse_kind(name).map(|kind| vec![kind]),
    }
}

fn parse_kind(name: &str) -> Result<TrialKind, String> {
    TrialKind::from_name(name).ok_or_else(|| {
        let names: Vec<_> = TrialKind::all().map(TrialKind::name).collect();
        format!("there are {}", names.join(", "))
    })
}

impl CampaignArgs {
    /// `campaign`
    pub fn run(self) -> anyhow::Result<Ending> {
        match self.command {
            None => {
                let _together = Together::begin(self.run.told.stream)?;
                self.run.run()
            }
            Some(CampaignCommand::Show {
                file,
                plots,
                json,
                markdown,
                reasons,
            }) => {
                let records = campaign::read(&file, Elsewhere::Followed)?.records;
                let summary = Summary::of(&records);
                if let Some(folder) = plots {
                    report::campaign::write(&summary, &folder)?;
                }
                match (markdown, reasons) {
                    (true, _) => print_bytes(document::harm(&summary).as_bytes())?,
                    (_, true) => print_bytes(document::reasons(&records).as_bytes())?,
                    _ => show(&summary, json)?,
                }
                Ok(Ending::SUCCESS)
            }
            Some(CampaignCommand::Replay {
                file,
                trial,
                images,
                told,
            }) => {
                let _together = Together::begin(told.stream)?;
                replay(&file, trial, &images, &told)
            }
            Some(CampaignCommand::FalseAlarms(args)) => {
                let _together = Together::begin(false)?;
                args.run()
            }
            Some(CampaignCommand::Kinds { json }) => {
                kinds(json)?;
                Ok(Ending::SUCCESS)
            }
        }
    }
}

/// The program's own workload for a driver.
pub(super) fn own_workload(driver: &str) -> Result<Workload, String> {
    Workload::of_driver(driver).ok_or_else(|| {
        let own: Vec<_> = Workload::own().map(|workload| workload.driver).collect();
        format!("there are workloads for {}", own.join(", "))
    })
}

fn parse_driver(driver: &str) -> Result<Workload, String> {
    own_workload(driver).map_err(|what| format!("{what}; give another driver's with --workload"))
}

/// A workload from a file.
fn read_workload(path: &std::path::Path) -> anyhow::Result<Workload> {
    let text = crate::json_lines::text(path, Elsewhere::Followed, MAX_WORKLOAD)?;
    Workload::read(&text).with_context(|| path.display().to_string())
}

/// What a campaign tries, in guests from these images.
fn setup(
    images: &Images,
    workload: Workload,
    contain: Contain,
    (steps, twins): (Steps, u32),
) -> anyhow::Result<Setup> {
    let options = GuestOptions::new(&images.images)?;
    Ok(Setup {
        guest: options.with(&workload.run).with(&checks()),
        workload,
        contain,
        steps,
        twins,
    })
}

impl RunArgs {
    fn run(self) -> anyhow::Result<Ending> {
        let mut workload = self.work.workload()?;
        if !self.functions.is_empty() {
            workload.entries = self.functions;
            workload.helpers.clear();
            workload.check()?;
        }
        let mut ways: Vec<Way> = self.ways.into_iter().map(Way::from).collect();
        ways.sort_unstable();
        ways.dedup();
        let contain = self.stores.contain(Contain::Full)?;
        let options = CampaignOptions {
            setup: self.told.jailed(setup(
                &self.images,
                workload,
                contain,
                (self.steps.into(), self.twins),
            )?),
            kinds: or_all(self.kinds.into_iter().flatten().collect()),
            trials: self.trials,
            seed: self.seed,
            ways,
            jobs: self.jobs,
            file: self.file,
            elsewhere: self.told.elsewhere(),
        };
        let told = self.told;
        let mut tell = |what: &str| told.says(what);
        let mut each = |progress: Progress<'_>| {
            told.made(&progress);
            true
        };
        let done = campaign::run(&options, &mut tell, &mut each)?;
        if told.stream {
            return Ok(Ending::SUCCESS);
        }
        let seconds = done.took.as_secs_f64();
        let all_ms = done.took.saturating_mul(self.jobs).as_millis();
        let all_ms = u64::try_from(all_ms).unwrap_or(u64::MAX);
        if done.made > 0 {
            eprintln!(
                "campaign: {} in {seconds:.0} s, {:.1} a minute, {:.0} % of the time outside the guest's work",
                counted(done.made.into(), "trial", "trials"),
                f64::from(done.made) * 60.0 / seconds,
                100.0 * done.pace.outside(all_ms)
            );
        }
        show(&done.summary, self.json)?;
        Ok(Ending::SUCCESS)
    }
}

/// These kinds, or all if there are none.
fn or_all(kinds: Vec<TrialKind>) -> Vec<TrialKind> {
    match kinds.is_empty() {
        true => TrialKind::all().collect(),
        false => kinds,
    }
}

/// A campaign in a workload of our own, for a report; of all kinds if none is named.
pub(super) fn measure(
    images: &Images,
    workload: Workload,
    kinds: Vec<TrialKind>,
    (trials, seed): (u32, u64),
) -> anyhow::Result<report::campaign::Campaign> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let driver = workload.driver.clone();
    let options = CampaignOptions {
        setup: setup(images, workload, Contain::Full, (Steps::Called, 0))?,
        kinds: or_all(kinds),
        trials,
        seed,
        ways: Way::ALL.to_vec(),
        jobs: 1,
        file: folder.path().join("campaign.jsonl"),
        elsewhere: Elsewhere::Followed,
    };
    let mut each = |progress: Progress<'_>| {
        eprintln!("{}", line(&progress));
        true
    };
    let done = campaign::run(&options, &mut |what| eprintln!("{what}"), &mut each)?;
    Ok(report::campaign::Campaign {
        driver,
        seed,
        took_s: done.took.as_secs_f64(),
        summary: done.summary,
    })
}

/// A trial that was made, and how long the rest takes.
fn line(progress: &Progress<'_>) -> String {
    let Record { trial, runs, .. } = progress.record;
    let runs: Vec<_> = runs
        .iter()
        .map(|(way, run)| format!("{}: {}", way.name(), run.verdict.name()))
        .collect();
    format!(
        "{} of {}, {} {}: {}; {} left",
        trial.number,
        progress.of,
        trial.kind.name(),
        trial.place(),
        runs.join("; "),
        minutes(progress.left)
    )
}

fn minutes(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        _ => format!("{} min", seconds.div_ceil(60)),
    }
}

fn replay(
    file: &std::path::Path,
    trial: u32,
    images: &Images,
    told: &Told,
) -> anyhow::Result<Ending> {
    // Which steps a trial has is in the file.
    let of_header = |header: &Header| {
        let how = (Steps::All, header.twins);
        let setup = setup(images, header.workload.clone(), header.contain, how)?;
        Ok(told.jailed(setup))
    };
    let mut tell = |what: &str| told.says(what);
    let (then, now) = campaign::replay((file, told.elsewhere()), trial, of_header, &mut tell)?;
    if told.stream {
        told.replayed(then, now);
        return Ok(Ending::SUCCESS);
    }
    print_json(&serde_json::json!({ "then": then, "now": now }))?;
    let same = then.runs.iter().all(|(way, run)| {
        now.runs
            .get(way)
            .is_some_and(|now| now.verdict == run.verdict)
    });
    if !same {
        eprintln!("campaign: it did not end as then");
    }
    Ok(Ending::SUCCESS)
}

fn kinds(json: bool) -> anyhow::Result<()> {
    if json {
        let all = TrialKind::all().map(|kind| {
            serde_json::json!({ "kind": kind.name(), "sentence": kind.sentence(), "source": kind.source() })
        });
        return print_json(&all.collect::<Vec<_>>());
    }
    let mut table = table(&["kind", "what goes wrong", "source"]);
    for kind in TrialKind::all() {
        table.add_row(vec![kind.name(), kind.sentence(), kind.source()]);
    }
    print_bytes(format!("{table}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_named_where_one_is_wrong() {
        assert_eq!(parse_kind("nop").unwrap().name(), "nop");
        assert_eq!(parse_kinds("removed").unwrap().len(), 1);
        let both = [parse_kinds("code").unwrap(), parse_kinds("edge").unwrap()].concat();
        assert!(both.into_iter().eq(TrialKind::all()));
        assert!(parse_kind("gremlin").unwrap_err().contains("missing_call"));
    }

    #[test]
    fn times_are_said_as_people_do() {
        assert_eq!(minutes(Duration::from_secs(119)), "119 s");
        assert_eq!(minutes(Duration::from_secs(121)), "3 min");
    }
}
