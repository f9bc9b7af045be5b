//! A trace in the format of Chrome's `about:tracing`, which Perfetto opens, too ("Trace Event
//! Format", Google, section "JSON Object Format").
//!
//! A call is a `B` and an `E` on the line of the guest's vCPU, with its phases as such in between;
//! what the private VM ran is on the domain's line; what happened at one moment is `i`.
//!
//! Nothing is an `X`, which has its begin and its length: Perfetto takes the `E` of a call for a
//! misplaced one where an `X` ends at the same time.

use std::collections::{BTreeSet, HashMap};

use isolation::dispatch::call_trace::{BarPlace, CallTrace};
use isolation::domain::recorder::{ExitReason, Happened, Place};
use serde_json::{Value, json};

use super::phases::{Phase, Span, spans};

/// The one process that there is in a trace: the guest.
const PROCESS: u32 = 1;

/// Number of the domain's line; those of the vCPUs are theirs, from 1.
const DOMAIN: u32 = 1000;

/// All that was recorded.
#[derive(Debug, Default)]
pub struct Recorded {
    /// Calls in their order.
    pub calls: Vec<CallTrace>,
    /// Names of functions, by address.
    pub functions: HashMap<u64, String>,
    /// Where the device is.
    pub bars: Vec<BarPlace>,
}

impl Recorded {
    /// The name of the function at `va`.
    pub fn function(&self, va: u64) -> String {
        let name = self.functions.get(&va);
        name.cloned().unwrap_or_else(|| format!("{va:#x}"))
    }

    /// A place of the device: its register and the offset in it, where that is known.
    fn place(&self, at: Place) -> String {
        let (address, is_io) = match at {
            Place::Memory(gpa) => (gpa, false),
            Place::Port(port) => (port.into(), true),
        };
        let mut bars = self.bars.iter().filter(|bar| bar.is_io == is_io);
        let within = |bar: &&BarPlace| {
            let offset = address.checked_sub(bar.start);
            offset.is_some_and(|offset| offset < bar.bytes)
        };
        match bars.find(within) {
            Some(bar) => format!("BAR {} + {:#x}", bar.bar, address - bar.start),
            None if is_io => format!("port {address:#x}"),
            None => format!("{address:#x}"),
        }
    }

    /// What happened at one moment, and what belongs to it; `None` of what begins a phase.
    fn moment(&self, what: &Happened) -> Option<(String, Value)> {
        let access = |how: &str, at: Place, bytes: u8, value: u64| {
            let place = self.place(at);
            let args = json!({"at": place, "bytes": bytes, "value": format!("{value:#x}")});
            (format!("{how} {place}"), args)
        };
        Some(match *what {
            Happened::Filled(va) => {
                let args = json!({"address": format!("{va:#x}")});
                ("page filled".to_owned(), args)
            }
            Happened::Opened(va) => {
                let args = json!({"address": format!("{va:#x}")});
                ("page opened to be written".to_owned(), args)
            }
            Happened::Calls(va) => (format!("calls {}", self.function(va)), json!({})),
            Happened::CallReturned => ("kernel function returned".to_owned(), json!({})),
            Happened::CallsBack(va) => (format!("called back: {}", self.function(va)), json!({})),
            Happened::CallBackReturned => ("call-back returned".to_owned(), json!({})),
            Happened::Waited(us) => ("waited".to_owned(), json!({"us": us})),
            Happened::DeviceLoad { at, bytes, value } => access("load", at, bytes, value),
            Happened::DeviceStore { at, bytes, value } => access("store", at, bytes, value),
            Happened::DevicePerforms(stores) => {
                let args = json!({"stores": stores});
                ("stores reach the device".to_owned(), args)
            }
            Happened::Console(port) => {
                let args = json!({"port": format!("{port:#x}")});
                ("console".to_owned(), args)
            }
            Happened::HandsOver(functions) => {
                let args = json!({"functions": functions});
                ("kernel functions waited".to_owned(), args)
            }
            _ => return None,
        })
    }

    /// The whole in the format; times are microseconds from the first event.
    pub fn chrome(&self, vm: &str, module: &str) -> Value {
        let first = self.calls.iter().filter_map(|call| call.events.first());
        let first_ns = first.map(|event| event.at_ns).min().unwrap_or(0);
        let mut events = self.names(vm, module);
        for call in &self.calls {
            self.add_call(call, first_ns, &mut events);
        }
        json!({
            "traceEvents": events,
            "displayTimeUnit": "ns",
            "otherData": {
                "program": concat!("cofferdam ", env!("CARGO_PKG_VERSION")),
                "vm": vm,
                "module": module,
                "first_event_monotonic_ns": first_ns,
            },
        })
    }

