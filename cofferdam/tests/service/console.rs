//! The console of a guest, read and typed into over HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use cofferdam::runtime_dir::RuntimeRoot;
use serde_json::json;

use crate::client::Service;
use crate::common::place::{LIMIT, Place};
use crate::common::{ECHO_CODE, EM_X86_64, elf};

const CONSOLE: &str = "/v1/guests/web/console";

/// A stream of what a guest prints, in chunks (RFC 9112, 7.1).
struct Stream(BufReader<UnixStream>);

impl Stream {
    #[track_caller]
    fn open(service: &Service) -> Self {
        let mut stream = service.connect();
        let request = format!("GET {CONSOLE} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(stream.read_line(&mut head).unwrap(), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(head.contains("nosniff"), "{head}");
        Self(stream)
    }

    /// The next bytes; none at the end of a stream that is whole.
    fn next(&mut self) -> std::io::Result<Vec<u8>> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let length = usize::from_str_radix(line.trim_end(), 16)
            .map_err(|_| std::io::ErrorKind::UnexpectedEof)?;
        let mut bytes = vec![0; length + 2];
        self.0.read_exact(&mut bytes)?;
        bytes.truncate(length);
        Ok(bytes)
    }

    #[track_caller]
    fn until(&mut self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            let part = self.next().unwrap();
            assert!(!part.is_empty(), "the stream ended");
            all.extend(part);
        }
        all
    }
}

fn make(place: &Place, service: &Service, code: &[u8], serial: Option<&str>) {
    let kernel = place.file("printing", &elf(EM_X86_64, code));
    let mut spec = json!({"name": "web", "kernel": kernel, "memory": "32M"});
    if let Some(serial) = serial {
        spec["serial"] = json!(serial);
    }
    service.post("/v1/guests", &spec.to_string()).ok(201);
}

fn end_guest(service: &Service) {
    service.delete("/v1/guests/web?force=true").ok(200);
}

#[test]
fn a_guest_prints_and_is_typed_to_and_its_stream_ends_with_it() {
    let place = Place::new();
    let service = Service::start(&place, "");
    make(&place, &service, &ECHO_CODE, None);
    let mut first = Stream::open(&service);
    service.post(CONSOLE, r#"{"text":"hello\r"}"#).ok(204);
    assert_eq!(first.until(6), b"hello\r");
    // Who comes later sees what is kept, and then both see the same.
    let mut second = Stream::open(&service);
    assert_eq!(second.until(6), b"hello\r");
    let long = "x".repeat(4096);
    let typed = json!({"text": long}).to_string();
    service.post(CONSOLE, &typed).ok(204);
    for stream in [&mut first, &mut second] {
        assert_eq!(stream.until(4096), long.as_bytes());
    }
    let kept = service.get(&format!("{CONSOLE}?follow=false")).ok(200);
    assert_eq!(kept.text, format!("hello\r{long}"));
    end_guest(&service);
    for mut stream in [first, second] {
        assert_eq!(stream.next().unwrap(), b"");
    }
    service.end();
    place.assert_empty();
}

#[test]
fn what_cannot_be_typed_or_read_is_a_problem() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let file = format!("file={}", place.path("console").display());
    make(&place, &service, &[0xf4, 0xeb, 0xfd], Some(&file));
    let typed = service.post(CONSOLE, r#"{"text":"x"}"#);
    typed.problem(409, "refused", "--serial");
    // It is read all the same.
    let kept = service.get(&format!("{CONSOLE}?follow=false")).ok(200);
    assert_eq!(kept.text, "");
    for wrong in [
        "{}".to_owned(),
        r#"{"text":""}"#.to_owned(),
        r#"{"text":7}"#.to_owned(),
        r#"{"text":"x","more":1}"#.to_owned(),
        json!({"text": "x".repeat(4097)}).to_string(),
    ] {
        service
            .post(CONSOLE, &wrong)
            .problem(422, "wrong_values", "");
    }
    for wrong in ["follow=perhaps", "from=1", "follow=true&follow=true"] {
        let answer = service.get(&format!("{CONSOLE}?{wrong}"));
        answer.problem(400, "malformed", "");
    }
    let nobody = service.get("/v1/guests/nosuch/console");
    nobody.problem(404, "no_such_guest", "nosuch");
    end_guest(&service);
    service.end();
}

#[test]
fn readers_are_bounded_and_one_that_takes_nothing_is_given_up() {
    let place = Place::new();
    let service = Service::start(&place, "--client-time 1");
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the out.
    let endless = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd];
    make(&place, &service, &endless, None);
    let slow: Vec<_> = (0..4).map(|_| Stream::open(&service)).collect();
    let kept = format!("{CONSOLE}?follow=false");
    let deadline = Instant::now() + LIMIT;
    // They take nothing: after a while their places are free again, and the guest was never held
    // up.
    loop {
        let answer = service.get(&kept);
        if answer.status == 200 {
            break;
        }
        answer.problem(503, "busy", "read this console");
        assert!(Instant::now() < deadline);
    }
    let mut left = slow.into_iter().map(|mut stream| {
        loop {
            match stream.next() {
                Ok(bytes) if bytes.is_empty() => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    });
    end_guest(&service);
    assert!(left.any(|whole| !whole), "none was given up");
    service.end();
}

#[test]
fn a_stream_of_which_something_is_missing_is_not_whole() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let root = RuntimeRoot::new(place.path("run"));
    let dir = root.claim(&"web".parse().unwrap()).unwrap();
    let listener = UnixListener::bind(dir.paths().control_socket()).unwrap();
    const FIRST: &str =
        "{\"ok\":{\"reply\":\"console\",\"from\":0,\"bytes\":\"aGVsbG8=\",\"ended\":false}}\n";
    const MISSED: &str =
        "{\"ok\":{\"reply\":\"console\",\"from\":9,\"bytes\":\"aGVsbG8=\",\"ended\":false}}\n";
    let asked = |answer: &str| {
        let (mut stream, _) = listener.accept().unwrap();
        let mut requests = BufReader::new(stream.try_clone().unwrap());
        requests.read_line(&mut String::new()).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        (stream, requests)
    };
    for then in [MISSED, "nonsense\n", "{\"error\":\"no\"}\n", ""] {
        std::thread::scope(|scope| {
            let opened = scope.spawn(|| Stream::open(&service));
            let (mut guest, mut requests) = asked(FIRST);
            let mut stream = opened.join().unwrap();
            assert_eq!(stream.until(5), b"hello");
            requests.read_line(&mut String::new()).unwrap();
            guest.write_all(then.as_bytes()).unwrap();
            drop((guest, requests));
            stream.next().unwrap_err();
        });
    }
    for (first, status, code, says) in [
        ("{\"error\":\"no\"}\n", 409, "refused", "no"),
        (
            "{\"ok\":{\"reply\":\"done\"}}\n",
            502,
            "broken_off",
            "something else",
        ),
        ("", 502, "broken_off", "ended before"),
    ] {
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| service.get(CONSOLE));
            drop(asked(first));
            answer.join().unwrap().problem(status, code, says);
        });
    }
    drop(dir);
    service.end();
}
