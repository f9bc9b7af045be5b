//! The interfaces of a driver in the guest: their configuration, read before the driver goes and
//! put back when it has come again.
//!
//! The guest's agent runs `ip` and `ethtool` for that, and what they print is not trusted
//! ([`InterfaceConfig`]).

use std::time::Duration;

use anyhow::ensure;

use super::config::{InterfaceConfig, Printed};
use crate::guest::{Agent, LiveGuest, POLL};

/// Interfaces of one driver whose configuration is put back.
const MAX_INTERFACES: usize = 8;

/// Prints the names of the interfaces of the driver module `$1`.
const LIST: &str = "for i in /sys/class/net/*; do \
    m=$(readlink $i/device/driver/module) && [ ${m##*/} = \"$1\" ] && echo ${i##*/}; done; true";

/// The configuration of all interfaces of `module`.
pub(crate) fn read(agent: &mut impl Agent, module: &str) -> anyhow::Result<Vec<InterfaceConfig>> {
    let list = agent.run(&["sh", "-c", LIST, "sh", module])?;
    let names = list.stdout;
    let names = names.split_whitespace().take(MAX_INTERFACES);
    names.map(|name| read_one(agent, name)).collect()
}

fn read_one(agent: &mut impl Agent, name: &str) -> anyhow::Result<InterfaceConfig> {
    let mut printed = |argv: &[&str]| agent.run(argv).map(|ran| ran.stdout);
    let printed = Printed {
        addresses: printed(&["ip", "-j", "-d", "addr", "show"])?,
        routes: printed(&["ip", "-j", "route", "show", "dev", name])?,
        // These fail where the driver has no such thing, and print nothing then.
        rings: printed(&["ethtool", "-g", name])?,
        features: printed(&["ethtool", "-k", name])?,
    };
    Ok(InterfaceConfig::parse(name, &printed)?)
}

/// Waits until `deadline` on the guest's clock for the interfaces and gives them what they lack of
/// their configuration; returns what they lack nevertheless.
pub(crate) fn put_back<G: LiveGuest>(
    guest: &G,
    agent: &mut G::Agent,
    configs: &[InterfaceConfig],
    deadline: Duration,
) -> anyhow::Result<Vec<String>> {
    let mut lost = Vec::new();
    for config in configs {
        let name = config.name.as_str();
        let path = format!("/sys/class/net/{name}");
        while !agent.run(&["test", "-e", &path])?.success {
            ensure!(guest.now() < deadline, "{name} does not come back");
            guest.wait(POLL);
        }
        let fresh = read_one(agent, name)?;
        for (argv, must) in config.replay(&fresh) {
            let words: Vec<&str> = argv.iter().map(String::as_str).collect();
            let result = agent.run(&words)?;
            ensure!(
                result.success || !must,
                "the configuration of {name} cannot be put back: `{}`: {}",
                argv.join(" "),
                result.stderr.trim()
            );
        }
        let now = read_one(agent, name)?;
        lost.extend(
            config
                .lost(&now)
                .iter()
                .map(|lost| format!("{name}: {lost}")),
        );
    }
    Ok(lost)
}

/// Those of the interfaces that have a link.
pub(crate) fn linked(
    agent: &mut impl Agent,
    configs: &[InterfaceConfig],
) -> anyhow::Result<Vec<String>> {
    let all = agent.interfaces()?;
    let ours = all
        .into_iter()
        .filter(|one| configs.iter().any(|config| config.name == one.name));
    let linked = ours.filter(|one| one.carrier == Some(true));
    Ok(linked.map(|one| one.name).collect())
}

/// Waits until all of `names` have a link.
pub(crate) fn wait_for_link<G: LiveGuest>(
    guest: &G,
    agent: &mut G::Agent,
    configs: &[InterfaceConfig],
    names: &[String],
    deadline: Duration,
) -> anyhow::Result<()> {
    loop {
        let linked = linked(agent, configs)?;
        let Some(without) = names.iter().find(|name| !linked.contains(name)) else {
            return Ok(());
        };
        ensure!(guest.now() < deadline, "{without} has no link any more");
        guest.wait(POLL);
    }
}
