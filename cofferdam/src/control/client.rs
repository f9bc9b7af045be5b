//! The other side of the control socket.
//!
//! No request waits without end: those that are answered at once have a limit, and where a VM
//! process is at work for long it says every second what it does. One that is silent for longer is
//! stopped, or so is its host.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Protocol;
use super::protocol::{Answer, MAX_ANSWER_BYTES, Reply, Request, Status, VmProtocol, line};
use crate::process::State;
use crate::runtime_dir::RunningVm;

/// How long a VM process may take to answer a request, or be silent while it is at work on one.
pub const ANSWER_TIME: Duration = Duration::from_secs(20);

/// How often the process is looked at while it does not answer.
const LOOK: Duration = Duration::from_secs(1);

/// Looks in a row at which it is stopped, after which it is not waited for.
const STOPPED_LOOKS: u32 = 3;

/// Why a request has no answer, for those who have to tell one reason from another.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It was answered with an error.
    #[error("{0}")]
    Refused(String),
    /// There was no answer in time.
    #[error("{0}")]
    Silent(String),
    /// The process has ended.
    #[error("{0}")]
    Ended(String),
}

/// A connection to a VM process.
pub type ControlClient = Connection<VmProtocol>;

/// Who is asked over a connection.
#[derive(Debug)]
pub struct Asked {
    /// Name and process of who answers, for what a person is told.
    who: Option<(String, Option<u32>)>,
    /// How long it has for each answer.
    limit: Duration,
}

/// A connection to a process that has a control socket.
#[derive(Debug)]
pub struct Connection<P: Protocol> {
    reader: BufReader<UnixStream>,
    asked: Asked,
    protocol: PhantomData<fn() -> P>,
}

