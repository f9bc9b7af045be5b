//! A driver's own suspend and resume functions, called in the live guest: its device begins anew,
//! or rests until it is wanted again; the driver stays.
//!
//! ```text
//!   suspend:  driver's suspend function ─► state of the device taken ─► D3hot
//!   resume:   D0 ─► state put back ─► driver's resume function
//! ```

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;
use isolation::suspend_resume::{ATTRIBUTE, DriverCalls};
use serde::{Deserialize, Serialize};

use crate::asker::Asker;
use crate::guest::{Agent, LiveGuest};
use crate::lock::lock;
use crate::resting::Resting;
use crate::supervisor::Supervisor;

/// Devices of one driver.
const MAX_DEVICES: usize = 8;

/// Prints which instance of the driver module `$1` is loaded, which changes whenever it is
/// inserted, and the folders in sysfs of its PCI devices.
const LIST: &str = "stat -c 'instance %i' /sys/module/$1; for d in /sys/bus/pci/devices/*; do \
    m=$(readlink $d/driver/module) && [ ${m##*/} = \"$1\" ] && echo $d; done; true";

/// How long the parts of a suspend or of a resume took, one after the other, in microseconds of the
/// host's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePhases {
    /// The driver's own function, for all of its devices.
    pub driver_us: u64,
    /// Taking the devices' state, or putting it back; absent if they do not give it away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_us: Option<u64>,
    /// Changing their power state; absent if they have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_us: Option<u64>,
}

/// What came of a resume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resumed {
    /// The devices were suspended and work again.
    FromRest(DevicePhases),
    /// They were not: each was suspended and resumed, which took so long.
    Anew(Vec<Duration>),
}

/// A driver module in the guest, and the folders in sysfs of its devices.
struct Driver {
    instance: String,
    folders: Vec<String>,
}

impl Driver {
    fn look(agent: &mut impl Agent, module: &str) -> anyhow::Result<Self> {
        let list = agent.run(&["sh", "-c", LIST, "sh", module])?.stdout;
        let (mut instance, mut folders) = (String::new(), Vec::new());
        for line in list.lines() {
            match line.strip_prefix("instance ") {
                Some(number) => instance = number.to_owned(),
                None if folders.len() < MAX_DEVICES => folders.push(line.to_owned()),
                None => {}
            }
        }
        ensure!(
            !folders.is_empty(),
            "{module} is not loaded in the guest, or drives no PCI device"
        );
        let is_device = |address: &str| {
            let mut bytes = address.bytes();
            bytes.all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte))
        };
        for folder in &folders {
            let address = folder.strip_prefix("/sys/bus/pci/devices/");
            ensure!(
                address.is_some_and(is_device),
                "the guest lists {folder} as a device"
            );
        }
        Ok(Self { instance, folders })
    }
}

impl<G: LiveGuest> Supervisor<G> {
    /// Has a driver suspend its devices, and leaves them so, in a sleep state if they have any.
    ///
    /// # Errors
    /// They are suspended already, or cannot be: they work then.
    pub fn suspend_device(&self, module: &str, asker: &dyn Asker) -> anyhow::Result<DevicePhases> {
        suspend(self, module, asker)
    }

    /// Brings back a driver's devices that were suspended; has it suspend and resume those that
    /// were not.
    ///
    /// # Errors
    /// Its functions cannot be called, or failed; or the driver was removed since.
    pub fn resume_device(&self, module: &str, asker: &dyn Asker) -> anyhow::Result<Resumed> {
        let _alone = self.change_driver_for(asker)?;
        asker.tell("having the driver resume its devices")?;
        resume(self, module)
    }
}

