//! What guests cost that go on lazily from one snapshot, all of them alive at the same time.
//!
//! ```text
//!   snapshot ─► clone, clone, ... ─► each answered a ping, and is isolated if it is to be ─► what each has in memory
//! ```
//!
//! Pages that several have are divided among them (`Pss` of proc_pid_smaps(5)), so that the parts
//! of all add up to what they take of the host.

use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::Context;
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use recovery::ladder::LadderConfig;
use recovery::request::Spilling;
use vmm::snapshot::{IMAGE_FILE, PAGE_BYTES, Snapshot};

use super::guest::{BOOT_TIME, Guest, GuestOptions};
use super::network::{self, DRIVER, LINK_TIME};
use crate::control::protocol::Request;
use crate::report::Stat;
use crate::report::suspend::Clones;
use crate::smaps::{self, Line};

/// Functions that are isolated.
const ENTRIES: [&str; 2] = ["e1000_xmit_frame", "e1000_clean"];

/// What a process has in memory, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct InMemory {
    /// Its part of the snapshot's pages.
    base: u64,
    /// Guest memory of its own.
    guest: u64,
    /// All else: heap, stacks, its part of the program.
    rest: u64,
}

/// Starts `count` clones of the snapshot in `dir`, and says what they have in memory. They are
/// started as `options` says, which are those of no snapshot.
///
/// # Errors
/// One does not go on, or cannot be isolated.
pub fn measure(
    options: &GuestOptions,
    dir: &Path,
    count: usize,
    isolated: bool,
) -> anyhow::Result<Clones> {
    let options = options.clone().from_snapshot(dir).with("--lazy");
    let snapshot = Snapshot::open(dir)?;
    let mut clones = Vec::new();
    for number in 1..=count {
        let clone = start(&options, isolated);
        clones.push(clone.with_context(|| format!("clone {number} of {count}"))?);
    }
    let found = clones.iter().map(|clone| in_memory(clone.pid()));
    let found: Vec<InMemory> = found.collect::<Result<_, _>>()?;
    let stat = |part: fn(&InMemory) -> u64| {
        let samples: Vec<f64> = found.iter().map(|one| part(one) as f64).collect();
        Stat::from_samples(&samples).context("there are no clones")
    };
    Ok(Clones {
        mem_mib: snapshot.manifest().memory_bytes >> 20,
        isolated,
        stored_kib: snapshot.map().stored_pages() * PAGE_BYTES / 1024,
        base_kib: found.iter().map(|one| one.base).sum(),
        guest_kib: stat(|one| one.guest)?,
        rest_kib: stat(|one| one.rest)?,
    })
}

/// A clone whose network works.
fn start(options: &GuestOptions, isolated: bool) -> anyhow::Result<Guest> {
    let mut clone = Guest::boot(options, BOOT_TIME)?;
    network::wait_for_link(&mut clone, LINK_TIME)?;
    if isolated {
        // The VM asks the agent itself, which listens to one client at a time.
        clone.agent().disconnect();
        clone.control()?.ask(&Request::Isolate {
            module: DRIVER.to_owned(),
            entries: Wanted::Named(ENTRIES.map(str::to_owned).to_vec()),
            budget_us: None,
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig::default(),
            spilling: Spilling::default(),
            contain: Contain::Full,
            keep_faults: None,
        })?;
    }
    let gateway = network::GATEWAY.to_string();
    clone.run(&["ping", "-c", "3", "-i", "0.2", &gateway])?;
    clone.agent().disconnect();
    Ok(clone)
}

fn in_memory(pid: u32) -> anyhow::Result<InMemory> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = std::fs::File::open(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(sum(BufReader::new(smaps))?)
}

/// Adds up an `smaps`.
fn sum(smaps: impl BufRead) -> std::io::Result<InMemory> {
    let mut sum = InMemory::default();
    let (mut is_image, mut is_guest) = (false, false);
    smaps::read(smaps, |line| match line {
        Line::Mapping { path, .. } => {
            is_image = path.ends_with(IMAGE_FILE);
            is_guest = path.contains(vmm::memory::FILE_NAME);
        }
        Line::Field { name: "Pss", kib } if is_image => sum.base += kib,
        Line::Field { name: "Pss", kib } if is_guest => sum.guest += kib,
        Line::Field { name: "Pss", kib } => sum.rest += kib,
        // Of the image's mapping: what the guest has written, which nobody shares.
        Line::Field {
            name: "Anonymous",
            kib,
        } if is_image => {
            sum.base = sum.base.saturating_sub(kib);
            sum.guest += kib;
        }
        Line::Field { .. } => {}
    })?;
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_the_snapshot_of_the_guest_and_of_the_process_are_told_apart() {
        let smaps = "\
55e0c0a00000-55e0c0b00000 r-xp 00000000 08:01 1234 /usr/bin/cofferdam
Rss:                 900 kB
Pss:                 100 kB
Pss_Dirty:             0 kB
Anonymous:             0 kB
7f0000000000-7f0010000000 rw-p 00000000 00:01 77 /tmp/warm/memory.image
Rss:               70000 kB
Pss:                9000 kB
Anonymous:          3000 kB
7f1000000000-7f1010000000 rw-s 00000000 00:01 78 /cofferdam-guest (deleted)
Rss:                4000 kB
Pss:                2000 kB
Anonymous:             0 kB
7f2000000000-7f2010000000 rw-p 00000000 00:01 78 /cofferdam-guest (deleted)
Rss:                4100 kB
Pss:                2100 kB
Anonymous:           100 kB
7f3000000000-7f3000100000 rw-p 00000000 00:00 0
Rss:                1000 kB
Pss:                1000 kB
Anonymous:          1000 kB
";
        let expected = InMemory {
            base: 6000,
            guest: 7100,
            rest: 1100,
        };
        assert_eq!(sum(smaps.as_bytes()).unwrap(), expected);
    }
}