impl<P: Protocol> Connection<P> {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        Self::open(path, None, ANSWER_TIME)
    }

    /// Connects to a VM or device host that runs, which has `limit` for each answer.
    pub fn to(vm: &RunningVm, limit: Duration) -> anyhow::Result<Self> {
        let who = (vm.name.to_string(), vm.pid);
        Self::open(&vm.paths.control_socket(), Some(who), limit)
    }

    fn open(
        path: &Path,
        who: Option<(String, Option<u32>)>,
        limit: Duration,
    ) -> anyhow::Result<Self> {
        let cannot = || format!("cannot reach {} at {}", P::WHO, path.display());
        // With its limits before it connects: a process that is stopped accepts nobody, and its
        // queue may be full.
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .with_context(cannot)?;
        for (side, time) in [(Timeout::Recv, limit.min(LOOK)), (Timeout::Send, limit)] {
            set_socket_timeout(&socket, side, Some(time)).with_context(cannot)?;
        }
        let address = SocketAddrUnix::new(path).with_context(cannot)?;
        let client = Self {
            reader: BufReader::new(UnixStream::from(socket)),
            asked: Asked { who, limit },
            protocol: PhantomData,
        };
        match connect(client.reader.get_ref(), &address) {
            Err(rustix::io::Errno::AGAIN) => return Err(client.silent().into()),
            other => other.with_context(cannot)?,
        }
        Ok(client)
    }

    /// The connection, for who wants to close it while an answer is waited for.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn stream(&self) -> std::io::Result<UnixStream> {
        self.reader.get_ref().try_clone()
    }

    /// Asks for something and waits for the answer.
    pub fn ask(&mut self, request: &P::Request) -> anyhow::Result<P::Reply> {
        self.ask_and_watch(request, &mut |_| {})
    }

    /// The same, with each new word of what is done meanwhile for `progress`.
    pub fn ask_and_watch(
        &mut self,
        request: &P::Request,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<P::Reply> {
        let written = self.reader.get_mut().write_all(line(request).as_bytes());
        if let Err(error) = &written
            && error.kind() == ErrorKind::BrokenPipe
            && let Ok(Answer::Error(why)) = self.answer(Vec::new())
        {
            // It has no room for one more, which it says before it closes.
            return Err(AskError::Refused(why).into());
        }
        self.in_words(written, || {
            format!("{} has closed its control socket", P::WHO)
        })?;
        self.wait(request, Vec::new(), progress)
    }

    /// Waits for the answer to `request`, which was sent, and of which `line` was read already.
    ///
    /// # Errors
    /// As of [`Self::ask`].
    pub fn go_on(&mut self, request: &P::Request, line: Vec<u8>) -> anyhow::Result<P::Reply> {
        self.wait(request, line, &mut |_| {})
    }

    /// Takes a connection apart that nothing is asked over; `None` if something has come over it
    /// that nobody has asked for.
    pub fn into_parts(self) -> Option<(UnixStream, Asked)> {
        let is_at_rest = self.reader.buffer().is_empty();
        is_at_rest.then(|| (self.reader.into_inner(), self.asked))
    }

    /// Puts one together again; `stream` waits when it is read.
    pub fn of_parts(stream: UnixStream, asked: Asked) -> Self {
        Self {
            reader: BufReader::new(stream),
            asked,
            protocol: PhantomData,
        }
    }

    fn wait(
        &mut self,
        request: &P::Request,
        mut line: Vec<u8>,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<P::Reply> {
        let mut told = String::new();
        let longest = P::may_take(request).unwrap_or(self.asked.limit);
        let deadline = Instant::now() + longest;
        loop {
            match self.answer(std::mem::take(&mut line))? {
                Answer::Ok(reply) => return Ok(reply),
                Answer::Error(error) => return Err(AskError::Refused(error).into()),
                Answer::Progress(what) if Instant::now() >= deadline => {
                    let silent = AskError::Silent(format!(
                        "not done within {} s, and given up; {} is at this: {what}",
                        longest.as_secs(),
                        P::WHO
                    ));
                    return Err(silent.into());
                }
                Answer::Progress(what) if what == told => {}
                Answer::Progress(what) => {
                    progress(&what);
                    told = what;
                }
            }
        }
    }

    /// The next answer, of which `line` was read already.
    fn answer(&mut self, mut line: Vec<u8>) -> anyhow::Result<Answer<P::Reply>> {
        let deadline = Instant::now() + self.asked.limit;
        let mut stopped = 0;
        while line.last() != Some(&b'\n') {
            match self.read_some(&mut line) {
                Ok(true) => break,
                // Some of a line is no sign of life: whoever sends a byte at a time would be waited
                // for without end.
                Ok(false) if Instant::now() < deadline => stopped = 0,
                Ok(false) => return Err(self.silent().into()),
                Err(error) if is_time_up(&error) && Instant::now() < deadline => {
                    stopped = if self.is_stopped() { stopped + 1 } else { 0 };
                    if stopped >= STOPPED_LOOKS {
                        return Err(self.silent().into());
                    }
                }
                Err(error) => return self.in_words(Err(error), unreadable::<P>),
            }
        }
        if line.last() != Some(&b'\n') {
            return Err(AskError::Ended(format!("{} ended before it answered", P::WHO)).into());
        }
        serde_json::from_slice(&line).with_context(unreadable::<P>)
    }

    /// Reads on in a line, once. Says whether that is all: its end, the connection's, or as much as
    /// an answer may have.
    fn read_some(&mut self, line: &mut Vec<u8>) -> std::io::Result<bool> {
        let bytes = match self.reader.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(false),
            bytes => bytes?,
        };
        let room = MAX_ANSWER_BYTES.saturating_sub(line.len() as u64);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1).min(room);
        line.extend_from_slice(&bytes[..taken]);
        self.reader.consume(taken);
        Ok(taken == 0 || line.last() == Some(&b'\n'))
    }

    fn in_words<T>(
        &self,
        result: std::io::Result<T>,
        otherwise: impl FnOnce() -> String,
    ) -> anyhow::Result<T> {
        match result {
            Err(error) if is_time_up(&error) => Err(self.silent().into()),
            other => other.with_context(otherwise),
        }
    }

    fn is_stopped(&self) -> bool {
        let pid = self.asked.who.as_ref().and_then(|(_, pid)| *pid);
        pid.and_then(State::of) == Some(State::Stopped)
    }

    /// Why there is no answer, as far as the process can be seen.
    fn silent(&self) -> AskError {
        let seconds = self.asked.limit.as_secs();
        let Some((name, pid)) = &self.asked.who else {
            return AskError::Silent(format!("{} does not answer within {seconds} s", P::WHO));
        };
        match pid.map(|pid| (pid, State::of(pid))) {
            Some((pid, Some(State::Stopped))) => AskError::Silent(format!(
                "{name} does not answer: its process is stopped; `kill -CONT {pid}` lets it go on"
            )),
            Some((pid, Some(State::Lives))) => AskError::Silent(format!(
                "{name} does not answer within {seconds} s, though its process ({pid}) lives: try again, or end it \
                 with `{} {name}`",
                P::END
            )),
            _ => AskError::Ended(format!("{name} has ended")),
        }
    }
}

impl ControlClient {
    /// Asks for something that answers nothing but that it was done.
    pub fn tell(&mut self, request: &Request) -> anyhow::Result<()> {
        match self.ask(request)? {
            Reply::Done {} => Ok(()),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }

    /// Asks how the VM is.
    pub fn status(&mut self) -> anyhow::Result<Status> {
        match self.ask(&Request::Status {})? {
            Reply::Status(status) => Ok(*status),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }
}

fn unreadable<P: Protocol>() -> String {
    format!("the answer of {} cannot be read", P::WHO)
}

/// Whether this is how the system says that a socket's time is up.
fn is_time_up(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Long after the caller's limit.
    const SAFETY: Duration = Duration::from_secs(120);

    /// It sends a byte at a time for as long as somebody waits for it.
    #[test]
    fn who_sends_bytes_and_no_answer_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let begin = Instant::now();
                while !over.load(Ordering::Relaxed)
                    && begin.elapsed() < SAFETY
                    && stream.write_all(b"x").is_ok()
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let limit = Duration::from_millis(100);
            let mut client = ControlClient::open(&path, None, limit).unwrap();
            let error = client.ask(&Request::Status {}).unwrap_err();
            over.store(true, Ordering::Relaxed);
            let silent = matches!(error.downcast_ref(), Some(AskError::Silent(_)));
            assert!(silent, "{error:#}");
        });
    }
}
