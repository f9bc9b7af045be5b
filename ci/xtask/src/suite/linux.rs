//! Runs the `#[ignore]`d tests: they need the images. Those that boot guests run where that is
//! possible, all others on this host, one after the other; those that take long only in the full
//! form, or by name. In labs, a few tests at a time are one command, in a process of their own
//! (`queue.rs`), and several labs work side by side. A command that hangs its lab is tried again in
//! a new one, and so are, once and a few a run, tests that fail in one: what the emulated
//! processors do wrong (`docs/lab.md`) fails tests too. That is not hidden.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;

use super::FULL;
use super::batch_run::{BatchRun, Progress};
use super::count::Count;
use super::emulator::Emulator;
use super::queue::{Batch, Queue, Times, is_long};
use super::record::TestRecord;
use super::{lanes, programs};
use crate::lab::{Ended, Kind, Lab, Request, Settings, watch_interrupts};
use crate::place::Place;
use crate::workspace::Workspace;

/// Ends a process whose guest hangs in a lab that itself lives: for it, and for each of its tests
/// beyond that. Several boots, or twenty driver restarts, take some two minutes in a lab that comes
/// up in five seconds; one that took longer gets as many times more ([`Lab::pace`]).
const PROCESS_LIMIT: Duration = Duration::from_secs(480);
const TEST_LIMIT: Duration = Duration::from_secs(120);
/// So many batches of tests of a run that failed in a lab are tried once more.
const SECOND_TRIES: usize = 3;
/// How many times longer the full forms of tests may take.
const FULL_TIMES: u32 = 10;

/// What came of all of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// Each test.
    pub tests: Vec<TestRecord>,
    /// Labs that hung.
    pub retries: u32,
}

impl Findings {
    /// How many passed and failed.
    pub fn count(&self) -> Count {
        let passed = self.tests.iter().filter(|test| test.passed).count() as u64;
        Count {
            passed,
            failed: self.tests.len() as u64 - passed,
            skipped: 0,
        }
    }

    /// Names of those that failed at first and then passed.
    pub fn unsteady(&self) -> impl Iterator<Item = &str> {
        let unsteady = |test: &&TestRecord| test.second_try && test.passed;
        let unsteady = self.tests.iter().filter(unsteady);
        unsteady.map(|test| test.name.as_str())
    }

    /// Names of those that failed.
    pub fn failed(&self) -> impl Iterator<Item = &str> {
        let failed = self.tests.iter().filter(|test| !test.passed);
        failed.map(|test| test.name.as_str())
    }
}

/// Emulated processors of a lab for tests. With two, QEMU's guests with several vCPUs now and then
/// do not come up (`docs/lab.md`); with one lab for each of the host's processors there is no use
/// for more either.
const LAB_CPUS: u32 = 1;

/// How guests are run.
pub struct Guests {
    /// Where.
    pub place: Place,
    /// Images that they are booted from.
    pub images: PathBuf,
    /// Whether tests that have a full form run in it.
    pub full: bool,
}

/// Runs every ignored test whose name contains `filter`. What was done is in `findings` even if it
/// ends early.
pub fn run(
    workspace: &Workspace,
    guests: &Guests,
    filter: &str,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    watch_interrupts()?;
    let mut on_host = Vec::new();
    let mut in_labs = Vec::new();
    let programs = programs::build(workspace)?.into_iter();
    for program in programs.flat_map(|program| program.forms(guests.full)) {
        let mut tests = programs::ignored(&program)?;
        tests.retain(|test| program.full_name(test).contains(filter));
        if filter.is_empty() && !guests.full {
            tests.retain(|test| !is_long(test));
        }
        if guests.place == Place::Lab && program.boots_linux {
            in_labs.extend(Batch::divide(program, tests));
        } else if !tests.is_empty() {
            let program = program.into();
            on_host.push(Batch { program, tests });
        }
    }
    let all = on_host.iter().chain(&in_labs);
    let progress = Progress::new(all.map(|batch| batch.tests.len()).sum());
    for batch in on_host {
        let request = request(workspace, &batch, guests)?;
        let mut run = BatchRun::new(&batch, Place::Host, "host".into(), &progress);
        let ended = super::host::run(&request, &mut |is_stderr, bytes| run.read(is_stderr, bytes))?;
        if ended == Ended::Interrupted {
            bail!("interrupted");
        }
        findings.tests.extend(run.finish(ended));
    }
    if in_labs.is_empty() {
        return Ok(());
    }
    let times = Times::read(&workspace.lab().join("times.json"));
    let queue = Queue::new(in_labs, &times);
    let result = run_in_labs(workspace, &queue, guests, &progress, findings);
    times.keep(&findings.tests)?;
    result
}

