//! The guest's NICs: what is kept of them to look at them and to control them, and which of them a
//! driver has.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_protocol::{Client, ClientError};
use anyhow::bail;
use devices::edge::Edge;
use devices::hold::{CheckpointBy, DeviceState, Holdable, HoldableSet};
use devices::nic::Nic;
use devices::pci::bus::PowerState;
use devices::pci::config::offset::COMMAND;
use devices::vfio_user::VfioUserFunction;
use devices::wire::gateway::GatewayControl;
use vmm::VmHandle;

use super::NetConfig;
use super::attachment::{Attachment, Away};
use super::meter::Meter;
use crate::options::NicSpec;

/// Longest name of a PCI driver that the guest is believed, in bytes.
const MAX_DRIVER_NAME: usize = 64;

/// One NIC.
#[derive(Clone)]
pub struct GuestNic {
    /// What it was made from.
    pub config: NetConfig,
    /// The device.
    pub nic: Nic,
    /// Its number among the guest's NICs, from 0.
    pub number: usize,
    /// Its PCI slot.
    pub slot: u8,
    /// It came while the guest ran.
    pub came: bool,
    /// What passed between it and its wire, if that is in this process.
    pub meter: Option<Arc<Meter>>,
    /// The user-mode gateway that it is plugged into, if it is.
    pub gateway: Option<GatewayControl>,
    /// The device host that has it, if one does.
    pub attachment: Option<Attachment>,
    /// That device, as this process reaches it.
    pub remote: Option<Arc<Mutex<VfioUserFunction>>>,
    /// What stands between the guest and the device.
    pub edge: Arc<Edge>,
}

impl GuestNic {
    /// Its PCI address, as Linux writes it.
    pub fn address(&self) -> String {
        format!("0000:00:{:02x}.0", self.slot)
    }

    /// Whether it is not in this process: its device writes guest memory by itself.
    pub fn is_elsewhere(&self) -> bool {
        !matches!(self.config.nic, NicSpec::Model { .. })
    }
}

/// All NICs of a guest: those that it began with in the order of their slots, then those that came.
#[derive(Clone, Default)]
pub struct Nics {
    all: Arc<Mutex<Vec<GuestNic>>>,
    /// Slots of the NICs that modules had when the guest was last asked: while a driver is out, it
    /// has none.
    driven: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    /// The VM is paused.
    paused: Arc<AtomicBool>,
    /// Slots of the NICs whose driver was given up, by its name.
    given_up: Arc<Mutex<HashMap<String, Vec<u8>>>>,
}

/// The devices of a module, held as one.
pub struct Driven {
    /// The devices.
    pub device: Arc<dyn Holdable>,
    /// Their slots.
    pub slots: Vec<u8>,
}

impl Nics {
    /// These NICs.
    pub fn new(all: Vec<GuestNic>) -> Self {
        Self {
            all: Arc::new(Mutex::new(all)),
            driven: Arc::default(),
            paused: Arc::default(),
            given_up: Arc::default(),
        }
    }

    /// All of them.
    pub fn all(&self) -> Vec<GuestNic> {
        self.lock().clone()
    }

    /// One more.
    pub fn add(&self, nic: GuestNic) {
        self.lock().push(nic.clone());
        // Looked at where it is told: who lets the VM go on meanwhile tells it so afterwards.
        tell(&nic, |away| {
            away.paused = self.paused.load(Ordering::SeqCst);
        });
    }

