//! The wall clock jumps by years, back and forth, while the service and its guests run.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Listener, Service, answer};
use crate::common::place::{LIMIT, Place};

/// Twenty years, in seconds.
const YEARS: i64 = 20 * 365 * 86400;

/// Between two jumps: shorter than anything that is waited for.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the service lets a client take.
const CLIENT_TIME: Duration = Duration::from_secs(2);

/// A wall clock that the test sets, and the library that gives it to a process.
struct Clock {
    library: std::path::PathBuf,
    file: std::path::PathBuf,
}

impl Clock {
    /// Why there is none otherwise.
    fn new(place: &Place) -> Result<Self, String> {
        let library = place.path("jumping.so");
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/service/jumping.c"
            ))
            .arg("-ldl")
            .output()
            .map_err(|error| format!("there is no C compiler: {error}"))?;
        if !made.status.success() {
            let said = String::from_utf8_lossy(&made.stderr);
            return Err(format!("the C compiler makes none: {said}"));
        }
        let file = place.path("jump");
        std::fs::write(&file, [0; 16]).unwrap();
        Ok(Self { library, file })
    }

    fn give(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("JUMP_FILE", &self.file);
    }

    /// Sets it so many seconds off.
    fn set(&self, off: i64) {
        let file = std::fs::File::options()
            .write(true)
            .open(&self.file)
            .unwrap();
        file.write_all_at(&off.to_le_bytes(), 0).unwrap();
    }

    /// How often it was asked for.
    fn asked(&self) -> u64 {
        let mut count = [0; 8];
        let file = std::fs::File::open(&self.file).unwrap();
        file.read_exact_at(&mut count, 8).unwrap();
        u64::from_le_bytes(count)
    }
}

/// Uptimes of a guest as the service tells them: they grow, and by no more than time that passed.
fn uptimes_grow(service: &Service, begun: Instant) {
    let mut before = 0;
    for _ in 0..40 {
        let status = service.get("/v1/guests/web").ok(200).json();
        let passed = u64::try_from(begun.elapsed().as_millis()).unwrap();
        let now = status["uptime_ms"].as_u64().unwrap();
        assert!(
            before <= now && now <= passed,
            "{before}, {now} of {passed}"
        );
        before = now;
        std::thread::sleep(PAUSE / 4);
    }
    let metrics = service.get("/metrics").ok(200).text;
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("cofferdam_guest_uptime_seconds{guest=\"web\"} "));
    let told: u64 = line.unwrap().parse().unwrap();
    assert!(
        told >= before / 1000 && told <= begun.elapsed().as_secs(),
        "{told}"
    );
}

/// A request whose body comes in two halves is taken; one whose second half does not come is
/// refused, and not before its time.
fn clients_have_their_time(service: &Service) {
    let head = "POST /v1/guests/web/marks HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
        content-type: application/json\r\ncontent-length: 12\r\n\r\n{\"name\"";
    let mut stream = service.connect();
    stream.write_all(head.as_bytes()).unwrap();
    std::thread::sleep(PAUSE * 10);
    stream.write_all(b":\"x\"}").unwrap();
    answer(stream).ok(200);
    let begun = Instant::now();
    let mut stream = service.connect();
    stream.write_all(head.as_bytes()).unwrap();
    answer(stream).problem(408, "slow_request", "2s");
    assert!(begun.elapsed() >= CLIENT_TIME);
}

fn all_is_as_if_the_clock_went_right(place: &Place, clock: &Clock, service: &Service) {
    let begun = Instant::now();
    let spec = json!({"name": "web", "kernel": place.idle_kernel(), "memory": "32M"});
    service.post("/v1/guests", &spec.to_string()).ok(201);
    let mut listener = Listener::new(service);
    assert_eq!(listener.next()["event"], "now");
    uptimes_grow(service, begun);
    clients_have_their_time(service);
    for (how, state) in [("pause", "paused"), ("resume", "running")] {
        let path = format!("/v1/guests/web/{how}");
        service.ask("POST", &path, None).ok(204);
        assert_eq!(listener.until("guest_state")["state"], state);
    }
    // A look from outside, with rates, in a process whose clock jumps, too.
    let mut top = place.command();
    clock.give(&mut top);
    let frame = top
        .args(["top", "--once", "--interval", "0.2"])
        .output()
        .unwrap();
    let frame = String::from_utf8(frame.stdout).unwrap();
    assert!(
        frame.contains("web") && frame.contains("running"),
        "{frame}"
    );
    // What is a time of day is that of the clock, as it is: twenty years off.
    let dir = place.path("snapshot").display().to_string();
    let asked = json!({"dir": dir}).to_string();
    let job = service.end_of_job(&service.post("/v1/guests/web/snapshot", &asked));
    assert_eq!(job["stage"], "done", "{job}");
    let manifest = std::fs::read(place.path("snapshot/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let told = manifest["manifest"]["created_unix_s"].as_i64().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let off = told - i64::try_from(now.unwrap().as_secs()).unwrap();
    assert!(
        off.abs() > YEARS / 2,
        "the guest's clock does not jump: {manifest}"
    );
    service.delete("/v1/guests/web?force=true").ok(200);
    assert_eq!(listener.until("guest_gone")["guest"], "web");
}

#[test]
fn a_wall_clock_that_jumps_by_years_changes_no_wait_no_rate_and_no_uptime() {
    let name =
        "service::clock::a_wall_clock_that_jumps_by_years_changes_no_wait_no_rate_and_no_uptime";
    let place = Place::new();
    let clock = match Clock::new(&place) {
        Ok(clock) => clock,
        Err(why) => return skipped::skip(name, &why),
    };
    let mut command = place.command();
    clock.give(&mut command);
    command.env("RUST_LOG", "info");
    clock.set(YEARS);
    let words = format!("--client-time {}", CLIENT_TIME.as_secs());
    let service = Service::start_by(command, &place, &words);
    let over = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            for off in [-YEARS, YEARS].into_iter().cycle() {
                clock.set(off);
                std::thread::sleep(PAUSE);
                if over.load(Ordering::Relaxed) || begun.elapsed() > LIMIT * 4 {
                    return;
                }
            }
        });
        // The other thread is to end also where this fails.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            all_is_as_if_the_clock_went_right(&place, &clock, &service);
        }));
        over.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|why| std::panic::resume_unwind(why));
        clock.asked()
    });
    assert!(asked > 0, "nobody has asked for the time");
    let said = service.end_and_hear();
    let year = said
        .split('-')
        .next()
        .and_then(|year| year.parse::<u32>().ok());
    let off = year.is_some_and(|year| !(2016..2036).contains(&year));
    assert!(off, "its clock does not jump: {said}");
}
