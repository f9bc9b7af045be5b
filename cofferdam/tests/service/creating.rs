//! Guests that the service makes.

use serde_json::{Value, json};

use crate::client::Service;
use crate::common::place::Place;

fn spec(place: &Place, name: &str) -> Value {
    json!({"name": name, "kernel": place.idle_kernel(), "memory": "32M"})
}

#[track_caller]
fn force(service: &Service, name: &str) {
    service
        .delete(&format!("/v1/guests/{name}?force=true"))
        .ok(200);
}

#[test]
fn a_guest_is_made_once_however_often_it_is_asked_for() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let spec = spec(&place, "web");
    let made = service.post("/v1/guests", &spec.to_string()).ok(201);
    assert!(
        made.head.contains("location: /v1/guests/web\r\n"),
        "{made:?}"
    );
    let pid = made.json()["pid"].clone();
    let again = service.post("/v1/guests", &spec.to_string()).ok(200);
    assert_eq!(again.json()["pid"], pid);
    let mut other = spec.clone();
    other["vcpus"] = json!(2);
    service
        .post("/v1/guests", &other.to_string())
        .problem(409, "other_spec", "web");
    assert_eq!(place.status_of("web")["pid"], pid);
    force(&service, "web");
    service.end();
    place.assert_empty();
}

#[test]
fn several_who_ask_for_one_guest_at_once_get_one() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let spec = spec(&place, "web").to_string();
    let answers: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| service.post("/v1/guests", &spec)))
            .collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let made = answers.iter().filter(|answer| answer.status == 201).count();
    // One that comes while another has only just the name may be told to ask again.
    let found = answers
        .iter()
        .filter(|answer| matches!(answer.status, 200 | 503))
        .count();
    assert_eq!((made, found), (1, 5), "{answers:?}");
    let list = service.get("/v1/guests").json();
    assert_eq!(list["guests"].as_array().unwrap().len(), 1);
    force(&service, "web");
    service.end();
    place.assert_empty();
}

#[test]
fn a_guest_that_cannot_start_says_why_and_leaves_nothing() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let text = place.file("text", b"no kernel");
    let kernel = place.idle_kernel();
    for (spec, says) in [
        (
            json!({"name": "a", "kernel": "/nonexistent"}),
            "cannot read /nonexistent",
        ),
        (json!({"name": "a", "kernel": text}), "not a Linux kernel"),
        (
            json!({"name": "a", "kernel": kernel, "net": ["tap=nosuchtap0"]}),
            "nosuchtap0",
        ),
        (
            json!({"name": "a", "kernel": kernel, "memory": "8000G"}),
            "this host has",
        ),
        (
            json!({"name": "a", "snapshot": "/nonexistent"}),
            "/nonexistent",
        ),
    ] {
        let answer = service.post("/v1/guests", &spec.to_string());
        answer.problem(422, "cannot_start", says);
    }
    for (spec, says) in [
        (json!({"name": "../a", "kernel": kernel}), "name: "),
        (
            json!({"name": "a", "kernel": "idle"}),
            "kernel: give an absolute",
        ),
        (json!({"name": "a", "kernel": kernel, "vcpus": "2"}), "u8"),
        (
            json!({"name": "a", "kernel": kernel, "vcpu": 2}),
            "unknown field `vcpu`",
        ),
        (
            json!({"name": "a", "kernel": kernel, "serial": "stdio"}),
            "serial: ",
        ),
        (json!([]), ""),
    ] {
        let answer = service.post("/v1/guests", &spec.to_string());
        answer.problem(422, "wrong_values", says);
    }
    assert_eq!(place.left(), ["service.sock"]);
    service.end();
    place.assert_empty();
}

#[test]
fn a_guest_outlives_its_service_and_the_next_one_finds_it() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let spec = spec(&place, "web").to_string();
    let pid = service.post("/v1/guests", &spec).ok(201).json()["pid"].clone();
    // A session of its own: what ends the service's ends no guest.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit_once(')').unwrap().1.split(' ').nth(4).unwrap();
    assert_eq!(session, pid.to_string());
    service.kill();
    assert_eq!(place.status_of("web")["state"], "running");
    let service = Service::start(&place, "");
    let list = service.get("/v1/guests").ok(200).json();
    assert_eq!(list["guests"][0]["status"]["pid"], pid);
    assert_eq!(service.post("/v1/guests", &spec).ok(200).json()["pid"], pid);
    service.end();
    assert_eq!(place.status_of("web")["state"], "running");
    let service = Service::start(&place, "");
    force(&service, "web");
    service.end();
    place.assert_empty();
}

#[test]
fn a_service_that_jails_makes_guests_in_jails_that_see_nothing_of_it() {
    let name =
        "service::creating::a_service_that_jails_makes_guests_in_jails_that_see_nothing_of_it";
    if let Err(why) = cofferdam::sandbox::can_jail() {
        return skipped::skip(name, &format!("this host makes no jails: {why}"));
    }
    let place = Place::new();
    let service = Service::start(&place, "--jail");
    let spec = json!({"name": "web", "kernel": place.idle_kernel(), "memory": "32M"}).to_string();
    let made = service.post("/v1/guests", &spec).ok(201).json();
    let process = made["pid"].as_u64().unwrap();
    let user = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user")).unwrap();
    assert_ne!(user(&process.to_string()), user("self"));
    let root = format!("/proc/{process}/root{}", place.path("run").display());
    let seen = std::fs::read_dir(root).unwrap();
    let seen: Vec<_> = seen.map(|name| name.unwrap().file_name()).collect();
    assert_eq!(seen, ["web"]);
    service.post("/v1/guests", &spec).ok(200);
    service
        .post("/v1/guests/web/marks", r#"{"name":"a"}"#)
        .ok(200);
    service.delete("/v1/guests/web?force=true").ok(200);
    // Where the service has no control group that it may divide.
    let said = service.end_and_hear();
    let mut lines = said.lines();
    let known = "no control groups around guests";
    assert!(lines.all(|line| line.contains(known)), "{said}");
    place.assert_empty();
}