    /// Tells the device hosts of all that the VM stands still, or goes on. One that does not answer
    /// is told of in the log: its turn stays where it is.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
        for nic in &self.all() {
            tell(nic, |away| away.paused = paused);
        }
    }

    /// The same of those device hosts for which the guest's drivers have to do something before it
    /// stands still.
    pub fn about_to_pause(&self) {
        for nic in &self.all() {
            let attachment = nic.attachment.as_ref();
            if attachment.is_some_and(|own| own.by_driver.load(Ordering::Relaxed)) {
                tell(nic, |away| away.paused = true);
            }
        }
    }

    /// The same of the device hosts of `module`'s NICs: the guest's driver of them was given up, or
    /// is not any more.
    pub fn set_given_up(&self, module: &str, given_up: bool) {
        let is_its = self.driven_by(module);
        let its = self.all().into_iter().filter(|nic| is_its(nic));
        let its: Vec<u8> = its.map(|nic| nic.slot).collect();
        let slots = {
            let mut all = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
            match given_up {
                true => {
                    all.insert(module.to_owned(), its.clone());
                    its
                }
                // A guest that begins anew has not said yet which it drives.
                false => all.remove(module).unwrap_or_default(),
            }
        };
        for nic in self.all().iter().filter(|nic| slots.contains(&nic.slot)) {
            tell(nic, |away| away.given_up = given_up);
        }
    }

    /// One that is not in this process, if there is any: its device writes guest memory by itself.
    pub fn elsewhere(&self) -> Option<GuestNic> {
        let all = self.lock();
        all.iter().find(|nic| nic.is_elsewhere()).cloned()
    }

    /// Forgets those that came to `vm` while it ran and went again. Says whether others are left
    /// that came.
    pub fn forget_gone(&self, vm: &VmHandle) -> bool {
        let mut all = self.lock();
        all.retain(|nic| !nic.came || vm.is_plugged(nic.slot));
        all.iter().any(|nic| nic.came)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<GuestNic>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest which NICs `module` drives, and remembers it.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn look(&self, agent: &mut Client, module: &str) -> anyhow::Result<()> {
        let mut slots = Vec::new();
        for nic in self.all() {
            if is_driven(agent, &nic, module)? {
                slots.push(nic.slot);
            }
        }
        let mut driven = self.driven.lock().unwrap_or_else(PoisonError::into_inner);
        // A driver that has let go of its device for the moment is going to have it again.
        if !slots.is_empty() {
            driven.insert(module.to_owned(), slots);
        }
        Ok(())
    }

    /// Forgets what the guest said: it starts anew.
    pub fn forget(&self) {
        let mut driven = self.driven.lock().unwrap_or_else(PoisonError::into_inner);
        driven.clear();
    }

    /// The NICs of `module` that can be held, as one whose state is taken in the given way. Those
    /// that the guest said last, or, if it was not asked since it started, those that such a module
    /// is known to drive.
    ///
    /// # Errors
    /// There is no such way for them.
    pub fn of(&self, module: &str, by: CheckpointBy) -> anyhow::Result<Option<Driven>> {
        let is_its = self.driven_by(module);
        let (mut devices, mut slots) = (Vec::new(), Vec::new());
        for nic in self.all().iter().filter(|nic| is_its(nic)) {
            if let Some(holdable) = &nic.nic.holdable {
                let device = holdable(by)?;
                devices.push(nic.edge.holdable(device, nic.nic.function.clone()));
                slots.push(nic.slot);
            }
        }
        if devices.is_empty() && by != CheckpointBy::Exact {
            bail!("there is no description of the registers of {module}'s device");
        }
        let device = HoldableSet::of(devices);
        Ok(device.map(|device| Driven { device, slots }))
    }

    /// Whether a NIC is one of `module`'s: see [`Nics::of`].
    fn driven_by<'a>(&self, module: &'a str) -> impl Fn(&GuestNic) -> bool + use<'a> {
        let driven = self.driven.lock().unwrap_or_else(PoisonError::into_inner);
        let said = driven.get(module).cloned();
        move |nic| match &said {
            Some(slots) => slots.contains(&nic.slot),
            None => nic.config.nic.drivers().contains(&module),
        }
    }

    /// The state of `module`'s devices.
    pub fn save(&self, module: &str) -> Option<DeviceState> {
        let driven = self.of(module, CheckpointBy::Exact).ok()??;
        let mut state = None;
        let held = driven.device.hold(&mut |held| state = held.state());
        if let Err(lost) = held {
            tracing::warn!("the state of {module}'s device is not taken: {lost}");
        }
        state
    }

    /// Puts `module`'s devices into a power state; `false` if it has none here, or none of them has
    /// any.
    pub fn set_power(&self, vm: &VmHandle, module: &str, state: PowerState) -> bool {
        let driven = self.of(module, CheckpointBy::Exact);
        let slots = driven
            .ok()
            .flatten()
            .map_or(Vec::new(), |driven| driven.slots);
        let set = slots
            .iter()
            .filter(|slot| vm.pci_bus().set_power_state(**slot, state));
        set.count() > 0
    }

    /// Puts that state back.
    ///
    /// # Errors
    /// The devices do not take it.
    pub fn put_back(&self, vm: &VmHandle, module: &str, state: &DeviceState) -> anyhow::Result<()> {
        let Some(driven) = self.of(module, CheckpointBy::Exact)? else {
            bail!("{module} drives no device of ours");
        };
        let mut result = Ok(());
        driven
            .device
            .hold(&mut |held| result = held.put_back(state))?;
        result?;
        // Written through the bus, so that it decodes what the functions decode now.
        let bus = vm.pci_bus();
        for slot in driven.slots {
            let mut command = [0; 2];
            bus.config_read(slot, COMMAND, &mut command);
            bus.config_write(slot, COMMAND, &command);
        }
        Ok(())
    }
}

