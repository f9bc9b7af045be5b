//! Two guests, what moves between them, and the far end of the cable.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::message::Ipv4;
use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;

use super::observer::{Observer, Outage};
use super::{MODEL, MovedNic};
use crate::bench::device_host::{self, DeviceHost};
use crate::bench::guest::{BOOT_TIME, Guest, GuestOptions};
use crate::bench::network::{self, LINK_TIME};
use crate::control::protocol::{Reply, Request};
use crate::device::protocol::SwitchRecord;
use crate::options::MacAddress;
use crate::report::switch::SwitchMethod;

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
/// Between two looks at a link, which the guest is asked for.
const LINK_POLL: Duration = Duration::from_millis(20);
/// Frames of a guest that has its turn before the turn goes on: it works by then.
const SETTLED_FRAMES: usize = 5;

/// What is known of a move.
pub struct Moved {
    /// How long the new guest's interface waited for its link, if it was brought up.
    pub link_ns: Option<u64>,
}

/// See the module.
pub struct Pair {
    // Dropped in this order: nobody is left waiting for somebody who is gone.
    guests: [Guest; 2],
    host: Option<DeviceHost>,
    observer: Observer,
    cable: PathBuf,
    nic: MovedNic,
    /// Where the NIC of a guest is, if it was plugged in.
    plugged: [Option<String>; 2],
    _folder: tempfile::TempDir,
}

impl Pair {
    pub fn new(guest: &GuestOptions, nic: &MovedNic, method: SwitchMethod) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let cable = folder.path().join("cable");
        let observer = match nic {
            MovedNic::Model => Observer::listen(&cable)?,
            MovedNic::Function { far_end, .. } => Observer::overhear(far_end)?,
        };
        let parked = match method {
            SwitchMethod::Context => Some("down"),
            SwitchMethod::ContextStall => Some("stall"),
            SwitchMethod::Hotplug => None,
        };
        let host = parked
            .map(|parked| {
                let device = match nic {
                    MovedNic::Model => {
                        format!("--model {MODEL} --net unix={}", cable.display())
                    }
                    MovedNic::Function { address, .. } => format!("--vfio {address}"),
                };
                let words = format!("{device} --parked {parked}");
                let words: Vec<_> = words.split_whitespace().collect();
                DeviceHost::start(&guest.program, folder.path(), &words)
            })
            .transpose()?;
        let boot = |name| {
            let options = guest.clone().among(folder.path(), name);
            let options = match host {
                Some(_) => options.with(&format!("--nic device={}", device_host::NAME)),
                None => options,
            };
            Guest::boot(&options, BOOT_TIME)
        };
        let mut pair = Self {
            guests: [boot(NAMES[0])?, boot(NAMES[1])?],
            host,
            observer,
            cable,
            nic: nic.clone(),
            plugged: [None, None],
            _folder: folder,
        };
        for guest in &mut pair.guests {
            network::insert_slowly(guest, nic.driver())?;
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
            None => {
                pair.plug(0)?;
            }
        }
        pair.settled(0, monotonic_ns())?;
        Ok(pair)
    }

    pub fn guest(&mut self, index: usize) -> &mut Guest {
        &mut self.guests[index]
    }

    /// The last switch of the device host, if there is one.
    pub fn last_switch(&self) -> anyhow::Result<Option<SwitchRecord>> {
        let status = self.host.as_ref().map(DeviceHost::status).transpose()?;
        Ok(status.and_then(|status| status.switches.last().cloned()))
    }

    /// What the far end saw of a move that was asked for at `asked_ns`.
    pub fn outage(&self, old: usize, new: usize, asked_ns: u64) -> Option<Outage> {
        let (old, new) = (self.mac(old), self.mac(new));
        self.observer.outage(old, new, asked_ns)
    }

    fn mac(&self, index: usize) -> MacAddress {
        MacAddress::for_name(NAMES[index])
    }

    /// Who has the turn, of a device host.
    fn turn(&self) -> anyhow::Result<Option<String>> {
        self.host.as_ref().map_or(Ok(None), DeviceHost::turn)
    }

    /// Gives the NIC to the other guest.
    pub fn give(&mut self, to: usize) -> anyhow::Result<Moved> {
        let link_ns = match &self.host {
            Some(host) => {
                host.give(NAMES[to])?;
                None
            }
            None => {
                self.unplug(1 - to)?;
                Some(self.plug(to)?)
            }
        };
        Ok(Moved { link_ns })
    }

    /// How long its interface waited for the link.
    fn plug(&mut self, index: usize) -> anyhow::Result<u64> {
        let request = match &self.nic {
            MovedNic::Model => {
                let (cable, mac) = (self.cable.display(), self.mac(index));
                Request::Plug {
                    net: Some(format!("unix={cable},nic={MODEL},mac={mac}")),
                    nic: None,
                }
            }
            MovedNic::Function { address, .. } => Request::Plug {
                net: None,
                nic: Some(format!("vfio={address}")),
            },
        };
        let mut control = self.guests[index].control()?;
        match control.ask(&request)? {
            Reply::Plugged(nic) => self.plugged[index] = Some(nic.address),
            other => bail!("the VM answered something else: {other:?}"),
        }
        let name = self.configure(index)?;
        let up_ns = monotonic_ns();
        self.linked(index, &name)?;
        Ok(monotonic_ns().saturating_sub(up_ns))
    }

    /// Waits until the interface has its link.
    fn linked(&mut self, index: usize, name: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + LINK_TIME;
        loop {
            let interfaces = self.guests[index].agent().interfaces()?;
            let is_linked = |one: &agent_protocol::message::Interface| {
                one.name == name && one.carrier == Some(true)
            };
            if interfaces.iter().any(is_linked) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} has no link", NAMES[index]);
            std::thread::sleep(LINK_POLL);
        }
    }

    fn unplug(&mut self, index: usize) -> anyhow::Result<()> {
        let Some(address) = self.plugged[index].take() else {
            return Ok(());
        };
        let mut control = self.guests[index].control()?;
        control.tell(&Request::Unplug { address })
    }

    /// Waits until the guest has the NIC's interface, and gives it its address, as whoever listens
    /// for new devices there would: its name. It sends as soon as it has a link.
    fn configure(&mut self, index: usize) -> anyhow::Result<String> {
        let mac = self.mac(index).to_string();
        let agent = self.guests[index].agent();
        let deadline = Instant::now() + LINK_TIME;
        let interface = loop {
            let interfaces = agent.interfaces()?;
            let driver = self.nic.driver();
            let of_driver =
                |one: &agent_protocol::message::Interface| one.driver.as_deref() == Some(driver);
            if let Some(interface) = interfaces.into_iter().find(of_driver) {
                break interface;
            }
            ensure!(
                Instant::now() < deadline,
                "{} does not probe its NIC",
                NAMES[index]
            );
            std::thread::sleep(POLL);
        };
        let name = interface.name;
        // A function has its own, for whoever has it.
        if interface.mac != mac {
            self.guests[index].shell(&format!("ip link set {name} address {mac}"))?;
        }
        let agent = self.guests[index].agent();
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
        Ok(name)
    }

    /// Waits until `new` is heard.
    pub fn heard(&self, old: usize, new: usize, asked_ns: u64) -> anyhow::Result<Outage> {
        let deadline = Instant::now() + HEARD_TIME;
        loop {
            if let Some(outage) = self.outage(old, new, asked_ns) {
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
    pub fn settled(&self, index: usize, since_ns: u64) -> anyhow::Result<()> {
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
