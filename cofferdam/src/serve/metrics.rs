//! Counters of all guests and devices for Prometheus.
//!
//! They are read from the processes each time: a restart of the service loses none.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::app::App;
use super::events::guest_state;
use super::look::Look;
use super::problem::{Code, Problem};

/// The format that is spoken (OpenMetrics 1.0).
const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Gauges<L> = Family<L, Gauge<u64, AtomicU64>>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfGuest {
    guest: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfExit {
    guest: String,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfEntry {
    guest: String,
    module: String,
    entry: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRung {
    guest: String,
    module: String,
    rung: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMemory {
    guest: String,
    of: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDevice {
    device: String,
    outcome: &'static str,
}

/// Show the counters of all guests and devices, as Prometheus reads them.
#[utoipa::path(get, path = "/metrics", tag = "service",
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let look = app.look().await?;
    let text = text(&look, own_rss_bytes())
        .map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    Ok(([(CONTENT_TYPE, CONTENT)], text).into_response())
}

/// Resident memory of this process (proc_pid_status(5)); 0 if the host does not say.
fn own_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse().ok()).unwrap_or(0_u64) * 1024
}

fn text(look: &Look, own_rss: u64) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("cofferdam");
    let states = Gauges::<OfState>::default();
    registry.register("guests", "Guests that run, by state", states.clone());
    let uptime = Gauges::<OfGuest>::default();
    let help = "Time since the guest's process began";
    registry.register_with_unit("guest_uptime", help, Unit::Seconds, uptime.clone());
    let resets = Family::<OfGuest, Counter>::default();
    registry.register("guest_resets", "Resets of the guest", resets.clone());
    let memory = Gauges::<OfMemory>::default();
    let help = "Resident memory of the guest, and of its process beyond it";
    registry.register_with_unit("guest_resident", help, Unit::Bytes, memory.clone());
    let exits = Family::<OfExit, Counter>::default();
    registry.register("exits", "Exits of vCPUs by reason", exits.clone());
    let calls = Family::<OfEntry, Counter>::default();
    registry.register("calls", "Calls of isolated functions", calls.clone());
    let aborts = Family::<OfEntry, Counter>::default();
    let help = "Calls that were taken back because of a violation";
    registry.register("aborts", help, aborts.clone());
    let rungs = Family::<OfRung, Counter>::default();
    let help = "What was done to get a driver back, by rung";
    registry.register("recoveries", help, rungs.clone());
    let switches = Family::<OfDevice, Counter>::default();
    let help = "Switches of a device to another guest, by how they ended";
    registry.register("device_switches", help, switches.clone());
    let own = Gauge::<u64, AtomicU64>::default();
    own.set(own_rss);
    let help = "Resident memory of the service";
    registry.register_with_unit("service_resident", help, Unit::Bytes, own);

    for listed in &look.guests {
        let state = guest_state(listed).to_owned();
        states.get_or_create(&OfState { state }).inc();
        let Some(status) = &listed.status else {
            continue;
        };
        let guest = || listed.name.clone();
        uptime
            .get_or_create(&OfGuest { guest: guest() })
            .set(status.uptime_ms / 1000);
        resets
            .get_or_create(&OfGuest { guest: guest() })
            .inc_by(status.resets);
        for (of, kib) in [("guest", status.guest_rss_kib), ("vmm", status.vmm_rss_kib)] {
            let label = OfMemory { guest: guest(), of };
            memory.get_or_create(&label).set(kib.saturating_mul(1024));
        }
        for (reason, count) in &status.exits {
            let (guest, reason) = (guest(), reason.clone());
            exits
                .get_or_create(&OfExit { guest, reason })
                .inc_by(*count);
        }
        for module in &status.isolation {
            for entry in &module.entries {
                let label = OfEntry {
                    guest: guest(),
                    module: module.module.clone(),
                    entry: entry.name.clone(),
                };
                calls.get_or_create(&label).inc_by(entry.calls);
                aborts.get_or_create(&label).inc_by(entry.aborts);
            }
        }
        for (module, ladder) in &status.recovery {
            let counts = &ladder.rungs;
            for (rung, count) in [
                ("error", counts.errors),
                ("retry", counts.retries),
                ("rest", counts.rests),
                ("resume", counts.resumes),
                ("failed_resume", counts.failed_resumes),
                ("restart", counts.restarts),
                ("failed_restart", counts.failed_restarts),
                ("rewind", counts.rewinds),
                ("reset", counts.resets),
                ("stop", counts.stops),
            ] {
                let (guest, module) = (guest(), module.clone());
                let label = OfRung {
                    guest,
                    module,
                    rung,
                };
                rungs.get_or_create(&label).inc_by(count);
            }
        }
    }
    for listed in &look.devices {
        let Some(status) = &listed.status else {
            continue;
        };
        let done = status.switch_count.saturating_sub(status.failed_switches);
        for (outcome, count) in [("done", done), ("failed", status.failed_switches)] {
            let device = listed.name.clone();
            let label = OfDevice { device, outcome };
            switches.get_or_create(&label).inc_by(count);
        }
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::events::tests::{device, guest};

    #[test]
    fn counters_are_those_of_the_processes() {
        let look = Look {
            guests: vec![guest("web", 7, 3), guest("db", 0, 0)],
            devices: vec![device("nic0", Some("web"), 5)],
        };
        let text = text(&look, 4096).unwrap();
        for line in [
            "cofferdam_guests{state=\"running\"} 2",
            "cofferdam_exits_total{guest=\"web\",reason=\"hlt\"} 12",
            "cofferdam_calls_total{guest=\"web\",module=\"e1000\",entry=\"e1000_open\"} 9",
            "cofferdam_aborts_total{guest=\"web\",module=\"e1000\",entry=\"e1000_open\"} 7",
            "cofferdam_recoveries_total{guest=\"web\",module=\"e1000\",rung=\"restart\"} 3",
            "cofferdam_device_switches_total{device=\"nic0\",outcome=\"done\"} 5",
            "cofferdam_service_resident_bytes 4096",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