/// Several labs side by side, one for each of this host's processors.
fn run_in_labs(
    workspace: &Workspace,
    queue: &Queue,
    guests: &Guests,
    progress: &Progress,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let labs = lanes::labs();
    let found = Mutex::new(findings);
    let found = &found;
    let second_tries = &AtomicUsize::new(SECOND_TRIES);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..labs)
            .map(|number| {
                // One that was left running serves one command at a time.
                let kind = if number == 0 { Kind::Any } else { Kind::Fresh };
                scope.spawn(move || {
                    let mut settings = Settings::new(workspace);
                    settings.number = number;
                    settings.machine.cpus = LAB_CPUS;
                    let mut lab = Lab::open(settings, kind)?;
                    let name = format!("lab {}", number + 1);
                    while let Some(batch) = queue.take() {
                        let once = |lab: &mut Lab, batch: &Batch| {
                            let mut request = request(workspace, batch, guests)?;
                            lab.bring_up()?;
                            request.limit = request.limit.mul_f64(lab.pace());
                            let mut run = BatchRun::new(batch, Place::Lab, name.clone(), progress);
                            run.emulator = lab.pid().and_then(Emulator::new);
                            let mut read = |is_stderr, bytes: &[u8]| run.read(is_stderr, bytes);
                            let outcome = lab.run(&request, &mut read)?;
                            if outcome.ended == Ended::Interrupted {
                                bail!("interrupted");
                            }
                            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                            found.retries += outcome.retries;
                            Ok(run.finish(outcome.ended))
                        };
                        let mut records = once(&mut lab, &batch)?;
                        let failed = failed(&batch, &records);
                        if !failed.tests.is_empty() && take_one(second_tries) {
                            eprintln!("      that failed: once more, in a new lab");
                            lab.renew()?;
                            let again = failed.tests.len();
                            progress.over.fetch_sub(again, Ordering::Relaxed);
                            records = second(records, once(&mut lab, &failed)?);
                        }
                        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                        found.tests.extend(records);
                    }
                    lab.close()
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Takes one of so many; `false` if there is none left.
fn take_one(left: &AtomicUsize) -> bool {
    let one_less = |left: usize| left.checked_sub(1);
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
        .is_ok()
}

/// Those of a batch that failed.
fn failed(batch: &Batch, records: &[TestRecord]) -> Batch {
    let failed = |test: &&String| {
        let name = batch.program.full_name(test);
        records.iter().any(|one| one.name == name && !one.passed)
    };
    Batch {
        program: batch.program.clone(),
        tests: batch.tests.iter().filter(failed).cloned().collect(),
    }
}

/// What came of tests of which those that failed were tried a second time.
fn second(mut first: Vec<TestRecord>, second: Vec<TestRecord>) -> Vec<TestRecord> {
    first.retain(|record| record.passed);
    let again = second.into_iter().map(|record| TestRecord {
        second_try: true,
        ..record
    });
    first.extend(again);
    first
}

fn request(
    workspace: &Workspace,
    Batch { program, tests }: &Batch,
    guests: &Guests,
) -> anyhow::Result<Request> {
    let path = program.path.to_string_lossy().into_owned();
    let mut argv = vec![path];
    argv.extend(["--ignored", "--test-threads", "1", "--exact"].map(str::to_owned));
    argv.extend_from_slice(tests);
    let limit = PROCESS_LIMIT + TEST_LIMIT * u32::try_from(tests.len())?;
    let limit = limit * if guests.full { FULL_TIMES } else { 1 };
    let mut request = Request::new(argv, limit)?;
    request.cwd = program.directory.clone();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    for (name, value) in [
        ("CARGO_MANIFEST_DIR", text(&program.directory)),
        ("COFFERDAM_IMAGES", text(&guests.images)),
        ("COFFERDAM_KERNELS", text(&workspace.images())),
    ] {
        request.env.retain(|(other, _)| other != name);
        request.env.push((name.to_owned(), value));
    }
    if guests.full {
        request.env.push((FULL.to_owned(), "1".to_owned()));
    }
    let more = program.environment.iter();
    request
        .env
        .extend(more.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::batch_run::tests::batch;

    #[test]
    fn a_test_that_passes_at_its_second_try_is_told_from_others() {
        let (batch, progress) = (batch(&["a", "b", "c"]), Progress::new(3));
        let records = |batch: &Batch, said: &str| {
            let mut run = BatchRun::new(batch, Place::Lab, "lab 1".into(), &progress);
            run.read(false, said.as_bytes()).unwrap();
            run.finish(Ended::Exited(101))
        };
        let first = "test a ... FAILED\ntest b ... ok\ntest c ... FAILED\n";
        let first = records(&batch, first);
        let failed = failed(&batch, &first);
        assert_eq!(failed.tests, ["a", "c"]);
        let again = records(&failed, "test a ... ok\ntest c ... FAILED\n");
        let findings = Findings {
            tests: second(first, again),
            retries: 0,
        };
        assert_eq!(findings.tests.len(), 3);
        assert_eq!(findings.unsteady().collect::<Vec<_>>(), ["vmm::boot::a"]);
        assert_eq!(findings.failed().collect::<Vec<_>>(), ["vmm::boot::c"]);
        let left = AtomicUsize::new(1);
        assert_eq!((take_one(&left), take_one(&left)), (true, false));
    }

    #[test]
    fn environment_of_a_program_is_that_of_its_crate() {
        let workspace = Workspace::find().unwrap();
        let guests = Guests {
            place: Place::Lab,
            images: "/i/6.12-amd64".into(),
            full: false,
        };
        let request = request(&workspace, &batch(&["boots"]), &guests).unwrap();
        for (name, value) in [
            ("CARGO_MANIFEST_DIR", "/w/vmm"),
            ("COFFERDAM_IMAGES", "/i/6.12-amd64"),
        ] {
            let values: Vec<_> = request.env.iter().filter(|(of, _)| of == name).collect();
            assert_eq!(values.len(), 1);
            assert_eq!(values[0].1, value);
        }
        assert_eq!(request.argv[request.argv.len() - 2..], ["--exact", "boots"]);
    }
}