    /// Names of process and lines.
    fn names(&self, vm: &str, module: &str) -> Vec<Value> {
        let name = |what: &str, line: u32, name: String| {
            json!({
                "ph": "M", "name": what, "pid": PROCESS, "tid": line, "ts": 0, "args": {"name": name},
            })
        };
        let mut names = vec![
            name("process_name", 0, format!("VM {vm}")),
            name("thread_name", DOMAIN, format!("domain of {module}")),
        ];
        let vcpus: BTreeSet<u8> = self.calls.iter().map(|call| call.vcpu).collect();
        let of_vcpu = |vcpu| name("thread_name", line_of(vcpu), format!("guest vCPU {vcpu}"));
        names.extend(vcpus.into_iter().map(of_vcpu));
        names
    }

    fn add_call(&self, call: &CallTrace, first_ns: u64, events: &mut Vec<Value>) {
        let (Some(first), Some(last)) = (call.events.first(), call.events.last()) else {
            return;
        };
        let us = |ns: u64| ns.saturating_sub(first_ns) as f64 / 1000.0;
        let line = line_of(call.vcpu);
        let event = |ph: &str, name: &str, line: u32, at_ns: u64, args: Value| {
            json!({
                "ph": ph, "name": name, "cat": "isolation", "pid": PROCESS, "tid": line, "ts": us(at_ns),
                "args": args,
            })
        };
        let args = json!({
            "attempt": call.attempt,
            "comes_back": call.comes_back,
            "crossings": call.crossings,
            "crossings_without_exit": without_exit(call),
            "handed_over": call.handed_over,
            "events_left_out": call.left_out,
            "violation": call.violation,
        });
        events.push(event("B", &call.function, line, first.at_ns, args));
        for span in spans(call) {
            let is_inside = span.phase == Phase::Domain;
            let on = if is_inside { DOMAIN } else { line };
            let name = self.name(&span);
            let mut phase = event("B", &name, on, span.begin_ns, json!({}));
            if let Some(Happened::Ended(how)) = span.events.first().map(|first| first.what) {
                phase["args"] = json!({"ended": how});
            }
            events.push(phase);
            for inside in span.events {
                let Some((name, args)) = self.moment(&inside.what) else {
                    continue;
                };
                let mut moment = event("i", &name, line, inside.at_ns, args);
                moment["s"] = json!("t");
                events.push(moment);
            }
            events.push(event("E", &name, on, span.end_ns, json!({})));
        }
        events.push(event("E", &call.function, line, last.at_ns, json!({})));
    }

    /// What a phase is called: an exit by what it was for.
    fn name(&self, span: &Span<'_>) -> String {
        let Some(Happened::Exit(reason)) = span.events.first().map(|first| first.what) else {
            return span.phase.name().to_owned();
        };
        if span.phase != Phase::Serve {
            return span.phase.name().to_owned();
        }
        let mut moments = span.events.iter();
        let told = moments.find_map(|event| self.moment(&event.what));
        let told = told.map_or_else(|| exit_name(reason).to_owned(), |(name, _)| name);
        format!("exit: {told}")
    }
}

/// Number of a vCPU's line.
fn line_of(vcpu: u8) -> u32 {
    u32::from(vcpu) + 1
}

/// Kernel functions that a call called without an exit.
pub fn without_exit(call: &CallTrace) -> u64 {
    let is_seen = |what: &Happened| matches!(what, Happened::Calls(_));
    let seen = call.events.iter().filter(|event| is_seen(&event.what));
    call.crossings.saturating_sub(seen.count() as u64)
}

fn exit_name(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::Out => "a stub of the domain, or a port",
        ExitReason::In => "load from a port",
        ExitReason::MmioLoad => "load from a device",
        ExitReason::MmioStore => "store to a device",
        ExitReason::Msr => "processor register",
        ExitReason::Interrupt => "interrupt of the host",
        ExitReason::DirtyRing => "dirty ring full",
        ExitReason::Shutdown => "shutdown",
        ExitReason::Other => "something that KVM cannot do",
    }
}
