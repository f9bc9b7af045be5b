//! A driver's own suspend and resume functions, called in the live guest: its device begins anew, the driver stays.

use std::time::Duration;

use anyhow::{Context, ensure};
use devices::clock::monotonic_ns;
use isolation::suspend_resume::ATTRIBUTE;

use crate::guest::{Agent, LiveGuest};

/// Devices of one driver.
const MAX_DEVICES: usize = 8;

/// Prints the folders in sysfs of the PCI devices of the driver module `$1`.
const LIST: &str = "for d in /sys/bus/pci/devices/*; do \
    m=$(readlink $d/driver/module) && [ ${m##*/} = \"$1\" ] && echo $d; done; true";

/// Has `module` suspend and resume each of its PCI devices, and returns how long each took.
pub(crate) fn suspend_and_resume<G: LiveGuest>(
    guest: &G,
    module: &str,
) -> anyhow::Result<Vec<Duration>> {
    let mut agent = guest.agent();
    let list = agent.run(&["sh", "-c", LIST, "sh", module])?.stdout;
    let folders: Vec<&str> = list.split_whitespace().take(MAX_DEVICES).collect();
    ensure!(
        !folders.is_empty(),
        "{module} is not loaded in the guest, or drives no PCI device"
    );
    let mut times = Vec::new();
    for folder in &folders {
        let is_device = |address: &str| {
            address
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte))
        };
        let address = folder.strip_prefix("/sys/bus/pci/devices/");
        ensure!(
            address.is_some_and(is_device),
            "the guest lists {folder} as a device"
        );
        // Nobody else writes that.
        let word = format!("cofferdam-{:x}", monotonic_ns());
        guest.begin_suspend_resume(&mut agent, module, word.as_bytes())?;
        let written = agent.write_file(&format!("{folder}/{ATTRIBUTE}"), word.as_bytes(), 0o644);
        let ended = guest.end_suspend_resume();
        times.push(ended.context("the device cannot be resumed")?);
        written.context("the guest's agent cannot write to the device's folder")?;
    }
    Ok(times)
}
