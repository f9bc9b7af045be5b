//! Putting a guest away and having it back: boot, snapshot, restore, mark, rewind, all of one guest
//! in one run.
//!
//! ```text
//!  boot ─► network up ─► full snapshot, diffs ─► mark, rewinds ─► its driver suspended and resumed ─► end
//!     ─► restores of the full snapshot, lazy ones without and with what was recorded, cold ones ─► clones
//! ```
//!
//! Lazy restores without a recorded working set have it taken away before; one that is not counted
//! records it for the others.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;
use vmm::snapshot::{Taken, WORKING_SET_FILE};

use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::isolation::rates;
use super::network::{self, DRIVER, LINK_TIME};
use super::{clones, device_power};
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::report::suspend::{Clones, Followed, Suspend, SuspendMethod};
use crate::report::{Guest as GuestFacts, Stat};

/// Rewinds for each of the other runs.
const REWINDS_PER_RUN: usize = 20;
/// What the guest does between two rewinds.
const WORK: &[&str] = &["true"];

/// How long each kind of traffic runs with and without a mark.
const TRAFFIC_TIME: Duration = Duration::from_secs(4);

/// What to measure.
#[derive(Debug, Clone)]
pub struct SuspendOptions {
    /// The guest; without a network, which is added.
    pub guest: GuestOptions,
    /// Sizes of its memory, in MiB.
    pub mem_mib: Vec<u64>,
    /// How often each is done.
    pub runs: usize,
    /// Where snapshots are written; a temporary folder if nobody says so.
    pub folder: Option<PathBuf>,
    /// Restores with nothing of the snapshot in the page cache, too.
    pub cold: bool,
    /// How many clones are alive at a time, with and without isolation; none if 0.
    pub clones: usize,
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// Each way, with each size of memory.
    pub ways: Vec<Suspend>,
    /// What a mark costs.
    pub followed: Vec<Followed>,
    /// What clones cost.
    pub clones: Vec<Clones>,
    /// The guest.
    pub guest: Option<GuestFacts>,
}

/// Measures, telling `progress` what is done.
pub fn measure(
    options: &SuspendOptions,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<Measured> {
    let mut measured = Measured::default();
    for &mem_mib in &options.mem_mib {
        let mut one = One {
            mem_mib,
            runs: options.runs,
            // Guest memory is written to where temporary files are: a tmpfs says more of this
            // program than a disk does.
            folder: match &options.folder {
                Some(folder) => tempfile::tempdir_in(folder),
                None => tempfile::tempdir(),
            }
            .context("cannot make a temporary folder")?,
            measured: &mut measured,
            progress,
        };
        one.measure(options)?;
    }
    Ok(measured)
}

/// The measurement with one size of memory.
struct One<'a> {
    mem_mib: u64,
    runs: usize,
    folder: tempfile::TempDir,
    measured: &'a mut Measured,
    progress: &'a mut dyn FnMut(&str),
}

/// What a lazy restore knows of the pages that are touched first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Nothing,
    WorkingSet,
}

/// Samples of one way, in microseconds.
#[derive(Default)]
struct Samples {
    us: Vec<f64>,
    rest_us: Vec<f64>,
    pages: Vec<f64>,
}

