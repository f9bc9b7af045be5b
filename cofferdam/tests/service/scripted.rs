//! A process that only speaks the protocol, for what a guest without Linux cannot do.

mod orders;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cofferdam::control::protocol::{Reply, Request};
use cofferdam::control::server::{Handler, serve};
use cofferdam::runtime_dir::{RuntimeRoot, VmDir};
use recovery::asker::Asker;
use recovery::ladder::Rung;
use serde_json::{Value, json};

use crate::client::{Listener, Service};
use crate::common::module::module;
use crate::common::place::Place;

/// What a scripted guest is asked and answers.
pub struct Script {
    asked: Mutex<Vec<Request>>,
    violations: Mutex<u64>,
    hostile: AtomicBool,
    modules: AtomicUsize,
}

/// What a guest may say that wants to be more than text.
pub const HOSTILE: &str = "</td><img src=x onerror=broken=1><script>broken=1</script>";

impl Handler for Script {
    fn handle(&self, request: Request, asker: &dyn Asker) -> Result<Reply, String> {
        self.asked.lock().unwrap().push(request.clone());
        let reply = match request {
            Request::Status {} => {
                let violations = *self.violations.lock().unwrap();
                let entry = entry(violations);
                let hostile = self.hostile.load(Ordering::Relaxed);
                let panic = hostile.then_some(HOSTILE);
                let mut times = recovery::ladder::RungTimes::default();
                times.add(Rung::Restart, false, Duration::from_secs(3));
                let mut status = json!({"guest_panic": panic, "reply": "status", "name": "script", "pid": 1, "state": "running", "uptime_ms": 1, "mark_pages": 2,
                    "vmm_rss_kib": 1, "guest_rss_kib": 1, "resets": 0, "exits": {}, "nic": {},
                    "isolation": [{"module": "e1000", "entries": [entry], "violations": violations,
                        "warm_pages": 0, "broken": null}],
                    "recovery": {"e1000": {"state": "running", "times": times, "rungs": {"errors": violations, "retries": 0,
                        "restarts": 0, "failed_restarts": 0, "resets": 0, "stops": 0}}},
                    "config": {"kernel": "/k", "memory_mib": 64, "vcpus": 1, "disks": [], "serial": "stdio"}});
                if hostile {
                    let mut other = status["isolation"][0].clone();
                    other["module"] = json!(HOSTILE);
                    status["isolation"].as_array_mut().unwrap().push(other);
                }
                for number in 0..self.modules.load(Ordering::Relaxed) {
                    let mut other = status["isolation"][0].clone();
                    other["module"] = json!(format!("{number}{}", "x".repeat(300)));
                    status["isolation"].as_array_mut().unwrap().push(other);
                }
                status
            }
            Request::Isolate { module, .. } if module == "e1000" => {
                asker.tell("looking for the module").unwrap();
                json!({"reply": "isolated", "entries": ["e1000_open"]})
            }
            Request::Isolate { module, .. } => return Err(format!("no module {module} is loaded")),
            Request::Release { module } => {
                json!({"reply": "released", "module": module, "entries": [], "violations": 3,
                    "warm_pages": 0, "broken": null})
            }
            Request::Violations { .. } => {
                let text = match self.hostile.load(Ordering::Relaxed) {
                    true => HOSTILE,
                    false => "what it did",
                };
                json!({"reply": "violations", "isolated": true, "reports": [], "texts": [], "all": [
                    {"entry": "e1000_open", "count": 3, "first_ns": 1, "last_ns": 2, "text": text}]})
            }
            Request::Faults { .. } | Request::UndoFaults { .. } => {
                json!({"reply": "faults", "calls": null, "own_text": null})
            }
            Request::Snapshot { .. } => {
                asker.tell("writing").unwrap();
                // Until nobody wants it any more.
                while asker.tell("still writing").is_ok() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                return Err("nobody wants it any more".to_owned());
            }
            Request::Instructions { function, .. } if function == "e1000_open" => {
                json!({"reply": "instructions", "instructions": [
                    {"offset": 0, "len": 5, "kind": "plain"}, {"offset": 5, "len": 3, "kind": "plain"},
                    {"offset": 8, "len": 1, "kind": "return"}]})
            }
            Request::Inject { .. } => json!({"reply": "done"}),
            // push rbp; mov rbp, rsp; mov eax, 1; pop rbp; ret
            Request::FunctionText { module, function } if function == "e1000_open" => {
                json!({"reply": "function_text", "start": 0x1000_0000, "code": "VUiJ5bgBAAAAXcM=", "callees": [],
                    "isolated": module == "e1000"})
            }
            Request::InjectCode { .. } => json!({"reply": "done"}),
            Request::Upgrade { module, .. } => {
                asker.tell("removing the driver").unwrap();
                json!({"reply": "upgraded", "module": module, "outcome": "old", "old_build": "01", "new_build": "02",
                    "interfaces": ["eth0"], "isolated": 2, "outage_us": 7, "problems": ["the new one failed"]})
            }
            Request::SuspendDevice { .. } => {
                json!({"reply": "device_suspended", "driver_us": 5, "state_us": null, "power_us": 7})
            }
            Request::ResumeDevice { .. } => json!({"reply": "resumed", "times_us": [12]}),
            other => return Err(format!("{other:?} is not in the script")),
        };
        Ok(serde_json::from_value(reply).unwrap())
    }
}

