//! How long a guest's network is gone when a failed call of its driver is rolled back.
//!
//! ```text
//! fault ─ detect ─ memory ─ device ─ returned ─┬─ irq_live   the guest takes an interrupt of the NIC
//!         └─ the VM's own clock ─────────────┘ ├─ first_tx   a frame of the guest
//!                                              └─ first_rx   a ping sent after the fault is answered
//! ```
//!
//! One fault at a time goes into one call. Each entry is isolated alone: a function that an
//! isolated one calls, directly or through the kernel, is part of that call. The gateway pings all
//! the time, and after the faults at one place the same operation must succeed.

mod atomic;
mod faults;
mod spilled;

use anyhow::Context;
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use recovery::ladder::{LadderConfig, OnFault};
use recovery::request::Spilling;

use super::guest::Guest;
use super::network::{DRIVER, Probe};
use super::operation::Operation;
use crate::control::protocol::Request;
use crate::report::Recovery;
use faults::Bench;
pub(super) use faults::RolledBack;
use spilled::GUEST_ONLY;

pub use spilled::SPILLING;

/// Entry points that are measured unless others are asked for: those whose calls do not sleep.
pub const ENTRIES: &[&str] = &[
    "e1000_xmit_frame",
    "e1000_clean",
    "e1000_intr",
    "e1000_get_ethtool_stats",
    "e1000_get_regs",
    "e1000_set_rx_mode",
    "e1000_set_mac",
];

/// Time for a call in the domain, in microseconds: only a call that hangs should reach it.
const BUDGET_US: u64 = 10_000_000;

/// Measures rollbacks of `entries` in `guest`, `runs` of each, in turn at each place. If `spilled`,
/// their calls go on in the guest and fail after that.
pub fn measure(
    guest: &mut Guest,
    probe: &mut Probe,
    entries: &[String],
    spilled: bool,
    runs: usize,
    progress: &mut dyn FnMut(&str),
    all: &mut Vec<Recovery>,
) -> anyhow::Result<()> {
    let control = guest.control()?;
    let mut bench = Bench {
        guest,
        probe,
        control,
        link_losses: 0,
    };
    for entry in entries {
        let operation = Operation::of(entry).with_context(|| {
            format!("what makes the kernel call {entry} is not known to this bench")
        })?;
        let before = bench.carrier_changes()?;
        bench.link_losses = 0;
        let isolate = Request::Isolate {
            module: DRIVER.to_owned(),
            entries: Wanted::Named(vec![entry.clone()]),
            budget_us: Some(BUDGET_US),
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig {
                // The rollback alone: another try takes as long as the call does.
                on_fault: Some(OnFault::Error),
                recoveries_per_minute: u32::MAX,
                failures_in_a_row: u32::MAX,
                ..LadderConfig::default()
            },
            spilling: match spilled {
                true => Spilling {
                    wait_us: Some(0),
                    guest_only: GUEST_ONLY.map(str::to_owned).to_vec(),
                },
                false => Spilling::default(),
            },
            contain: Contain::Full,
            keep_faults: None,
        };
        // The VM asks the agent itself, which listens to one client at a time.
        bench.guest.agent().disconnect();
        bench.control.ask(&isolate)?;
        let of_entry = match spilled {
            true => bench.spilling_entry(entry, operation, runs, progress),
            false => bench.entry(entry, operation, runs, progress),
        };
        let of_entry =
            of_entry.with_context(|| format!("rollback of {entry}{}", bench.guest.last_words()))?;
        // Those of the guest's are a part of what spilled calls do.
        let lost = match spilled {
            true => bench.link_losses,
            false => bench.carrier_changes()?.saturating_sub(before),
        };
        all.extend(of_entry.into_iter().map(|recovery| Recovery {
            link_changes: operation.keeps_interface_up().then_some(lost),
            spilled,
            ..recovery
        }));
        bench.control.ask(&Request::Release {
            module: DRIVER.to_owned(),
        })?;
    }
    Ok(())
}
