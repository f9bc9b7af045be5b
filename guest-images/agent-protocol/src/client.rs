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
//! time is up: the channel may not be there yet, or the guest may be rebooting. A call that failed is
//! never repeated by itself, because it may have been carried out.
//!
//! The agent is as hostile as its guest: frames, collected results and waits are bounded.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::PROTOCOL_VERSION;
use crate::frame::{self, Decoder, Item};
use crate::message::*;

/// How long a call may take when nothing else is said.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(30);

/// Largest collected result (output of a program, file, list) in bytes.
pub const DEFAULT_COLLECT_LIMIT: usize = 256 << 20;

/// Between two hellos to an agent that does not answer.
const HELLO_INTERVAL: Duration = Duration::from_millis(250);

/// Between two attempts to open a channel that is not there.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Added to a program's own time limit, so that the agent's word arrives before ours.
const EXEC_GRACE: Duration = Duration::from_secs(10);

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

/// How a program ended and what it wrote.
#[derive(Clone, Debug)]
pub struct ExecResult {
    /// How it ended.
    pub end: ExecEnd,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// The answer with its times.
    pub answer: Answer,
}

impl ExecResult {
    /// Exit status 0.
    pub fn success(&self) -> bool {
        self.end == ExecEnd::Exited(0)
    }

    /// Standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
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
    /// A client that gets its stream from `connect`, at the first call and whenever the stream broke.
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
    /// [`ClientError::Time`] when none did within `limit`, [`ClientError::Version`] when it does not fit.
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

    /// One hello and the wait for its answer.
    fn try_hello(&mut self, deadline: Instant) -> Result<Option<AgentInfo>, ClientError> {
        if self.stream.is_none() {
            self.stream = Some((self.connect)()?);
            (self.start, self.end) = (0, 0);
            self.decoder = Decoder::new();
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
    /// [`ClientError::Agent`] when the agent refused; after any other error the session is over and the
    /// next call begins a new one. An error of `part` ends the session too.
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

    /// A call whose answer has no parts.
    fn simple(&mut self, call: Call) -> Result<Answer, ClientError> {
        self.call(call, self.limit, &mut |body| Err(unexpected(&body)))
    }

    /// Nothing but the times.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn ping(&mut self) -> Result<Answer, ClientError> {
        self.simple(Call::Ping)
    }

    /// Runs a program and gives its output away as it comes: `output(is_stderr, bytes)`.
    ///
    /// # Errors
    /// See [`Client::call`]. A program that fails is no error.
    pub fn exec_streaming(
        &mut self,
        exec: Exec,
        output: &mut dyn FnMut(bool, Vec<u8>) -> Result<(), ClientError>,
    ) -> Result<(ExecEnd, Answer), ClientError> {
        let limit = exec.limit_ms.map_or(self.limit, Duration::from_millis) + EXEC_GRACE;
        let answer = self.call(Call::Exec(exec), limit, &mut |body| match body {
            Body::Stdout(bytes) => output(false, bytes.0),
            Body::Stderr(bytes) => output(true, bytes.0),
            other => Err(unexpected(&other)),
        })?;
        match answer.done {
            Done::Exec(end) => Ok((end, answer)),
            other => Err(unexpected(&other)),
        }
    }

    /// Runs a program and collects its output.
    ///
    /// # Errors
    /// See [`Client::call`]. A program that fails is no error.
    pub fn exec(&mut self, exec: Exec) -> Result<ExecResult, ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let most = self.collect_limit;
        let (end, answer) = self.exec_streaming(exec, &mut |is_stderr, bytes| {
            let total = stdout.len() + stderr.len() + bytes.len();
            let into = if is_stderr { &mut stderr } else { &mut stdout };
            collect(into, bytes, total, most)
        })?;
        Ok(ExecResult {
            end,
            stdout,
            stderr,
            answer,
        })
    }

