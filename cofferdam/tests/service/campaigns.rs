//! Campaigns over HTTP: their processes and guests, and what is in their folder. The guests here
//! have no Linux: they boot for ever. A campaign to its end is in `tests/linux/served.rs`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use recovery::campaign::Way;
use recovery::campaign::kind::TrialKind;
use recovery::campaign::plan::Trial;
use recovery::campaign::record::{FORMAT, Header, Record, Run};
use recovery::campaign::verdict::{Detected, Seen, Verdict};
use recovery::campaign::workload::{Steps, Workload};
use serde_json::{Value, json};

use crate::client::Service;
use crate::common::place::{LIMIT, Place};
use crate::scripted::HOSTILE;

/// A campaign of these trials in its file: each crashes natively and escapes when isolated.
pub fn campaign(place: &Place, name: &str, trials: u32) -> String {
    fs::create_dir_all(place.path("campaigns")).unwrap();
    place.file(&format!("campaigns/{name}.jsonl"), text(trials).as_bytes())
}

/// The text of such a file, that of fewer trials at its beginning.
pub fn text(trials: u32) -> String {
    let header = Header {
        campaign: FORMAT,
        workload: Workload::of_driver("dummy").unwrap(),
        kernel: "6.1.0-test".to_owned(),
        seed: 7,
        kinds: vec!["nop".to_owned()],
        contain: isolation::attach::request::Contain::Full,
        steps: Steps::Called,
        twins: 0,
    };
    let mut text = serde_json::to_string(&header).unwrap() + "\n";
    for number in 1..=trials {
        let violation = Some(Detected {
            says: HOSTILE.to_owned(),
            after_ns: Some(1000),
            rollback_ns: u64::from(number),
        });
        let seen = Seen {
            violation,
            ..Seen::default()
        };
        let run = |verdict| Run {
            verdict,
            seen: seen.clone(),
        };
        let runs = [(Way::Native, Verdict::Crash), (Way::Once, Verdict::Escaped)];
        let record = Record {
            trial: Trial {
                number,
                kind: TrialKind::from_name("nop").unwrap(),
                function: "dummy_xmit".to_owned(),
                offset: 9,
                seed: 3,
            },
            says: "left out".to_owned(),
            steps: Vec::new(),
            runs: runs.map(|(way, verdict)| (way, run(verdict))).into(),
            took_ms: 0,
        };
        text += &(serde_json::to_string(&record).unwrap() + "\n");
    }
    text
}

/// A service with a folder for campaigns, and images of a guest that boots for ever.
fn service(place: &Place) -> Service {
    for folder in ["campaigns", "images"] {
        fs::create_dir_all(place.path(folder)).unwrap();
    }
    fs::copy(place.idle_kernel(), place.path("images/vmlinux")).unwrap();
    place.file("images/initrd.cpio", b"none");
    let path = |name: &str| place.path(name).display().to_string();
    let words = format!(
        "--campaigns {} --images {}",
        path("campaigns"),
        path("images")
    );
    Service::start(place, &words)
}

#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "never so: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Folders of the guests of campaigns.
fn guests(place: &Place) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(place.path("run/.campaigns")) else {
        return Vec::new();
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The process of the one guest that there is, and the campaign's.
fn processes(place: &Place) -> (u32, u32) {
    let pid_file = || Some(guests(place).first()?.join("guest/pid"));
    let pid = || fs::read_to_string(pid_file()?).ok()?.trim().parse().ok();
    until("a guest boots", || pid().is_some());
    let guest: u32 = pid().unwrap();
    let stat = fs::read_to_string(format!("/proc/{guest}/stat")).unwrap();
    let parent = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1);
    (guest, parent.unwrap().parse().unwrap())
}

fn is_there(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.trim_start().to_owned());
    state.is_some_and(|state| !state.starts_with('Z'))
}

const SPEC: &str = r#"{"name": "few", "driver": "dummy", "trials": 3}"#;

