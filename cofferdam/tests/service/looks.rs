//! What a look at one guest takes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

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
