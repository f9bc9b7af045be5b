//! Moving one NIC between two running guests, as a switch of the device host and as an unplug and
//! plug, in one run.
//!
//! ```text
//!  guest left ──┐
//!               ├── the NIC ── cable ── observer: whose frames come when
//!  guest right ─┘
//! ```
//!
//! Both guests send all that they can, all the time: pings to a group that nobody answers. So a
//! guest that has the NIC is not silent for reasons of its own, and one that waits for it has
//! frames in its rings. The outage is what the far end of the cable sees: from the last frame of
//! the one guest to the first of the other.
//!
//! The NIC is a model, whose cable ends in this process, or a function of the host, whose cable
//! ends in an interface of the host: two cards of one machine, the one plugged into the other.

mod interface;
mod large_pages;
mod observer;
mod pair;

use std::collections::BTreeMap;

use anyhow::Context;
use devices::clock::monotonic_ns;
use devices::vfio::binding::Sysfs;

use self::large_pages::LargePages;
use self::pair::Pair;
use super::guest::{GuestOptions, guest_facts};
use super::network::DRIVER;
use crate::device::protocol::SwitchRecord;
use crate::options::PciAddress;
use crate::report::switch::{LINK, PHASES, Switch, SwitchMethod, Way};
use crate::report::{Guest as GuestFacts, Stat};

/// The model that is moved.
const MODEL: &str = "e1000";

/// What to measure.
#[derive(Debug, Clone)]
pub struct SwitchOptions {
    /// The guests; without a network, which is added.
    pub guest: GuestOptions,
    /// Ways.
    pub methods: Vec<SwitchMethod>,
    /// What is moved.
    pub nic: MovedNic,
    /// Sizes of the memory of each guest, in MiB.
    pub mem_mib: Vec<u64>,
    /// Whether guests whose memory has large pages are measured, too.
    pub large_pages: bool,
    /// Switches of the device host.
    pub switches: usize,
    /// Moves by unplug and plug.
    pub moves: usize,
}

/// What is moved.
#[derive(Debug, Clone)]
pub enum MovedNic {
    /// A model.
    Model,
    /// A function of the host.
    Function {
        /// Where it is.
        address: PciAddress,
        /// The guests' driver for it.
        driver: String,
        /// The interface of the host that its cable ends in.
        far_end: String,
    },
}

impl MovedNic {
    /// The guests' driver for it.
    fn driver(&self) -> &str {
        match self {
            Self::Model => DRIVER,
            Self::Function { driver, .. } => driver,
        }
    }

    /// What it is, for people.
    fn words(&self) -> String {
        match self {
            Self::Model => format!("model {MODEL}"),
            Self::Function { driver, .. } => format!("function of the host, {driver}"),
        }
    }
}

/// A function of the host that belongs to `vfio-pci` as long as this lives.
pub(super) struct Bound(Option<PciAddress>);

impl Bound {
    /// None without an address; one that is in use is taken by `force`.
    pub(super) fn new(address: Option<PciAddress>, force: bool) -> anyhow::Result<Self> {
        let Some(address) = address else {
            return Ok(Self(None));
        };
        let bound = Sysfs::default().bind(address, force)?;
        // One that was given away before stays so.
        Ok(Self((bound.from != bound.to).then_some(address)))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let unbound = self
            .0
            .map(|address| Sysfs::default().unbind(address, false));
        if let Some(Err(error)) = unbound {
            tracing::warn!(%error, "the function is not given back to the host");
        }
    }
}

/// Measures, telling `progress` what is done.
///
/// # Errors
/// A guest does not come up, or is not heard after a switch.
pub fn measure(
    options: &SwitchOptions,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<(Vec<Switch>, Option<GuestFacts>)> {
    let address = match &options.nic {
        MovedNic::Function { address, .. } => Some(*address),
        MovedNic::Model => None,
    };
    let _bound = Bound::new(address, false)?;
    let (mut rows, mut facts) = (Vec::new(), None);
    let kinds: &[bool] = match options.large_pages {
        true => &[false, true],
        false => &[false],
    };
    for &mem_mib in &options.mem_mib {
        for &large_pages in kinds {
            let _pages = large_pages
                .then(|| LargePages::set_aside(2 * mem_mib))
                .transpose()?;
            for &method in &options.methods {
                let way = Way {
                    method,
                    mem_mib,
                    large_pages,
                };
                progress(&format!("{way}: booting two guests"));
                let row = one(options, way, &mut facts)?;
                let outage_ms = row.outage_us.p50 / 1e3;
                progress(&format!("{way}: outage {outage_ms:.2} ms"));
                rows.push(row);
            }
        }
    }
    Ok((rows, facts))
}

/// One way.
fn one(
    options: &SwitchOptions,
    way: Way,
    facts: &mut Option<GuestFacts>,
) -> anyhow::Result<Switch> {
    let n = match way.method {
        SwitchMethod::Hotplug => options.moves,
        SwitchMethod::Context | SwitchMethod::ContextStall => options.switches,
    };
    let memory = format!("--memory {}M", way.mem_mib);
    let mut guest = options.guest.clone().with(&memory);
    if way.large_pages {
        guest = guest.with("--large-pages");
    }
    let mut pair = Pair::new(&guest, &options.nic, way.method)?;
    facts.get_or_insert(guest_facts(pair.guest(0))?);
    let (mut outages, mut phases, mut late_frames) = (Vec::new(), Phases::default(), 0);
    for number in 0..n {
        let to = (number + 1) % 2;
        let asked_ns = monotonic_ns();
        let moved = pair.give(to)?;
        let outage = pair.heard(1 - to, to, asked_ns)?;
        outages.push(outage.first_ns.saturating_sub(outage.last_ns) as f64 / 1e3);
        pair.settled(to, outage.first_ns)?;
        if let Some(link_ns) = moved.link_ns {
            phases.sample(LINK, link_ns);
        }
        // Its first frame is in it by now.
        if let Some(last) = pair.last_switch()? {
            phases.add(&last);
        }
        // Looked at again when the old guest has had time to be late.
        let again = pair.outage(1 - to, to, asked_ns);
        late_frames += again.map_or(0, |outage| outage.late);
    }
    Ok(Switch {
        device: options.nic.words(),
        way,
        n: n as u64,
        phases_us: phases.stats(),
        outage_us: Stat::from_samples(&outages).context("no switch was asked for")?,
        late_frames,
    })
}

/// Times of the parts of switches.
#[derive(Debug, Default)]
struct Phases(BTreeMap<String, Vec<f64>>);

impl Phases {
    fn add(&mut self, of: &SwitchRecord) {
        let phases = &of.phases;
        let told = [
            phases.prepare_ns,
            phases.quiesce_ns,
            phases.save_ns,
            phases.unmap_ns,
            phases.map_ns,
            phases.load_ns,
            phases.resume_ns,
            phases.complete_ns,
            of.first_frame_ns,
        ];
        for (name, ns) in PHASES.into_iter().zip(told) {
            if let Some(ns) = ns {
                self.sample(name, ns);
            }
        }
    }

    fn sample(&mut self, name: &str, ns: u64) {
        let samples = self.0.entry(name.to_owned()).or_default();
        samples.push(ns as f64 / 1e3);
    }

    fn stats(&self) -> BTreeMap<String, Stat> {
        let stats = self
            .0
            .iter()
            .filter_map(|(name, samples)| Some((name.clone(), Stat::from_samples(samples)?)));
        stats.collect()
    }
}
