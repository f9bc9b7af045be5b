//! A cable between two processes: frames over a unix stream socket, each behind its length in four
//! bytes, most significant first. This is the framing of QEMU's `-netdev stream` and of vde-like
//! switches, so either may be at the other end.
//!
//! One side listens, the other connects; the order does not matter and both survive the other's
//! going and coming back. The carrier is there while the two are connected. What a peer sends is
//! hostile: a length that no frame has ends the connection.
//!
//! ```text
//!   inbound (epoll) ◄── the socket (IN; OUT while part of a frame waits)
//!                   ◄── listener, or timer of the next attempt, while not connected
//!                   ◄── changed (eventfd): frames left in the buffer, or carrier lost in `send`
//!   outbound (epoll) ◄─ the socket (OUT) while `send` has said Full
//! ```
//!
//! The event loop sees the two epoll descriptors only: they stay the same while sockets come and
//! go.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::state::{Form, Part, StateError};

use super::{MAX_FRAME_BYTES, SendOutcome, Wire, WritableFd, WritableSignal};
use crate::rate_limit::RateLimit;

const HEADER_BYTES: usize = 4;
/// Room for several frames, so that not every frame costs a system call.
const BUFFER_BYTES: usize = 4 * (MAX_FRAME_BYTES + HEADER_BYTES);
/// What is kept of a link: whether a peer was there.
const FORM: Form = Form {
    kind: "unix socket's wire",
    version: 1,
};
/// How long the peer of a link that was restored may take to come back before the carrier goes.
const COMES_BACK: Duration = Duration::from_secs(3);
/// Time between attempts to reach a peer that is not there.
const RETRY: Duration = Duration::from_millis(200);

