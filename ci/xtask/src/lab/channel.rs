//! The stream to the lab's agent, with two watches on it: the user's Ctrl-C, and a heartbeat.
//!
//! While it waits, it also kicks the emulated processors ([`super::kick`]).
//!
//! A program may be silent for minutes; an agent may not. While nothing comes, a ping is put into
//! the stream between two requests' frames; the client passes over its answer. An agent that
//! answers none is hung, and so is its server.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent_protocol::client::Channel;
use agent_protocol::message::Call;
use agent_protocol::{Request, frame};

use super::interrupt;
use super::kick::Kick;

/// How soon Ctrl-C is noticed.
const SLICE: Duration = Duration::from_millis(100);
/// Silence before a ping.
const PING_AFTER: Duration = Duration::from_secs(5);
/// Silence after which the lab counts as hung. Long: emulation on a busy host stalls for seconds.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(40);
/// Id of all pings; the client counts its own up from 1.
const PING_ID: u64 = u64::MAX;

/// A watched stream.
pub struct Watched {
    stream: UnixStream,
    limit: Cell<Duration>,
    /// Set once the agent has answered: before that it may boot in silence.
    heartbeat: Arc<AtomicBool>,
    silence_limit: Duration,
    heard: Instant,
    pinged: Instant,
    kick: Option<Kick>,
}

impl Watched {
    /// Watches `stream`; the heartbeat is looked for while the flag is set.
    pub fn new(
        stream: UnixStream,
        kick: Option<Kick>,
        heartbeat: Arc<AtomicBool>,
        silence_limit: Duration,
    ) -> Self {
        let now = Instant::now();
        Self {
            stream,
            limit: Cell::new(SLICE),
            heartbeat,
            silence_limit,
            heard: now,
            pinged: now,
            kick,
        }
    }

    fn look(&mut self, deadline: Instant) -> io::Result<()> {
        if interrupt::seen() {
            // Not `Interrupted`, after which the client would go on.
            return Err(io::Error::other("interrupted"));
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if !self.heartbeat.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(kick) = &mut self.kick {
            kick.now_and_then();
        }
        if now - self.heard > self.silence_limit {
            let text = format!("no sign of life for {} s", self.silence_limit.as_secs());
            return Err(io::Error::other(text));
        }
        if now - self.heard.max(self.pinged) > PING_AFTER.min(self.silence_limit / 4) {
            self.pinged = now;
            let ping = serde_json::to_vec(&Request {
                id: PING_ID,
                call: Call::Ping,
            })?;
            frame::send(&mut self.stream, &ping)?;
        }
        Ok(())
    }
}

fn is_time(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let deadline = Instant::now() + self.limit.get();
        loop {
            self.stream
                .set_read_timeout(Some(SLICE.min(self.limit.get())))?;
            match self.stream.read(buffer) {
                Ok(count) => {
                    self.heard = Instant::now();
                    self.kick.iter_mut().for_each(Kick::now_and_then);
                    return Ok(count);
                }
                Err(error) if is_time(&error) || error.kind() == io::ErrorKind::Interrupted => {
                    self.look(deadline)?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Write for Watched {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // A new request: what was silent before it was not asked.
        self.heard = Instant::now();
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Channel for Watched {
    fn set_time_limit(&self, limit: Duration) -> io::Result<()> {
        // Zero would mean "no limit".
        let limit = limit.max(Duration::from_millis(1));
        self.limit.set(limit);
        self.stream.set_write_timeout(Some(limit))
    }
}

#[cfg(test)]
mod tests {
    use agent_protocol::frame::{Decoder, Item};

    use super::*;

    fn watched(limit: Duration, silence_ms: u64) -> (Watched, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let heartbeat = Arc::new(AtomicBool::new(true));
        let watched = Watched::new(ours, None, heartbeat, Duration::from_millis(silence_ms));
        watched.set_time_limit(limit).unwrap();
        (watched, theirs)
    }

    #[test]
    fn silent_agent_is_pinged_and_then_given_up() {
        let (mut watched, mut theirs) = watched(Duration::from_secs(3600), 800);
        let error = watched.read(&mut [0; 16]).unwrap_err();
        assert!(error.to_string().contains("no sign of life"), "{error}");
        drop(watched);
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        let Some(Item::Frame(payload)) = Decoder::new().next(&mut bytes.as_slice()) else {
            panic!("no ping")
        };
        let request: Request = serde_json::from_slice(&payload).unwrap();
        assert_eq!(
            request,
            Request {
                id: PING_ID,
                call: Call::Ping
            }
        );
    }

    #[test]
    fn time_limit_of_the_client_comes_first() {
        let (mut watched, _theirs) = watched(Duration::from_millis(20), 3_600_000);
        assert!(is_time(&watched.read(&mut [0; 16]).unwrap_err()));
    }

    #[test]
    fn bytes_pass_unchanged() {
        let (mut watched, mut theirs) = watched(Duration::from_secs(3600), 3_600_000);
        theirs.write_all(b"answer").unwrap();
        let mut buffer = [0; 16];
        let count = watched.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"answer");
    }
}
