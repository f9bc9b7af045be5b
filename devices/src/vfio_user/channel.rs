//! One connection: messages and descriptors over a unix stream socket, without ever waiting longer
//! than it was told.
//!
//! Received bytes lie in a buffer, and a read takes what fits. Descriptors come with the bytes that
//! they were sent with: a read ends behind the first bytes that have some, so they belong to the
//! message that has the last byte read.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::message::{HEADER_BYTES, Header, MAX_MESSAGE_BYTES, MessageError};

/// Most descriptors with one message.
pub const MAX_FDS: usize = 32;
/// The most that one look at the socket uses up of somebody's [`Patience`].
const SLICE: Duration = Duration::from_millis(100);
/// Bytes that one read takes; more for a message that is longer.
const READ_BYTES: usize = 16 << 10;
/// Most bytes that are kept of what the peer sends while nobody takes it: two messages of the
/// longest.
const MAX_RECEIVED_BYTES: usize = 2 * MAX_MESSAGE_BYTES;
/// Most bytes that wait for the peer to read them.
const MAX_UNSENT_BYTES: usize = 2 * MAX_MESSAGE_BYTES;

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChannelError {
    /// The peer closed it.
    #[error("the peer has gone")]
    Gone,
    /// The kernel refused.
    #[error("the socket failed: {0}")]
    Io(Errno),
    /// The peer was too slow.
    #[error("the peer did not answer in time")]
    Silent,
    /// The peer does not read what it asked for.
    #[error("the peer does not take its replies")]
    Unread,
    /// It sent what nobody can read on from.
    #[error("the peer sent {0}")]
    Garbled(MessageError),
    /// It did what the protocol forbids.
    #[error("the peer {0}")]
    Violation(&'static str),
}

/// Numbers of messages since the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MessageCounts {
    /// Sent, replies included.
    pub sent: u64,
    /// Received, replies included.
    pub received: u64,
    /// Commands among both that wanted no reply.
    pub posted: u64,
}

/// The same while they rise. Clones are of the same connection.
#[derive(Debug, Clone, Default)]
pub struct Counters(Arc<[AtomicU64; 3]>);

impl Counters {
    /// The numbers at this moment.
    pub fn counts(&self) -> MessageCounts {
        let [sent, received, posted] = &*self.0;
        MessageCounts {
            sent: sent.load(Ordering::Relaxed),
            received: received.load(Ordering::Relaxed),
            posted: posted.load(Ordering::Relaxed),
        }
    }

    fn count(&self, which: usize, header: &Header) {
        self.0[which].fetch_add(1, Ordering::Relaxed);
        if !header.is_reply() && header.wants_no_reply() {
            self.0[2].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Received {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// There were more descriptors than anybody takes; those are closed.
    pub surplus_fds: bool,
}

/// Descriptors that came, and behind which byte.
struct Arrival {
    end: u64,
    fds: Vec<OwnedFd>,
    surplus: bool,
}

struct Unsent {
    bytes: Vec<u8>,
    from: usize,
    fds: Vec<OwnedFd>,
}

/// See the module.
pub struct Channel {
    stream: UnixStream,
    /// What was received and not taken lies in `start..end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes received before `start`.
    taken: u64,
    arrivals: VecDeque<Arrival>,
    unsent: VecDeque<Unsent>,
    unsent_bytes: usize,
    counters: Counters,
}

impl Channel {
    /// The connection over `stream`.
    ///
    /// # Errors
    /// It cannot be set to not wait.
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            buffer: vec![0; READ_BYTES],
            start: 0,
            end: 0,
            taken: 0,
            arrivals: VecDeque::new(),
            unsent: VecDeque::new(),
            unsent_bytes: 0,
            counters: Counters::default(),
        })
    }

    /// Numbers of messages.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether something was sent that the socket has no room for.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether a message has begun that is not whole.
    pub fn has_part(&self) -> bool {
        self.start < self.end
    }

    /// Ends the connection for both sides, and drops what is under way; the socket stays open as a
    /// descriptor.
    pub fn shut_down(&mut self) {
        (self.start, self.end) = (0, 0);
        self.arrivals.clear();
        self.unsent.clear();
        // It fails where the peer has gone already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// The header that begins what was received.
    fn peek(&self) -> Result<Option<Header>, ChannelError> {
        let bytes = self.buffer.get(self.start..self.end);
        let header = bytes.and_then(|bytes| bytes.first_chunk::<HEADER_BYTES>());
        let header = header.map(|bytes| Header::parse(*bytes));
        header.transpose().map_err(ChannelError::Garbled)
    }

    /// Takes the next whole message of those that were received.
    ///
    /// # Errors
    /// What comes next is no message.
    pub fn next(&mut self) -> Result<Option<Received>, ChannelError> {
        let Some(header) = self.peek()? else {
            return Ok(None);
        };
        let end = self.start + header.size as usize;
        if end > self.end {
            return Ok(None);
        }
        let payload = self.buffer[self.start + HEADER_BYTES..end].to_vec();
        self.start = end;
        self.taken += u64::from(header.size);
        let (mut fds, mut surplus_fds) = (Vec::new(), false);
        while let Some(arrival) = self.arrivals.pop_front_if(|first| first.end <= self.taken) {
            fds.extend(arrival.fds);
            surplus_fds |= arrival.surplus;
        }
        if fds.len() > MAX_FDS {
            fds.truncate(MAX_FDS);
            surplus_fds = true;
        }
        self.counters.count(1, &header);
        Ok(Some(Received {
            header,
            payload,
            fds,
            surplus_fds,
        }))
    }

    /// Reads once what the socket has, without waiting. Returns whether there was anything.
    ///
    /// # Errors
    /// The connection has ended, or too much was received that nobody has taken.
    pub fn fill(&mut self) -> Result<bool, ChannelError> {
        self.make_room()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let mut room = [IoSliceMut::new(&mut self.buffer[self.end..])];
            match rustix::net::recvmsg(&self.stream, &mut room, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::CONNRESET) => return Err(ChannelError::Gone),
                Err(error) => return Err(ChannelError::Io(error)),
                Ok(received) => break received,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(ChannelError::Gone);
        }
        self.end += received.bytes;
        let surplus = received.flags.contains(ReturnFlags::CTRUNC);
        if surplus || !fds.is_empty() {
            let behind = self.taken + (self.end - self.start) as u64;
            self.arrivals.push_back(Arrival {
                end: behind,
                fds,
                surplus,
            });
            if self.arrivals.iter().map(|one| one.fds.len()).sum::<usize>() > 2 * MAX_FDS {
                return Err(ChannelError::Violation("sent descriptors without end"));
            }
        }
        Ok(true)
    }

