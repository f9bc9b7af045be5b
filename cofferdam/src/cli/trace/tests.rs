//! What is made of recorded calls.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use isolation::dispatch::call_trace::{BarPlace, CallTrace, TraceTaken};
use isolation::domain::recorder::{Ended, Event, ExitReason, Happened, MAX_EVENTS, Place};
use recovery::asker::Asker;
use serde_json::Value;

use super::chrome::Recorded;
use super::phases::{Phase, spans};
use super::summary::Summary;
use super::{Output, TraceOptions};
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::control::server::{Handler, serve};
use crate::long_work::Interrupt;

const FUNCTION: u64 = 0xffff_ffff_8100_0000;

fn call(what: impl IntoIterator<Item = Happened>) -> CallTrace {
    let events = (1u64..).zip(what).map(|(number, what)| Event {
        at_ns: 5_000_000_000 + number * 1_001,
        what,
    });
    CallTrace {
        function: "driver_sends".to_owned(),
        crossings: 9,
        events: events.collect(),
        ..CallTrace::default()
    }
}

/// A call as calls are.
fn whole() -> Vec<Happened> {
    let at = Place::Memory(0xfeb0_0018);
    vec![
        Happened::Gate,
        Happened::Held,
        Happened::Prepared,
        Happened::Entered,
        Happened::Exit(ExitReason::Out),
        Happened::Opened(0x1000),
        Happened::Filled(0x1000),
        Happened::Entered,
        Happened::Exit(ExitReason::MmioStore),
        Happened::DeviceStore {
            at,
            bytes: 4,
            value: 0x77,
        },
        Happened::Entered,
        Happened::Exit(ExitReason::Out),
        Happened::Calls(FUNCTION),
        Happened::Entered,
        Happened::Exit(ExitReason::Out),
        Happened::Returned,
        Happened::Commits,
        Happened::Writes(2),
        Happened::DevicePerforms(1),
        Happened::Ended(Ended::Committed),
        Happened::DeviceReleased,
        Happened::BackInGuest,
    ]
}

fn recorded(calls: Vec<CallTrace>) -> Recorded {
    Recorded {
        calls,
        functions: HashMap::from([(FUNCTION, "kernel_function".to_owned())]),
        bars: vec![BarPlace {
            slot: 3,
            bar: 0,
            is_io: false,
            start: 0xfeb0_0000,
            bytes: 0x2_0000,
        }],
    }
}

fn number(event: &Value, key: &str) -> f64 {
    event[key].as_f64().unwrap()
}

/// The rules of the format: what each kind of event has, `B` and `E` in pairs on each line, each
/// inside of what is open there, none over another. There is no `X`, whose end is not seen.
fn check_format(trace: &Value) {
    let mut open: HashMap<u64, Vec<(&str, f64)>> = HashMap::new();
    let mut until: HashMap<u64, f64> = HashMap::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        let line = event["tid"].as_u64().unwrap();
        assert!(
            event["pid"].is_u64() && event["name"].is_string(),
            "{event}"
        );
        let at = number(event, "ts");
        assert!(at >= 0.0, "{event}");
        let stack = open.entry(line).or_default();
        let after = until.entry(line).or_insert(0.0);
        match event["ph"].as_str().unwrap() {
            "M" => assert!(event["args"]["name"].is_string(), "{event}"),
            "B" => {
                assert!(at >= *after, "{event}");
                stack.push((event["name"].as_str().unwrap(), at));
            }
            "E" => {
                let (name, begin) = stack.pop().expect("an E without its B");
                assert_eq!(event["name"], name);
                assert!(at >= begin && at >= *after, "{event}");
                *after = at;
            }
            "i" => {
                assert_eq!(event["s"], "t");
                assert!(stack.last().is_none_or(|(_, begin)| at >= *begin));
            }
            other => panic!("{other} is not used: {event}"),
        }
    }
    assert!(open.values().all(Vec::is_empty), "a B without its E");
}

#[test]
fn a_trace_keeps_the_rules_of_its_format_and_names_what_happened() {
    let mut failing = call([
        Happened::Held,
        Happened::Prepared,
        Happened::Entered,
        Happened::Exit(ExitReason::Out),
        Happened::TakesBack,
        Happened::Ended(Ended::TakenBack),
        Happened::BackInGuest,
    ]);
    // Calls are in the domain one after the other.
    failing
        .events
        .iter_mut()
        .for_each(|event| event.at_ns += 1_000_000);
    failing.vcpu = 1;
    failing.violation = Some("what it did".to_owned());
    let trace = recorded(vec![call(whole()), failing]).chrome("web", "driver");
    check_format(&trace);
    let events = trace["traceEvents"].as_array().unwrap();
    let names: Vec<&str> = events
        .iter()
        .filter(|event| ["B", "i"].contains(&event["ph"].as_str().unwrap()))
        .map(|event| event["name"].as_str().unwrap())
        .collect();
    for name in [
        "driver_sends",
        "hold vCPUs and devices",
        "in the domain",
        "exit: page opened to be written",
        "exit: store BAR 0 + 0x18",
        "store BAR 0 + 0x18",
        "exit: calls kernel_function",
        "check the return",
        "commit",
        "let the device go",
        "take back",
    ] {
        assert!(names.contains(&name), "no {name}: {names:?}");
    }
    let lines: Vec<&str> = events
        .iter()
        .filter(|event| event["ph"] == "M")
        .map(|event| event["args"]["name"].as_str().unwrap())
        .collect();
    let wanted = ["VM web", "domain of driver", "guest vCPU 0", "guest vCPU 1"];
    assert_eq!(lines, wanted);
    let is_call = |event: &&Value| event["ph"] == "B" && event["name"] == "driver_sends";
    let begins = events.iter().filter(is_call);
    let begins: Vec<&Value> = begins.collect();
    assert_eq!(begins[0]["ts"], 0.0);
    assert_eq!(begins[0]["args"]["crossings_without_exit"], 8);
    assert_eq!(begins[1]["args"]["violation"], "what it did");
    let in_domain = events
        .iter()
        .filter(|event| event["ph"] == "B" && event["name"] == "in the domain");
    assert!(in_domain.clone().all(|event| event["tid"] == 1000));
    assert_eq!(in_domain.count(), 5);
}

