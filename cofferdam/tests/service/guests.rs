//! Guests of this host's KVM, asked over HTTP.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::Service;
use crate::common::place::{LIMIT, Place, end, finish, signal};

#[test]
fn a_guest_is_looked_at_held_and_reset() {
    let place = Place::new();
    let service = Service::start(&place, "");
    assert_eq!(
        service.get("/v1/guests").ok(200).json(),
        json!({"guests": []})
    );
    let vm = place.idle("");
    let status = service.get("/v1/guests/idle").ok(200).json();
    assert_eq!(status["name"], "idle");
    assert_eq!(status["pid"], vm.id());
    for (word, state) in [("pause", "paused"), ("resume", "running")] {
        for _ in 0..2 {
            let path = format!("/v1/guests/idle/{word}");
            assert_eq!(service.ask("POST", &path, None).ok(204).text, "");
            assert_eq!(place.status()["state"], state);
        }
    }
    service
        .ask("POST", "/v1/guests/idle/power-button", None)
        .ok(204);
    service.ask("POST", "/v1/guests/idle/reset", None).ok(204);
    let deadline = std::time::Instant::now() + LIMIT;
    while service.get("/v1/guests/idle").json()["resets"] != 1 {
        assert!(std::time::Instant::now() < deadline);
    }
    let list = service.get("/v1/guests").ok(200).json();
    assert_eq!(list["guests"][0]["status"]["resets"], 1, "{list}");
    service.end();
    end(&place, vm, &[]);
}

/// How many connections to its control socket a process serves.
fn served(process: u32) -> usize {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).ok())
        .filter(|name| name.trim() == "control-client")
        .count()
}

#[test]
fn looks_at_a_guest_share_a_connection_and_see_who_has_its_name_now() {
    let place = Place::new();
    let service = Service::start(&place, "");
    for _ in 0..2 {
        let vm = place.idle("");
        for _ in 0..3 {
            let status = service.get("/v1/guests/idle").ok(200).json();
            assert_eq!(status["pid"], vm.id());
            // Who looked before may be about to go; a connection that is not kept leaves none.
            let until = Instant::now() + Duration::from_secs(60);
            while served(vm.id()) != 1 {
                assert!(Instant::now() < until, "{}", served(vm.id()));
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        end(&place, vm, &["service.sock"]);
        let gone = service.get("/v1/guests/idle");
        gone.problem(404, "no_such_guest", "idle");
    }
    service.end();
}

/// Resident memory of a process's mappings whose heads have `word` in them, in KiB.
fn resident(process: u32, word: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut counts, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next().unwrap().strip_suffix(':') {
            None => counts = line.contains(word),
            Some("Rss") if counts => sum += words.next().unwrap().parse::<u64>().unwrap(),
            Some(_) => {}
        }
    }
    sum
}

#[test]
fn memory_of_a_guest_is_what_the_kernel_counts_of_its_mappings_however_these_are_made() {
    /// The process goes on meanwhile, and kernels count by processor (proc_pid_status(5)), in KiB.
    const NEARLY: u64 = 2048;
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("--memory 32M");
    let dir = place.path("saved").display().to_string();
    place.ask(&format!("snapshot idle {dir}"));
    let log = place.path("log").display().to_string();
    let words = format!("run --snapshot {dir} --name copy --lazy --serial file={log}");
    let copy = place.command().args(words.split(' ')).spawn().unwrap();
    place.wait_for("copy");
    for (name, process, mapped) in [
        ("idle", vm.id(), "cofferdam-guest"),
        ("copy", copy.id(), dir.as_str()),
    ] {
        let said = service.get(&format!("/v1/guests/{name}")).ok(200).json();
        let (guest, all) = (resident(process, mapped), resident(process, ""));
        let (of_guest, own) = (&said["guest_rss_kib"], &said["vmm_rss_kib"]);
        let (of_guest, own) = (of_guest.as_u64().unwrap(), own.as_u64().unwrap());
        assert!(guest > 0, "{name}");
        assert!(of_guest.abs_diff(guest) <= NEARLY, "{said}: {guest}");
        assert!((of_guest + own).abs_diff(all) <= NEARLY, "{said}: {all}");
    }
    service.end();
    end(&place, copy, &["idle"]);
    end(&place, vm, &[]);
}

#[test]
fn a_guest_that_is_stopped_holds_up_nobody_and_can_be_ended_by_force() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let other = place.idle("");
    let mut stopped = place.start("still", &place.idle_kernel(), "");
    signal(&stopped, libc::SIGSTOP);
    let list = service.get("/v1/guests").ok(200).json();
    assert_eq!(list["guests"][0]["status"]["state"], "running", "{list}");
    assert_eq!(list["guests"][1]["name"], "still");
    let why = list["guests"][1]["no_answer"].as_str().unwrap();
    assert!(why.contains("its process is stopped"), "{why}");
    let kill = format!("kill -CONT {}", stopped.id());
    let silent = service.get("/v1/guests/still");
    silent.problem(504, "no_answer", &kill);
    service.get("/v1/guests/idle").ok(200);
    let metrics = service.get("/metrics").ok(200).text;
    assert!(
        metrics.contains("cofferdam_guests{state=\"no_answer\"} 1"),
        "{metrics}"
    );
    let mut forced = service.delete("/v1/guests/still?force=true");
    if forced.status == 202 {
        forced.text = service.end_of_job(&forced)["result"].to_string();
    }
    let why = forced.json()["killed"].as_str().unwrap().to_owned();
    assert!(why.contains("stopped"), "{why}");
    stopped.wait().unwrap();
    service.end();
    end(&place, other, &[]);
}

