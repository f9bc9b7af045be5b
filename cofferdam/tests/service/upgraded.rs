//! The service's program is replaced by another build while it runs, the old service ends, however
//! that comes, and one of the new build takes its place.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{Listener, Service};
use crate::common::place::{Place, finish, signal};
use crate::devices::host;

/// A copy of the program: the same but for bytes behind its end, which nobody reads.
fn build(place: &Place, name: &str) -> PathBuf {
    let path = place.path(name);
    std::fs::copy(env!("CARGO_BIN_EXE_cofferdam"), &path).unwrap();
    let mut file = std::fs::File::options().append(true).open(&path).unwrap();
    file.write_all(name.as_bytes()).unwrap();
    path
}

/// The program that is installed in `place`, as a command.
fn installed(place: &Place, program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
        .env_remove("RUST_LOG")
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped());
    command
}

/// The file of the program that a process runs.
fn program_of(pid: &Value) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

#[test]
fn guests_and_device_hosts_are_found_again_after_an_upgrade_of_the_service() {
    for number in [libc::SIGTERM, libc::SIGKILL] {
        let place = Place::new();
        let program = build(&place, "cofferdam");
        let old = Service::start_by(installed(&place, &program), &place, "");
        let make = |service: &Service, name: &str| {
            let spec = json!({"name": name, "kernel": place.idle_kernel(), "memory": "32M"});
            service.post("/v1/guests", &spec.to_string()).ok(201).json()
        };
        let web = make(&old, "web");
        let device = host(&place);
        let mut listener = Listener::new(&old);
        assert_eq!(listener.next()["guests"], json!({"web": "running"}));
        // Put in its place at once, as packages do.
        std::fs::rename(build(&place, "next"), &program).unwrap();
        // The old service still makes guests, of its own build.
        let late = make(&old, "late");
        assert_eq!(listener.until("guest_appeared")["guest"], "late");
        let gone = program_of(&late["pid"]).display().to_string();
        assert!(gone.ends_with(" (deleted)"), "{gone}");
        let dir = place.path("snapshot").display().to_string();
        let begun = old.post("/v1/guests/web/snapshot", &json!({"dir": dir}).to_string());
        let job = old.end_of_job(&begun);
        assert_eq!(job["stage"], "done", "{job}");
        match number {
            libc::SIGTERM => old.end(),
            _ => old.kill(),
        }
        listener.ends();
        let new = Service::start_by(installed(&place, &program), &place, "");
        let service = json!(new.child.as_ref().unwrap().id());
        assert_eq!(program_of(&service), program);
        // Nothing of them has changed, and they do what the new one asks.
        let mut listener = Listener::new(&new);
        let now = listener.next();
        assert_eq!(now["guests"], json!({"late": "running", "web": "running"}));
        assert_eq!(now["devices"], json!({"nic0": null}));
        for made in [&web, &late] {
            let path = format!("/v1/guests/{}", made["name"].as_str().unwrap());
            let found = new.get(&path).ok(200).json();
            assert_eq!((&found["pid"], &found["resets"]), (&made["pid"], &json!(0)));
            new.ask("POST", &format!("{path}/pause"), None).ok(204);
            let event = listener.until("guest_state");
            assert_eq!(
                (&event["guest"], &event["state"]),
                (&made["name"], &json!("paused"))
            );
            new.ask("POST", &format!("{path}/resume"), None).ok(204);
        }
        // To ask for what is there already changes nothing; a snapshot that was done is there.
        let spec = json!({"name": "web", "kernel": place.idle_kernel(), "memory": "32M"});
        let again = new.post("/v1/guests", &spec.to_string()).ok(200).json();
        assert_eq!(again["pid"], web["pid"]);
        place.ask(&format!("snapshot check {dir}"));
        // Jobs were the old one's, and are said not to be there.
        let id = job["id"].as_str().unwrap();
        new.get(&format!("/v1/jobs/{id}"))
            .problem(404, "no_such_job", "");
        let third = make(&new, "third");
        assert_eq!(program_of(&third["pid"]), program);
        for name in ["web", "late", "third"] {
            new.delete(&format!("/v1/guests/{name}?force=true")).ok(200);
        }
        signal(&device, libc::SIGTERM);
        finish(device);
        new.end();
        assert!(
            place.left().iter().all(|name| name == ".devices"),
            "{:?}",
            place.left()
        );
    }
}