#[test]
fn the_phases_of_a_call_are_the_whole_of_it() {
    let call = call(whole());
    let spans = spans(&call);
    let (first, last) = (&call.events[0], call.events.last().unwrap());
    assert_eq!(spans[0].begin_ns, first.at_ns);
    assert_eq!(spans.last().unwrap().end_ns, last.at_ns);
    for two in spans.windows(2) {
        assert_eq!(two[0].end_ns, two[1].begin_ns);
    }
    let summary = Summary::new("driver", 2, &recorded(vec![call]));
    let shown = serde_json::to_value(&summary).unwrap();
    let phases = shown["phases"].as_array().unwrap();
    let sum: u64 = phases.iter().map(|time| time["ns"].as_u64().unwrap()).sum();
    assert_eq!(shown["calls"][0]["total_ns"], sum);
    assert_eq!(shown["calls"][0]["ended"], "committed");
    let text = summary.text();
    for part in [
        "driver_sends",
        "in the domain",
        "8 kernel functions were called without an exit",
        "1 of 2 calls came in time",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("left out"), "{text}");
}

#[test]
fn where_events_were_left_out_no_phase_is_made_up() {
    let again = [Happened::Entered, Happened::Exit(ExitReason::Out)];
    let many = again.into_iter().cycle().take(MAX_EVENTS);
    let end = [Happened::Returned, Happened::Ended(Ended::Committed)];
    let mut call = call(many.chain(end));
    let gaps = |call: &CallTrace| {
        let spans = spans(call);
        let is_gap = |span: &&super::phases::Span<'_>| span.phase == Phase::NotRecorded;
        let gaps = spans.iter().filter(is_gap);
        gaps.map(|gap| gap.end_ns).collect::<Vec<_>>()
    };
    assert!(gaps(&call).is_empty());
    call.left_out = 7;
    assert_eq!(gaps(&call), [call.events[MAX_EVENTS].at_ns]);
    let all = recorded(vec![call]);
    check_format(&all.chrome("web", "driver"));
    let text = Summary::new("driver", 1, &all).text();
    assert!(text.contains("7 events were left out"), "{text}");
}

#[test]
fn nothing_is_made_of_a_call_without_events() {
    let all = recorded(vec![call([])]);
    check_format(&all.chrome("web", "driver"));
    assert!(Summary::new("driver", 1, &all).text().contains("not known"));
}

/// A VM that answers what it is told to.
struct Script(Mutex<VecDeque<Result<Reply, String>>>);

impl Handler for Script {
    fn handle(&self, _: Request, _: &dyn Asker) -> Result<Reply, String> {
        self.0.lock().unwrap().pop_front().unwrap()
    }
}

fn taken(call: Option<CallTrace>, continues: bool, more: bool) -> Result<Reply, String> {
    Ok(Reply::Trace(Box::new(TraceTaken {
        call,
        continues,
        more,
        functions: vec![(FUNCTION, "kernel_function".to_owned())],
        bars: Vec::new(),
    })))
}

/// What comes of these answers.
fn record(answers: Vec<Result<Reply, String>>) -> anyhow::Result<Recorded> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    serve(&path, Arc::new(Script(Mutex::new(answers.into())))).unwrap();
    let options = TraceOptions {
        vm: "web".parse().unwrap(),
        module: "driver".to_owned(),
        function: None,
        calls: 2,
        limit: 1,
        output: None,
        json: false,
    };
    let mut client = ControlClient::connect(&path).unwrap();
    options.record(&mut client, &Interrupt::default())
}

#[test]
fn a_trace_that_comes_in_pieces_is_put_together_and_one_that_is_gone_is_an_error() {
    let begun = || Ok(Reply::TraceBegun { id: 7 });
    let all = call(whole());
    let (mut first, mut second) = (all.clone(), all.clone());
    second.events = first.events.split_off(5);
    let recorded = record(vec![
        begun(),
        taken(None, false, true),
        taken(Some(first), true, true),
        taken(Some(second), false, true),
        taken(None, false, true),
        taken(Some(all.clone()), false, false),
    ]);
    let recorded = recorded.unwrap();
    assert_eq!(recorded.calls, [all.clone(), all.clone()]);
    assert_eq!(recorded.function(FUNCTION), "kernel_function");
    let gone = "module driver is not isolated";
    let left = taken(Some(all), false, true);
    let error = record(vec![begun(), left, Err(gone.to_owned())]).unwrap_err();
    assert_eq!(format!("{error:#}"), gone);
}

#[test]
fn a_file_is_there_whole_or_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    std::fs::write(&path, "before").unwrap();
    drop(Output::begin(&path).unwrap());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "before");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let trace = recorded(vec![call(whole())]).chrome("web", "driver");
    Output::begin(&path).unwrap().end(&trace).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    check_format(&written);
    assert!(Output::begin(dir.path()).is_err());
    assert!(Output::begin(&dir.path().join("no").join("trace")).is_err());
}
