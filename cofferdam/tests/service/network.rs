//! TCP: TLS always, tokens, roles, and what somebody does who has none.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::common::place::{LIMIT, Place, end};
use crate::over_tcp::{DO, LOOK, OverTcp, private, tokens};
use crate::sockets::refused;

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

#[test]
fn a_token_says_who_may_do_what() {
    let place = Place::new();
    let log = place.path("log");
    let over = OverTcp::start(&place, &format!("-vvv --log-file {}", log.display()));
    let vm = place.idle("");
    let twice = bearer(DO).repeat(2);
    for none in [
        "",
        &bearer("x"),
        &bearer(&LOOK[1..]),
        &format!("authorization: Basic {DO}\r\n"),
        &format!("authorization: {DO}\r\n"),
        &format!("cookie: token={DO}\r\n"),
        &twice,
    ] {
        for path in [
            "/v1/guests",
            "/v1/events",
            "/metrics",
            "/openapi.json",
            "/no",
        ] {
            let answer = over.ask("GET", path, none);
            answer.problem(401, "unauthorized", "token");
            assert!(
                answer.head.contains("www-authenticate: bearer"),
                "{answer:?}"
            );
        }
        let answer = over.ask("POST", "/v1/guests/idle/pause", none);
        answer.problem(401, "unauthorized", "token");
    }
    let look = bearer(LOOK);
    for path in ["/v1/guests", "/v1/guests/idle", "/v1/jobs", "/metrics"] {
        over.ask("GET", path, &look).ok(200);
    }
    over.ask("HEAD", "/v1/guests", &look).ok(200);
    let answer = over.ask("GET", "/v1/guests/no", &look);
    answer.problem(404, "no_such_guest", "no");
    for (method, path) in [
        ("POST", "/v1/guests"),
        ("POST", "/v1/guests/idle/pause"),
        ("PUT", "/v1/guests/idle/isolation/e1000"),
        ("DELETE", "/v1/guests/idle?force=true"),
        ("OPTIONS", "/v1/guests"),
        ("BREW", "/v1/guests"),
    ] {
        let answer = over.ask(method, path, &look);
        answer.problem(403, "forbidden", "look");
    }
    assert_eq!(place.status()["state"], "running");
    let all = bearer(DO);
    over.ask("POST", "/v1/guests/idle/pause", &all).ok(204);
    assert_eq!(place.status()["state"], "paused");
    // The unix socket needs none.
    over.service.post("/v1/guests/idle/resume", "").ok(204);
    over.service.end();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("serving"), "{log}");
    for token in [LOOK, DO] {
        assert!(!log.contains(&token[1..]), "a token is in the log");
    }
    end(&place, vm, &[]);
}

#[test]
fn another_sites_page_is_refused_and_the_services_own_is_not() {
    let place = Place::new();
    let over = OverTcp::start(&place, "");
    let origin = |origin: &str| format!("{}origin: {origin}\r\n", bearer(DO));
    for other in ["https://example.org", "null", "https://localhost"] {
        for path in ["/", "/v1/guests"] {
            let answer = over.ask("GET", path, &origin(other));
            answer.problem(403, "forbidden", "another site");
        }
        // Over the unix socket, too: somebody may have led a TCP port there.
        let text = format!(
            "POST /v1/guests/x/pause HTTP/1.1\r\nhost: localhost:1\r\nconnection: close\r\n{}\r\n",
            origin(other)
        );
        let answer = over.service.send(text.as_bytes());
        answer.problem(403, "forbidden", "another site");
    }
    let own = origin(&format!("https://{}", over.address));
    let answer = over.ask("GET", "/v1/guests", &own).ok(200);
    assert!(!answer.head.contains("access-control"), "{answer:?}");
    over.service.end();
}