fn entry(aborts: u64) -> Value {
    let mut entry = isolation::status::EntryStatus {
        name: "e1000_open".to_owned(),
        calls: aborts,
        aborts,
        ..Default::default()
    };
    for _ in 0..aborts {
        entry.taken_back.add(Duration::from_micros(40));
    }
    json!(entry)
}

/// A scripted guest called "script".
pub fn script(place: &Place) -> (VmDir, Arc<Script>) {
    let dir = claim(place);
    let script = Arc::new(Script {
        asked: Mutex::default(),
        violations: Mutex::new(2),
        hostile: AtomicBool::new(false),
        modules: AtomicUsize::new(0),
    });
    serve(&dir.paths().control_socket(), script.clone()).unwrap();
    (dir, script)
}

/// The folder of a guest called "script".
pub fn claim(place: &Place) -> VmDir {
    let root = RuntimeRoot::new(place.path("run"));
    root.claim(&"script".parse().unwrap()).unwrap()
}

const MODULE: &str = "/v1/guests/script/isolation/e1000";

#[test]
fn a_module_is_isolated_looked_at_and_released() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, script) = script(&place);
    let spec = json!({"entries": {"named": ["e1000_open"]}, "budget_us": 5,
        "recovery": {"on_fault": "retry", "per_entry": {"e1000_open": "restart"}, "retries": 7},
        "contain": "none"});
    let isolated = service
        .ask("PUT", MODULE, Some(&spec.to_string()))
        .ok(200)
        .json();
    assert_eq!(isolated["entries"], json!(["e1000_open"]));
    let asked = json!(script.asked.lock().unwrap().last().unwrap());
    assert_eq!(asked["request"], "isolate");
    assert_eq!(asked["entries"], json!({"named": ["e1000_open"]}));
    assert_eq!(
        (&asked["budget_us"], &asked["contain"]),
        (&json!(5), &json!("none"))
    );
    assert_eq!(asked["recovery"]["retries"], 7);
    assert_eq!(asked["recovery"]["recoveries_per_minute"], 600, "as always");
    service.ask("PUT", MODULE, Some("{}")).ok(200);
    let asked = json!(script.asked.lock().unwrap().last().unwrap());
    assert_eq!(asked["entries"], "all");
    for wrong in [
        r#"{"entries":"some"}"#,
        r#"{"entries":{"named":"x"}}"#,
        r#"{"recovery":{"on_fault":"pray"}}"#,
        r#"{"recovery":{"retry":1}}"#,
        r#"{"budget":1}"#,
        r#"{"budget_us":3600000001}"#,
        r#"{"wait_us":1000001}"#,
        r#"{"recovery":{"failures_in_a_row":0}}"#,
        "[]",
    ] {
        let answer = service.ask("PUT", MODULE, Some(wrong));
        answer.problem(422, "wrong_values", "");
    }
    let other = "/v1/guests/script/isolation/nosuch";
    service
        .ask("PUT", other, Some("{}"))
        .problem(409, "refused", "no module nosuch is loaded");
    let shown = service.get(&format!("{MODULE}/violations")).ok(200).json();
    assert_eq!(shown["isolated"], true);
    assert_eq!(shown["violations"][0]["text"], "what it did");
    let faults = json!({"calls": null, "own_text": null});
    let path = format!("{MODULE}/faults");
    assert_eq!(service.get(&path).ok(200).json(), faults);
    assert_eq!(service.delete(&path).ok(200).json(), faults);
    assert_eq!(service.delete(MODULE).ok(200).json()["violations"], 3);
    service.end();
    drop(dir);
}

