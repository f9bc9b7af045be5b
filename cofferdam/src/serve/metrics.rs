//! Counters of all guests and devices for Prometheus.
//!
//! They are read from the processes each time: a restart of the service loses none.

mod histogram;

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
use recovery::ladder::LadderStatus;

use super::app::App;
use super::events::guest_state;
use super::little::resident_bytes;
use super::look::Look;
use super::problem::{Code, Problem};
use crate::control::protocol::Status;
use crate::device::protocol::HostStatus;
use histogram::Kept;

/// The format that is spoken (OpenMetrics 1.0).
const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;

type Gauges<L> = Family<L, Gauge<u64, AtomicU64>>;
type Histograms<L> = Family<L, Kept>;

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
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfSwitch {
    device: String,
    outcome: &'static str,
}

/// Show the counters of all guests and devices, as Prometheus reads them.
#[utoipa::path(get, path = "/metrics", tag = "service",
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let look = app.looks.look().await?;
    let text = text(&look, resident_bytes())
        .map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    Ok(([(CONTENT_TYPE, CONTENT)], text).into_response())
}

fn text(look: &Look, own_rss: u64) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("cofferdam");
    let counters = Counters::registered(&mut registry);
    let own = Gauge::<u64, AtomicU64>::default();
    own.set(own_rss);
    let help = "Resident memory of the service";
    registry.register_with_unit("service_resident", help, Unit::Bytes, own);
    for listed in &look.guests {
        let state = guest_state(listed).to_owned();
        counters.states.get_or_create(&OfState { state }).inc();
        if let Some(status) = &listed.status {
            counters.add_guest(&listed.name, status);
        }
    }
    for listed in &look.devices {
        if let Some(status) = &listed.status {
            counters.add_device(&listed.name, status);
        }
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(histogram::canonical(&text))
}

/// What is shown of guests and devices.
#[derive(Default)]
struct Counters {
    states: Gauges<OfState>,
    uptime: Gauges<OfGuest>,
    resets: Family<OfGuest, Counter>,
    memory: Gauges<OfMemory>,
    marks: Gauges<OfGuest>,
    exits: Family<OfExit, Counter>,
    calls: Family<OfEntry, Counter>,
    aborts: Family<OfEntry, Counter>,
    dirty: Family<OfEntry, Counter>,
    taken_back: Histograms<OfEntry>,
    rungs: Family<OfRung, Counter>,
    rung_times: Histograms<OfRung>,
    switches: Family<OfSwitch, Counter>,
    switch_times: Histograms<OfDevice>,
    outages: Histograms<OfDevice>,
}

impl Counters {
    fn registered(registry: &mut Registry) -> Self {
        let own = Self::default();
        registry.register("guests", "Guests that run, by state", own.states.clone());
        let help = "Time since the guest's process began";
        registry.register_with_unit("guest_uptime", help, Unit::Seconds, own.uptime.clone());
        registry.register("guest_resets", "Resets of the guest", own.resets.clone());
        let help = "Resident memory of the guest, and of its process beyond it";
        registry.register_with_unit("guest_resident", help, Unit::Bytes, own.memory.clone());
        let help = "Memory that is kept for the guest's marks";
        registry.register_with_unit("guest_marks", help, Unit::Bytes, own.marks.clone());
        registry.register("exits", "Exits of vCPUs by reason", own.exits.clone());
        registry.register("calls", "Calls of isolated functions", own.calls.clone());
        let help = "Calls that were taken back because of a violation";
        registry.register("aborts", help, own.aborts.clone());
        let help = "Pages that calls may have written";
        registry.register("dirty_pages", help, own.dirty.clone());
        let help = "Time from the fault of a call until nothing of it was left";
        let times = own.taken_back.clone();
        registry.register_with_unit("abort_duration", help, Unit::Seconds, times);
        let help = "What was done to get a driver back, by rung";
        registry.register("recoveries", help, own.rungs.clone());
        let help = "Time that was taken to get a driver back, by rung";
        let times = own.rung_times.clone();
        registry.register_with_unit("recovery_duration", help, Unit::Seconds, times);
        own.register_devices(registry);
        own
    }

    fn register_devices(&self, registry: &mut Registry) {
        let help = "Switches of a device to another guest, by how they ended";
        registry.register("device_switches", help, self.switches.clone());
        let help = "Time that switches of a device took";
        let times = self.switch_times.clone();
        registry.register_with_unit("device_switch_duration", help, Unit::Seconds, times);
        let help = "Time without a frame around a switch of a device";
        let times = self.outages.clone();
        registry.register_with_unit("device_outage", help, Unit::Seconds, times);
    }