impl One<'_> {
    fn measure(&mut self, options: &SuspendOptions) -> anyhow::Result<()> {
        let size = format!("--net user --nic e1000 --memory {}M", self.mem_mib);
        let boots = options.guest.clone().with(&size);
        let mut samples = Samples::default();
        let mut guest = self.start(&boots, &mut samples)?;
        for _ in 1..self.runs {
            drop(guest);
            guest = self.start(&boots, &mut samples)?;
        }
        self.note(SuspendMethod::Boot, samples)?;
        network::bring_up(&mut guest, DRIVER)?;
        network::wait_for_link(&mut guest, LINK_TIME)?;
        self.measured.guest = Some(guest_facts(&mut guest)?);
        let before = rates(&mut guest, TRAFFIC_TIME)?;
        let full = self.snapshots(&guest)?;
        self.rewinds(&mut guest)?;
        let marked = rates(&mut guest, TRAFFIC_TIME)?;
        self.measured.followed.push(Followed {
            mem_mib: self.mem_mib,
            pings_fraction: marked.pings / before.pings,
            tcp_fraction: marked.mib / before.mib,
        });
        for (method, us) in device_power::measure(&mut guest, self.runs)? {
            self.note(
                method,
                Samples {
                    us,
                    ..Samples::default()
                },
            )?;
        }
        drop(guest);
        self.restores(&boots, &full, options.cold)?;
        if options.clones == 0 {
            return Ok(());
        }
        for isolated in [false, true] {
            let clones = clones::measure(&boots, &full, options.clones, isolated)?;
            (self.progress)(&clones.sentence());
            self.measured.clones.push(clones);
        }
        Ok(())
    }

    /// Restores of the snapshot in `full`, one of each way after the other: what else the host does
    /// meanwhile is the same for all of them.
    fn restores(&mut self, boots: &GuestOptions, full: &Path, cold: bool) -> anyhow::Result<()> {
        use SuspendMethod as Method;
        let goes_on = boots.clone().from_snapshot(full);
        let lazy = goes_on.clone().with("--lazy");
        let warm = [
            (Method::Restore, &goes_on, Known::Nothing),
            (Method::RestoreLazy, &lazy, Known::Nothing),
            (Method::RestoreLazyAhead, &lazy, Known::WorkingSet),
        ];
        let from_disk = [
            (Method::RestoreCold, &goes_on, Known::Nothing),
            (Method::RestoreLazyCold, &lazy, Known::Nothing),
            (Method::RestoreLazyAheadCold, &lazy, Known::WorkingSet),
        ];
        let from_disk = from_disk.iter().filter(|_| cold).map(|way| (way, true));
        let ways: Vec<_> = warm
            .iter()
            .map(|way| (way, false))
            .chain(from_disk)
            .collect();
        let mut samples: Vec<Samples> = ways.iter().map(|_| Samples::default()).collect();
        self.record(&lazy, full)?;
        let working_set = std::fs::read(full.join(WORKING_SET_FILE))?;
        for _ in 0..self.runs {
            for (&(&(_, options, known), is_cold), samples) in ways.iter().zip(&mut samples) {
                match known {
                    Known::Nothing => forget(full)?,
                    Known::WorkingSet => {
                        std::fs::write(full.join(WORKING_SET_FILE), &working_set)?;
                    }
                }
                if is_cold {
                    drop_page_cache(full)?;
                }
                let mut guest = self.start(options, samples)?;
                network::wait_for_link(&mut guest, LINK_TIME)?;
            }
        }
        for ((way, _), samples) in ways.into_iter().zip(samples) {
            self.note(way.0, samples)?;
        }
        Ok(())
    }

    /// Has what a guest touches first recorded beside the snapshot in `full`.
    fn record(&mut self, goes_on: &GuestOptions, full: &Path) -> anyhow::Result<()> {
        let file = full.join(WORKING_SET_FILE);
        let is_there = || file.metadata().is_ok_and(|metadata| metadata.len() > 0);
        if !is_there() {
            let _guest = Guest::boot(goes_on, BOOT_TIME)?;
            let deadline = std::time::Instant::now() + BOOT_TIME;
            while !is_there() {
                ensure!(
                    std::time::Instant::now() < deadline,
                    "no working set was recorded in {}",
                    full.display()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Starts a VM and times it until the guest's agent answers.
    fn start(&mut self, options: &GuestOptions, samples: &mut Samples) -> anyhow::Result<Guest> {
        let guest = Guest::boot(options, BOOT_TIME)?;
        samples.us.push(us(guest.started_ns, monotonic_ns()));
        Ok(guest)
    }

    /// Full snapshots, then diffs, each of the one before; the first full one is given back.
    fn snapshots(&mut self, guest: &Guest) -> anyhow::Result<PathBuf> {
        let mut control = guest.control()?;
        let dir = |kind: &str, number: usize| self.folder.path().join(format!("{kind}{number}"));
        let (mut full, mut diffs) = (Samples::default(), Samples::default());
        for number in 0..self.runs {
            let last = number + 1 == self.runs;
            full.add(&snapshot(&mut control, &dir("full", number), None, last)?);
            if number > 0 && !last {
                // The disk is not the matter here.
                std::fs::remove_dir_all(dir("full", number))?;
            }
        }
        let mut parent = dir("full", self.runs - 1);
        for number in 0..self.runs {
            let next = dir("diff", number);
            let last = number + 1 == self.runs;
            diffs.add(&snapshot(&mut control, &next, Some(&parent), !last)?);
            parent = next;
        }
        let first = dir("full", 0);
        self.note(SuspendMethod::Snapshot, full)?;
        self.note(SuspendMethod::SnapshotDiff, diffs)?;
        Ok(first)
    }

    fn rewinds(&mut self, guest: &mut Guest) -> anyhow::Result<()> {
        let mut control = guest.control()?;
        let mut mark = Samples::default();
        let begun = monotonic_ns();
        let name = "bench".to_owned();
        match control.ask(&Request::Mark { name })? {
            Reply::Marked(info) => mark.pages.push(info.pages as f64),
            other => bail!("the VM answered something else: {other:?}"),
        }
        mark.us.push(us(begun, monotonic_ns()));
        self.note(SuspendMethod::Mark, mark)?;
        let mut rewinds = Samples::default();
        for _ in 0..self.runs * REWINDS_PER_RUN {
            guest.run(WORK)?;
            // The connection to the agent does not go back with the guest.
            guest.agent().disconnect();
            let rewound = match control.ask(&Request::Rewind { name: None })? {
                Reply::Rewound(rewound) => rewound,
                other => bail!("the VM answered something else: {other:?}"),
            };
            let work = rewound.phases.work_ns();
            rewinds.us.push(work as f64 / 1e3);
            rewinds
                .rest_us
                .push((work + rewound.phases.rest_ns) as f64 / 1e3);
            rewinds.pages.push(rewound.pages as f64);
        }
        self.note(SuspendMethod::Rewind, rewinds)
    }

    fn note(&mut self, method: SuspendMethod, samples: Samples) -> anyhow::Result<()> {
        let stat = Stat::from_samples(&samples.us).context("nothing was measured")?;
        let row = Suspend {
            method,
            mem_mib: self.mem_mib,
            dirty_pages: Stat::from_samples(&samples.pages).map(|pages| pages.p50 as u64),
            us: stat,
            rest_us: Stat::from_samples(&samples.rest_us),
        };
        (self.progress)(&format!(
            "{} MiB, {}: {:.2} ms",
            row.mem_mib,
            method.words(),
            row.us.p50 / 1e3
        ));
        self.measured.ways.push(row);
        Ok(())
    }
}

impl Samples {
    fn add(&mut self, taken: &Taken) {
        self.us.push(taken.whole_us as f64);
        self.rest_us.push(taken.rest_us as f64);
        self.pages.push(taken.pages as f64);
    }
}

fn snapshot(
    control: &mut ControlClient,
    dir: &Path,
    parent: Option<&Path>,
    track: bool,
) -> anyhow::Result<Taken> {
    let request = Request::Snapshot {
        dir: dir.to_owned(),
        parent: parent.map(Path::to_owned),
        track,
        stop: false,
    };
    match control.ask(&request)? {
        Reply::Snapshot(taken) => Ok(taken),
        other => bail!("the VM answered something else: {other:?}"),
    }
}

/// Takes away what was recorded beside the snapshot in `dir`.
fn forget(dir: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(dir.join(WORKING_SET_FILE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error)
            .with_context(|| format!("cannot forget what is recorded in {}", dir.display())),
        _ => Ok(()),
    }
}

/// Has the host forget what it has in memory of the files in `dir` (posix_fadvise(2)); those of
/// this program stay.
fn drop_page_cache(dir: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let file = std::fs::File::open(entry?.path())?;
        // What is not on the disk yet cannot be dropped.
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

fn us(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e3
}
