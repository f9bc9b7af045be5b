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

mod observer;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::message::Ipv4;
use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;

use self::observer::{Observer, Outage};
use super::device_host::{self, DeviceHost};
use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::network::{self, DRIVER, LINK_TIME};
use crate::control::protocol::{Reply, Request};
use crate::device::protocol::SwitchRecord;
use crate::options::MacAddress;
use crate::report::switch::{PHASES, Switch, SwitchMethod};
use crate::report::{Guest as GuestFacts, Stat};

/// Names of the two guests.
const NAMES: [&str; 2] = ["left", "right"];
/// Their addresses.
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(10, 0, 2, 16)];
/// What they ping: a group that nobody is in.
const GROUP: &str = "239.1.1.1";
/// Between two pings of a guest, in seconds: all the time.
const PING_INTERVAL: &str = "0.0002";
/// Size of a ping: some twenty frames at a time.
const PING_BYTES: u32 = 30_000;
/// How long a guest that has its turn may take to be heard.
const HEARD_TIME: Duration = Duration::from_secs(60);
/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(1);
/// Frames of a guest that has its turn before the turn goes on: it works by then.
const SETTLED_FRAMES: usize = 5;
/// The model that is moved.
const MODEL: &str = "e1000";

/// What to measure.
#[derive(Debug, Clone)]
pub struct SwitchOptions {
    /// The guests; without a network, which is added.
    pub guest: GuestOptions,
    /// Ways.
    pub methods: Vec<SwitchMethod>,
    /// Sizes of the memory of each guest, in MiB.
    pub mem_mib: Vec<u64>,
    /// Switches of the device host.
    pub switches: usize,
    /// Moves by unplug and plug.
    pub moves: usize,
}