#[test]
fn a_job_that_is_given_up_ends_in_the_guests_process_too() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, _script) = script(&place);
    let begun = service.post("/v1/guests/script/snapshot", r#"{"dir":"/x"}"#);
    let id = begun.json()["id"].as_str().unwrap().to_owned();
    let job = format!("/v1/jobs/{id}");
    while service.get(&job).json()["progress"][0] != "writing" {}
    service.delete(&job).ok(202);
    let job = service.end_of_job(&begun);
    assert_eq!(job["stage"], "failed", "{job}");
    assert_eq!(job["problem"]["code"], "cancelled", "{job}");
    service.end();
    drop(dir);
}

#[test]
fn a_guest_that_dies_during_a_request_is_a_problem() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let dir = claim(&place);
    let listener = UnixListener::bind(dir.paths().control_socket()).unwrap();
    let dies = |answer: &'static [u8]| {
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| service.get("/v1/guests/script"));
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            assert_eq!(request, "{\"request\":\"status\"}\n");
            std::io::Write::write_all(&mut stream, answer).unwrap();
            drop(stream);
            asked.join().unwrap()
        })
    };
    dies(b"").problem(502, "broken_off", "ended before it answered");
    dies(b"{\"ok\":{\"reply\":\"sta").problem(502, "broken_off", "ended before");
    dies(b"nonsense\n").problem(502, "broken_off", "cannot be read");
    dies(b"{\"ok\":{\"reply\":\"done\"}}\n").problem(502, "broken_off", "something else");
    dies(b"{\"error\":\"no\"}\n").problem(409, "refused", "no");
    drop(listener);
    service
        .get("/v1/guests/script")
        .problem(502, "broken_off", "cannot reach");
    let list = service.get("/v1/guests").ok(200).json();
    assert!(list["guests"][0]["no_answer"].is_string(), "{list}");
    drop(dir);
    service
        .get("/v1/guests/script")
        .problem(404, "no_such_guest", "script");
    service.end();
}

#[test]
fn what_fails_is_told_and_counted() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, script) = script(&place);
    let mut listener = Listener::new(&service);
    assert_eq!(listener.next()["guests"]["script"], "running");
    *script.violations.lock().unwrap() = 5;
    let event = listener.until("violations");
    assert_eq!(event["guest"], "script");
    assert_eq!(
        (&event["module"], &event["more"], &event["count"]),
        (&json!("e1000"), &json!(3), &json!(5))
    );
    let metrics = service.get("/metrics").ok(200).text;
    for line in [
        "cofferdam_aborts_total{guest=\"script\",module=\"e1000\",entry=\"e1000_open\"} 5",
        "cofferdam_recoveries_total{guest=\"script\",module=\"e1000\",rung=\"error\"} 5",
    ] {
        assert!(metrics.lines().any(|other| other == line), "{metrics}");
    }
    drop(dir);
    assert_eq!(listener.until("guest_gone")["guest"], "script");
    service.end();
}

