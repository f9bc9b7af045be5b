//! The host's side: one request at a time, each with a time limit, over any stream.
//!
//! ```text
//!              hello answered                 time up, broken stream,
//!   no session ───────────────► session       malformed answer, agent began anew
//!        ▲                         └───────────────────┐
//!        └─────────────────────────────────────────────┘
//! ```
//!
//! Without a session the next call says hello first, again and again until the agent answers or the
//! time is up: the channel may not be there yet, or the guest may be rebooting. A call that failed
//! is never repeated by itself, because it may have been carried out.
//!
//! The agent is as hostile as its guest: frames, collected results and waits are bounded.
//!
//! Here is what all calls have in common; each call has its method in [`calls`].

mod calls;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::PROTOCOL_VERSION;
use crate::frame::{self, Decoder, Item};
use crate::message::*;

pub use calls::ExecResult;

/// How long a call may take when nothing else is said.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(30);

/// Largest collected result (output of a program, file, list) in bytes.
pub const DEFAULT_COLLECT_LIMIT: usize = 256 << 20;

/// Between two hellos to an agent that does not answer.
const HELLO_INTERVAL: Duration = Duration::from_millis(250);

/// Between two attempts to open a channel that is not there.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The agent said no.
    #[error("{}", .0.message)]
    Agent(AgentError),
    /// No answer in time.
    #[error(
        "no answer from the guest agent within {0:?} ({1}): is the guest up and its agent running?"
    )]
    Time(Duration, String),
    /// The channel broke.
    #[error("the guest agent's channel failed: {0}")]
    Channel(#[from] io::Error),
    /// The agent began anew while it was to answer: crashed, or the guest rebooted.
    #[error("the guest agent restarted before it answered: ask again")]
    Restarted,
    /// What came is not the protocol.
    #[error("the guest agent sent what is no answer: {0}")]
    Malformed(String),
    /// Host and agent do not fit.
    #[error(
        "the guest agent speaks version {0}, this host {PROTOCOL_VERSION}: build the images again (cargo xtask images)"
    )]
    Version(u32),
    /// The result is larger than the caller wants to hold.
    #[error("the guest agent's result is larger than {0} bytes: ask for less")]
    TooMuch(usize),
}

impl ClientError {
    /// The guest's error number, if the agent reported one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Agent(error) => error.errno,
            _ => None,
        }
    }
}

/// A byte stream whose reads and writes can be given an end.
pub trait Channel: Read + Write + Send {
    /// The longest time the next read or write may block.
    ///
    /// # Errors
    /// What the system reports.
    fn set_time_limit(&self, limit: Duration) -> io::Result<()>;
}

impl Channel for UnixStream {
    fn set_time_limit(&self, limit: Duration) -> io::Result<()> {
        // Zero would mean "no limit".
        let limit = Some(limit.max(Duration::from_millis(1)));
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

/// The last answer to a call.
#[derive(Clone, Debug)]
pub struct Answer {
    /// When the agent had read the request, on the guest's clocks.
    pub received: Stamp,
    /// When the agent had the answer, on the guest's clocks.
    pub sent: Stamp,
    /// When the request had been written, on the host's clock.
    pub asked: Instant,
    /// When the answer had been read, on the host's clock.
    pub answered: Instant,
    /// The result.
    pub done: Done,
}

type Connect = Box<dyn FnMut() -> io::Result<Box<dyn Channel>> + Send>;

/// A client of one agent.
pub struct Client {
    connect: Connect,
    stream: Option<Box<dyn Channel>>,
    decoder: Decoder,
    /// Read from the stream, not yet decoded: `buffer[start..end]`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    session: Option<AgentInfo>,
    next_id: u64,
    nonce: u64,
    limit: Duration,
    collect_limit: usize,
}

impl Client {
    /// A client that gets its stream from `connect`, at the first call and whenever the stream
    /// broke.
    pub fn new(connect: impl FnMut() -> io::Result<Box<dyn Channel>> + Send + 'static) -> Self {
        // Any number that an earlier client on the same channel has most likely not used.
        let nonce = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64)
            ^ (u64::from(std::process::id()) << 40);
        Self {
            connect: Box::new(connect),
            stream: None,
            decoder: Decoder::new(),
            buffer: vec![0; 64 << 10],
            start: 0,
            end: 0,
            session: None,
            next_id: 1,
            nonce,
            limit: DEFAULT_LIMIT,
            collect_limit: DEFAULT_COLLECT_LIMIT,
        }
    }

    /// A client of the agent behind a unix socket. The socket need not be there yet.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self::new(move || Ok(Box::new(UnixStream::connect(&path)?)))
    }

    /// Closes the channel, which only one client at a time can have. The next call opens it again.
    pub fn disconnect(&mut self) {
        self.session = None;
        self.stream = None;
    }

    /// How long a call may take from now on.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// How large a collected result may be from now on, in bytes.
    pub fn set_collect_limit(&mut self, bytes: usize) {
        self.collect_limit = bytes;
    }

    /// The agent of the current session.
    pub fn agent(&self) -> Option<&AgentInfo> {
        self.session.as_ref()
    }

