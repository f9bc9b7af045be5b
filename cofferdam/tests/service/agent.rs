//! Programs in guests, by an agent that only speaks the protocol.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};

use agent_protocol::PROTOCOL_VERSION;
use agent_protocol::frame::{Decoder, Item, send, send_mark};
use agent_protocol::message::{
    AgentError, AgentInfo, Body, Bytes, Call, Done, Exec, ExecEnd, Request, Response, Stamp,
};
use serde_json::json;

use crate::client::Service;
use crate::common::place::{Place, end};
use crate::scripted::script;

/// Answers one client: `echo` gives its input and arguments back, and there is nothing else.
fn serve(mut stream: UnixStream) {
    let mut decoder = Decoder::new();
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut bytes) {
        let mut input = &bytes[..length];
        while let Some(item) = decoder.next(&mut input) {
            let Item::Frame(payload) = item else { continue };
            let Request { id, call } = serde_json::from_slice(&payload).unwrap();
            if matches!(call, Call::Hello { .. }) {
                send_mark(&mut stream).unwrap();
            }
            let mut answer = |body| {
                let (received, sent) = (Stamp::default(), Stamp::default());
                let response = Response {
                    id,
                    received,
                    sent,
                    body,
                };
                send(&mut stream, &serde_json::to_vec(&response).unwrap()).unwrap();
            };
            match call {
                Call::Hello { nonce } => {
                    let agent = AgentInfo {
                        version: PROTOCOL_VERSION,
                        boot_id: "x".to_owned(),
                        kernel: "x".to_owned(),
                        pid: 1,
                    };
                    answer(Body::Done(Done::Hello { nonce, agent }));
                }
                Call::Exec(Exec { argv, stdin, .. }) if argv[0] == "echo" => {
                    answer(Body::Stdout(stdin));
                    answer(Body::Stderr(Bytes(argv[1..].join(" ").into_bytes())));
                    answer(Body::Done(Done::Exec(ExecEnd::Exited(3))));
                }
                other => answer(Body::Error(AgentError {
                    message: format!("no such program: {other:?}"),
                    errno: Some(libc::ENOENT),
                })),
            }
        }
    }
}

#[test]
fn a_program_in_a_guest_gets_its_input_and_its_output_comes_back() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let (dir, _script) = script(&place);
    let listener = UnixListener::bind(dir.paths().agent_socket()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            serve(stream.unwrap());
        }
    });
    let path = "/v1/guests/script/exec";
    let spec = json!({"argv": ["echo", "a", "b"], "stdin": "text"}).to_string();
    assert_eq!(
        service.post(path, &spec).ok(200).json(),
        json!({"status": 3, "signal": null, "timed_out": false, "stdout": "text", "stderr": "a b"})
    );
    service
        .post(path, r#"{"argv":["fly"]}"#)
        .problem(409, "refused", "no such program");
    for wrong in [
        "{}",
        r#"{"argv":[]}"#,
        r#"{"argv":"true"}"#,
        r#"{"argv":["true"],"limit_s":0}"#,
        r#"{"argv":["true"],"limit_s":18446744073709551615}"#,
        r#"{"argv":["true"],"shell":true}"#,
    ] {
        service.post(path, wrong).problem(422, "wrong_values", "");
    }
    service.end();
    drop(dir);
}

#[test]
fn no_program_is_run_in_a_guest_that_is_paused() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    service.ask("POST", "/v1/guests/idle/pause", None).ok(204);
    service
        .post("/v1/guests/idle/exec", r#"{"argv":["true"]}"#)
        .problem(409, "refused", "paused");
    service.end();
    end(&place, vm, &[]);
}
