//! `snapshot`: takes snapshots of VMs that run, and looks at those on disk.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Subcommand;
use comfy_table::Cell;
use serde::Serialize;
use vmm::snapshot::{Chain, Manifest, PAGE_BYTES, Snapshot, Taken};

use super::isolation::ask;
use super::table::{number, table};
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{Reply, Request};
use crate::long_work::{Interrupt, LongWork};
use crate::options::VmName;

/// `snapshot`
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
The guest goes on, unless --stop is given. Ctrl-C gives the snapshot up and leaves nothing of it.

Examples:
  cofferdam snapshot web /snapshots/warm
  cofferdam snapshot web /snapshots/later --diff /snapshots/warm
  cofferdam snapshot web /snapshots/end --stop
  cofferdam run --snapshot /snapshots/warm
  cofferdam snapshot show /snapshots/later
  cofferdam snapshot check /snapshots/later
  cofferdam snapshot merge /snapshots/later /snapshots/whole"
)]
pub struct SnapshotOptions {
    /// Name of the VM
    #[arg(required = true)]
    vm: Option<VmName>,
    /// Directory to write: one that is not there, or an empty one
    #[arg(required = true)]
    dir: Option<PathBuf>,
    /// Only what changed since that snapshot, which is needed to go on from this one
    #[arg(long, value_name = "DIR")]
    diff: Option<PathBuf>,
    /// Follow from now on what changes, so that the next --diff of this snapshot takes little time.
    /// It slows the guest down a little
    #[arg(long)]
    track: bool,
    /// End the VM where the snapshot is taken
    #[arg(long)]
    stop: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    of_disk: Option<OfDisk>,
}

/// What can be done with a snapshot on disk.
#[derive(Debug, Subcommand)]
enum OfDisk {
    /// Say what a snapshot is
    Show {
        /// Its directory
        dir: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Read all of a snapshot, and of those it is based on, and compare it with its checksums
    Check {
        /// Its directory
        dir: PathBuf,
    },
    /// Make one full snapshot of a diff and what it is based on
    Merge {
        /// The diff's directory
        dir: PathBuf,
        /// Directory to write
        into: PathBuf,
    },
}

impl SnapshotOptions {
    /// `snapshot`
    pub fn run(self) -> anyhow::Result<Ending> {
        match self.of_disk {
            Some(OfDisk::Show { dir, json }) => show(&dir, json)?,
            Some(OfDisk::Check { dir }) => {
                let chain = Chain::open(&dir)?;
                let mut word = LongWork::begin();
                chain.check(&mut |what| {
                    word.tell(what);
                    true
                })?;
                let count = chain.snapshots().len();
                print_bytes(
                    format!("{}: whole ({count} directories)\n", dir.display()).as_bytes(),
                )?;
            }
            Some(OfDisk::Merge { dir, into }) => return merge(&dir, &into),
            None => {
                let vm = self.vm.context("give the VM's name")?;
                let dir = self.dir.context("give the directory to write")?;
                let whole = |path: &Path| {
                    // The VM's process is in another folder.
                    std::path::absolute(path)
                        .with_context(|| format!("cannot name {}", path.display()))
                };
                let request = Request::Snapshot {
                    dir: whole(&dir)?,
                    parent: self.diff.as_deref().map(whole).transpose()?,
                    track: self.track,
                    stop: self.stop,
                };
                let taken = match ask(&vm, &request)? {
                    Reply::Snapshot(taken) => taken,
                    other => bail!("the VM answered something else: {other:?}"),
                };
                match self.json {
                    true => print_json(&taken)?,
                    false => print_bytes(sentence(&taken, &dir).as_bytes())?,
                }
            }
        }
        Ok(Ending::SUCCESS)
    }
}

/// A merge that is interrupted leaves nothing of what it wrote.
fn merge(dir: &Path, into: &Path) -> anyhow::Result<Ending> {
    let interrupt = Interrupt::watch()?;
    let mut word = LongWork::begin();
    let merged = Chain::open(dir)?.merge(into, &mut |what| {
        word.tell(what);
        !interrupt.has_come()
    });
    interrupt.ending(merged.map_err(Into::into))
}

fn sentence(taken: &Taken, dir: &Path) -> String {
    format!(
        "{}: {} of {} MiB, guest at rest for {:.1} ms of {:.0} ms\n",
        dir.display(),
        match taken.diff {
            true => "diff",
            false => "full snapshot",
        },
        mib(taken.pages),
        taken.rest_us as f64 / 1e3,
        taken.whole_us as f64 / 1e3,
    )
}

/// Pages in MiB, for people.
fn mib(pages: u64) -> String {
    format!("{:.1}", (pages * PAGE_BYTES) as f64 / f64::from(1 << 20))
}

/// A snapshot and what it is based on, as JSON.
#[derive(Serialize)]
struct Shown<'a> {
    dir: &'a Path,
    stored_pages: u64,
    manifest: &'a Manifest,
}

fn show(dir: &Path, json: bool) -> anyhow::Result<()> {
    let chain = Chain::open(dir)?;
    if json {
        let shown: Vec<_> = chain
            .snapshots()
            .iter()
            .map(|snapshot| Shown {
                dir: snapshot.dir(),
                stored_pages: snapshot.map().stored_pages(),
                manifest: snapshot.manifest(),
            })
            .collect();
        return print_json(&shown);
    }
    let top = chain.top().manifest();
    let text = |name: &str| match &top.vm[name] {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut out = String::new();
    for (name, value) in [
        ("VM", text("name")),
        ("kernel", text("kernel")),
        ("memory", format!("{} MiB", top.memory_bytes >> 20)),
        ("vCPUs", top.vcpus.to_string()),
        (
            "processor",
            format!("{} {}", top.cpu.vendor, top.cpu.brand)
                .trim()
                .to_owned(),
        ),
        ("written by", top.program.clone()),
        ("taken", age(top.created_unix_s)),
    ] {
        let _ = writeln!(out, "{name:<11} {value}");
    }
    out.push('\n');
    let mut directories = table(&["directory", "kind", "MiB", "identity"]);
    directories.add_rows(chain.snapshots().iter().map(row));
    let _ = writeln!(out, "{directories}");
    print_bytes(out.as_bytes())
}

fn row(snapshot: &Snapshot) -> Vec<Cell> {
    let kind = match snapshot.manifest().parent {
        Some(_) => "diff",
        None => "full",
    };
    vec![
        Cell::new(snapshot.dir().display()),
        Cell::new(kind),
        number(mib(snapshot.map().stored_pages())),
        Cell::new(snapshot.manifest().id),
    ]
}

/// How long ago something was, for people.
fn age(unix_s: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or(Duration::ZERO).as_secs();
    match now.checked_sub(unix_s) {
        None => "in the future".to_owned(),
        Some(s @ 0..120) => format!("{s} s ago"),
        Some(s @ 120..7200) => format!("{} min ago", s / 60),
        Some(s @ 7200..172_800) => format!("{} h ago", s / 3600),
        Some(s) => format!("{} days ago", s / 86400),
    }
}
