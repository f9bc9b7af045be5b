//! Traffic with sets of functions of the driver isolated, as a fraction of the same traffic
//! without.
//!
//! ```text
//!   none ─► one function ─► none ─► another ─► ... ─► all ─► none
//! ```
//!
//! The baseline is taken anew before each set and the two beside a set are averaged, so that a host
//! that slows down in between does not count as isolation's cost.

use std::time::Duration;

use agent_protocol::traffic::{TrafficKind, TrafficResult};
use anyhow::ensure;
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use recovery::ladder::LadderConfig;
use recovery::request::Spilling;

use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::network::{self, DRIVER, LINK_TIME};
use super::traffic::send;
use crate::control::client::ControlClient;
use crate::control::protocol::Request;
use crate::report::Guest as GuestFacts;
use crate::report::isolation::{FunctionCost, IsolatedSet, Isolation};

/// Sets of entry points that are measured unless others are asked for: those that packets go
/// through, alone and together.
pub const SETS: &[&str] = &[
    "e1000_xmit_frame",
    "e1000_clean",
    "e1000_intr",
    "e1000_xmit_frame+e1000_clean+e1000_intr",
];

/// Time for a call in the domain, in microseconds: only a call that hangs should reach it.
const BUDGET_US: u64 = 10_000_000;

/// What to measure.
#[derive(Debug, Clone)]
pub struct IsolationOptions {
    /// The guest; without a network, which is added.
    pub guest: GuestOptions,
    /// Sets of functions.
    pub sets: Vec<Vec<String>>,
    /// How long each kind of traffic runs.
    pub time: Duration,
}

/// Measures, telling `progress` what is done.
pub fn measure(
    options: &IsolationOptions,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<(Isolation, GuestFacts)> {
    let guest_options = options.guest.clone().with("--net user --nic e1000");
    progress("booting a guest");
    let mut guest = Guest::boot(&guest_options, BOOT_TIME)?;
    network::bring_up(&mut guest, DRIVER)?;
    network::wait_for_link(&mut guest, LINK_TIME)?;
    let mut control = guest.control()?;
    let mut isolation = Isolation::default();
    progress("nothing isolated");
    let mut before = rates(&mut guest, options.time)?;
    isolation.sets.push(set(&[], before, before, Vec::new()));
    for entries in &options.sets {
        progress(&format!("isolated: {}", entries.join(" ")));
        // The VM asks the agent itself, which listens to one client at a time.
        guest.agent().disconnect();
        control.ask(&Request::Isolate {
            module: DRIVER.to_owned(),
            entries: Wanted::Named(entries.clone()),
            budget_us: Some(BUDGET_US),
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig::default(),
            spilling: Spilling::default(),
            contain: Contain::Full,
            keep_faults: None,
        })?;
        let isolated = rates(&mut guest, options.time)?;
        let functions = costs(&mut control)?;
        control.ask(&Request::Release {
            module: DRIVER.to_owned(),
        })?;
        progress("nothing isolated");
        let traps = traps(&mut control)?;
        let after = rates(&mut guest, options.time)?;
        isolation.exits_when_off += self::traps(&mut control)?.saturating_sub(traps);
        let baseline = Rates {
            pings: (before.pings + after.pings) / 2.0,
            mib: (before.mib + after.mib) / 2.0,
        };
        let set = set(entries, isolated, baseline, functions);
        isolation.sets.push(set);
        before = after;
    }
    let facts = guest_facts(&mut guest)?;
    Ok((isolation, facts))
}

/// What goes through, a second.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rates {
    /// Pings.
    pub pings: f64,
    /// MiB of TCP, both ways.
    pub mib: f64,
}

fn set(
    entries: &[String],
    rates: Rates,
    baseline: Rates,
    functions: Vec<FunctionCost>,
) -> IsolatedSet {
    IsolatedSet {
        entries: entries.to_vec(),
        pings_per_s: rates.pings,
        pings_fraction: rates.pings / baseline.pings,
        tcp_mib_per_s: rates.mib,
        tcp_fraction: rates.mib / baseline.mib,
        functions,
    }
}

/// What goes through in `time` of each.
pub(super) fn rates(guest: &mut Guest, time: Duration) -> anyhow::Result<Rates> {
    let mut run = |kind: TrafficKind| -> anyhow::Result<(TrafficResult, f64)> {
        let result = send(guest, kind, time)?;
        let well = result.error.is_none() && result.corrupted == 0 && result.elapsed_ns > 0;
        ensure!(
            well,
            "{}: not all of it arrived as it was sent: {result:?}",
            kind.name()
        );
        let seconds = result.elapsed_ns as f64 / 1e9;
        Ok((result, seconds))
    };
    let (pings, ping_s) = run(TrafficKind::PingFlood)?;
    let (tcp, tcp_s) = run(TrafficKind::TcpEcho)?;
    let bytes = tcp.bytes_to_peer + tcp.bytes_from_peer;
    ensure!(pings.answered > 0 && bytes > 0, "nothing went through");
    Ok(Rates {
        pings: pings.answered as f64 / ping_s,
        mib: bytes as f64 / f64::from(1 << 20) / tcp_s,
    })
}

fn costs(control: &mut ControlClient) -> anyhow::Result<Vec<FunctionCost>> {
    let status = control.status()?;
    let modules = status.isolation.iter();
    let modules: Vec<_> = modules.filter(|status| status.module == DRIVER).collect();
    for module in &modules {
        ensure!(
            module.violations == 0 && module.broken.is_none(),
            "calls failed under traffic: see `cofferdam violations`"
        );
    }
    let entries = modules.iter().flat_map(|module| &module.entries);
    Ok(entries.filter_map(FunctionCost::new).collect())
}

/// Exits to the isolator so far.
fn traps(control: &mut ControlClient) -> anyhow::Result<u64> {
    let status = control.status()?;
    Ok(status.exits.get("trap").copied().unwrap_or(0))
}
