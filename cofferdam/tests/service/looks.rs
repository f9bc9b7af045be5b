//! What a look at one guest takes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use crate::client::Service;
use crate::common::place::{LIMIT, Place, end};

/// A client that keeps its connection.
struct Looker(BufReader<UnixStream>);

impl Looker {
    fn new(service: &Service) -> Self {
        Self(BufReader::new(service.connect()))
    }

    /// Looks at the guest `idle`.
    fn look(&mut self) {
        let request = b"GET /v1/guests/idle HTTP/1.1\r\nhost: x\r\n\r\n";
        self.0.get_mut().write_all(request).unwrap();
        let (mut length, mut head) = (0, String::new());
        while !head.ends_with("\r\n\r\n") {
            let start = head.len();
            self.0.read_line(&mut head).unwrap();
            if let Some(value) = head[start..].strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
        }
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
    }
}

/// Threads of the service that wait for answers of other processes.
fn waiting(service: &Service) -> usize {
    let process = service.child.as_ref().unwrap().id();
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).ok())
        .filter(|name| name.trim() == "service-ask")
        .count()
}

#[test]
fn a_guest_that_answers_soon_is_looked_at_without_a_thread() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    let mut looker = Looker::new(&service);
    let deadline = Instant::now() + LIMIT;
    // The first look makes the connection, and on a busy machine an answer may be late: threads
    // that this took are gone after a while.
    loop {
        looker.look();
        while waiting(&service) > 0 {
            assert!(Instant::now() < deadline, "threads stay");
            std::thread::sleep(Duration::from_millis(5));
        }
        for _ in 0..20 {
            looker.look();
        }
        if waiting(&service) == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "looks take threads");
    }
    service.end();
    end(&place, vm, &[]);
}

/// Processor time of all threads of a process, in nanoseconds: the first number of `schedstat`
/// (Documentation/scheduler/sched-stats.rst of Linux). One that has ended and was not waited for has
/// it still.
fn processor_ns(process: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let of = |thread: std::io::Result<std::fs::DirEntry>| -> Option<u64> {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    threads.filter_map(of).sum()
}

/// Processor time of a start of `cofferdam status`, in nanoseconds.
fn status_ns(place: &Place) -> u64 {
    let mut command = place.command();
    command.args(["status", "idle", "--json"]);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let pid = Pid::from_child(&child);
    let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(pid), ended).unwrap();
    let taken = processor_ns(child.id());
    assert!(child.wait().unwrap().success());
    taken
}

#[test]
fn a_look_takes_at_most_a_twentieth_of_a_start_of_status() {
    const LOOKS: u64 = 200;
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    let processes = [service.child.as_ref().unwrap().id(), vm.id()];
    let both = || -> u64 { processes.map(processor_ns).iter().sum() };
    let mut looker = Looker::new(&service);
    for _ in 0..20 {
        looker.look();
    }
    // Time of processors, which others that have them meanwhile change less than time that goes by;
    // caches are theirs as well, so that the least of some rounds counts.
    let round = |_| {
        let begun = both();
        for _ in 0..LOOKS {
            looker.look();
        }
        let look = (both() - begun) / LOOKS;
        let mut starts: Vec<_> = (0..7).map(|_| status_ns(&place)).collect();
        starts.sort_unstable();
        (look, starts[3])
    };
    let rounds: Vec<_> = (0..4).map(round).collect();
    eprintln!("a look and a start of status, ns: {rounds:?}");
    let is_so = |(look, status): &(u64, u64)| look * 20 <= *status;
    assert!(rounds.iter().any(is_so), "{rounds:?}");
    service.end();
    end(&place, vm, &[]);
}
