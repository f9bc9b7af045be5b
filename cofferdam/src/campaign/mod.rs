//! Campaigns in VMs of this process's own: faults from a list that a seed decides, each tried
//! natively and isolated from the same warm state.

pub mod alarms;
mod jobs;
pub mod patience;
pub mod stream;
pub mod worker;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use isolation::mutation::{Function, Kind, Mutation, NoMutation, mutate, sites};
use recovery::campaign::Way;
use recovery::campaign::kind::TrialKind;
use recovery::campaign::plan::{PARTS, Place, Trial, trials};
use recovery::campaign::record::{self, FORMAT, Header, MAX_FILE, Record, Run};
use recovery::campaign::summary::Summary;
use recovery::campaign::times::Pace;
use recovery::campaign::verdict::Verdict;

use crate::control::protocol::FunctionBytes;
use crate::json_lines::{self, Contents, Elsewhere, append, ensure_same, text, text_if_any};
use jobs::Jobs;
use worker::{Fault, Setup, Worker};

/// VMs in a row that do not do what they are asked for, after which a campaign is given up.
const MAX_LOST: u32 = 3;

/// What is said of a file that is not this campaign's.
const DIFFERS: &str = "another campaign (workload, kernel, seed, kinds, stores or steps differ)";

/// What to try.
#[derive(Debug, Clone)]
pub struct CampaignOptions {
    /// Where.
    pub setup: Setup,
    /// What goes wrong.
    pub kinds: Vec<TrialKind>,
    /// How many faults.
    pub trials: u32,
    /// What decides which ones.
    pub seed: u64,
    /// In which ways.
    pub ways: Vec<Way>,
    /// In how many VMs at a time.
    pub jobs: u32,
    /// Where it is written, and gone on with if it is there.
    pub file: PathBuf,
    /// What becomes of it if that is no file.
    pub elsewhere: Elsewhere,
}

/// How far a campaign is.
pub struct Progress<'a> {
    /// The trial that was made last.
    pub record: &'a Record,
    /// All so far.
    pub summary: &'a Summary,
    /// How many there are to be.
    pub of: u32,
    /// How long the rest will take.
    pub left: Duration,
}

/// What a campaign came to.
#[derive(Debug, Default)]
pub struct Done {
    /// Its figures.
    pub summary: Summary,
    /// Time that it took, making ready included.
    pub took: Duration,
    /// How fast the trials were made that were made now.
    pub pace: Pace,
    /// Trials that were made now.
    pub made: u32,
    /// It was stopped before its end.
    pub stopped: bool,
}