#[test]
fn a_campaign_that_is_given_up_ends_with_its_guests_and_leaves_nothing() {
    let place = Place::new();
    let service = service(&place);
    let begun = service.post("/v1/campaigns", SPEC).ok(202);
    let job = begun.json();
    assert_eq!(job["campaign"], "few", "{job}");
    assert!(job["guest"].is_null(), "{job}");
    let id = job["id"].as_str().unwrap().to_owned();
    until("it tells what it does", || {
        let job = service.get(&format!("/v1/jobs/{id}")).json();
        job["progress"][0] == "booting a guest"
    });
    let (guest, campaign) = processes(&place);
    // It is in the list, which has no file of it yet.
    let list = service.get("/v1/campaigns").ok(200).json();
    let listed = json!({"name": "few", "bytes": 0, "job": id});
    assert_eq!(list["campaigns"], json!([listed]));
    // It is no guest of the service's.
    assert_eq!(service.get("/v1/guests").json()["guests"], json!([]));
    // Asked for once more it is the same one, and another one of its name is refused.
    assert_eq!(
        service.post("/v1/campaigns", SPEC).ok(202).json()["id"],
        job["id"]
    );
    let other = SPEC.replace('3', "4");
    service
        .post("/v1/campaigns", &other)
        .problem(409, "other_spec", "few");
    let shown = service.get("/v1/campaigns/few").ok(200).json();
    assert_eq!((&shown["job"], &shown["bytes"]), (&job["id"], &json!(0)));
    service.delete(&format!("/v1/jobs/{id}")).ok(202);
    let ended = service.end_of_job(&begun);
    assert_eq!(ended["problem"]["code"], "cancelled", "{ended}");
    assert!(!is_there(guest) && !is_there(campaign));
    assert!(guests(&place).is_empty(), "{:?}", guests(&place));
    assert_eq!(fs::read_dir(place.path("campaigns")).unwrap().count(), 0);
    service
        .get("/v1/campaigns/few")
        .problem(404, "no_such_campaign", "few");
    service.end();
    place.assert_empty();
}

#[test]
fn a_campaign_ends_with_its_service_and_guests_with_their_campaign_whoever_is_killed() {
    let place = Place::new();
    let first = service(&place);
    first.post("/v1/campaigns", SPEC).ok(202);
    let (guest, campaign) = processes(&place);
    first.kill();
    until("the campaign has ended", || {
        !is_there(campaign) && !is_there(guest)
    });
    assert!(guests(&place).is_empty(), "{:?}", guests(&place));
    let next = service(&place);
    let begun = next.post("/v1/campaigns", SPEC).ok(202);
    let (guest, campaign) = processes(&place);
    // SAFETY: a plain system call; the process is a child of the service that runs.
    let killed = unsafe { libc::kill(campaign.cast_signed(), libc::SIGKILL) };
    assert_eq!(killed, 0);
    let ended = next.end_of_job(&begun);
    assert_eq!(ended["problem"]["code"], "campaign_failed", "{ended}");
    until("its guest has ended", || !is_there(guest));
    // What it could not remove goes with the next.
    assert_eq!(guests(&place).len(), 1);
    let left = guests(&place).remove(0);
    let begun = next.post("/v1/campaigns", SPEC).ok(202);
    until("what was left is gone", || !left.exists());
    let id = begun.json()["id"].as_str().unwrap().to_owned();
    next.delete(&format!("/v1/jobs/{id}")).ok(202);
    next.end_of_job(&begun);
    next.end();
    place.assert_empty();
}

/// The command, with images of a guest that boots for ever.
fn command(place: &Place) -> std::process::Command {
    let kernel = place.idle_kernel();
    fs::create_dir(place.path("images")).unwrap();
    fs::create_dir(place.path("run/.campaigns")).unwrap();
    fs::copy(kernel, place.path("images/vmlinux")).unwrap();
    place.file("images/initrd.cpio", b"none");
    let mut command = place.command();
    command
        .args(["campaign", "--driver", "dummy", "--images"])
        .arg(place.path("images"))
        .arg("--file")
        .arg(place.path("few.jsonl"))
        .env("TMPDIR", place.path("run/.campaigns"));
    command
}

#[test]
fn a_campaign_that_is_asked_to_end_in_two_ways_ends_its_guests_first() {
    let place = Place::new();
    let mut command = command(&place);
    command.arg("--stream").stdin(std::process::Stdio::piped());
    let mut campaign = command.spawn().unwrap();
    let (guest, _) = processes(&place);
    // It does not end when it is asked, and is killed after a while.
    // SAFETY: a plain system call; the process is a child of the campaign, which runs.
    let stopped = unsafe { libc::kill(guest.cast_signed(), libc::SIGSTOP) };
    assert_eq!(stopped, 0);
    drop(campaign.stdin.take());
    crate::common::place::signal(&campaign, libc::SIGTERM);
    crate::common::place::finish(campaign);
    let is_left = is_there(guest);
    if is_left {
        // SAFETY: a plain system call; it is there, and was a child of the campaign.
        unsafe { libc::kill(guest.cast_signed(), libc::SIGKILL) };
    }
    assert!(!is_left, "the guest outlived its campaign");
    assert!(guests(&place).is_empty(), "{:?}", guests(&place));
}

