//! A device that a guest has by turns with others: its driver suspends it before somebody else gets
//! it, and resumes it when it is back, with its own functions.
//!
//! ```text
//!   hand over:  driver's suspend function; of a device without a driver: the guest's kernel forgets it
//!   take over:  driver's resume function; of a device that the kernel does not know: it looks for it
//! ```

use std::time::Duration;

use anyhow::{bail, ensure};
use isolation::suspend_resume::DriverCalls;
use serde::{Deserialize, Serialize};

use crate::asker::Asker;
use crate::guest::{Agent, LiveGuest, POLL};
use crate::lock::lock;
use crate::resume_device::call;
use crate::supervisor::Supervisor;
use crate::turn::Taken;

/// How long another change of a driver is waited for: who changes one may wait for whoever asks for
/// this.
const BUSY_TIME: Duration = Duration::from_secs(5);
/// How long the agent may take for each thing that it is asked: the first time it lists symbols.
const AGENT_TIME: Duration = Duration::from_secs(60);

/// Longest name of a module, in bytes (`MODULE_NAME_LEN`, include/linux/module.h).
const MAX_NAME: usize = 56;

/// Prints `there` if the guest's kernel knows the PCI device `$1`, and which module drives it, with
/// a number that changes whenever the driver gets the device (that of the link, Linux
/// drivers/base/dd.c: `driver_sysfs_add`), or that it is driven by no module.
pub(crate) const LOOK: &str = "d=/sys/bus/pci/devices/$1; [ -e $d ] || exit 0; echo there; \
    [ -e $d/driver ] || exit 0; m=$(readlink $d/driver/module) || { echo built-in; exit 0; }; \
    stat -c \"module ${m##*/} %i\" $d/driver";

/// Has the guest's kernel forget the PCI device `$1`.
pub(crate) const FORGET: &str = "echo 1 > /sys/bus/pci/devices/$1/remove";

/// Has the guest's kernel look for PCI devices, and drivers look at `$1`; whatever drives it gets
/// the Ethernet address `$2`. A device that no driver wants is no error.
pub(crate) const FIND: &str = "d=/sys/bus/pci/devices/$1; [ -e $d ] || echo 1 > /sys/bus/pci/rescan; [ -e $d ] || exit 1; \
    [ -e $d/driver ] || echo $1 > /sys/bus/pci/drivers_probe; \
    for n in $d/net/*; do [ -e $n ] && [ \"$(cat $n/address)\" != $2 ] && ip link set dev ${n##*/} address $2; done; true";

/// A device that is somebody else's just now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HandedOver {
    /// The module that drives it.
    pub module: String,
    /// Which binding of it to the device.
    instance: String,
}

/// How a guest gave its device away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GivenAway {
    /// Its driver has suspended it.
    Suspended,
    /// No driver had it, and its kernel does not know it any more.
    Forgotten,
}

/// How a guest got its device back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TakenOver {
    /// Its driver, which had suspended it, has resumed it.
    Resumed,
    /// Its driver had not suspended it, and has it begin anew.
    Anew,
    /// Its kernel has found it, and a driver, if there is one, has probed it.
    Found,
}

/// The device as the guest's kernel has it: `None` if it does not know it, and the module that
/// drives it, if one does.
type Seen = Option<Option<HandedOver>>;

impl<G: LiveGuest> Supervisor<G> {
    /// Has the guest's driver of the PCI device at `address` (as Linux writes it) suspend it, for
    /// whom somebody else is to have it. Done already is as good.
    ///
    /// # Errors
    /// It cannot; the device works as before.
    pub fn hand_over(&self, address: &str, asker: &dyn Asker) -> anyhow::Result<GivenAway> {
        let _alone = self.soon_alone()?;
        asker.tell("having the driver suspend its device")?;
        let guest = self.guest();
        let mut agent = guest.agent();
        agent.set_limit(AGENT_TIME);
        let Some(seen) = look(&mut agent, address)? else {
            return Ok(GivenAway::Forgotten);
        };
        let Some(driver) = seen else {
            let ran = agent.run(&["sh", "-c", FORGET, "sh", address])?;
            ensure!(ran.success, "the guest does not let go of {address}");
            lock(&self.handed_over).remove(address);
            return Ok(GivenAway::Forgotten);
        };
        if lock(&self.handed_over).get(address) == Some(&driver) {
            return Ok(GivenAway::Suspended);
        }
        let module = &driver.module;
        ensure!(
            !lock(&self.resting).contains_key(module),
            "the devices of {module} are suspended: `cofferdam resume-device` brings them back"
        );
        self.device_begins_anew(module);
        let suspend = DriverCalls::Suspend;
        call(guest, &mut agent, suspend, module, &folder(address))?;
        lock(&self.handed_over).insert(address.to_owned(), driver.clone());
        if let Err(gone) = asker.tell("the device is suspended") {
            // Who has gone did not take it, and it may be here still.
            let resume = DriverCalls::Resume;
            call(guest, &mut agent, resume, module, &folder(address))?;
            lock(&self.handed_over).remove(address);
            return Err(gone.into());
        }
        Ok(GivenAway::Suspended)
    }

