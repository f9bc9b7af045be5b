//! A driver's own suspend and resume functions, called in the live guest: its device begins anew, the driver stays.

use std::time::Duration;

use anyhow::{Context, ensure};
use devices::clock::monotonic_ns;
use isolation::suspend_resume::ATTRIBUTE;

use super::isolation::Isolation;

/// Devices of one driver.
const MAX_DEVICES: usize = 8;

/// Prints the folders in sysfs of the PCI devices of the driver module `$1`.
const LIST: &str = "for d in /sys/bus/pci/devices/*; do \
    m=$(readlink $d/driver/module) && [ ${m##*/} = \"$1\" ] && echo $d; done; true";

/// Has `module` suspend and resume each of its PCI devices, and returns how long each took.
pub fn suspend_and_resume(isolation: &Isolation, module: &str) -> anyhow::Result<Vec<Duration>> {
    let mut agent = isolation.agent();
    let loaded = agent.modules(None)?;
    let own = loaded.iter().find(|one| one.name == module);
    let own = own.with_context(|| format!("the guest has no module {module} loaded"))?;
    let sections = own.sections.clone();
    let (symbols, types) = isolation.knowledge(&mut agent, module, loaded)?;
    let types = types.context("the guest does not tell its types")?;
    let list = agent.run(&["sh", "-c", LIST, "sh", module])?.stdout_text();
    let folders: Vec<&str> = list.split_whitespace().take(MAX_DEVICES).collect();
    ensure!(!folders.is_empty(), "{module} drives no PCI device");
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
        isolation.isolator().begin_suspend_resume(
            module,
            &sections,
            &symbols,
            &types,
            word.as_bytes(),
        )?;
        let written = agent.write_file(&format!("{folder}/{ATTRIBUTE}"), word.as_bytes(), 0o644);
        let ended = isolation.isolator().end_suspend_resume();
        times.push(ended.context("the device cannot be resumed")?);
        written.context("the guest's agent cannot write to the device's folder")?;
    }
    Ok(times)
}