#[test]
fn a_fault_is_put_where_an_instruction_begins() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, script) = script(&place);
    let path = format!("{MODULE}/faults");
    let ordered = service.post(&path, r#"{"function":"e1000_open"}"#).ok(200);
    assert_eq!(
        ordered.json(),
        json!({"function": "e1000_open", "offset": 5, "fault": "null_dereference", "every": 1, "times": 1})
    );
    let body = r#"{"function":"e1000_open","offset":8,"fault":"halt","every":2,"times":7}"#;
    service.post(&path, body).ok(200);
    let asked = json!(script.asked.lock().unwrap().last().unwrap());
    assert_eq!(
        asked,
        json!({"request": "inject", "module": "e1000", "entry": "e1000_open", "offset": 8,
            "fault": "halt", "every": 2, "times": 7})
    );
    let before = script.asked.lock().unwrap().len();
    for wrong in [
        "{}",
        r#"{"function":"e1000_open","offset":-1}"#,
        r#"{"function":"e1000_open","every":0}"#,
        r#"{"function":"e1000_open","fault":"gremlin"}"#,
        r#"{"function":"e1000_open","offset":5,"place":"last"}"#,
        r#"{"function":"e1000_open","at":"first"}"#,
    ] {
        service.post(&path, wrong).problem(422, "wrong_values", "");
    }
    assert_eq!(script.asked.lock().unwrap().len(), before, "it was asked");
    let between = r#"{"function":"e1000_open","offset":6}"#;
    let answer = service.post(&path, between);
    answer.problem(422, "wrong_values", "no instruction");
    let answer = service.post(&path, r#"{"function":"nosuch"}"#);
    answer.problem(409, "refused", "nosuch");
    service.end();
    drop(dir);
}

#[test]
fn a_driver_suspends_and_resumes_its_devices() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, script) = script(&place);
    let path = "/v1/guests/script/modules/e1000/suspend-device";
    let phases = json!({"driver_us": 5, "state_us": null, "power_us": 7});
    assert_eq!(
        service.post(path, "").ok(200).json()["driver_us"],
        phases["driver_us"]
    );
    let asked = json!(script.asked.lock().unwrap().last().unwrap());
    assert_eq!(
        asked,
        json!({"request": "suspend_device", "module": "e1000"})
    );
    let path = "/v1/guests/script/modules/e1000/resume-device";
    let times = json!({"times_us": [12]});
    assert_eq!(service.post(path, "").ok(200).json(), times);
    let answer = service.post("/v1/guests/script/modules/..%2fx/resume-device", "");
    answer.problem(400, "malformed", "");
    service.end();
    drop(dir);
}