/// Why a link cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Somebody listens there.
    #[error(
        "another process listens on {0}; connect to it (without `listen`) or choose another path"
    )]
    Busy(PathBuf),
    /// The path is of something that is no socket.
    #[error("{0} exists and is not a socket; choose another path")]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("cannot use {path} as a network link: {source}")]
    Io {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

enum Role {
    Listen(UnixListener),
    /// With the timer of the next attempt, and when that is.
    Connect(TimerFd, Instant),
}

/// A wire over a unix socket. See the module.
pub struct UnixLink {
    path: PathBuf,
    role: Role,
    stream: Option<UnixStream>,
    inbound: Epoll,
    outbound: Epoll,
    changed: EventFd,
    changed_signalled: bool,
    /// What was received lies in `consumed..filled`.
    received: Box<[u8]>,
    consumed: usize,
    filled: usize,
    /// Rest of a frame of which the socket took only a part.
    unsent: Vec<u8>,
    /// The link was restored with a peer that is not back yet: until when it is waited for.
    awaited: Option<(TimerFd, Instant)>,
    /// `send` has said Full and the outbound descriptor watches for room.
    awaits_room: bool,
    log: RateLimit,
}

impl UnixLink {
    /// Waits at `path` for a peer, one at a time. A socket that nobody listens on any more is
    /// replaced; the path is removed when the link is dropped.
    pub fn listen(path: &Path) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Io {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            other => other,
        }
        .map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Self::new(path, Role::Listen(listener)).map_err(failed)
    }

    /// Connects to whoever listens at `path`, now or as soon as somebody does.
    pub fn connect(path: &Path) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Io {
            path: path.to_owned(),
            source,
        };
        let timer = TimerFd::new().map_err(|error| failed(error.into()))?;
        let mut link = Self::new(path, Role::Connect(timer, Instant::now())).map_err(failed)?;
        match try_connect(path) {
            Ok(stream) => link.adopt(stream).map_err(failed)?,
            Err(error) if may_come(&error) => {
                tracing::info!(path = %path.display(), "nobody listens yet: waiting for a peer");
                link.retry_later();
            }
            Err(error) => return Err(failed(error)),
        }
        Ok(link)
    }

    fn new(path: &Path, role: Role) -> std::io::Result<Self> {
        let inbound = Epoll::new()?;
        let changed = EventFd::new(EFD_NONBLOCK)?;
        let waiting = match &role {
            Role::Listen(listener) => listener.as_raw_fd(),
            Role::Connect(timer, _) => timer.as_raw_fd(),
        };
        for fd in [waiting, changed.as_raw_fd()] {
            inbound.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self {
            path: path.to_owned(),
            role,
            stream: None,
            inbound,
            outbound: Epoll::new()?,
            changed,
            changed_signalled: false,
            received: vec![0; BUFFER_BYTES].into_boxed_slice(),
            consumed: 0,
            filled: 0,
            unsent: Vec::new(),
            awaited: None,
            awaits_room: false,
            log: RateLimit::default(),
        })
    }

    /// Looks for a peer while there is none.
    fn establish(&mut self) {
        let attempt = match &mut self.role {
            Role::Listen(listener) => listener.accept().map(|(stream, _)| stream),
            Role::Connect(_, next) if Instant::now() < *next => return,
            Role::Connect(..) => try_connect(&self.path),
        };
        let result = match attempt {
            Ok(stream) => self.adopt(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock || may_come(&error) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = result
            && self.log.permit().is_some()
        {
            tracing::warn!(path = %self.path.display(), %error, "network link");
        }
        if self.stream.is_none() {
            self.retry_later();
        }
    }

    fn adopt(&mut self, stream: UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(true)?;
        let fd = stream.as_raw_fd();
        self.inbound
            .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        self.outbound
            .ctl(ControlOperation::Add, fd, EpollEvent::default())?;
        self.watch_for_peers(false);
        self.awaited = None;
        self.stream = Some(stream);
        Ok(())
    }

    /// The peer is gone, or is to be.
    fn disconnect(&mut self, why: &str) {
        // Closing the socket takes it out of both epoll sets: it was never duplicated.
        if self.stream.take().is_none() {
            return;
        }
        if let Some(held_back) = self.log.permit() {
            tracing::info!(path = %self.path.display(), held_back, "network link is down: {why}");
        }
        (self.consumed, self.filled) = (0, 0);
        self.unsent.clear();
        self.awaits_room = false;
        self.watch_for_peers(true);
        self.signal_changed();
        self.retry_later();
    }

    /// Listener and timer are watched only while a peer may come.
    fn watch_for_peers(&self, watch: bool) {
        let fd = match &self.role {
            Role::Listen(listener) => listener.as_raw_fd(),
            Role::Connect(timer, _) => timer.as_raw_fd(),
        };
        let events = if watch {
            EventSet::IN
        } else {
            EventSet::empty()
        };
        self.modify(&self.inbound, fd, events);
    }

    /// Shows a carrier for as long as a peer usually takes to come back.
    fn await_peer(&mut self) -> std::io::Result<()> {
        let mut timer = TimerFd::new()?;
        timer.reset(COMES_BACK, None)?;
        let event = EpollEvent::new(EventSet::IN, 0);
        self.inbound
            .ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
        self.awaited = Some((timer, Instant::now() + COMES_BACK));
        Ok(())
    }

    fn retry_later(&mut self) {
        if let Role::Connect(timer, next) = &mut self.role {
            *next = Instant::now() + RETRY;
            if let Err(error) = timer.reset(RETRY, None) {
                tracing::error!(%error, "network link cannot set its timer: it will not reconnect");
            }
        }
    }

    fn modify(&self, epoll: &Epoll, fd: RawFd, events: EventSet) {
        if let Err(error) = epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, 0)) {
            tracing::error!(%error, "network link cannot change what it watches");
        }
    }

    fn signal_changed(&mut self) {
        if !std::mem::replace(&mut self.changed_signalled, true)
            && let Err(error) = self.changed.write(1)
        {
            tracing::error!(%error, "network link cannot signal its eventfd");
        }
    }

    fn drain_changed(&mut self) {
        if std::mem::take(&mut self.changed_signalled) {
            // Only this drains it: there is something to read.
            let _ = self.changed.read();
        }
    }

    /// Writes what is left of a frame. Returns whether nothing is left.
    fn flush(&mut self) -> bool {
        let had = !self.unsent.is_empty();
        while !self.unsent.is_empty() {
            let Some(stream) = &mut self.stream else {
                break;
            };
            match stream.write(&self.unsent) {
                Ok(length) if length > 0 => {
                    self.unsent.drain(..length);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Ok(_) | Err(_) => self.disconnect("the peer has gone"),
            }
        }
        if had && let Some(stream) = &self.stream {
            self.modify(&self.inbound, stream.as_raw_fd(), EventSet::IN);
        }
        true
    }

    /// Says Full, and watches for room.
    fn full(&mut self) -> SendOutcome {
        if let Some(stream) = &self.stream
            && !std::mem::replace(&mut self.awaits_room, true)
        {
            self.modify(&self.outbound, stream.as_raw_fd(), EventSet::OUT);
        }
        SendOutcome::Full
    }

    /// Length of the frame that begins the received bytes, if its header is there.
    fn next_length(&self) -> Option<usize> {
        let header = self.received[self.consumed..self.filled].get(..HEADER_BYTES)?;
        // Four bytes, by the line above.
        let header: [u8; HEADER_BYTES] = header.try_into().ok()?;
        Some(u32::from_be_bytes(header) as usize)
    }

    /// Takes a whole frame out of the received bytes; where it lies.
    fn next_frame(&mut self) -> Option<std::ops::Range<usize>> {
        let length = self.next_length()?;
        if length == 0 || length > MAX_FRAME_BYTES {
            self.disconnect("the peer sent a length that no frame has");
            return None;
        }
        let start = self.consumed + HEADER_BYTES;
        let end = start + length;
        if end > self.filled {
            return None;
        }
        self.consumed = end;
        Some(start..end)
    }

    /// Reads what the peer sent. Returns whether there is more than before.
    fn fill(&mut self) -> bool {
        // What is left is less than a frame: there is room behind it.
        self.received.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.consumed = 0;
        let Some(stream) = &mut self.stream else {
            return false;
        };
        let result = loop {
            match stream.read(&mut self.received[self.filled..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match result {
            Ok(length) if length > 0 => {
                self.filled += length;
                return true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => self.disconnect("the peer has gone"),
        }
        false
    }
}

impl Wire for UnixLink {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        if std::mem::take(&mut self.awaits_room)
            && let Some(stream) = &self.stream
        {
            self.modify(&self.outbound, stream.as_raw_fd(), EventSet::empty());
        }
        if frame.is_empty() || frame.len() > MAX_FRAME_BYTES {
            return SendOutcome::Dropped;
        }
        if !self.flush() {
            return self.full();
        }
        let header = (frame.len() as u32).to_be_bytes();
        loop {
            let Some(stream) = &mut self.stream else {
                return SendOutcome::Dropped;
            };
            let parts = [IoSlice::new(&header), IoSlice::new(frame)];
            match stream.write_vectored(&parts) {
                Ok(length) if length > 0 => {
                    let whole = header.iter().chain(frame);
                    self.unsent.extend(whole.skip(length));
                    if !self.unsent.is_empty() {
                        let fd = stream.as_raw_fd();
                        self.modify(&self.inbound, fd, EventSet::IN | EventSet::OUT);
                    }
                    return SendOutcome::Sent;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.full(),
                Ok(_) | Err(_) => self.disconnect("the peer has gone"),
            }
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if self.stream.is_none() {
            self.establish();
            // Closing the timer takes it out of the epoll set.
            self.awaited.take_if(|(_, until)| Instant::now() >= *until);
        }
        self.flush();
        loop {
            if let Some(frame) = self.next_frame() {
                let length = frame.len();
                let Some(room) = buffer.get_mut(..length) else {
                    continue;
                };
                room.copy_from_slice(&self.received[frame]);
                // The socket may be empty although there are more frames here.
                self.signal_changed();
                return Some(length);
            }
            if !self.fill() {
                self.drain_changed();
                return None;
            }
        }
    }

    fn carrier(&self) -> bool {
        self.stream.is_some() || self.awaited.is_some()
    }

    fn save(&self) -> Result<Option<Part>, StateError> {
        Part::new(FORM, &self.carrier()).map(Some)
    }

    /// The peer that the saved link had is waited for, so that the guest does not see the link go
    /// because its process was another one for a moment.
    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        let Some(part) = state else {
            return Ok(());
        };
        let had_peer: bool = part.open(FORM)?;
        if self.stream.is_none() {
            self.establish();
        }
        if had_peer && self.stream.is_none() && self.awaited.is_none() {
            self.await_peer()
                .map_err(|error| FORM.does_not_fit(error))?;
        }
        Ok(())
    }

    fn readable_fd(&self) -> RawFd {
        self.inbound.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.outbound.as_raw_fd(),
            signal: WritableSignal::In,
        })
    }
}

impl Drop for UnixLink {
    fn drop(&mut self) {
        if let Role::Listen(_) = self.role
            && let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

/// Connects without waiting, also where the listener's backlog is full.
fn try_connect(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Whether a peer may still come to where there is none now.
fn may_come(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
    )
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), LinkError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |source| LinkError::Io {
        path: path.to_owned(),
        source,
    };
    let kind = std::fs::symlink_metadata(path).map_err(failed)?.file_type();
    if !kind.is_socket() {
        return Err(LinkError::NotASocket(path.to_owned()));
    }
    match try_connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        _ => Err(LinkError::Busy(path.to_owned())),
    }
}

#[cfg(test)]
#[path = "unix_link_tests.rs"]
mod tests;