#[test]
fn marks_are_set_shown_gone_back_to_and_forgotten() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("--memory 32M");
    let marks = "/v1/guests/idle/marks";
    let rewind = "/v1/guests/idle/rewind";
    service
        .post(rewind, "{}")
        .problem(409, "refused", "has no mark");
    assert_eq!(
        service.post(marks, r#"{"name":"a"}"#).ok(200).json()["name"],
        "a"
    );
    let second = service.post(marks, r#"{"name":"b"}"#).ok(200).json();
    assert_eq!(second["parent"], "a");
    service
        .post(marks, r#"{"name":"b"}"#)
        .problem(409, "refused", "already");
    let back = service.post(rewind, r#"{"name":"a"}"#).ok(200).json();
    assert_eq!(back["mark"], "a");
    service
        .delete(&format!("{marks}/c"))
        .problem(404, "no_such_mark", "c");
    let left = service.delete(&format!("{marks}/b")).ok(200).json();
    assert_eq!(left["marks"][0]["name"], "a");
    assert_eq!(left["marks"].as_array().unwrap().len(), 1);
    assert_eq!(service.get(marks).ok(200).json(), left);
    for wrong in [
        r#"{"name":"../x"}"#,
        r#"{"name":7}"#,
        "{}",
        r#"{"name":"a","x":1}"#,
    ] {
        service.post(marks, wrong).problem(422, "wrong_values", "");
    }
    service.end();
    end(&place, vm, &[]);
}

#[test]
fn a_snapshot_is_a_job_with_progress_and_a_result() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("--memory 32M");
    let dir = place.path("snapshot").display().to_string();
    let spec = json!({"dir": dir}).to_string();
    let begun = service.post("/v1/guests/idle/snapshot", &spec);
    let job = service.end_of_job(&begun);
    assert_eq!(job["stage"], "done", "{job}");
    assert_eq!(job["guest"], "idle");
    assert!(!job["progress"].as_array().unwrap().is_empty(), "{job}");
    assert_eq!(job["result"]["diff"], false);
    place.ask(&format!("snapshot check {dir}"));
    let again = service.post("/v1/guests/idle/snapshot", &spec);
    let job = service.end_of_job(&again);
    assert_eq!(job["stage"], "failed");
    assert_eq!(job["problem"]["code"], "refused");
    let jobs = service.get("/v1/jobs").ok(200).json();
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 2);
    let id = job["id"].as_str().unwrap();
    service
        .delete(&format!("/v1/jobs/{id}"))
        .problem(409, "refused", "ended");
    service
        .post("/v1/guests/idle/snapshot", r#"{"dir":"here"}"#)
        .problem(422, "wrong_values", "absolute");
    service.get("/v1/jobs/none").problem(404, "no_such_job", "");
    service.end();
    end(&place, vm, &[]);
}

#[test]
fn a_nic_is_disturbed_and_works_again() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("--net user --net user,nic=virtio");
    let path = "/v1/guests/idle/disturbances";
    let list = |query: &str| {
        let list = service.get(&format!("{path}{query}")).ok(200).json();
        list["disturbances"].as_array().unwrap().clone()
    };
    assert!(list("").is_empty());
    let order = r#"{"nic":"1","order":{"kind":"link_flap"}}"#;
    let done = service.post(path, order).ok(200).json();
    assert_eq!(done["nic"], "0000:00:03.0");
    service
        .post(path, r#"{"order":{"kind":"removed"}}"#)
        .problem(409, "refused", "0000:00:03.0");
    for wrong in [
        r#"{"nic":"0","order":{"kind":"gremlin"}}"#,
        r#"{"nic":"0","order":{"kind":"load_ones","bar":6}}"#,
        r#"{"nic":0,"order":{"kind":"removed"}}"#,
        r#"{"nic":"0","order":{"kind":"removed","colour":"red"}}"#,
    ] {
        service.post(path, wrong).problem(422, "wrong_values", "");
    }
    assert_eq!(list("?nic=1").len(), 1);
    assert!(list("?nic=0").is_empty());
    service
        .get(&format!("{path}?nci=0"))
        .problem(400, "malformed", "nci");
    service
        .delete(&format!("{path}?nic=1&number=7"))
        .problem(409, "refused", "no disturbance 7");
    let undone = service.delete(path).ok(200).json();
    assert_eq!(undone["disturbances"].as_array().unwrap().len(), 1);
    assert!(list("").is_empty());
    service.end();
    end(&place, vm, &[]);
}

#[test]
fn a_guest_is_asked_to_shut_down_and_waited_for() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    // It listens for nothing: a job waits for it, and for its end by other means.
    let begun = service.delete("/v1/guests/idle");
    assert_eq!(begun.status, 202, "{begun:?}");
    let id = begun.json()["id"].as_str().unwrap().to_owned();
    service
        .delete(&format!("/v1/jobs/{id}"))
        .problem(409, "refused", "cannot be given up");
    place.ask("stop idle --force");
    let job = service.end_of_job(&begun);
    assert_eq!(
        (&job["stage"], &job["result"]),
        (&json!("done"), &json!({})),
        "{job}"
    );
    assert!(finish(vm).status.success());
    service
        .get("/v1/guests/idle")
        .problem(404, "no_such_guest", "idle");
    service.end();
    place.assert_empty();
}

#[test]
fn a_nic_comes_and_only_one_that_came_can_go() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("--net user");
    let nics = "/v1/guests/idle/nics";
    let plugged = service.post(nics, r#"{"net":"user,nic=virtio"}"#).ok(200);
    assert_eq!(plugged.json()["address"], "0000:00:03.0");
    let shown = service.get("/v1/guests/idle").ok(200).json();
    assert_eq!(shown["nics"].as_array().unwrap().len(), 2);
    for wrong in [
        "{}",
        r#"{"net":"user","nic":"device=lan"}"#,
        r#"{"net":"carrier-pigeon"}"#,
        r#"{"net":"unix=here"}"#,
        r#"{"nics":"user"}"#,
    ] {
        service.post(nics, wrong).problem(422, "wrong_values", "");
    }
    for (address, status, code) in [
        ("0000:00:02.0", 409, "refused"),
        ("0000:00:1f.0", 409, "refused"),
        ("somewhere", 400, "malformed"),
    ] {
        let answer = service.delete(&format!("{nics}/{address}"));
        answer.problem(status, code, "");
    }
    service.end();
    end(&place, vm, &[]);
}