    /// Moves what is left to the front, and makes room for the message that it begins.
    fn make_room(&mut self) -> Result<(), ChannelError> {
        let needed = match self.peek()? {
            Some(header) => (header.size as usize).max(READ_BYTES),
            None => READ_BYTES,
        };
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if needed > self.buffer.len() {
            self.buffer.resize(needed, 0);
        } else if needed == READ_BYTES && self.end < READ_BYTES && self.buffer.len() > READ_BYTES {
            self.buffer.truncate(READ_BYTES);
            self.buffer.shrink_to_fit();
        }
        if self.end == self.buffer.len() {
            // All of it are whole messages: they are to be taken first.
            if self.end >= MAX_RECEIVED_BYTES {
                return Err(ChannelError::Violation(
                    "sends without end while it reads nothing",
                ));
            }
            self.buffer.resize(self.end + READ_BYTES, 0);
        }
        Ok(())
    }

    /// Sends a message as far as the socket takes it; the rest waits for [`Channel::flush`].
    ///
    /// # Errors
    /// The connection has ended, or the peer reads nothing.
    pub fn send(
        &mut self,
        mut header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let size = HEADER_BYTES + payload.len();
        if size > MAX_MESSAGE_BYTES || fds.len() > MAX_FDS {
            return Err(ChannelError::Violation("would have to be sent too much"));
        }
        header.size = size as u32;
        self.counters.count(0, &header);
        let head = header.to_bytes();
        let sent = match self.unsent.is_empty() {
            true => send_once(&self.stream, &[&head, payload], fds)?,
            false => 0,
        };
        if sent == size {
            return Ok(());
        }
        self.unsent_bytes += size - sent;
        if self.unsent_bytes > MAX_UNSENT_BYTES {
            return Err(ChannelError::Unread);
        }
        let copies = fds.iter().filter(|_| sent == 0);
        let fds: Result<_, _> = copies
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 0))
            .collect();
        self.unsent.push_back(Unsent {
            bytes: [&head, payload].concat(),
            from: sent,
            fds: fds.map_err(ChannelError::Io)?,
        });
        Ok(())
    }

    /// Sends what the socket had no room for. Returns whether nothing is left.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn flush(&mut self) -> Result<bool, ChannelError> {
        while let Some(first) = self.unsent.front_mut() {
            let fds: Vec<_> = first.fds.iter().map(AsFd::as_fd).collect();
            let sent = send_once(&self.stream, &[&first.bytes[first.from..]], &fds)?;
            if sent == 0 {
                return Ok(false);
            }
            first.fds.clear();
            first.from += sent;
            self.unsent_bytes = self.unsent_bytes.saturating_sub(sent);
            if first.from == first.bytes.len() {
                self.unsent.pop_front();
            }
        }
        Ok(true)
    }

    /// Waits until the socket can be read, or written if something is unsent.
    ///
    /// # Errors
    /// Neither happened before `patience` was at its end.
    pub fn wait(&self, patience: &mut Patience) -> Result<(), ChannelError> {
        let mut events = PollFlags::IN;
        if self.has_unsent() {
            events |= PollFlags::OUT;
        }
        loop {
            let slice = patience.left().min(SLICE);
            if slice.is_zero() {
                // Also of a peer that sends without end.
                return Err(ChannelError::Silent);
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(slice.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: slice.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&self.stream, events)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => {}
                Err(error) => return Err(ChannelError::Io(error)),
                Ok(_) => return Ok(()),
            }
        }
    }
}

/// How long somebody still waits for a peer. What goes by between two looks counts whether the peer
/// was waited for or what it sent was dealt with, but as one slice at most: a machine that stands
/// still for a while, with both sides on it, has not used up all of it.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
    looked: Instant,
}

impl Patience {
    /// So much, from now on.
    pub fn new(time: Duration) -> Self {
        Self {
            left: time,
            looked: Instant::now(),
        }
    }

    /// What is left of it now.
    fn left(&mut self) -> Duration {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.looked, now));
        self.left = self.left.saturating_sub(passed.min(SLICE));
        self.left
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Sends without waiting; the number of bytes that the socket took.
fn send_once(
    stream: &UnixStream,
    parts: &[&[u8]],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, ChannelError> {
    let parts: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ChannelError::Violation("would have to be sent too much"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(stream, &parts, &mut control, flags) {
            Ok(sent) => return Ok(sent),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Gone),
            Err(error) => return Err(ChannelError::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests;
