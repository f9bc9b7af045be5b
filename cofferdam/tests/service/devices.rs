//! Device hosts, asked over HTTP.

use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::Instant;

use serde_json::json;

use crate::client::Service;
use crate::common::place::{LIMIT, Place, finish, signal};

/// A device host called `nic0`.
pub fn host(place: &Place) -> Child {
    let words = ["device", "serve", "nic0", "--net", "user"];
    let child = place.command().args(words).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while UnixStream::connect(place.path("run/.devices/nic0/control.sock")).is_err() {
        assert!(Instant::now() < deadline, "no device host");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child
}

#[test]
fn a_device_is_looked_at_and_its_turn_is_passed_on() {
    let place = Place::new();
    let service = Service::start(&place, "");
    assert_eq!(
        service.get("/v1/devices").ok(200).json(),
        json!({"devices": []})
    );
    service
        .get("/v1/devices/nic0")
        .problem(404, "no_such_device", "nic0");
    let host = host(&place);
    let left = place.start("left", &place.idle_kernel(), "--nic device=nic0");
    let right = place.start("right", &place.idle_kernel(), "--nic device=nic0");
    let status = service.get("/v1/devices/nic0").ok(200).json();
    assert_eq!(status["turn"], "left");
    assert_eq!(status["contexts"].as_array().unwrap().len(), 2);
    let path = "/v1/devices/nic0/switch";
    let record = service.post(path, r#"{"to":"right"}"#).ok(200).json();
    assert_eq!(
        (&record["from"], &record["to"]),
        (&json!("left"), &json!("right"))
    );
    let turn = service.post(path, r#"{"every_ms":3600000}"#).ok(200).json();
    assert_eq!(turn, json!({"turn": "right"}));
    service.post(path, r#"{"hold":true}"#).ok(200);
    service
        .post(path, r#"{"to":"nobody"}"#)
        .problem(409, "refused", "nobody");
    service
        .post(path, r#"{"every_ms":0}"#)
        .problem(409, "refused", "time slice");
    for wrong in [
        "{}",
        r#"{"to":"../x"}"#,
        r#"{"to":"left","hold":true}"#,
        r#"{"hold":false}"#,
        r#"{"every_ms":-1}"#,
        r#"{"from":"left"}"#,
    ] {
        service.post(path, wrong).problem(422, "wrong_values", "");
    }
    let list = service.get("/v1/devices").ok(200).json();
    assert_eq!(list["devices"][0]["status"]["turn"], "right", "{list}");
    let metrics = service.get("/metrics").ok(200).text;
    let counted = "cofferdam_device_switches_total{device=\"nic0\",outcome=\"done\"}";
    assert!(metrics.contains(counted), "{metrics}");
    signal(&host, libc::SIGSTOP);
    let kill = format!("kill -CONT {}", host.id());
    service
        .get("/v1/devices/nic0")
        .problem(504, "no_answer", &kill);
    let list = service.get("/v1/devices").ok(200).json();
    assert!(list["devices"][0]["no_answer"].is_string(), "{list}");
    signal(&host, libc::SIGCONT);
    service.end();
    for process in [left, right, host] {
        signal(&process, libc::SIGTERM);
        finish(process);
    }
    assert_eq!(place.left(), [".devices"]);
}