/// Measures, telling `progress` what is done.
///
/// # Errors
/// A guest does not come up, or is not heard after a switch.
pub fn measure(
    options: &SwitchOptions,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<(Vec<Switch>, Option<GuestFacts>)> {
    let (mut rows, mut facts) = (Vec::new(), None);
    for &mem_mib in &options.mem_mib {
        for &method in &options.methods {
            progress(&format!(
                "{mem_mib} MiB, {}: booting two guests",
                method.words()
            ));
            let n = match method {
                SwitchMethod::Hotplug => options.moves,
                SwitchMethod::Context | SwitchMethod::ContextStall => options.switches,
            };
            let row = one(&options.guest, method, mem_mib, n, &mut facts)?;
            progress(&format!(
                "{mem_mib} MiB, {}: outage {:.2} ms",
                method.words(),
                row.outage_us.p50 / 1e3
            ));
            rows.push(row);
        }
    }
    Ok((rows, facts))
}

/// One way, with one size of memory.
fn one(
    guest: &GuestOptions,
    method: SwitchMethod,
    mem_mib: u64,
    n: usize,
    facts: &mut Option<GuestFacts>,
) -> anyhow::Result<Switch> {
    let mut pair = Pair::new(guest, method, mem_mib)?;
    facts.get_or_insert(guest_facts(&mut pair.guests[0])?);
    let (mut outages, mut phases, mut late) = (Vec::new(), Phases::default(), 0);
    for number in 0..n {
        let to = (number + 1) % 2;
        let asked_ns = monotonic_ns();
        pair.give(to)?;
        let outage = pair.heard(1 - to, to, asked_ns)?;
        outages.push(outage.first_ns.saturating_sub(outage.last_ns) as f64 / 1e3);
        pair.settled(to, outage.first_ns)?;
        // Its first frame is in it by now.
        if let Some(host) = &pair.host
            && let Some(last) = host.status()?.switches.last()
        {
            phases.add(last);
        }
        // Looked at again when the old guest has had time to be late.
        let again = pair
            .observer
            .outage(pair.mac(1 - to), pair.mac(to), asked_ns);
        late += again.map_or(0, |outage| outage.late);
    }
    Ok(Switch {
        device: format!("model {MODEL}"),
        method,
        n: n as u64,
        mem_mib,
        phases_us: phases.stats(),
        outage_us: Stat::from_samples(&outages).context("no switch was asked for")?,
        late_frames: late,
    })
}

/// Times of the parts of switches.
#[derive(Debug, Default)]
struct Phases(BTreeMap<String, Vec<f64>>);

impl Phases {
    fn add(&mut self, of: &SwitchRecord) {
        let phases = &of.phases;
        let told = [
            phases.quiesce_ns,
            phases.save_ns,
            phases.unmap_ns,
            phases.map_ns,
            phases.load_ns,
            phases.resume_ns,
            of.first_frame_ns,
        ];
        for (name, ns) in PHASES.into_iter().zip(told) {
            if let Some(ns) = ns {
                let samples = self.0.entry(name.to_owned()).or_default();
                samples.push(ns as f64 / 1e3);
            }
        }
    }

    fn stats(&self) -> BTreeMap<String, Stat> {
        let stats = self
            .0
            .iter()
            .filter_map(|(name, samples)| Some((name.clone(), Stat::from_samples(samples)?)));
        stats.collect()
    }
}

/// Two guests, what moves between them, and the far end of the cable.
struct Pair {
    // Dropped in this order: nobody is left waiting for somebody who is gone.
    guests: [Guest; 2],
    host: Option<DeviceHost>,
    observer: Observer,
    cable: PathBuf,
    /// Where the NIC of a guest is, if it was plugged in.
    plugged: [Option<String>; 2],
    _folder: tempfile::TempDir,
}

impl Pair {
    fn new(guest: &GuestOptions, method: SwitchMethod, mem_mib: u64) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let cable = folder.path().join("cable");
        let observer = Observer::listen(&cable)?;
        let parked = match method {
            SwitchMethod::Context => Some("down"),
            SwitchMethod::ContextStall => Some("stall"),
            SwitchMethod::Hotplug => None,
        };
        let host = parked
            .map(|parked| {
                let net = format!("unix={}", cable.display());
                let words = ["--model", MODEL, "--net", &net, "--parked", parked];
                DeviceHost::start(&guest.program, folder.path(), &words)
            })
            .transpose()?;
        let boot = |name| {
            let options = guest.clone().among(folder.path(), name);
            let mut options = options.with(&format!("--memory {mem_mib}M"));
            if host.is_some() {
                options = options.with(&format!("--nic device={}", device_host::NAME));
            }
            Guest::boot(&options, BOOT_TIME)
        };
        let mut pair = Self {
            guests: [boot(NAMES[0])?, boot(NAMES[1])?],
            host,
            observer,
            cable,
            plugged: [None, None],
            _folder: folder,
        };
        for guest in &mut pair.guests {
            network::insert_slowly(guest, DRIVER)?;
        }
        match pair.host {
            Some(_) => {
                for index in 0..2 {
                    pair.configure(index)?;
                }
                // Each has had it once: no link has been away for as long as the other guest took
                // to boot.
                if pair.turn()?.as_deref() == Some(NAMES[0]) {
                    pair.settled(0, monotonic_ns())?;
                    pair.give(1)?;
                }
                pair.settled(1, monotonic_ns())?;
                pair.give(0)?;
            }
            None => pair.plug(0)?,
        }
        pair.settled(0, monotonic_ns())?;
        Ok(pair)
    }

    fn mac(&self, index: usize) -> MacAddress {
        MacAddress::for_name(NAMES[index])
    }

    /// Who has the turn, of a device host.
    fn turn(&self) -> anyhow::Result<Option<String>> {
        self.host.as_ref().map_or(Ok(None), DeviceHost::turn)
    }

    /// Gives the NIC to the other guest.
    fn give(&mut self, to: usize) -> anyhow::Result<()> {
        match &self.host {
            Some(host) => {
                host.give(NAMES[to])?;
                Ok(())
            }
            None => {
                self.unplug(1 - to)?;
                self.plug(to)
            }
        }
    }

    fn plug(&mut self, index: usize) -> anyhow::Result<()> {
        let net = format!(
            "unix={},nic={MODEL},mac={}",
            self.cable.display(),
            self.mac(index)
        );
        let mut control = self.guests[index].control()?;
        match control.ask(&Request::Plug {
            net: Some(net),
            nic: None,
        })? {
            Reply::Plugged(nic) => self.plugged[index] = Some(nic.address),
            other => bail!("the VM answered something else: {other:?}"),
        }
        self.configure(index)
    }

    fn unplug(&mut self, index: usize) -> anyhow::Result<()> {
        let Some(address) = self.plugged[index].take() else {
            return Ok(());
        };
        let mut control = self.guests[index].control()?;
        control.tell(&Request::Unplug { address })
    }

    /// Waits until the guest has the NIC's interface, and gives it its address, as whoever listens
    /// for new devices there would.
    fn configure(&mut self, index: usize) -> anyhow::Result<()> {
        let mac = self.mac(index).to_string();
        let agent = self.guests[index].agent();
        let deadline = Instant::now() + LINK_TIME;
        let name = loop {
            let interfaces = agent.interfaces()?;
            if let Some(interface) = interfaces.into_iter().find(|one| one.mac == mac) {
                break interface.name;
            }
            ensure!(
                Instant::now() < deadline,
                "{} does not probe its NIC",
                NAMES[index]
            );
            std::thread::sleep(POLL);
        };
        agent.set_link(&name, true)?;
        let address = Ipv4 {
            address: ADDRESSES[index],
            prefix: 24,
        };
        agent.set_address(&name, address, None)?;
        // While there is such an interface. One whose link is down may refuse to send.
        self.guests[index].shell(&format!(
            "ip route add {GROUP} dev {name} 2> /dev/null; \
             (while [ -e /sys/class/net/{name} ]; do ping -q -s {PING_BYTES} -i {PING_INTERVAL} {GROUP}; sleep 0.01; done) \
             > /dev/null 2>&1 < /dev/null &"
        ))?;
        Ok(())
    }

    /// Waits until `new` is heard.
    fn heard(&self, old: usize, new: usize, asked_ns: u64) -> anyhow::Result<Outage> {
        let deadline = Instant::now() + HEARD_TIME;
        loop {
            if let Some(outage) = self.observer.outage(self.mac(old), self.mac(new), asked_ns) {
                return Ok(outage);
            }
            ensure!(
                Instant::now() < deadline,
                "{} is not heard{}",
                NAMES[new],
                self.guests[new].last_words()
            );
            std::thread::sleep(POLL);
        }
    }

    /// Waits until the guest has sent so much since `since_ns` that its NIC works.
    fn settled(&self, index: usize, since_ns: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEARD_TIME;
        while self.observer.frames(self.mac(index), since_ns) < SETTLED_FRAMES {
            ensure!(
                Instant::now() < deadline,
                "{} sends nothing{}",
                NAMES[index],
                self.guests[index].last_words()
            );
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}
