//! Putting a guest away and having it back: boot, snapshot, restore, mark, rewind, all of one guest
//! in one run.
//!
//! ```text
//!  boot ─► network up ─► full snapshot, diffs ─► mark, rewinds ─► end ─► restores of the full snapshot, lazy ones
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use devices::clock::monotonic_ns;
use vmm::snapshot::Taken;

use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::isolation::rates;
use super::network::{self, DRIVER, LINK_TIME};
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::report::suspend::{Followed, Suspend, SuspendMethod};
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
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// Each way, with each size of memory.
    pub ways: Vec<Suspend>,
    /// What a mark costs.
    pub followed: Vec<Followed>,
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
            folder: tempfile::tempdir().context("cannot make a temporary folder")?,
            measured: &mut measured,
            progress,
        };
        one.measure(&options.guest)?;
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

/// Samples of one way, in microseconds.
#[derive(Default)]
struct Samples {
    us: Vec<f64>,
    rest_us: Vec<f64>,
    pages: Vec<f64>,
}

impl One<'_> {
    fn measure(&mut self, guest: &GuestOptions) -> anyhow::Result<()> {
        let size = format!("--net user --nic e1000 --memory {}M", self.mem_mib);
        let boots = guest.clone().with(&size);
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
        drop(guest);
        for (method, lazy) in [
            (SuspendMethod::Restore, ""),
            (SuspendMethod::RestoreLazy, "--lazy"),
        ] {
            let goes_on = boots.clone().from_snapshot(&full).with(lazy);
            let mut samples = Samples::default();
            for _ in 0..self.runs {
                let mut guest = self.start(&goes_on, &mut samples)?;
                network::wait_for_link(&mut guest, LINK_TIME)?;
            }
            self.note(method, samples)?;
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

fn us(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e3
}