#[test]
fn a_handshake_that_stalls_is_ended_and_is_in_nobodys_way() {
    let place = Place::new();
    let over = OverTcp::start(&place, "--client-time 2");
    let begun = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let mut open: Vec<_> = (0..300).map(|_| over.plain()).collect();
    for stream in open.iter_mut().step_by(2) {
        // Those that there is no room for are closed already.
        let _ = stream.write_all(begun);
    }
    over.service.get("/v1/guests").ok(200);
    for stream in &mut open {
        // The end, or a reset: what it must not do is stay open, for which the read would time out.
        match stream.read(&mut [0]) {
            Ok(length) => assert_eq!(length, 0, "something was answered"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    over.ask("GET", "/v1/guests", &bearer(LOOK)).ok(200);
    over.service.end();
}

#[test]
fn what_is_no_tls_gets_no_http() {
    let place = Place::new();
    let over = OverTcp::start(&place, "");
    let request = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", bearer(LOOK));
    for bytes in [request.as_bytes(), b"\0\0\0\0\0\0\0\0", b"SSH-2.0-x\r\n"] {
        let mut stream = over.plain();
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        // An alert of TLS at most.
        assert!(answer.len() <= 7, "{answer:?}");
        assert!(answer.is_empty() || answer[0] == 0x15, "{answer:?}");
    }
    over.ask("GET", "/v1/guests", &bearer(LOOK)).ok(200);
    over.service.end();
}

#[test]
fn the_bounds_are_those_of_the_unix_socket() {
    let place = Place::new();
    let over = OverTcp::start(&place, "--client-time 1");
    let json = "content-type: application/json\r\ncontent-length: 99999999999\r\n";
    let head = format!("{}{json}", bearer(DO));
    let answer = over.ask("POST", "/v1/guests", &head);
    answer.problem(413, "too_large", "65536");
    // Who is not known is not even waited for.
    let slow = "content-type: application/json\r\ncontent-length: 9\r\n";
    let answer = over.ask("POST", "/v1/guests", slow);
    answer.problem(401, "unauthorized", "");
    let answer = over.ask("POST", "/v1/guests", &format!("{}{slow}", bearer(DO)));
    answer.problem(408, "slow_request", "1s");
    let long = format!("authorization: Bearer {}\r\n", "x".repeat(100_000));
    let answer = over.ask("GET", "/v1/guests", &long);
    assert!(matches!(answer.status, 0 | 431), "{answer:?}");
    // Nothing at all after the handshake, and a client that takes nothing.
    let mut stream = over.connect();
    let _ = stream.read(&mut [0]);
    let mut stream = over.connect();
    let deadline = Instant::now() + LIMIT;
    let request = format!(
        "GET /openapi.json HTTP/1.1\r\nhost: x\r\n{}\r\n",
        bearer(LOOK)
    );
    let slept = Duration::from_millis(1);
    // Writes alone: what comes back is never read from the socket once the handshake is over.
    stream.write_all(request.as_bytes()).unwrap();
    let (mut client, mut socket) = (stream.conn, stream.sock);
    while std::io::Write::write_all(&mut client.writer(), request.as_bytes()).is_ok() {
        while client.wants_write() {
            match client.write_tls(&mut socket) {
                Ok(_) => assert!(Instant::now() < deadline, "it is still open"),
                Err(_) => {
                    over.ask("GET", "/v1/guests", &bearer(LOOK)).ok(200);
                    over.service.end();
                    return;
                }
            }
        }
        std::thread::sleep(slept);
    }
    panic!("nothing was refused");
}

#[test]
fn a_file_of_tokens_that_is_none_is_refused_in_a_line() {
    let place = Place::new();
    let with = |file: &str, says| {
        refused(
            &place,
            &format!("--listen 127.0.0.1:0 --tokens {file}"),
            says,
        );
    };
    let good = tokens(&place);
    for mode in [0o644, 0o640, 0o604, 0o620] {
        fs::set_permissions(&good, fs::Permissions::from_mode(mode)).unwrap();
        with(&good, "chmod it to 0600");
    }
    let huge = "# a comment\n".repeat(1 << 20);
    with(&private(&place, "huge", huge.as_bytes()), "65536 bytes");
    with(&private(&place, "nothing", b""), "there are none");
    with(&private(&place, "bytes", b"look \xff\xff"), "no text");
    with(&private(&place, "short", b"look x"), "line 1");
    with(&place.path("").display().to_string(), "no file");
    with("/dev/zero", "no file");
    with(&place.path("nowhere").display().to_string(), "No such file");
    refused(&place, "--listen 127.0.0.1:0", "--tokens");
    refused(&place, "--listen nonsense --tokens x", "nonsense");
    let good = tokens(&place);
    refused(
        &place,
        &format!("--listen 192.0.2.1:1 --tokens {good}"),
        "192.0.2.1:1",
    );
    place.assert_empty();
}

#[test]
fn a_certificate_is_taken_with_its_key_and_no_other() {
    let place = Place::new();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = rcgen::KeyPair::generate().unwrap().serialize_der();
    let other = pem("PRIVATE KEY", &other);
    let cert = pem("CERTIFICATE", made.cert.der());
    let cert = place.file("cert", cert.as_bytes());
    let key = pem("PRIVATE KEY", &made.signing_key.serialize_der());
    let key = private(&place, "key", key.as_bytes());
    let over = OverTcp::start(&place, &format!("--tls-cert {cert} --tls-key {key}"));
    over.ask("GET", "/v1/guests", &bearer(LOOK)).ok(200);
    over.service.end();
    let tokens = tokens(&place);
    let with = |cert: &str, key: &str, says| {
        let tls = format!("--tls-cert {cert} --tls-key {key}");
        refused(
            &place,
            &format!("--listen 127.0.0.1:0 --tokens {tokens} {tls}"),
            says,
        );
    };
    with(
        &cert,
        &private(&place, "other", other.as_bytes()),
        "with the key",
    );
    let text = private(&place, "text", b"nonsense");
    let cut = &fs::read(&cert).unwrap()[..200];
    let cut = place.file("cut", cut);
    let inside = pem("CERTIFICATE", b"nonsense");
    let inside = place.file("inside", inside.as_bytes());
    with(&text, &key, "no certificate");
    with(&cut, &key, "cannot use the certificate");
    with(&inside, &key, "cannot use the certificate");
    with(&cert, &text, "no key in PEM");
    with(&key, &cert, "no certificate");
    with("/dev/zero", &key, "no file");
    let huge = place.file("huge", &vec![b'x'; 2 << 20]);
    with(&huge, &key, "1048576 bytes");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    with(&cert, &key, "others may use it");
    refused(
        &place,
        &format!("--listen 127.0.0.1:0 --tokens x --tls-cert {cert}"),
        "--tls-key",
    );
    place.assert_empty();
}

fn pem(what: &str, bytes: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    let lines: Vec<_> = text
        .as_bytes()
        .chunks(64)
        .map(String::from_utf8_lossy)
        .collect();
    let lines = lines.join("\n");
    format!("-----BEGIN {what}-----\n{lines}\n-----END {what}-----\n")
}

#[test]
fn a_new_certificate_is_made_at_each_start_and_tokens_can_be_made() {
    let place = Place::new();
    let one = OverTcp::start(&place, "");
    let told = one.told.clone();
    one.service.end();
    let other = OverTcp::start(&place, "");
    assert_ne!(told, other.told);
    other.service.end();
    let line = place.ask("serve --new-token do");
    let (role, token) = line.trim_end().split_once(' ').unwrap();
    assert_eq!((role, token.len()), ("do", 43));
    assert_ne!(line, place.ask("serve --new-token do"));
    place.assert_empty();
}