/// Makes a campaign's trials, from where its file ends. `each` is told of each; it gives `false` to
/// stop.
///
/// # Errors
/// A guest cannot be made ready; the file is another campaign's, or cannot be written: what was
/// made is in it, but for trials that other VMs made before one that comes earlier.
pub fn run(
    options: &CampaignOptions,
    progress: &mut dyn FnMut(&str),
    each: &mut dyn FnMut(Progress<'_>) -> bool,
) -> anyhow::Result<Done> {
    let begun = Instant::now();
    let mut header = header_of(options);
    // Before a guest is booted for nothing.
    if let Some(there) = header_in(&options.file, options.elsewhere)? {
        header.kernel.clone_from(&there.kernel);
        ensure_same(&options.file, &there, &header, DIFFERS)?;
    }
    json_lines::ensure_writable(&options.file, options.elsewhere)?;
    let worker = Worker::start(&options.setup, &options.kinds, progress)?;
    worker.kernel().clone_into(&mut header.kernel);
    let (mut file, records) = open(&options.file, options.elsewhere, &header)?;
    let summary = Summary::of(&records);
    let fits = |kind: &&TrialKind| match kind {
        TrialKind::Code(_) => true,
        TrialKind::Edge(kind) => worker.events(*kind) > 0,
    };
    let kinds: Vec<_> = options.kinds.iter().filter(fits).copied().collect();
    let plan = trials(
        &places(worker.texts()),
        &kinds,
        options.trials,
        options.seed,
    );
    ensure!(
        !plan.is_empty(),
        "none of these kinds fits into any of these functions or the device"
    );
    let done_before = records.len();
    let left = u32::try_from(plan.len().saturating_sub(done_before))?;
    let jobs = Jobs {
        options,
        vms: options.jobs.min(left).max(1),
        left: Mutex::new(plan.iter().skip(done_before)),
        stop: AtomicBool::new(false),
    };
    let mut done = Done {
        summary,
        ..Done::default()
    };
    let since = Instant::now();
    let mut write = |record: &Record| {
        append(&mut file, record).with_context(|| options.file.display().to_string())?;
        done.summary.add(record);
        done.pace.add(record);
        done.made += 1;
        let left = plan.len().saturating_sub(done_before + done.made as usize);
        let left = since.elapsed() / done.made * u32::try_from(left).unwrap_or(u32::MAX);
        let goes_on = each(Progress {
            record,
            summary: &done.summary,
            of: options.trials,
            left,
        });
        done.stopped |= !goes_on;
        Ok(goes_on)
    };
    jobs.make_all(worker, done_before, progress, &mut write)?;
    done.took = begun.elapsed();
    Ok(done)
}

/// What its file is of, before it is known which kernel the guest has.
fn header_of(options: &CampaignOptions) -> Header {
    let kinds = options.kinds.iter().map(|kind| kind.name().to_owned());
    Header {
        campaign: FORMAT,
        workload: options.setup.workload.clone(),
        kernel: String::new(),
        seed: options.seed,
        kinds: kinds.collect(),
        contain: options.setup.contain,
        steps: options.setup.steps,
        twins: options.setup.twins,
    }
}

/// Makes one trial, in another VM if the one that there is does not do what it is asked for. A
/// fault that the guest does not come to where its driver is not isolated is not tried further. The
/// guest does these `steps` of its work (all if there are none), or those that are chosen for the
/// function.
fn make(
    trial: &Trial,
    steps: Option<&[String]>,
    options: &CampaignOptions,
    worker: &mut Worker,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<Record> {
    let begun = Instant::now();
    let (fault, says) = fault(trial, worker)?;
    let steps = match (steps, trial.kind) {
        (Some(steps), _) => steps.to_vec(),
        (None, TrialKind::Code(_)) => worker.steps_for(&trial.function),
        (None, TrialKind::Edge(_)) => Vec::new(),
    };
    let mut lost = 0;
    let mut runs = BTreeMap::new();
    let mut ways = options.ways.iter().peekable();
    while let Some(way) = ways.peek().copied() {
        match worker.run(*way, &fault, &steps) {
            Ok(seen) => {
                let run = seen.map(|seen| Run::of(*way, seen));
                let in_vain = |run: &Run| run.verdict == Verdict::NotActivated;
                let is_over = *way == Way::Native && run.as_ref().is_some_and(in_vain);
                runs.extend(run.map(|run| (*way, run)));
                ways.next();
                if is_over {
                    break;
                }
            }
            Err(error) => {
                lost += 1;
                if lost == MAX_LOST {
                    return Err(error.context(format!("trial {}", trial.number)));
                }
                progress(&format!(
                    "trial {}: another VM is needed: {error:#}",
                    trial.number
                ));
                *worker = Worker::start(&options.setup, &options.kinds, progress)?;
            }
        }
    }
    Ok(Record {
        trial: trial.clone(),
        says,
        steps,
        runs,
        took_ms: millis(begun.elapsed()).max(1),
    })
}

/// Whole milliseconds.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What is put in for a trial, and the same in words.
fn fault(trial: &Trial, worker: &Worker) -> anyhow::Result<(Fault, String)> {
    let kind = match trial.kind {
        TrialKind::Edge(kind) => kind,
        TrialKind::Code(kind) => {
            let mutation = mutation(trial, kind, worker.texts())?;
            let place = format!("{}+{:#x}", trial.function, trial.offset);
            let says = format!(
                "{place}: {} -> {} ({})",
                mutation.old_text, mutation.new_text, mutation.says
            );
            return Ok((Fault::Code(trial.function.clone(), mutation), says));
        }
    };
    let of = worker.events(kind);
    ensure!(of > 0, "the device cannot fail by {}", kind.name());
    let after = u128::from(of) * u128::from(trial.offset) / u128::from(PARTS);
    let after = u64::try_from(after).unwrap_or(of);
    let says = format!(
        "{} at the device's edge, after {after} of some {of} events that it can strike at",
        kind.name()
    );
    Ok((Fault::Edge(kind, after, trial.seed), says))
}

/// A trial of a campaign's file once more, alone; the record of the file, and of now.
///
/// # Errors
/// There is no such trial, or the driver is another one.
pub fn replay(
    (file, elsewhere): (&Path, Elsewhere),
    number: u32,
    setup: impl FnOnce(&Header) -> anyhow::Result<Setup>,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<(Record, Record)> {
    let campaign = read(file, elsewhere)?;
    let records = campaign.records.iter();
    let mut found = records.filter(|record| record.trial.number == number);
    let then = found
        .next()
        .with_context(|| format!("{} has no trial {number}", file.display()))?;
    let options = CampaignOptions {
        setup: setup(&campaign.header)?,
        kinds: vec![then.trial.kind],
        trials: number,
        seed: campaign.header.seed,
        ways: then.runs.keys().copied().collect(),
        jobs: 1,
        file: file.to_owned(),
        elsewhere,
    };
    let mut worker = Worker::start(&options.setup, &options.kinds, progress)?;
    let kernel = worker.kernel();
    if kernel != campaign.header.kernel {
        bail!(
            "the campaign was of a guest with {}, this one has {kernel}",
            campaign.header.kernel
        );
    }
    let now = make(
        &then.trial,
        Some(&then.steps),
        &options,
        &mut worker,
        progress,
    )?;
    Ok((then.clone(), now))
}

/// Reads a campaign's file.
///
/// # Errors
/// It is none, or too large.
pub fn read(path: &Path, elsewhere: Elsewhere) -> anyhow::Result<record::Campaign> {
    let text = text(path, elsewhere, MAX_FILE)?;
    record::read(&text).with_context(|| path.display().to_string())
}

/// The header in a campaign's file; `None` if there is no file, or nothing in it.
fn header_in(path: &Path, elsewhere: Elsewhere) -> anyhow::Result<Option<Header>> {
    let Some(text) = text_if_any(path, elsewhere, MAX_FILE)? else {
        return Ok(None);
    };
    let campaign = record::read(&text).with_context(|| path.display().to_string())?;
    Ok(Some(campaign.header))
}

/// The file to go on in, and what is in it.
fn open(path: &Path, elsewhere: Elsewhere, header: &Header) -> anyhow::Result<(File, Vec<Record>)> {
    let read = |text: &str| {
        let campaign = record::read(text)?;
        Ok(Contents {
            header: campaign.header,
            records: campaign.records,
            whole_bytes: campaign.whole_bytes,
        })
    };
    json_lines::open((path, elsewhere), header, MAX_FILE, read, DIFFERS)
}

/// Where faults can be put, in all functions.
fn places(texts: &[(String, FunctionBytes)]) -> Vec<Place> {
    let of = |(name, text): &(String, FunctionBytes)| {
        with_function(name, text, |function| {
            let all = sites(function).into_iter();
            let places = all.map(|site| Place {
                function: name.clone(),
                offset: site.offset,
                kinds: site.kinds,
            });
            places.collect::<Vec<_>>()
        })
    };
    texts.iter().flat_map(of).collect()
}

fn mutation(
    trial: &Trial,
    kind: Kind,
    texts: &[(String, FunctionBytes)],
) -> anyhow::Result<Mutation> {
    let found = texts.iter().find(|(name, _)| *name == trial.function);
    let (name, text) = found.with_context(|| format!("there is no function {}", trial.function))?;
    let changed: Result<Mutation, NoMutation> = with_function(name, text, |function| {
        mutate(function, kind, trial.offset, trial.seed)
    });
    Ok(changed?)
}

/// Looks at a function that a VM told of.
pub fn with_function<T>(
    name: &str,
    text: &FunctionBytes,
    look: impl FnOnce(&Function<'_>) -> T,
) -> T {
    let callee = |at: u64| {
        let mut callees = text.callees.iter();
        let found = callees.find(|(target, _)| *target == at)?;
        Some(found.1.clone())
    };
    look(&Function {
        name,
        start: text.start,
        code: &text.code.0,
        callee: &callee,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use recovery::campaign::workload::{Steps, Workload};

    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_gone_on_with_behind_its_last_whole_line_and_another_campaigns_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("campaign.jsonl");
        let header = Header {
            campaign: FORMAT,
            workload: Workload::of_driver("dummy").unwrap(),
            kernel: "6.1".to_owned(),
            seed: 1,
            kinds: vec!["nop".to_owned()],
            contain: isolation::attach::request::Contain::Full,
            steps: Steps::All,
            twins: 0,
        };
        let record = |number| Record {
            trial: Trial {
                number,
                kind: TrialKind::Code(Kind::Nop),
                function: "function".to_owned(),
                offset: 9,
                seed: 7,
            },
            says: String::new(),
            steps: Vec::new(),
            runs: BTreeMap::new(),
            took_ms: 0,
        };
        assert_eq!(header_in(&path, Elsewhere::Followed).unwrap(), None);
        let (mut file, records) = open(&path, Elsewhere::Followed, &header).unwrap();
        assert!(records.is_empty());
        assert_eq!(
            header_in(&path, Elsewhere::Followed).unwrap().as_ref(),
            Some(&header)
        );
        append(&mut file, &record(1)).unwrap();
        file.write_all(b"{\"number\":2,\"ki").unwrap();
        drop(file);
        let (mut file, records) = open(&path, Elsewhere::Followed, &header).unwrap();
        assert_eq!(records, [record(1)]);
        append(&mut file, &record(2)).unwrap();
        drop(file);
        assert_eq!(
            read(&path, Elsewhere::Followed).unwrap().records,
            [record(1), record(2)]
        );
        let whole = std::fs::read(&path).unwrap();
        let refused = open(&path, Elsewhere::Followed, &Header { seed: 2, ..header }).unwrap_err();
        assert!(
            refused.to_string().contains("another campaign"),
            "{refused:#}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }
}
