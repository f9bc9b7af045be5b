//! A guest's console: what it prints, as a stream, and what is typed into it.
//!
//! The guest's process keeps the last of what was printed. Each reader has a connection of its own
//! to it and says from which byte on it reads: the service keeps nothing, and a reader that takes
//! nothing holds up itself alone.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use agent_protocol::message::Bytes;
use axum::body::{Body as HttpBody, Bytes as HttpBytes};
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};

use super::ask::Asks;
use super::extract::{Body, Name, Options};
use super::problem::{Code, Problem};
use crate::control::client::ANSWER_TIME;
use crate::control::protocol::{
    Answer, ConsoleOutput, MAX_ANSWER_BYTES, MAX_TYPED_BYTES, Reply, Request,
};
use crate::options::VmName;
use crate::runtime_dir::RunningVm;

/// Readers of one guest's console: each takes one of the connections that the guest's process
/// serves at one time.
const MAX_READERS: usize = 4;

/// Readers of all consoles.
const MAX_ALL_READERS: usize = 64;

/// How long one that follows waits in the guest's process before it asks again, in milliseconds.
const WAIT_MS: u64 = 1000;

/// Most that is answered to one that does not follow, in bytes: more than is kept.
const MAX_SHOWN: usize = 128 << 10;

/// Who reads consoles, by guest.
#[derive(Debug, Clone, Default)]
pub struct Readers(Arc<Mutex<BTreeMap<VmName, usize>>>);

impl Readers {
    fn enter(&self, name: &VmName) -> Result<Reading, Problem> {
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_this = readers.get(name).copied().unwrap_or(0);
        let all: usize = readers.values().sum();
        if of_this >= MAX_READERS || all >= MAX_ALL_READERS {
            let detail = format!(
                "{of_this} read this console and {all} read consoles already: close one and try again"
            );
            return Err(Problem::new(Code::Busy, detail));
        }
        *readers.entry(name.clone()).or_default() += 1;
        Ok(Reading {
            readers: self.clone(),
            name: name.clone(),
        })
    }
}

/// One of them.
#[derive(Debug)]
struct Reading {
    readers: Readers,
    name: VmName,
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut readers = self
            .readers
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = readers.get_mut(&self.name) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                readers.remove(&self.name);
            }
        }
    }
}

/// How a console is read.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ConsoleOptions {
    /// Go on with what the guest prints from now on, until it ends; otherwise only what is kept is
    /// answered.
    #[serde(default = "yes")]
    #[param(required = false)]
    follow: bool,
}

fn yes() -> bool {
    true
}

/// Read what a guest prints on its console: the last 64 KiB, and what it prints from then on. A
/// reader that is farther behind is ended.
#[utoipa::path(get, path = "/v1/guests/{name}/console", tag = "guests", params(("name" = String, Path), ConsoleOptions),
    responses((status = 200, body = String, content_type = "application/octet-stream",
        description = "What it printed, byte by byte")))]
pub async fn read_console(
    State(asks): State<Asks>,
    State(readers): State<Readers>,
    Name(name): Name<VmName>,
    Options(ConsoleOptions { follow }): Options<ConsoleOptions>,
) -> Result<Response, Problem> {
    let vm = asks.guest(&name).await?;
    let reading = readers.enter(&name)?;
    let mut console = Console::open(&vm, reading).await?;
    // What is wrong is said while it can be: an answer that has begun has no place for it.
    let first = console.next(0).await?;
    let body = match follow {
        true => HttpBody::from_stream(futures_util::stream::unfold(
            Some((console, Some(first))),
            go_on,
        )),
        false => HttpBody::from(console.kept(first).await?),
    };
    let head = [
        (CONTENT_TYPE, "application/octet-stream"),
        // A guest says what it likes: no browser is to take it for a page.
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((head, body).into_response())
}

/// What is typed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Typed {
    /// It, 1 to 4096 bytes of UTF-8, keys that are no letters as a terminal sends them: `\r` for
    /// Enter.
    #[schema(min_length = 1, max_length = 4096)]
    text: String,
}

/// Type into a guest's console: all of it, or nothing.
#[utoipa::path(post, path = "/v1/guests/{name}/console", tag = "guests", params(("name" = String, Path)),
    request_body = Typed, responses((status = 204)))]