    fn add_guest(&self, name: &str, status: &Status) {
        let guest = || name.to_owned();
        self.uptime
            .get_or_create(&OfGuest { guest: guest() })
            .set(status.uptime_ms / 1000);
        self.resets
            .get_or_create(&OfGuest { guest: guest() })
            .inc_by(status.resets);
        for (of, kib) in [("guest", status.guest_rss_kib), ("vmm", status.vmm_rss_kib)] {
            let label = OfMemory { guest: guest(), of };
            self.memory
                .get_or_create(&label)
                .set(kib.saturating_mul(1024));
        }
        if let Some(pages) = status.mark_pages {
            let bytes = pages.saturating_mul(PAGE_BYTES);
            self.marks
                .get_or_create(&OfGuest { guest: guest() })
                .set(bytes);
        }
        for (reason, count) in &status.exits {
            let (guest, reason) = (guest(), reason.clone());
            self.exits
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
                self.calls.get_or_create(&label).inc_by(entry.calls);
                self.aborts.get_or_create(&label).inc_by(entry.aborts);
                self.dirty.get_or_create(&label).inc_by(entry.dirty_pages);
                if !entry.taken_back.is_empty() {
                    let times = self.taken_back.get_or_create(&label);
                    times.join(&entry.taken_back);
                }
            }
        }
        for (module, ladder) in &status.recovery {
            self.add_ladder(name, module, ladder);
        }
    }

    fn add_ladder(&self, guest: &str, module: &str, ladder: &LadderStatus) {
        let label = |rung| OfRung {
            guest: guest.to_owned(),
            module: module.to_owned(),
            rung,
        };
        for (rung, times) in ladder.times.each() {
            if !times.is_empty() {
                self.rung_times.get_or_create(&label(rung)).join(times);
            }
        }
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
            self.rungs.get_or_create(&label(rung)).inc_by(count);
        }
    }

    fn add_device(&self, name: &str, status: &HostStatus) {
        let done = status.switch_count.saturating_sub(status.failed_switches);
        for (outcome, count) in [("done", done), ("failed", status.failed_switches)] {
            let device = name.to_owned();
            let label = OfSwitch { device, outcome };
            self.switches.get_or_create(&label).inc_by(count);
        }
        let device = name.to_owned();
        let label = OfDevice { device };
        let times = self.switch_times.get_or_create(&label);
        times.join(&status.switch_times);
        self.outages.get_or_create(&label).join(&status.outages);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use recovery::ladder::Rung;

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
        // Nothing was said of times.
        assert!(!text.contains("abort_duration") && !text.contains("recovery_duration"));
        assert!(!text.contains("marks"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn times_are_histograms_whose_buckets_hold_all_that_is_below_them() {
        let mut web = guest("web", 2, 0);
        let mut host = device("nic0", None, 2);
        let status = web.status.as_mut().unwrap();
        status.mark_pages = Some(3);
        let times = &mut status.isolation[0].entries[0].taken_back;
        [8_000, 30_000, 30_000, 61_000_000_000]
            .into_iter()
            .for_each(|ns| times.add_ns(ns));
        let ladder = status.recovery.get_mut("e1000").unwrap();
        let (rung, took) = (Rung::Restart, Duration::from_millis(1500));
        ladder.times.add(rung, true, took);
        let status = host.status.as_mut().unwrap();
        status.switch_times.add_ns(2_000_000);
        let look = Look {
            guests: vec![web],
            devices: vec![host],
        };
        let text = text(&look, 4096).unwrap();
        let of = "guest=\"web\",module=\"e1000\"";
        let (entry, rung) = ("entry=\"e1000_open\"", "rung=\"failed_restart\"");
        let abort = "cofferdam_abort_duration_seconds";
        let recovery = "cofferdam_recovery_duration_seconds";
        for line in [
            format!("# TYPE {abort} histogram"),
            format!("{abort}_bucket{{le=\"1e-05\",{of},{entry}}} 1"),
            format!("{abort}_bucket{{le=\"0.00002\",{of},{entry}}} 1"),
            format!("{abort}_bucket{{le=\"0.00005\",{of},{entry}}} 3"),
            format!("{abort}_bucket{{le=\"60.0\",{of},{entry}}} 3"),
            format!("{abort}_bucket{{le=\"+Inf\",{of},{entry}}} 4"),
            format!("{abort}_count{{{of},{entry}}} 4"),
            format!("{abort}_sum{{{of},{entry}}} 61.000068"),
            format!("{recovery}_bucket{{le=\"1.0\",{of},{rung}}} 0"),
            format!("{recovery}_bucket{{le=\"2.0\",{of},{rung}}} 1"),
            format!("{recovery}_sum{{{of},{rung}}} 1.5"),
            "cofferdam_device_switch_duration_seconds_count{device=\"nic0\"} 1".to_owned(),
            "cofferdam_device_outage_seconds_count{device=\"nic0\"} 0".to_owned(),
            "cofferdam_guest_marks_bytes{guest=\"web\"} 12288".to_owned(),
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }
}