    /// Runs a program given by words.
    ///
    /// # Errors
    /// See [`Client::call`]. A program that fails is no error.
    pub fn run(&mut self, argv: &[&str]) -> Result<ExecResult, ClientError> {
        let limit_ms = Some(u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX));
        self.exec(Exec {
            argv: argv.iter().map(|s| s.to_string()).collect(),
            limit_ms,
            ..Exec::default()
        })
    }

    /// Loads a module, with what it depends on, from the guest's `/lib/modules`.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn load_module(&mut self, name: &str, params: &str) -> Result<Answer, ClientError> {
        self.simple(Call::LoadModule {
            source: ModuleSource::Name(name.into()),
            params: params.into(),
        })
    }

    /// Removes a module.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn remove_module(&mut self, name: &str) -> Result<Answer, ClientError> {
        self.simple(Call::RemoveModule { name: name.into() })
    }

    /// Removes and inserts a driver; the steps with their times.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn restart_driver(
        &mut self,
        restart: RestartDriver,
    ) -> Result<(Vec<Step>, Answer), ClientError> {
        let answer = self.simple(Call::RestartDriver(restart))?;
        match &answer.done {
            Done::Restart(steps) => Ok((steps.clone(), answer)),
            other => Err(unexpected(other)),
        }
    }

    /// The kernel's symbols that pass the filter.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn symbols(&mut self, filter: SymbolFilter) -> Result<Vec<Symbol>, ClientError> {
        let mut symbols = Vec::new();
        let most = self.collect_limit;
        let mut total = 0;
        self.call(Call::Symbols(filter), self.limit, &mut |body| match body {
            Body::Symbols(part) => {
                total += part
                    .iter()
                    .map(|s| size_of::<Symbol>() + s.name.len())
                    .sum::<usize>();
                collect(&mut symbols, part, total, most)
            }
            other => Err(unexpected(&other)),
        })?;
        Ok(symbols)
    }

    /// Loaded modules, or the one with this name.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn modules(&mut self, name: Option<&str>) -> Result<Vec<Module>, ClientError> {
        match self
            .simple(Call::Modules {
                name: name.map(str::to_string),
            })?
            .done
        {
            Done::Modules(modules) => Ok(modules),
            other => Err(unexpected(&other)),
        }
    }

    /// The network interfaces.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, ClientError> {
        match self.simple(Call::Interfaces)?.done {
            Done::Interfaces(interfaces) => Ok(interfaces),
            other => Err(unexpected(&other)),
        }
    }

    /// Brings an interface up or down.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn set_link(&mut self, interface: &str, up: bool) -> Result<Answer, ClientError> {
        self.simple(Call::SetLink {
            interface: interface.into(),
            up,
        })
    }

    /// Gives an interface its address.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn set_address(
        &mut self,
        interface: &str,
        address: Ipv4,
        gateway: Option<std::net::Ipv4Addr>,
    ) -> Result<Answer, ClientError> {
        self.simple(Call::SetAddress {
            interface: interface.into(),
            address,
            gateway,
        })
    }

    /// Kernel messages from a sequence number on, and the number to go on with.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn kmsg(&mut self, since: u64) -> Result<(Vec<KmsgRecord>, u64), ClientError> {
        let mut records = Vec::new();
        let most = self.collect_limit;
        let mut total = 0;
        let answer = self.call(Call::Kmsg { since }, self.limit, &mut |body| match body {
            Body::Kmsg(part) => {
                total += part
                    .iter()
                    .map(|r| size_of::<KmsgRecord>() + r.text.len())
                    .sum::<usize>();
                collect(&mut records, part, total, most)
            }
            other => Err(unexpected(&other)),
        })?;
        match answer.done {
            Done::Kmsg { next } => Ok((records, next)),
            other => Err(unexpected(&other)),
        }
    }

    /// A file's content.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn read_file(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        let mut content = Vec::new();
        let most = self.collect_limit;
        let call = Call::ReadFile {
            path: path.into(),
            offset: 0,
            limit: u64::MAX,
        };
        self.call(call, self.limit, &mut |body| match body {
            Body::File(bytes) => {
                let total = content.len() + bytes.0.len();
                collect(&mut content, bytes.0, total, most)
            }
            other => Err(unexpected(&other)),
        })?;
        Ok(content)
    }

    /// Writes a file of any size, in place of what is there.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn write_file(&mut self, path: &str, data: &[u8], mode: u32) -> Result<(), ClientError> {
        // At least one piece, so that an empty file is made.
        for (i, piece) in data
            .chunks(CHUNK)
            .chain(data.is_empty().then_some(&[][..]))
            .enumerate()
        {
            let data = Bytes(piece.to_vec());
            self.simple(Call::WriteFile {
                path: path.into(),
                data,
                append: i > 0,
                mode,
            })?;
        }
        Ok(())
    }

    /// Powers the guest off.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn power_off(&mut self) -> Result<Answer, ClientError> {
        self.simple(Call::PowerOff)
    }

    /// Reboots the guest. The next call waits for the new agent.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn reboot(&mut self) -> Result<Answer, ClientError> {
        let answer = self.simple(Call::Reboot)?;
        self.session = None;
        Ok(answer)
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

fn unexpected(what: &impl std::fmt::Debug) -> ClientError {
    let mut text = format!("{what:?}");
    text.truncate(text.floor_char_boundary(100));
    ClientError::Malformed(format!("not what was asked for: {text}"))
}

fn collect<T>(
    into: &mut Vec<T>,
    part: Vec<T>,
    total: usize,
    most: usize,
) -> Result<(), ClientError> {
    if total > most {
        return Err(ClientError::TooMuch(most));
    }
    into.extend(part);
    Ok(())
}