#[test]
fn a_campaign_that_is_asked_to_end_by_a_signal_ends_its_guests_first() {
    use std::os::unix::process::ExitStatusExt;
    let place = Place::new();
    let campaign = command(&place).spawn().unwrap();
    let (guest, _) = processes(&place);
    crate::common::place::signal(&campaign, libc::SIGTERM);
    let output = crate::common::place::finish(campaign);
    assert_eq!(output.status.signal(), Some(libc::SIGTERM), "{output:?}");
    assert!(!is_there(guest));
    assert!(guests(&place).is_empty(), "{:?}", guests(&place));
    assert!(!place.path("few.jsonl").exists());
}

#[test]
fn what_no_campaign_can_be_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let without = Service::start(&place, "");
    for path in ["/v1/campaigns", "/v1/campaigns/few"] {
        without.get(path).problem(409, "refused", "--campaigns");
    }
    without
        .post("/v1/campaigns", SPEC)
        .problem(409, "refused", "--campaigns");
    without.end();
    let service = service(&place);
    for (spec, says) in [
        (json!({"name": "../few"}), "name: "),
        (json!({"name": "few", "trials": 100_001}), "100000"),
        (json!({"name": "few", "jobs": 17}), "jobs: "),
        (json!({"name": "few", "kinds": ["gremlin"]}), "missing_call"),
        (json!({"name": "few", "workload": "w.toml"}), "absolute"),
        (
            json!({"name": "few", "file": "/etc/passwd"}),
            "unknown field",
        ),
        (json!([]), ""),
    ] {
        let answer = service.post("/v1/campaigns", &spec.to_string());
        answer.problem(422, "wrong_values", says);
    }
    campaign(&place, "mine", 2);
    place.file("campaigns/old.jsonl", b"{\"campaign\":1}\n");
    fs::create_dir(place.path("campaigns/folder.jsonl")).unwrap();
    place.file("campaigns/workload.toml", b"driver = 7\n");
    let workload = place.path("campaigns/workload.toml").display().to_string();
    let outside = place.file("outside", b"");
    std::os::unix::fs::symlink(&outside, place.path("campaigns/link.jsonl")).unwrap();
    let fifo = place.path("campaigns/fifo.jsonl");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    for (spec, says) in [
        (
            json!({"name": "few", "images": "/nonexistent"}),
            "/nonexistent/vmlinux",
        ),
        (json!({"name": "mine"}), "another campaign"),
        (json!({"name": "old"}), "format 1"),
        (json!({"name": "folder"}), "folder.jsonl"),
        (json!({"name": "link"}), "link.jsonl"),
        (json!({"name": "fifo"}), "fifo.jsonl"),
        (
            json!({"name": "few", "workload": workload}),
            "workload.toml",
        ),
    ] {
        let answer = service.post("/v1/campaigns", &spec.to_string());
        answer.problem(422, "campaign_failed", says);
    }
    assert!(!place.path("campaigns/few.jsonl").exists());
    service.end();
    place.assert_empty();
    // A folder that nobody writes in is refused before a guest is booted for nothing.
    let images = place.path("images").display().to_string();
    let service = Service::start(
        &place,
        &format!("--campaigns /sys/kernel --images {images}"),
    );
    let answer = service.post("/v1/campaigns", SPEC);
    answer.problem(422, "campaign_failed", "/sys/kernel/few.jsonl");
    service.end();
    place.assert_empty();
}