    /// Waits until an agent answers, and begins a session with it.
    ///
    /// # Errors
    /// [`ClientError::Time`] when none did within `limit`, [`ClientError::Version`] when it does
    /// not fit.
    pub fn hello(&mut self, limit: Duration) -> Result<AgentInfo, ClientError> {
        self.session = None;
        self.nonce = self.nonce.wrapping_add(1);
        let deadline = Instant::now() + limit;
        let mut last = String::from("never connected");
        while Instant::now() < deadline {
            match self.try_hello(deadline) {
                Ok(Some(agent)) if agent.version != PROTOCOL_VERSION => {
                    return Err(ClientError::Version(agent.version));
                }
                Ok(Some(agent)) => {
                    self.session = Some(agent.clone());
                    return Ok(agent);
                }
                Ok(None) => last = "connected, but it says nothing".into(),
                Err(error) => {
                    self.stream = None;
                    last = error.to_string();
                    std::thread::sleep(
                        CONNECT_INTERVAL.min(deadline.saturating_duration_since(Instant::now())),
                    );
                }
            }
        }
        Err(ClientError::Time(limit, last))
    }

    /// Connects, without a word yet: clients are served in the order in which they connect, one at
    /// a time.
    ///
    /// # Errors
    /// What connecting reports.
    pub fn get_in_line(&mut self) -> io::Result<()> {
        self.session = None;
        self.stream = Some((self.connect)()?);
        (self.start, self.end) = (0, 0);
        self.decoder = Decoder::new();
        Ok(())
    }

    /// One hello and the wait for its answer.
    fn try_hello(&mut self, deadline: Instant) -> Result<Option<AgentInfo>, ClientError> {
        if self.stream.is_none() {
            self.get_in_line()?;
        }
        let nonce = self.nonce;
        let id = self.new_id();
        let until = deadline.min(Instant::now() + HELLO_INTERVAL);
        let mut bytes = frame::MARK.to_vec();
        bytes.extend(encode(&Request {
            id,
            call: Call::Hello { nonce },
        })?);
        match self.write(&bytes, until) {
            Err(error) if is_time(&error) => return Ok(None),
            other => other?,
        }
        loop {
            match self.read_item(until) {
                Ok(Item::Mark | Item::TooLong(_)) => {}
                Ok(Item::Frame(payload)) => {
                    // Anything else is left over from before.
                    if let Ok(response) = serde_json::from_slice::<Response>(&payload)
                        && let Body::Done(Done::Hello { nonce: n, agent }) = response.body
                        && n == nonce
                    {
                        return Ok(Some(agent));
                    }
                }
                Err(error) if is_time(&error) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Asks, gives every part of the answer to `part`, and returns the last answer.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when the agent refused; after any other error the session is over and
    /// the next call begins a new one. An error of `part` ends the session too.
    pub fn call(
        &mut self,
        call: Call,
        limit: Duration,
        part: &mut dyn FnMut(Body) -> Result<(), ClientError>,
    ) -> Result<Answer, ClientError> {
        let deadline = Instant::now() + limit;
        if self.session.is_none() {
            self.hello(limit)?;
        }
        let result = self.ask(call, limit, deadline, part);
        if !matches!(result, Ok(_) | Err(ClientError::Agent(_))) {
            self.session = None;
        }
        if matches!(result, Err(ClientError::Channel(_))) {
            self.stream = None;
        }
        result
    }

    fn ask(
        &mut self,
        call: Call,
        limit: Duration,
        deadline: Instant,
        part: &mut dyn FnMut(Body) -> Result<(), ClientError>,
    ) -> Result<Answer, ClientError> {
        let late = |error: io::Error| match is_time(&error) {
            true => ClientError::Time(limit, "it had answered before".into()),
            false => ClientError::Channel(error),
        };
        let id = self.new_id();
        let bytes = encode(&Request { id, call })?;
        self.write(&bytes, deadline).map_err(late)?;
        let asked = Instant::now();
        loop {
            let payload = match self.read_item(deadline).map_err(late)? {
                // Also comes before the answer to a hello that was repeated.
                Item::Mark => continue,
                Item::TooLong(length) => {
                    return Err(ClientError::Malformed(format!(
                        "a message of {length} bytes"
                    )));
                }
                Item::Frame(payload) => payload,
            };
            let answered = Instant::now();
            let Response {
                id: of,
                received,
                sent,
                body,
            } = serde_json::from_slice(&payload)
                .map_err(|error| ClientError::Malformed(error.to_string()))?;
            match body {
                Body::Ready(_) => return Err(ClientError::Restarted),
                Body::Error(error) if of == id || of == 0 => return Err(ClientError::Agent(error)),
                _ if of != id => {}
                Body::Done(done) => {
                    return Ok(Answer {
                        received,
                        sent,
                        asked,
                        answered,
                        done,
                    });
                }
                body => part(body)?,
            }
        }
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        id
    }

    fn stream(&mut self) -> io::Result<&mut Box<dyn Channel>> {
        self.stream
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn write(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            let limit = remaining(deadline)?;
            let stream = self.stream()?;
            stream.set_time_limit(limit)?;
            match stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.stream()?.flush()
    }

    fn read_item(&mut self, deadline: Instant) -> io::Result<Item> {
        loop {
            let mut input = &self.buffer[self.start..self.end];
            let item = self.decoder.next(&mut input);
            self.start = self.end - input.len();
            let limit = remaining(deadline)?;
            if let Some(item) = item {
                return Ok(item);
            }
            let stream = self.stream.as_mut().ok_or(io::ErrorKind::NotConnected)?;
            stream.set_time_limit(limit)?;
            match stream.read(&mut self.buffer) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the other side closed it",
                    ));
                }
                Ok(n) => (self.start, self.end) = (0, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn encode(request: &Request) -> io::Result<Vec<u8>> {
    frame::encode(&serde_json::to_vec(request)?)
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

/// A socket's time limit shows as either, depending on the system.
fn is_time(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}
