//! Whose the service's socket is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::client::Service;
use crate::common::place::{LIMIT, Place, finish, signal};

/// `serve` with these words must fail with one line that says this.
#[track_caller]
pub fn refused(place: &Place, words: &str, says: &str) {
    let words = words.split_whitespace();
    let output = finish(place.command().arg("serve").args(words).spawn().unwrap());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{error}");
    assert!(error.contains(says), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn a_second_service_is_refused_and_the_first_goes_on() {
    let place = Place::new();
    let service = Service::start(&place, "");
    refused(&place, "", "a service answers at");
    let inode = |path| fs::metadata(path).unwrap();
    let mode = inode(&service.socket).permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    service.get("/v1/guests").ok(200);
    service.end();
    place.assert_empty();
}

#[test]
fn a_socket_that_a_dead_service_left_is_taken_over() {
    let place = Place::new();
    Service::start(&place, "").kill();
    let service = Service::start(&place, "");
    service.get("/v1/guests").ok(200);
    service.end();
    place.assert_empty();
}

#[test]
fn a_socket_that_cannot_be_made_is_refused_in_a_line() {
    let place = Place::new();
    let file = place.file("file", b"x");
    refused(&place, &format!("--socket {file}"), "no socket");
    assert_eq!(fs::read(&file).unwrap(), b"x");
    refused(&place, "--socket /proc/x", "/proc");
    let long = place.path(&"x".repeat(120)).display().to_string();
    refused(&place, &format!("--socket {long}"), "too long");
    let other = place.path("other");
    let _listener = UnixListener::bind(&other).unwrap();
    refused(
        &place,
        &format!("--socket {}", other.display()),
        "answers at",
    );
    refused(&place, "--client-time 0", "1..=3600");
    refused(&place, "--sockte x", "--sockte");
    place.assert_empty();
}

#[test]
fn each_signal_that_asks_for_the_end_leaves_nothing() {
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let place = Place::new();
        let mut service = Service::start(&place, "");
        let _open = service.connect();
        let child = service.child.take().unwrap();
        crate::common::place::signal(&child, number);
        assert!(finish(child).status.success());
        place.assert_empty();
    }
}

#[test]
fn another_user_is_refused_whatever_the_sockets_mode() {
    let place = Place::new();
    let service = Service::start(&place, "");
    for path in [place.path(""), place.path("run")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(&service.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let curl = Command::new("curl")
        .args([
            "-sS",
            "--max-time",
            "20",
            "http://localhost/v1/guests",
            "--unix-socket",
        ])
        .arg(&service.socket)
        .uid(65534)
        .output();
    let name = "service::sockets::another_user_is_refused_whatever_the_sockets_mode";
    match curl {
        Ok(output) => {
            let text = String::from_utf8(output.stdout).unwrap();
            let problem: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(problem["code"], "forbidden", "{text}");
        }
        Err(error) => skipped::skip(
            name,
            &format!("curl cannot be run as another user: {error}"),
        ),
    }
    service.end();
}

/// A request to the service's socket by another user, who is a member of these groups.
fn as_another(service: &Service, gid: u32, groups: &str, words: &[&str]) -> String {
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", &gid.to_string()])
        .args(["--groups", groups])
        .args(["curl", "-sS", "--max-time", "20", "--unix-socket"])
        .arg(&service.socket)
        .args(words)
        .output()
        .unwrap();
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn members_of_a_group_look_and_change_nothing() {
    let name = "service::sockets::members_of_a_group_look_and_change_nothing";
    let mut tried = Command::new("setpriv");
    tried.args(["--reuid", "65534", "curl", "--version"]);
    if !tried.output().is_ok_and(|output| output.status.success()) {
        return skipped::skip(name, "no curl can be run as another user (setpriv)");
    }
    let place = Place::new();
    // As /run is; the runtime folder in it is its owner's alone.
    fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(place.path("run"), fs::Permissions::from_mode(0o700)).unwrap();
    let service = Service::start(&place, "--look-group 4242");
    let vm = place.idle("");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&service.socket), mode(&place.path("run"))),
        (0o660, 0o710)
    );
    // Folders and sockets of guests are as before.
    assert_eq!(mode(&place.path("run/idle")), 0o700);
    let guests = "http://localhost/v1/guests";
    for (gid, groups) in [(4242, "1"), (65534, "1,4242,7")] {
        let list = as_another(&service, gid, groups, &[guests]);
        assert!(list.contains("\"idle\""), "{list}");
        for (method, path) in [
            ("POST", "/idle/pause"),
            ("DELETE", "/idle"),
            ("POST", ""),
            ("PUT", "/idle/isolation/e1000"),
            ("BREW", ""),
        ] {
            let url = format!("{guests}{path}");
            let said = as_another(&service, gid, groups, &["-X", method, &url]);
            assert!(
                said.contains("\"forbidden\"") && said.contains("look"),
                "{method} {path}: {said}"
            );
        }
    }
    // To who is no member the folder is closed, and if it were not the service would refuse.
    let refused = as_another(&service, 65534, "1", &[guests]);
    assert!(!refused.contains("idle"), "{refused}");
    fs::set_permissions(place.path("run"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(&service.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let refused = as_another(&service, 65534, "1", &[guests]);
    assert!(refused.contains("\"forbidden\""), "{refused}");
    assert_eq!(place.status()["state"], "running");
    service.end();
    crate::common::place::end(&place, vm, &[]);
}

#[test]
fn a_group_that_cannot_look_is_refused_in_a_line() {
    let place = Place::new();
    refused(&place, "--look-group no-such-group-here", "no group");
    refused(&place, "--look-group 4294967295", "no group");
    // A folder that is not its owner's alone is left as it is.
    fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o750)).unwrap();
    let folder = place.path("").display().to_string();
    refused(
        &place,
        &format!("--look-group 4242 --socket {folder}/s"),
        "cannot pass through",
    );
    assert!(!place.path("s").exists());
    place.assert_empty();
}

#[test]
fn a_service_without_descriptors_left_answers_again_when_there_are_some() {
    let place = Place::new();
    let script = format!(
        "ulimit -n 40; exec {} serve",
        env!("CARGO_BIN_EXE_cofferdam")
    );
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", &script])
        .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    let mut service = Service {
        child: Some(shell.spawn().unwrap()),
        socket: place.path("run/service.sock"),
    };
    let deadline = std::time::Instant::now() + LIMIT;
    while UnixStream::connect(&service.socket).is_err() {
        assert!(std::time::Instant::now() < deadline, "no service");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    service.get("/v1/guests").ok(200);
    // Those beyond the descriptors wait in the kernel, and nobody hears of them.
    let idle: Vec<_> = (0..60).map(|_| service.connect()).collect();
    let descriptors = format!("/proc/{}/fd", service.child.as_ref().unwrap().id());
    while std::fs::read_dir(&descriptors).unwrap().count() < 40 {
        assert!(std::time::Instant::now() < deadline, "descriptors are left");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(idle);
    service.get("/v1/guests").ok(200);
    let child = service.child.take().unwrap();
    signal(&child, libc::SIGTERM);
    assert!(finish(child).status.success());
    place.assert_empty();
}

/// Pages of files that a process has in memory (proc_pid_status(5)), in KiB.
fn of_files(service: &Service) -> u64 {
    let path = format!("/proc/{}/status", service.child.as_ref().unwrap().id());
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssFile:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse().unwrap()
}

#[test]
fn a_service_that_rests_gives_back_what_requests_have_needed() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let mut most = 0;
    for path in ["/v1/guests", "/metrics", "/openapi.json", "/v1/jobs"] {
        service.get(path).ok(200);
        most = most.max(of_files(&service));
    }
    // How much that is depends on the build.
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        let now = of_files(&service);
        most = most.max(now);
        if now < most / 10 * 7 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{now} KiB of {most}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    service.get("/v1/guests").ok(200);
    service.end();
    place.assert_empty();
}

#[test]
fn a_service_that_is_asked_gives_back_what_requests_have_needed() {
    // It does so every ten seconds as well, which is not what is looked for.
    const SOON: std::time::Duration = std::time::Duration::from_secs(9);
    let paths = ["/v1/guests", "/metrics", "/openapi.json", "/v1/jobs"];
    let mut tried = 0;
    loop {
        let place = Place::new();
        let begun = std::time::Instant::now();
        let service = Service::start(&place, "");
        let (mut most, mut gave) = (of_files(&service), false);
        for path in paths.iter().cycle() {
            service.get(path).ok(200);
            let now = of_files(&service);
            if begun.elapsed() >= SOON {
                break;
            }
            most = most.max(now);
            gave = now < most / 10 * 8;
            if gave {
                break;
            }
        }
        service.end();
        place.assert_empty();
        if gave {
            return;
        }
        // On a machine with much else to do few requests come in this time.
        tried += 1;
        assert!(tried < 3, "{most} KiB are kept");
    }
}