/// Tells the device host of `nic`, if one has it. See [`Nics::set_paused`].
fn tell(nic: &GuestNic, change: impl FnOnce(&mut Away)) {
    let Some(attachment) = &nic.attachment else {
        return;
    };
    if let Err(error) = attachment.set_away(change) {
        tracing::warn!(device = %attachment.host, "not told whether it may have turns: {error:#}");
    }
}

/// Whether the guest's `module` drives `nic`.
fn is_driven(agent: &mut Client, nic: &GuestNic, module: &str) -> Result<bool, ClientError> {
    let address = nic.address();
    let uevent = format!("/sys/bus/pci/devices/{address}/uevent");
    let Some(text) = read(agent, &uevent)? else {
        return Ok(false);
    };
    let Some(driver) = driver_in(&text) else {
        return Ok(false);
    };
    // The module's folder has a link to its driver, and that has one to each of its devices.
    let own = format!("/sys/module/{module}/drivers/pci:{driver}/{address}/uevent");
    Ok(read(agent, &own)?.is_some())
}

/// A file of the guest; `None` if it does not give it.
pub(super) fn read(agent: &mut Client, path: &str) -> Result<Option<Vec<u8>>, ClientError> {
    match agent.read_file(path) {
        Ok(text) => Ok(Some(text)),
        Err(ClientError::Agent(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The driver's name in the `uevent` file of a device (`DRIVER=`); `None` if it has none, or none
/// that could be a file's name.
pub(super) fn driver_in(uevent: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(uevent).ok()?;
    let driver = text.lines().find_map(|line| line.strip_prefix("DRIVER="))?;
    let usable = !driver.is_empty()
        && driver.len() <= MAX_DRIVER_NAME
        && driver
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_+ ".contains(&byte));
    usable.then_some(driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_name_is_taken_from_the_guest_only_if_it_can_be_one() {
        let text = b"DRIVER=e1000\nPCI_CLASS=20000\nPCI_SLOT_NAME=0000:00:02.0\n";
        assert_eq!(driver_in(text), Some("e1000"));
        for none in [
            &b"PCI_CLASS=20000\n"[..],
            b"DRIVER=\n",
            b"DRIVER=../../x\n",
            b"DRIVER=\xff\n",
            &[&b"DRIVER="[..], &[b'x'; 65]].concat(),
        ] {
            assert_eq!(driver_in(none), None);
        }
    }
}
