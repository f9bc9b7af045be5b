//! Requests that are cut, huge, slow, or nonsense: each is a problem, and the service goes on.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use crate::client::{Service, answer};
use crate::common::place::{LIMIT, Place, end};

#[test]
fn nonsense_is_a_problem_of_the_right_kind() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    for (method, path, status, code) in [
        ("GET", "/page.html", 404, "no_such_path"),
        ("GET", "/v2/guests", 404, "no_such_path"),
        ("GET", "/v1/guests/", 404, "no_such_path"),
        ("GET", "/v1/guests/x", 404, "no_such_guest"),
        ("GET", "/v1/guests/idle/status", 404, "no_such_path"),
        ("GET", "/v1/guests/../guests", 404, "no_such_path"),
        ("GET", "/v1/guests/..", 400, "malformed"),
        ("GET", "/v1/guests/.devices", 400, "malformed"),
        ("GET", "/v1/guests/%2e%2e%2fidle", 400, "malformed"),
        ("GET", "/v1/guests/..%2f..%2fetc%2fpasswd", 400, "malformed"),
        ("GET", "/v1/guests/idle%00", 400, "malformed"),
        ("GET", "/v1/guests/%ff%fe", 400, "malformed"),
        ("GET", "/v1/devices/%2fdev%2fkvm", 400, "malformed"),
        (
            "GET",
            "/v1/guests/idle/isolation/e1000.ko/violations",
            400,
            "malformed",
        ),
        (
            "GET",
            "/v1/guests/idle/isolation/..%2fx/faults",
            400,
            "malformed",
        ),
        ("DELETE", "/v1/guests/idle/marks/..%2fx", 400, "malformed"),
        ("DELETE", "/v1/guests/idle?force=perhaps", 400, "malformed"),
        (
            "DELETE",
            "/v1/guests/idle?force=true&force=true",
            400,
            "malformed",
        ),
        ("DELETE", "/v1/guests/idle?farce=true", 400, "malformed"),
        ("PATCH", "/v1/guests/idle", 405, "wrong_method"),
        ("DELETE", "/metrics", 405, "wrong_method"),
        ("BREW", "/v1/guests", 405, "wrong_method"),
        ("POST", "/v1/guests", 415, "wrong_type"),
    ] {
        service.ask(method, path, None).problem(status, code, "");
    }
    let create = |body: &str| service.post("/v1/guests", body);
    for malformed in [
        "{",
        "nonsense",
        "{\"name\":\"a\"",
        "\u{0}",
        "{\"name\":\"a\"}}",
        "'x'",
    ] {
        create(malformed).problem(400, "malformed", "column");
    }
    create(&"[".repeat(10_000)).problem(400, "malformed", "column");
    for wrong in [
        "[1]",
        "7",
        "null",
        "{\"name\":7}",
        "{\"name\":\"a\",\"name\":\"b\"}",
    ] {
        create(wrong).problem(422, "wrong_values", "");
    }
    let pause = "/v1/guests/idle/pause";
    service
        .post(pause, r#"{"when":"tomorrow"}"#)
        .problem(422, "wrong_values", "no body");
    assert_eq!(place.status()["state"], "running");
    let text = "POST /v1/guests HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}";
    service
        .send(text.as_bytes())
        .problem(415, "wrong_type", "content-type");
    service.end();
    end(&place, vm, &[]);
}

#[test]
fn what_is_no_http_ends_its_connection_and_nothing_else() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100));
    let long = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(100_000));
    for bytes in [
        &b"\x00\xff\x00\n\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        many.as_bytes(),
        long.as_bytes(),
    ] {
        let mut stream = service.connect();
        // It may be closed before all is sent.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let answer = answer(stream);
        assert!(matches!(answer.status, 0 | 400 | 431 | 414), "{answer:?}");
    }
    service.get("/v1/guests").ok(200);
    service.end();
}

#[test]
fn a_body_that_is_too_long_is_not_read() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let head = "POST /v1/guests HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n";
    let told = format!("{head}content-length: 99999999999\r\n\r\n");
    service
        .send(told.as_bytes())
        .problem(413, "too_large", "65536");
    let mut stream = service.connect();
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n");
    stream.write_all(chunked.as_bytes()).unwrap();
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    for _ in 0..17 {
        // It may be refused before all is sent.
        let _ = stream.write_all(chunk.as_bytes());
    }
    answer(stream).problem(413, "too_large", "65536");
    let most = format!("{}{{}}", " ".repeat(65_534));
    service
        .post("/v1/guests", &most)
        .problem(422, "wrong_values", "name");
    service.end();
}