/// Puts all that may be there into the folder, and gives the one whole file.
fn fill(place: &Place) -> String {
    let file = campaign(place, "mine", 3);
    campaign(place, "cut", 2);
    let cut = fs::read(place.path("campaigns/cut.jsonl")).unwrap();
    place.file("campaigns/cut.jsonl", &cut[..cut.len() - 20]);
    place.file("campaigns/empty.jsonl", b"");
    place.file("campaigns/old.jsonl", b"{\"campaign\":1}\n");
    place.file("campaigns/no text.jsonl", b"");
    place.file("campaigns/other", b"x");
    fs::create_dir(place.path("campaigns/folder.jsonl")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", place.path("campaigns/link.jsonl")).unwrap();
    let fifo = place.path("campaigns/fifo.jsonl");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let huge = fs::File::create(place.path("campaigns/huge.jsonl")).unwrap();
    huge.set_len((256 << 20) + 1).unwrap();
    file
}

#[test]
fn files_of_campaigns_are_shown_whatever_else_is_in_their_folder() {
    let place = Place::new();
    let service = service(&place);
    let file = fill(&place);
    let list = service.get("/v1/campaigns").ok(200).json();
    let campaigns = list["campaigns"].as_array().unwrap();
    let names: Vec<_> = campaigns.iter().map(|one| one["name"].as_str()).collect();
    let expected = [
        "cut", "empty", "fifo", "folder", "huge", "link", "mine", "old",
    ];
    assert_eq!(names, expected.map(Some));
    for one in campaigns {
        let name = one["name"].as_str().unwrap();
        let is_one = ["cut", "mine", "empty"].contains(&name);
        assert_eq!(one["unreadable"].is_null(), is_one, "{one}");
        let answer = service.get(&format!("/v1/campaigns/{name}"));
        match is_one {
            true => drop(answer.ok(200)),
            false => answer.problem(409, "refused", name),
        }
    }
    assert_eq!(campaigns[6]["what"]["driver"], "dummy");
    let shown = service.get("/v1/campaigns/mine").ok(200).json();
    let by_command: Value =
        serde_json::from_str(&place.ask(&format!("campaign show {file} --json"))).unwrap();
    assert_eq!(shown["summary"], by_command);
    assert_eq!(shown["summary"]["to_look_at"]["escaped"], json!([1, 2, 3]));
    let cut = service.get("/v1/campaigns/cut").ok(200).json();
    assert_eq!(cut["summary"]["trials"], 1, "the last line is cut off");
    for plot in shown["plots"].as_array().unwrap() {
        let plot = plot.as_str().unwrap();
        let drawn = service
            .get(&format!("/v1/campaigns/mine/plots/{plot}"))
            .ok(200);
        assert!(drawn.text.starts_with("<svg"), "{drawn:?}");
        assert!(
            drawn.head.contains("content-type: image/svg+xml"),
            "{drawn:?}"
        );
        assert!(drawn.head.contains("sandbox"), "{drawn:?}");
    }
    assert_eq!(shown["plots"].as_array().unwrap().len(), 5);
    let trial = service.get("/v1/campaigns/mine/trials/2").ok(200).json();
    assert_eq!(trial["runs"]["once"]["verdict"], "escaped");
    for (path, code) in [
        ("/v1/campaigns/mine/trials/4", "no_such_trial"),
        ("/v1/campaigns/mine/plots/other.svg", "no_such_trial"),
        ("/v1/campaigns/nosuch", "no_such_campaign"),
        ("/v1/campaigns/nosuch/trials/1", "no_such_campaign"),
        (
            "/v1/campaigns/nosuch/plots/latencies.svg",
            "no_such_campaign",
        ),
    ] {
        service.get(path).problem(404, code, "");
    }
    for path in ["..%2Frun%2Fx", "..", "a%2Fb", "a%00", "-x"] {
        let answer = service.get(&format!("/v1/campaigns/{path}"));
        assert!(matches!(answer.status, 400 | 404), "{path}: {answer:?}");
    }
    service.end();
    place.assert_empty();
}

/// A replay is a job of a process of its own, which has no guest with Linux to boot here.
#[test]
fn a_trial_that_is_made_again_leaves_its_file_as_it_is() {
    let place = Place::new();
    let service = service(&place);
    let file = campaign(&place, "mine", 3);
    service
        .post("/v1/campaigns/mine/trials/4/replay", "{}")
        .problem(404, "no_such_trial", "4");
    let images = r#"{"images": "/nonexistent"}"#;
    service
        .post("/v1/campaigns/mine/trials/2/replay", images)
        .problem(422, "campaign_failed", "/nonexistent");
    let before = fs::read(Path::new(&file)).unwrap();
    let begun = service
        .post("/v1/campaigns/mine/trials/2/replay", "{}")
        .ok(202);
    processes(&place);
    let id = begun.json()["id"].as_str().unwrap().to_owned();
    service.delete(&format!("/v1/jobs/{id}")).ok(202);
    assert_eq!(service.end_of_job(&begun)["problem"]["code"], "cancelled");
    assert_eq!(fs::read(Path::new(&file)).unwrap(), before);
    service.end();
    place.assert_empty();
}