/// Calls functions of the driver `module` for the device with this folder; how long they took.
pub(crate) fn call<G: LiveGuest>(
    guest: &G,
    agent: &mut G::Agent,
    calls: DriverCalls,
    module: &str,
    folder: &str,
) -> anyhow::Result<Duration> {
    // Nobody else writes that.
    let word = format!("cofferdam-{:x}", monotonic_ns());
    guest.begin_suspend_resume(agent, calls, module, word.as_bytes())?;
    let written = agent.write_file(&format!("{folder}/{ATTRIBUTE}"), word.as_bytes(), 0o644);
    let ended = guest.end_suspend_resume();
    let took = ended.with_context(|| match calls {
        DriverCalls::Suspend => "the device cannot be suspended",
        _ => "the device cannot be resumed",
    })?;
    if let Err(error) = written {
        // What was wanted is done, whatever the agent said of it.
        tracing::debug!(%error, folder, "of the write that had the functions called");
    }
    Ok(took)
}

/// Has `module` suspend its devices, takes their state and changes their power state. An error
/// means that they work.
fn suspend<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
    asker: &dyn Asker,
) -> anyhow::Result<DevicePhases> {
    let _alone = supervisor.change_driver_for(asker)?;
    let guest = supervisor.guest();
    let mut agent = guest.agent();
    supervisor.has_its_devices(module)?;
    let driver = Driver::look(&mut agent, module)?;
    if let Some(resting) = lock(&supervisor.resting).get(module) {
        ensure!(
            resting.instance != driver.instance,
            "the devices of {module} are suspended already: `cofferdam resume-device` brings them back"
        );
    }
    asker.tell("having the driver suspend its devices")?;
    let mut phases = DevicePhases::default();
    for (index, folder) in driver.folders.iter().enumerate() {
        match call(guest, &mut agent, DriverCalls::Suspend, module, folder) {
            Ok(took) => phases.driver_us += micros(took),
            Err(error) => {
                for folder in driver.folders[..index].iter().rev() {
                    let back = call(guest, &mut agent, DriverCalls::Resume, module, folder);
                    back.with_context(|| format!("{error:#}; one that was suspended before"))?;
                }
                return Err(error);
            }
        }
    }
    let begin = guest.now();
    let state = guest.save_device(module);
    let taken = guest.now();
    phases.state_us = state.is_some().then(|| micros(taken.saturating_sub(begin)));
    let asleep = guest.set_power(module, false);
    phases.power_us = asleep.then(|| micros(guest.now().saturating_sub(taken)));
    let Driver { instance, folders } = driver;
    let resting = Resting {
        instance,
        folders,
        state,
        asleep,
    };
    lock(&supervisor.resting).insert(module.to_owned(), resting);
    Ok(phases)
}

/// Brings the devices of `module` back, or has it suspend and resume them if they do not rest.
/// Nobody else may change the driver meanwhile.
pub(crate) fn resume<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
) -> anyhow::Result<Resumed> {
    supervisor.has_its_devices(module)?;
    let guest = supervisor.guest();
    let mut agent = guest.agent();
    let found = lock(&supervisor.resting).get(module).cloned();
    let driver = Driver::look(&mut agent, module);
    supervisor.device_begins_anew(module);
    let Some(resting) = found else {
        let call = |folder: &String| {
            let both = DriverCalls::SuspendAndResume;
            call(guest, &mut agent, both, module, folder)
        };
        let times: anyhow::Result<_> = driver?.folders.iter().map(call).collect();
        return Ok(Resumed::Anew(times?));
    };
    if driver
        .as_ref()
        .map_or(true, |now| now.instance != resting.instance)
    {
        lock(&supervisor.resting).remove(module);
        bail!(
            "{module} was removed since its devices were suspended: they are not suspended any more, and there is \
             nothing to resume"
        );
    }
    let mut phases = DevicePhases::default();
    let begin = guest.now();
    if resting.asleep {
        guest.set_power(module, true);
        phases.power_us = Some(micros(guest.now().saturating_sub(begin)));
    }
    let awake = guest.now();
    if let Some(state) = resting.state {
        guest
            .restore_device(module, state)
            .context("the state of the devices cannot be put back")?;
        phases.state_us = Some(micros(guest.now().saturating_sub(awake)));
    }
    for folder in &resting.folders {
        let took = call(guest, &mut agent, DriverCalls::Resume, module, folder)?;
        phases.driver_us += micros(took);
    }
    lock(&supervisor.resting).remove(module);
    Ok(Resumed::FromRest(phases))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "resume_device_tests.rs"]
mod tests;