#[test]
fn a_request_that_is_cut_short_changes_nothing() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    let whole = "POST /v1/guests/idle/pause HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{";
    for length in [1, 10, 40, whole.len() - 5, whole.len()] {
        let mut stream = service.connect();
        stream.write_all(&whole.as_bytes()[..length]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let answer = answer(stream);
        assert!(matches!(answer.status, 0 | 400), "{answer:?}");
        assert_eq!(place.status()["state"], "running");
    }
    service.end();
    end(&place, vm, &[]);
}

#[test]
fn a_client_that_is_slow_is_not_waited_for() {
    let place = Place::new();
    let service = Service::start(&place, "--client-time 1");
    // A byte now and then, in the head: it is closed, whatever comes.
    let deadline = Instant::now() + LIMIT;
    let mut stream = service.connect();
    while stream.write_all(b"G").is_ok() {
        assert!(Instant::now() < deadline, "it is still open");
        std::thread::sleep(Duration::from_millis(50));
    }
    // In the body: it is told.
    let mut stream = service.connect();
    let head = "POST /v1/guests HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    while stream.write_all(b" ").is_ok() {
        assert!(Instant::now() < deadline, "it is still open");
        std::thread::sleep(Duration::from_millis(50));
    }
    answer(stream).problem(408, "slow_request", "1s");
    // Nothing at all.
    let mut stream = service.connect();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // Nothing more after an answer.
    let mut stream = service.connect();
    stream
        .write_all(b"GET /v1/guests HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    assert!(answer(stream).text.contains("guests"));
    service.get("/v1/guests").ok(200);
    service.end();
}

/// How much is read at a time, ten times a second, in bytes, and how often: within the time that a
/// client has more than the kernel keeps in one piece (36 KiB), and less than has to be gone before
/// a socket takes more (three quarters of what it holds).
const SIP: usize = 2500;
const SIPS: usize = 80;

#[test]
fn a_client_that_takes_a_little_at_a_time_gets_all_of_its_answers() {
    let place = Place::new();
    let service = Service::start(&place, "--client-time 5");
    let mut stream = service.connect();
    // More than a connection holds.
    let request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n";
    let last = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream
        .write_all(&[request.repeat(9), last.to_vec()].concat())
        .unwrap();
    let mut taken = Vec::new();
    for _ in 0..SIPS {
        let mut sip = [0; SIP];
        stream.read_exact(&mut sip).unwrap();
        taken.extend(sip);
        std::thread::sleep(Duration::from_millis(100));
    }
    stream.read_to_end(&mut taken).unwrap();
    let text = String::from_utf8(taken).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 10);
    let one = service.get("/openapi.json").ok(200).text;
    assert!(text.len() > one.len() * 10 && text.ends_with(&one));
    service.end();
}

#[test]
fn a_client_that_takes_nothing_is_given_up() {
    let place = Place::new();
    let service = Service::start(&place, "--client-time 1");
    let mut stream = service.connect();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    let deadline = Instant::now() + LIMIT;
    // It asks and asks and reads nothing, until the service does not read either, and then gives it
    // up.
    while stream
        .write_all(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
        .is_ok()
    {
        assert!(Instant::now() < deadline, "it is still open");
    }
    service.get("/v1/guests").ok(200);
    service.end();
}

#[test]
fn more_connections_than_there_is_room_for_are_told_so() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let mut open: Vec<_> = (0..256).map(|_| service.connect()).collect();
    let deadline = Instant::now() + LIMIT;
    // They are taken one after the other.
    loop {
        let answer = service.get("/v1/guests");
        if answer.status == 503 {
            answer.problem(503, "busy", "256");
            break;
        }
        assert!(Instant::now() < deadline, "{answer:?}");
    }
    open.pop();
    while service.get("/v1/guests").status != 200 {
        assert!(Instant::now() < deadline, "there is no room");
    }
    service.end();
}
