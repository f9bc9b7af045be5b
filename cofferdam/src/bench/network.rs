//! The guest's network as the measurements set it up: interface `eth0` on the user-mode gateway.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use agent_protocol::message::{Exec, Ipv4};
use anyhow::{Context, bail, ensure};

use super::guest::Guest;
use crate::control::protocol::{ProbeReading, Reply, Request};

/// The driver under test, which is the stock one of the guest's kernel.
pub const DRIVER: &str = "e1000";

/// The guest's interface.
pub const INTERFACE: &str = "eth0";

/// The guest's address on the gateway's network.
pub const ADDRESS: Ipv4 = Ipv4 {
    address: Ipv4Addr::new(10, 0, 2, 15),
    prefix: 24,
};

/// The gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// How long a driver's link may take to come up, in the slowest place we measure in.
pub const LINK_TIME: Duration = Duration::from_secs(60);

/// How long a driver may take to probe a NIC in another process.
const PROBE_TIME: Duration = Duration::from_secs(600);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(2);

/// Inserts the driver of a NIC that lives in another process: each access to a register is a
/// message there and one back, and a driver's probe makes thousands.
pub fn insert_slowly(guest: &mut Guest, driver: &str) -> anyhow::Result<()> {
    let result = guest
        .agent()
        .exec(Exec {
            argv: vec!["modprobe".to_owned(), driver.to_owned()],
            limit_ms: Some(u64::try_from(PROBE_TIME.as_millis())?),
            ..Exec::default()
        })
        .with_context(|| format!("cannot insert {driver}"))?;
    ensure!(
        result.success(),
        "cannot insert {driver} ({:?}): {}",
        result.end,
        String::from_utf8_lossy(&result.stderr).trim()
    );
    Ok(())
}

/// Inserts the driver and gives its interface address and route.
pub fn bring_up(guest: &mut Guest, driver: &str) -> anyhow::Result<()> {
    let agent = guest.agent();
    agent
        .load_module(driver, "")
        .with_context(|| format!("cannot insert {driver}"))?;
    configure(guest)
}

/// Gives the interface its address and route.
pub fn configure(guest: &mut Guest) -> anyhow::Result<()> {
    let agent = guest.agent();
    agent
        .set_link(INTERFACE, true)
        .with_context(|| format!("cannot bring {INTERFACE} up"))?;
    agent
        .set_address(INTERFACE, ADDRESS, Some(GATEWAY))
        .with_context(|| format!("cannot give {INTERFACE} its address"))?;
    Ok(())
}

/// Waits until the driver reports its link, and returns when that was first seen, in nanoseconds of
/// the guest's monotonic clock.
pub fn wait_for_link(guest: &mut Guest, limit: Duration) -> anyhow::Result<u64> {
    let deadline = Instant::now() + limit;
    loop {
        let carrier = read_carrier(guest)?;
        if let Some(at) = carrier {
            return Ok(at);
        }
        if Instant::now() >= deadline {
            bail!("{INTERFACE} has no link after {limit:?}");
        }
        std::thread::sleep(POLL);
    }
}

/// When the link was seen, if it is there.
fn read_carrier(guest: &mut Guest) -> anyhow::Result<Option<u64>> {
    use agent_protocol::message::Done;
    let agent = guest.agent();
    let answer = agent
        .call(
            agent_protocol::message::Call::Interfaces,
            LINK_TIME,
            &mut |_| Ok(()),
        )
        .context("the agent does not tell the interfaces")?;
    let Done::Interfaces(interfaces) = answer.done else {
        bail!("the agent answered something else than the interfaces");
    };
    let linked = interfaces
        .iter()
        .any(|i| i.name == INTERFACE && i.carrier == Some(true));
    Ok(linked.then_some(answer.sent.mono_ns))
}

/// Has the gateway ping the guest until it is dropped.
pub struct Probe {
    control: crate::control::client::ControlClient,
}

impl Probe {
    /// Starts to ping every `interval`.
    pub fn start(guest: &Guest, interval: Duration) -> anyhow::Result<Self> {
        let mut control = guest.control()?;
        let interval_us = u64::try_from(interval.as_micros())?;
        control.tell(&Request::ProbeStart { interval_us })?;
        Ok(Self { control })
    }

    /// What was seen since `since_ns`.
    pub fn read(&mut self, since_ns: u64) -> anyhow::Result<ProbeReading> {
        match self.control.ask(&Request::ProbeRead { since_ns })? {
            Reply::Probe(reading) => Ok(reading),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }

    /// Waits until the guest answers a ping at `since_ns` or later.
    pub fn wait_for_reply(
        &mut self,
        since_ns: u64,
        limit: Duration,
    ) -> anyhow::Result<(u64, ProbeReading)> {
        let deadline = Instant::now() + limit;
        loop {
            let reading = self.read(since_ns)?;
            if let Some(at_ns) = reading.first_reply_ns {
                return Ok((at_ns, reading));
            }
            if Instant::now() >= deadline {
                bail!("the guest did not answer a ping within {limit:?}");
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // The VM may be gone, and the probe with it.
        let _ = self.control.tell(&Request::ProbeStop {});
    }
}
