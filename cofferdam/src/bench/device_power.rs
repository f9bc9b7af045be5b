//! One driver's device suspended and resumed, against what the guest's own kernel takes for that
//! and against removing and inserting the driver.
//!
//! ```text
//!   suspend-device, resume-device ─► driver removed, inserted ─► the kernel suspends and resumes all devices
//! ```
//!
//! The kernel's times are its own (`/sys/power/pm_print_times`), of its suspend to idle that turns
//! back when all devices are suspended (`/sys/power/pm_test`): the driver and its bus, without the
//! change of the power state, which comes later. That ends the agent's channel, a device like
//! others; so it comes last, and the guest says what it has seen on its console.

use std::time::{Duration, Instant};

use agent_protocol::message::{RestartDriver, StepName};
use anyhow::{Context, bail, ensure};
use recovery::resume_device::DevicePhases;

use super::guest::{BOOT_TIME, Guest};
use super::network::{self, ADDRESS, DRIVER, GATEWAY, INTERFACE, LINK_TIME};
use crate::control::protocol::{Reply, Request};
use crate::report::suspend::SuspendMethod;

/// What the guest writes when it has said all.
const LAST_WORD: &str = "cofferdam: that was all of them";

/// Most turns: the kernel's log has to hold what it says of all devices in each.
const MAX_TURNS: usize = 20;

/// Between two looks at the guest's console.
const POLL: Duration = Duration::from_millis(20);

/// Samples of each way, in microseconds. The agent of `guest` does not answer any more afterwards.
///
/// # Errors
/// The guest does not do it.
pub fn measure(guest: &mut Guest, runs: usize) -> anyhow::Result<Vec<(SuspendMethod, Vec<f64>)>> {
    let (mut suspends, mut resumes, mut restarts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        // The VM asks the agent itself, which listens to one client at a time.
        guest.agent().disconnect();
        let module = || DRIVER.to_owned();
        let mut control = guest.control()?;
        match control.ask(&Request::SuspendDevice { module: module() })? {
            Reply::DeviceSuspended(phases) => suspends.push(whole_us(&phases)),
            other => bail!("the VM answered something else: {other:?}"),
        }
        match control.ask(&Request::ResumeDevice { module: module() })? {
            Reply::DeviceResumed(phases) => resumes.push(whole_us(&phases)),
            other => bail!("the VM answered something else: {other:?}"),
        }
        network::wait_for_link(guest, LINK_TIME)?;
        restarts.push(restart_us(guest)?);
        network::wait_for_link(guest, LINK_TIME)?;
    }
    let (kernel_suspends, kernel_resumes) = by_the_kernel(guest, runs)?;
    Ok(vec![
        (SuspendMethod::DeviceSuspend, suspends),
        (SuspendMethod::DeviceResume, resumes),
        (SuspendMethod::KernelSuspend, kernel_suspends),
        (SuspendMethod::KernelResume, kernel_resumes),
        (SuspendMethod::DriverRestart, restarts),
    ])
}

fn whole_us(phases: &DevicePhases) -> f64 {
    let others = phases.state_us.unwrap_or(0) + phases.power_us.unwrap_or(0);
    (phases.driver_us + others) as f64
}

/// Removes and inserts the driver and brings its interface up, without the wait for its link: until
/// then, by the guest's clock.
fn restart_us(guest: &mut Guest) -> anyhow::Result<f64> {
    let (steps, _) = guest.agent().restart_driver(RestartDriver {
        module: DRIVER.to_owned(),
        params: String::new(),
        interface: INTERFACE.to_owned(),
        address: ADDRESS,
        gateway: Some(GATEWAY),
        wait_carrier: false,
        limit_ms: u64::try_from(LINK_TIME.as_millis())?,
    })?;
    let find = |name: StepName| {
        let step = steps.iter().find(|step| step.step == name);
        step.with_context(|| format!("the agent did not report the step {name:?}"))
    };
    let begin = find(StepName::Remove)?.begin.mono_ns;
    let end = find(StepName::Up)?.end.mono_ns;
    Ok(end.saturating_sub(begin) as f64 / 1e3)
}

/// The kernel's suspends and resumes of the driver's device.
fn by_the_kernel(guest: &mut Guest, runs: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let turns = runs.min(MAX_TURNS);
    let from = guest.console_bytes();
    // In a session of its own: the agent ends programs whose client goes.
    let script = format!(
        "cd /sys/power && echo 1 > pm_print_times && echo devices > pm_test && \
         echo 0 > /sys/module/suspend/parameters/pm_test_delay && \
         setsid sh -c 'for turn in $(seq {turns}); do echo freeze > state; done; \
         dmesg | grep \" {DRIVER} .*pci_pm_\" > /dev/ttyS0; echo \"{LAST_WORD}\" > /dev/ttyS0' \
         < /dev/null > /dev/null 2>&1 &"
    );
    guest.shell(&script)?;
    guest.agent().disconnect();
    let deadline = Instant::now() + BOOT_TIME;
    let said = loop {
        let said = guest.console_from(from);
        if said.contains(LAST_WORD) {
            break said;
        }
        ensure!(
            Instant::now() < deadline,
            "the guest's kernel does not suspend its devices and resume them{}",
            guest.last_words()
        );
        std::thread::sleep(POLL);
    };
    let found = (
        times(&said, "pci_pm_suspend"),
        times(&said, "pci_pm_resume"),
    );
    ensure!(
        found.0.len() == turns && found.1.len() == turns,
        "the guest's kernel does not say how long it took: {said}"
    );
    Ok(found)
}

/// What the kernel says of `function`: `pci_pm_suspend+0x0/0x170 returned 0 after 124334 usecs`.
fn times(log: &str, function: &str) -> Vec<f64> {
    let lines = log.lines().filter(|line| line.contains(function));
    let taken = lines.filter_map(|line| {
        let (_, after) = line.split_once(" returned 0 after ")?;
        after.split_whitespace().next()?.parse().ok()
    });
    taken.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_times_are_read_from_what_it_says() {
        let log = "\
[    4.096261] e1000 0000:00:02.0: PM: calling pci_pm_suspend+0x0/0x170 @ 100, parent: pci0000:00\r
[    4.220625] e1000 0000:00:02.0: PM: pci_pm_suspend+0x0/0x170 returned 0 after 124334 usecs\r
[    4.361784] e1000 0000:00:02.0: PM: pci_pm_resume+0x0/0xe0 returned 0 after 106051 usecs\r
[    5.361784] e1000 0000:00:02.0: PM: pci_pm_resume+0x0/0xe0 returned -5 after 7 usecs\r
";
        assert_eq!(times(log, "pci_pm_suspend"), [124_334.0]);
        assert_eq!(times(log, "pci_pm_resume"), [106_051.0]);
    }
}