pub async fn type_into_console(
    State(asks): State<Asks>,
    Name(name): Name<VmName>,
    Body(typed): Body<Typed>,
) -> Result<StatusCode, Problem> {
    let bytes = typed.text.into_bytes();
    if bytes.is_empty() || bytes.len() > MAX_TYPED_BYTES {
        let detail = format!("text has 1 to {MAX_TYPED_BYTES} bytes");
        return Err(Problem::new(Code::WrongValues, detail));
    }
    let bytes = Bytes(bytes);
    asks.tell(&name, Request::Type { bytes }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A connection to a guest's process, over which its console is read.
#[derive(Debug)]
struct Console {
    stream: BufReader<UnixStream>,
    /// The next byte to be read; none before the first.
    next: Option<u64>,
    _reading: Reading,
}

impl Console {
    async fn open(vm: &RunningVm, reading: Reading) -> Result<Self, Problem> {
        let path = vm.paths.control_socket();
        let stream = UnixStream::connect(&path).await.map_err(|error| {
            let code = match error.kind() {
                // It accepts nobody, and its queue is full.
                io::ErrorKind::WouldBlock => Code::NoAnswer,
                _ => Code::BrokenOff,
            };
            Problem::new(code, format!("cannot reach {}: {error}", vm.name))
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
            next: None,
            _reading: reading,
        })
    }

    /// Asks for more, and has the guest's process wait so long if there is none.
    async fn next(&mut self, wait_ms: u64) -> Result<ConsoleOutput, Problem> {
        let request = Request::Console {
            from: self.next,
            wait_ms,
        };
        let answer = timeout(ANSWER_TIME, self.ask(&request)).await;
        let silent = || {
            let detail = format!("it does not answer within {} s", ANSWER_TIME.as_secs());
            Problem::new(Code::NoAnswer, detail)
        };
        let output = answer.map_err(|_| silent())??;
        if let Some(missed) = self.next.and_then(|next| output.from.checked_sub(next))
            && missed > 0
        {
            let detail = format!("{missed} bytes were not read in time: read anew");
            return Err(Problem::new(Code::BrokenOff, detail));
        }
        let length = output.bytes.0.len() as u64;
        self.next = Some(output.from.saturating_add(length));
        Ok(output)
    }

    async fn ask(&mut self, request: &Request) -> Result<ConsoleOutput, Problem> {
        let broken = |why: String| Problem::new(Code::BrokenOff, why);
        let line = request.line();
        let sent = self.stream.get_mut().write_all(line.as_bytes()).await;
        sent.map_err(|error| broken(error.to_string()))?;
        let mut line = Vec::new();
        let read = (&mut self.stream)
            .take(MAX_ANSWER_BYTES)
            .read_until(b'\n', &mut line)
            .await;
        read.map_err(|error| broken(error.to_string()))?;
        if line.last() != Some(&b'\n') {
            return Err(broken("it ended before it answered".to_owned()));
        }
        match serde_json::from_slice(&line) {
            Ok(Answer::Ok(Reply::Console(output))) => Ok(output),
            Ok(Answer::Error(why)) => Err(Problem::new(Code::Refused, why)),
            Ok(other) => Err(Problem::unexpected(&other)),
            Err(error) => Err(broken(format!("its answer cannot be read: {error}"))),
        }
    }

    /// All that is kept, the first of it in `output`.
    async fn kept(mut self, output: ConsoleOutput) -> Result<Vec<u8>, Problem> {
        let mut bytes = output.bytes.0;
        while bytes.len() < MAX_SHOWN {
            let more = self.next(0).await?.bytes.0;
            if more.is_empty() {
                break;
            }
            bytes.extend(more);
        }
        Ok(bytes)
    }
}

/// The next part of a stream, and what comes after it: none at its end. A stream that breaks off is
/// not whole, as its reader sees.
async fn go_on(
    state: Option<(Console, Option<ConsoleOutput>)>,
) -> Option<(
    Result<HttpBytes, Problem>,
    Option<(Console, Option<ConsoleOutput>)>,
)> {
    let (mut console, mut first) = state?;
    loop {
        let output = match first.take() {
            Some(output) => Ok(output),
            None => console.next(WAIT_MS).await,
        };
        match output {
            Ok(output) if output.bytes.0.is_empty() && output.ended => return None,
            Ok(output) if output.bytes.0.is_empty() => {}
            Ok(output) => {
                let part = HttpBytes::from(output.bytes.0);
                return Some((Ok(part), Some((console, None))));
            }
            Err(problem) => return Some((Err(problem), None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readers_of_one_console_and_of_all_are_bounded() {
        let readers = Readers::default();
        let name = |number: usize| format!("vm{number}").parse::<VmName>().unwrap();
        let mut all = Vec::new();
        for number in 0..MAX_ALL_READERS {
            all.push(readers.enter(&name(number / MAX_READERS)).unwrap());
        }
        readers.enter(&name(0)).unwrap_err();
        readers.enter(&name(MAX_ALL_READERS)).unwrap_err();
        drop(all.pop());
        readers.enter(&name(0)).unwrap_err();
        readers.enter(&name(MAX_ALL_READERS)).unwrap();
        drop(all);
        assert!(readers.0.lock().unwrap().is_empty());
    }
}