#[test]
fn an_instruction_is_changed_where_a_kind_fits() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, script) = script(&place);
    let path = "/v1/guests/script/modules/e1000/code-faults";
    let sites = service.get(&format!("{path}?function=e1000_open")).ok(200);
    let sites = sites.json();
    assert_eq!(sites["isolated"], true);
    assert_eq!(sites["sites"][0]["offset"], 9, "{sites}");
    let fitting = service.get(&format!("{path}?function=e1000_open&kind=missing_call"));
    assert_eq!(
        fitting.ok(200).json()["sites"],
        json!([]),
        "it calls nothing"
    );
    let order = |more: Value| {
        let mut spec = json!({"function": "e1000_open", "kind": "nop", "offset": 9});
        spec.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        spec.to_string()
    };
    let changed = service
        .post(path, &order(json!({"when": {"nth": 3}})))
        .ok(200);
    let changed = changed.json();
    assert_eq!(
        (&changed["own_text"], &changed["address"]),
        (&json!(false), &json!(0x1000_0009))
    );
    let asked = json!(script.asked.lock().unwrap().last().unwrap());
    assert_eq!(
        (&asked["request"], &asked["old"]),
        (&json!("inject_code"), &json!("XQ=="))
    );
    assert_eq!(asked["calls"]["which"], json!({"every": 3}), "{asked}");
    // What is not isolated is left alone unless its own text is meant.
    let own = "/v1/guests/script/modules/e1001/code-faults";
    let before = script.asked.lock().unwrap().len();
    let refused = service.post(own, &order(json!({})));
    refused.problem(409, "refused", "e1001 is not isolated");
    for wrong in [
        json!({"own_text": true, "when": "always"}),
        json!({"offset": 3, "own_text": true}),
        json!({"offset": u64::MAX, "own_text": true}),
        json!({"own_text": true, "kind": "missing_call", "offset": null}),
    ] {
        service
            .post(own, &order(wrong))
            .problem(422, "wrong_values", "");
    }
    let asked = json!(script.asked.lock().unwrap()[before..]);
    assert!(!asked.to_string().contains("inject_code"), "{asked}");
    let changed = service.post(own, &order(json!({"own_text": true}))).ok(200);
    assert_eq!(changed.json()["own_text"], true);
    for wrong in [
        json!({"kind": "gremlin"}),
        json!({"kind": "lost_interrupt"}),
        json!({"when": {"nth": 0}}),
        json!({"when": {"chance": 0}}),
        json!({"when": "sometimes"}),
        json!({"offset": -1}),
        json!({"more": 1}),
    ] {
        service
            .post(path, &order(wrong))
            .problem(422, "wrong_values", "");
    }
    for wrong in [
        "",
        "?function=e1000_open&kind=gremlin",
        "?function=a&more=1",
    ] {
        service
            .get(&format!("{path}{wrong}"))
            .problem(400, "malformed", "");
    }
    let nowhere = service.get(&format!("{path}?function=nosuch"));
    nowhere.problem(409, "refused", "nosuch");
    service.end();
    drop(dir);
}

#[test]
fn a_driver_is_upgraded_from_a_file_that_is_its_build() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, script) = script(&place);
    let path = "/v1/guests/script/modules/spy/upgrade";
    let file = place.file("spy.ko", &module("spy", &["name=spy", "vermagic=6.1"]));
    let spec = |file: &str| json!({"file": file, "limit_s": 5}).to_string();
    let upgraded = service.post(path, &spec(&file)).ok(200).json();
    assert_eq!(
        (&upgraded["outcome"], &upgraded["module"]),
        (&json!("old"), &json!("spy"))
    );
    let asked = script.asked.lock().unwrap().last().cloned().unwrap();
    let Request::Upgrade {
        file: sent,
        limit_ms,
        ..
    } = asked
    else {
        panic!("{asked:?}");
    };
    assert_eq!((sent.0, limit_ms), (std::fs::read(&file).unwrap(), 5000));
    let before = script.asked.lock().unwrap().len();
    let none = place.file("none.ko", b"not a module");
    let fifo = place.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let missing = place.path("missing").display().to_string();
    for (wrong, says) in [
        (none.as_str(), "no kernel module"),
        (fifo.to_str().unwrap(), "no kernel module"),
        ("/dev/zero", "at most"),
        (&missing, "cannot read"),
        ("spy.ko", "absolute"),
    ] {
        service
            .post(path, &spec(wrong))
            .problem(422, "wrong_values", says);
    }
    let other = service.post("/v1/guests/script/modules/e1000/upgrade", &spec(&file));
    other.problem(422, "wrong_values", "spy");
    for wrong in [
        r#"{}"#,
        r#"{"file":"/x","limit_s":0}"#,
        r#"{"file":"/x","limit_s":61}"#,
        r#"{"file":7}"#,
    ] {
        service.post(path, wrong).problem(422, "wrong_values", "");
    }
    assert_eq!(script.asked.lock().unwrap().len(), before, "it was asked");
    service.end();
    drop(dir);
}