    /// The device at `address` was taken out of the guest: nobody has it suspended.
    pub fn device_gone(&self, address: &str) {
        lock(&self.handed_over).remove(address);
    }

    /// Has the guest's driver of the PCI device at `address` resume it, which is here again. A
    /// device that the guest's kernel does not know yet is found by it; its interface gets the
    /// Ethernet address `mac` then.
    ///
    /// # Errors
    /// It cannot, and the device does nothing for this guest.
    pub fn take_over(
        &self,
        address: &str,
        mac: &str,
        asker: &dyn Asker,
    ) -> anyhow::Result<TakenOver> {
        let _alone = self.soon_alone()?;
        asker.tell("having the driver resume its device")?;
        let guest = self.guest();
        let mut agent = guest.agent();
        agent.set_limit(AGENT_TIME);
        let Some(Some(driver)) = look(&mut agent, address)? else {
            lock(&self.handed_over).remove(address);
            let ran = agent.run(&["sh", "-c", FIND, "sh", address, mac])?;
            ensure!(ran.success, "the guest does not find {address}");
            return Ok(TakenOver::Found);
        };
        let suspended = lock(&self.handed_over).get(address) == Some(&driver);
        let (calls, how) = match suspended {
            true => (DriverCalls::Resume, TakenOver::Resumed),
            false => (DriverCalls::SuspendAndResume, TakenOver::Anew),
        };
        self.device_begins_anew(&driver.module);
        call(guest, &mut agent, calls, &driver.module, &folder(address))?;
        lock(&self.handed_over).remove(address);
        Ok(how)
    }

    /// Waits a little until nobody else changes a driver.
    fn soon_alone(&self) -> anyhow::Result<Taken<'_>> {
        let deadline = self.guest().now() + BUSY_TIME;
        loop {
            if let Some(alone) = self.turn.try_take() {
                return Ok(alone);
            }
            if self.guest().now() >= deadline {
                bail!("another change of a driver is under way in the guest");
            }
            self.guest().wait(POLL);
        }
    }

    /// That no device of `module` is somebody else's just now.
    pub(crate) fn has_its_devices(&self, module: &str) -> anyhow::Result<()> {
        let away = lock(&self.handed_over);
        let mut away = away.iter().filter(|(_, one)| one.module == module);
        match away.next() {
            None => Ok(()),
            Some((address, _)) => bail!(
                "{address}, a device of {module}, is another guest's just now: it is resumed in its turn"
            ),
        }
    }
}

fn folder(address: &str) -> String {
    format!("/sys/bus/pci/devices/{address}")
}

fn look(agent: &mut impl Agent, address: &str) -> anyhow::Result<Seen> {
    let said = agent.run(&["sh", "-c", LOOK, "sh", address])?.stdout;
    let mut lines = said.lines();
    if lines.next() != Some("there") {
        return Ok(None);
    }
    let Some(line) = lines.next() else {
        return Ok(Some(None));
    };
    ensure!(
        line != "built-in",
        "the driver of {address} is no module of the guest: its functions cannot be called"
    );
    let words: Vec<_> = line.split(' ').collect();
    let ["module", module, instance] = words[..] else {
        bail!("the guest says of {address}: {line}");
    };
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    ensure!(
        !module.is_empty() && module.len() <= MAX_NAME && module.bytes().all(is_name),
        "the guest says that {module} drives {address}"
    );
    let driver = HandedOver {
        module: module.to_owned(),
        instance: instance.to_owned(),
    };
    Ok(Some(Some(driver)))
}

#[cfg(test)]
#[path = "by_turns_tests.rs"]
mod tests;
