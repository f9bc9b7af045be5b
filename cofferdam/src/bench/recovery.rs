//! How long a guest's network is gone: by rollback of a failed call of its driver, by restart of
//! the driver, and by reboot of the guest.
//!
//! ```text
//! restart    start         returned            link_up      first_tx       first_rx
//!            │ remove insert │ address, up       │ carrier    │ a frame      │ a ping answered
//!            └─ agent ───────┴───────────────────┴────────────┴─ gateway ────┴─►
//! reboot     │ reset ─ kernel ─ driver, address, up ─ carrier, a frame, a ping answered; agent
//! rollback   see [`super::rollback`]
//! ```
//!
//! The gateway pings the guest all the time; its stamps are the host's. The agent's stamps are the
//! guest's and are put into the host's terms by [`GuestClock`].

use std::time::Duration;

use agent_protocol::message::{RestartDriver, StepName};
use anyhow::Context;
use devices::clock::monotonic_ns;

use super::clock::GuestClock;
use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::network::{self, ADDRESS, DRIVER, GATEWAY, INTERFACE, LINK_TIME, Probe};
use super::rollback;
use crate::control::protocol::Request;
use crate::report::{Guest as GuestFacts, Method, Phase, Recovery, RecoveryRun};

/// Between two pings: the resolution of `first_rx`.
const PING_INTERVAL: Duration = Duration::from_millis(5);

/// How long a driver may take for one step.
const STEP_TIME: Duration = Duration::from_secs(60);

/// What to measure.
#[derive(Debug, Clone)]
pub struct RecoveryOptions {
    /// The guest; without a network, which is added.
    pub guest: GuestOptions,
    /// Ways of recovery, in this order and in one guest.
    pub methods: Vec<Method>,
    /// Recoveries of each baseline.
    pub runs: usize,
    /// Entry points whose calls are rolled back.
    pub entries: Vec<String>,
    /// Entry points whose calls go on in the guest before they are rolled back.
    pub spilling: Vec<String>,
    /// Rollbacks of each entry point.
    pub rollbacks: usize,
}

/// What was measured; of a measurement that failed, what there was before.
#[derive(Debug, Default)]
pub struct Measured {
    /// By way of recovery, entry point and fault.
    pub recoveries: Vec<Recovery>,
    /// The guest, if it booted.
    pub guest: Option<GuestFacts>,
}

/// Measures, telling `progress` what is done. What was measured is in `measured` even after an
/// error.
pub fn measure(
    options: &RecoveryOptions,
    measured: &mut Measured,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    // The guest sets its network up by itself at each boot.
    let boot = format!("--append cofferdam.net={DRIVER},{ADDRESS},{GATEWAY}");
    let guest_options = options
        .guest
        .clone()
        .with("--net user --nic e1000")
        .with(&boot);
    progress("booting a guest");
    let mut guest = Guest::boot(&guest_options, BOOT_TIME)?;
    measured.guest = Some(guest_facts(&mut guest)?);
    let mut probe = Probe::start(&guest, PING_INTERVAL)?;
    for &method in &options.methods {
        let name = method.name();
        let recover = match method {
            Method::Restart => restart,
            Method::Reboot => reboot,
            Method::Rollback => {
                probe
                    .wait_for_reply(monotonic_ns(), LINK_TIME)
                    .context("the network did not work before the first fault")?;
                for (entries, spilled) in [(&options.entries, false), (&options.spilling, true)] {
                    let rollbacks = rollback::measure(
                        &mut guest,
                        &mut probe,
                        entries,
                        spilled,
                        options.rollbacks,
                        progress,
                        &mut measured.recoveries,
                    );
                    rollbacks?;
                }
                continue;
            }
        };
        let mut runs = Vec::new();
        for number in 1..=options.runs {
            probe
                .wait_for_reply(monotonic_ns(), LINK_TIME)
                .context("the network did not work before the recovery")?;
            let run =
                recover(&mut guest, &mut probe).with_context(|| format!("{name}, run {number}"))?;
            let total = run.total_us().unwrap_or_default() / 1e6;
            progress(&format!(
                "{name} {number} of {}: {total:.3} s",
                options.runs
            ));
            runs.push(run);
        }
        let baseline = Recovery::from_runs(DRIVER, method, runs);
        measured.recoveries.extend(baseline);
    }
    Ok(())
}

/// Removes and inserts the driver and brings its interface up.
fn restart(guest: &mut Guest, probe: &mut Probe) -> anyhow::Result<RecoveryRun> {
    let clock = GuestClock::measure(guest.agent()).context("the guest's clock")?;
    let (steps, _) = guest
        .agent()
        .restart_driver(RestartDriver {
            module: DRIVER.to_owned(),
            params: String::new(),
            interface: INTERFACE.to_owned(),
            address: ADDRESS,
            gateway: Some(GATEWAY),
            wait_carrier: true,
            limit_ms: u64::try_from(STEP_TIME.as_millis())?,
        })
        .context("the driver could not be restarted")?;
    let find = |name: StepName| {
        steps
            .iter()
            .find(|step| step.step == name)
            .with_context(|| format!("the agent did not report the step {name:?}"))
    };
    let remove = find(StepName::Remove)?;
    let start_ns = clock.host_ns(remove.begin.mono_ns);
    let gone_ns = clock.host_ns(remove.end.mono_ns);
    let (reply_ns, reading) = probe.wait_for_reply(gone_ns, LINK_TIME)?;
    let mut run = RecoveryRun::default();
    let mut ended = |phase: Phase, at_ns: u64| {
        run.at_us.insert(phase, microseconds(start_ns, at_ns));
    };
    ended(
        Phase::Returned,
        clock.host_ns(find(StepName::Up)?.end.mono_ns),
    );
    ended(
        Phase::LinkUp,
        clock.host_ns(find(StepName::Carrier)?.end.mono_ns),
    );
    if let Some(frame_ns) = reading.first_frame_ns {
        ended(Phase::FirstTx, frame_ns);
    }
    ended(Phase::FirstRx, reply_ns);
    for step in &steps {
        let name = serde_json::to_value(step.step)?;
        if let Some(name) = name.as_str() {
            let took = microseconds(step.begin.mono_ns, step.end.mono_ns);
            run.steps_us.insert(name.to_owned(), took);
        }
    }
    Ok(run)
}

/// Resets the guest and waits until its network is back.
fn reboot(guest: &mut Guest, probe: &mut Probe) -> anyhow::Result<RecoveryRun> {
    let mut control = guest.control()?;
    let start_ns = monotonic_ns();
    control.tell(&Request::Reset {})?;
    let reset_ns = monotonic_ns();
    guest
        .agent()
        .hello(BOOT_TIME)
        .context("the guest did not come back")?;
    let returned_ns = monotonic_ns();
    let linked = network::wait_for_link(guest, LINK_TIME)?;
    let clock = GuestClock::measure(guest.agent()).context("the guest's clock")?;
    let (reply_ns, reading) = probe.wait_for_reply(reset_ns, LINK_TIME)?;
    let mut run = RecoveryRun::default();
    let mut ended = |phase: Phase, at_ns: u64| {
        run.at_us.insert(phase, microseconds(start_ns, at_ns));
    };
    ended(Phase::Returned, returned_ns);
    ended(Phase::LinkUp, clock.host_ns(linked));
    if let Some(frame_ns) = reading.first_frame_ns {
        ended(Phase::FirstTx, frame_ns);
    }
    ended(Phase::FirstRx, reply_ns);
    Ok(run)
}

/// Time between two moments of one clock, in microseconds; none is before the other by more than
/// the clocks are off.
fn microseconds(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e3
}
