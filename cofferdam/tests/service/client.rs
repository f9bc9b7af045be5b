//! A service that runs, and a client that can also be a bad one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Instant;

use serde_json::Value;

use crate::common::place::{LIMIT, Place, finish, signal};

/// A service.
pub struct Service {
    pub child: Option<Child>,
    pub socket: PathBuf,
}

/// What it answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub text: String,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// It must be this problem, and say this.
    #[track_caller]
    pub fn problem(&self, status: u16, code: &str, says: &str) {
        let json = self.json();
        assert_eq!(
            (self.status, json["code"].as_str()),
            (status, Some(code)),
            "{self:?}"
        );
        assert_eq!(json["status"], status, "{self:?}");
        let detail = json["detail"].as_str().unwrap();
        assert!(detail.contains(says), "{self:?}");
        assert!(!detail.contains('\n'), "{self:?}");
        assert!(
            self.head.contains("application/problem+json"),
            "{}",
            self.head
        );
    }

    #[track_caller]
    pub fn ok(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }
}

impl Service {
    /// Starts one for the runtime folder of `place` and waits until it answers.
    pub fn start(place: &Place, words: &str) -> Self {
        Self::start_by(place.command(), place, words)
    }

    /// The same by a command that has the program, and what else its process is to be given.
    pub fn start_by(mut command: Command, place: &Place, words: &str) -> Self {
        let child = command
            .arg("serve")
            .args(words.split_whitespace())
            .spawn()
            .unwrap();
        let service = Self {
            child: Some(child),
            socket: place.path("run/service.sock"),
        };
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(&service.socket).is_err() {
            assert!(Instant::now() < deadline, "no service");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        service
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Sends these bytes as they are and reads all that comes back.
    pub fn send(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        answer(stream)
    }

    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        let body = body.map_or_else(String::new, |body| {
            let length = body.len();
            format!("content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        });
        let end = if body.is_empty() { "\r\n" } else { "" };
        let text =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{body}{end}");
        self.send(text.as_bytes())
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, None)
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: &str) -> Answer {
        self.ask("POST", path, Some(body))
    }

    #[track_caller]
    pub fn delete(&self, path: &str) -> Answer {
        self.ask("DELETE", path, None)
    }

    /// The job that was begun, when it has ended.
    #[track_caller]
    pub fn end_of_job(&self, begun: &Answer) -> Value {
        assert_eq!(begun.status, 202, "{begun:?}");
        let id = begun.json()["id"].as_str().unwrap().to_owned();
        let location = format!("location: /v1/jobs/{id}\r\n");
        assert!(begun.head.contains(&location), "{begun:?}");
        let deadline = Instant::now() + LIMIT;
        loop {
            let job = self.get(&format!("/v1/jobs/{id}")).ok(200).json();
            if job["stage"] != "running" {
                return job;
            }
            assert!(Instant::now() < deadline, "{job}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Ends it as a service manager does.
    #[track_caller]
    pub fn end(self) {
        assert_eq!(self.end_and_hear(), "");
    }

    /// The same; what it has said on its standard error.
    #[track_caller]
    pub fn end_and_hear(mut self) -> String {
        let child = self.child.take().unwrap();
        signal(&child, libc::SIGTERM);
        let output = finish(child);
        assert!(output.status.success(), "{output:?}");
        assert!(!self.socket.exists());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Ends it as nobody should.
    pub fn kill(mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(self.socket.exists());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Reads an answer to the end of its connection.
pub fn answer(mut stream: UnixStream) -> Answer {
    let mut bytes = Vec::new();
    // One that is closed in the middle of a request may be reset.
    let _ = stream.read_to_end(&mut bytes);
    answer_of(bytes)
}

/// What these bytes are.
pub fn answer_of(bytes: Vec<u8>) -> Answer {
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Answer {
        status: status.unwrap_or(0),
        head: format!("{}\r\n", head.to_ascii_lowercase()),
        text: body.to_owned(),
    }
}

/// A stream of events.
pub struct Listener(BufReader<UnixStream>);

impl Listener {
    pub fn new(service: &Service) -> Self {
        let mut stream = service.connect();
        let request = "GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        Self(BufReader::new(stream))
    }

    /// The next event.
    #[track_caller]
    pub fn next(&mut self) -> Value {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "the stream ended");
            if let Some(data) = line.strip_prefix("data: ") {
                return serde_json::from_str(data).unwrap();
            }
        }
    }

    /// Reads on until the stream ends.
    #[track_caller]
    pub fn ends(mut self) {
        let mut rest = String::new();
        self.0.read_to_string(&mut rest).unwrap();
    }

    /// The next event of this name; others are passed over.
    #[track_caller]
    pub fn until(&mut self, name: &str) -> Value {
        loop {
            let event = self.next();
            if event["event"] == name {
                return event;
            }
        }
    }
}
