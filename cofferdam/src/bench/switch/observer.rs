//! The far end of a cable, with a log of whose frames came when: a gateway of our own that answers
//! guests, or an interface of the host.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use devices::clock::monotonic_ns;
use devices::wire::gateway::{Gateway, GatewayConfig};
use devices::wire::unix_link::UnixLink;
use devices::wire::{MAX_FRAME_BYTES, Wire};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use super::interface::Interface;
use crate::options::MacAddress;

/// Frames that are remembered.
const REMEMBERED: usize = 200_000;
/// How long the event loop waits before it looks whether it is to end, in milliseconds.
const LOOK_MS: i32 = 20;

/// A frame that came over the cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    at_ns: u64,
    from: [u8; 6],
}

/// Frames in the order in which they came.
#[derive(Debug, Default)]
struct Log(VecDeque<Seen>);

/// When one guest was last heard and the other first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// Last frame of the old guest.
    pub last_ns: u64,
    /// First frame of the new one.
    pub first_ns: u64,
    /// Frames of the old guest that came after the first of the new one.
    pub late: u64,
}

impl Log {
    fn add(&mut self, seen: Seen) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(seen);
    }

    /// The outage between `old` and `new`, which was asked for at `asked_ns`; `None` as long as
    /// `new` is not heard.
    fn outage(&self, old: MacAddress, new: MacAddress, asked_ns: u64) -> Option<Outage> {
        let first = self
            .0
            .iter()
            .position(|seen| seen.from == new.0 && seen.at_ns >= asked_ns)?;
        let (before, after) = (self.0.range(..first), self.0.range(first..));
        let last = before.rev().find(|seen| seen.from == old.0)?;
        Some(Outage {
            last_ns: last.at_ns,
            first_ns: self.0.get(first)?.at_ns,
            late: after.filter(|seen| seen.from == old.0).count() as u64,
        })
    }
}

/// See the module. Dropping it pulls the cable.
pub struct Observer {
    log: Arc<Mutex<Log>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    /// Waits at `path` for the other end of the cable.
    ///
    /// # Errors
    /// There can be no socket, or no thread.
    pub fn listen(path: &Path) -> anyhow::Result<Self> {
        let link = UnixLink::listen(path)?;
        let gateway = Gateway::new(&GatewayConfig::default())?;
        let timer = Arc::new(Mutex::new(gateway.timer()));
        let log = Arc::new(Mutex::new(Log::default()));
        let bridge = Bridge {
            link,
            gateway,
            log: log.clone(),
            buffer: vec![0; MAX_FRAME_BYTES],
        };
        let mut events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().context("cannot make an event loop")?;
        events.add_subscriber(timer);
        events.add_subscriber(Arc::new(Mutex::new(bridge)));
        Self::start(log, move || events.run_with_timeout(LOOK_MS))
    }

    /// Hears what comes in at the interface `name` of the host, and answers nothing.
    ///
    /// # Errors
    /// There is none, or this process may not listen there.
    pub fn overhear(name: &str) -> anyhow::Result<Self> {
        let interface = Interface::open(name)?;
        let log = Arc::new(Mutex::new(Log::default()));
        let to = log.clone();
        Self::start(log, move || hear(&interface, &to))
    }

    /// Calls `listen`, which waits for a while, until it is dropped.
    fn start<T, E: std::fmt::Display>(
        log: Arc<Mutex<Log>>,
        mut listen: impl FnMut() -> Result<T, E> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let ends = end.clone();
        let thread = std::thread::Builder::new()
            .name("observer".to_owned())
            .spawn(move || {
                while !ends.load(Ordering::Relaxed) {
                    if let Err(error) = listen() {
                        tracing::error!(%error, "the far end of the cable is gone");
                        return;
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(Self {
            log,
            end,
            thread: Some(thread),
        })
    }

    /// The outage between the two guests with these addresses, which was asked for at `asked_ns`,
    /// once it is over.
    pub fn outage(&self, old: MacAddress, new: MacAddress, asked_ns: u64) -> Option<Outage> {
        lock(&self.log).outage(old, new, asked_ns)
    }

    /// How many frames of the guest with this address came since `since_ns`.
    pub fn frames(&self, of: MacAddress, since_ns: u64) -> usize {
        let log = lock(&self.log);
        let recent = log.0.iter().rev().take_while(|seen| seen.at_ns >= since_ns);
        recent.filter(|seen| seen.from == of.0).count()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the observer's thread panicked");
        }
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes what has come, and waits for a while where nothing has.
fn hear(interface: &Interface, log: &Mutex<Log>) -> Result<(), std::io::Error> {
    interface.wait(Duration::from_millis(LOOK_MS as u64))?;
    while let Some((from, at_ns)) = interface.next()? {
        lock(log).add(Seen { at_ns, from });
    }
    Ok(())
}

/// Carries frames between the cable and the gateway.
struct Bridge {
    link: UnixLink,
    gateway: Gateway,
    log: Arc<Mutex<Log>>,
    buffer: Vec<u8>,
}

impl Bridge {
    fn carry(&mut self) {
        while let Some(length) = self.link.receive(&mut self.buffer) {
            let frame = &self.buffer[..length];
            if let Some(&[_, _, _, _, _, _, a, b, c, d, e, f]) = frame.first_chunk::<12>() {
                lock(&self.log).add(Seen {
                    at_ns: monotonic_ns(),
                    from: [a, b, c, d, e, f],
                });
            }
            // What does not fit is lost, as in any network.
            self.gateway.send(frame);
            self.answer();
        }
        self.answer();
    }

    fn answer(&mut self) {
        let mut buffer = [0; 2048];
        while let Some(length) = self.gateway.receive(&mut buffer) {
            self.link.send(&buffer[..length]);
        }
    }
}

impl MutEventSubscriber for Bridge {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.carry();
    }

    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.link.readable_fd(), self.gateway.readable_fd()] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!(%error, "the far end of the cable hears nothing");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_from_the_last_frame_of_the_one_to_the_first_of_the_other() {
        let (a, b) = (
            MacAddress([2, 0, 0, 0, 0, 1]),
            MacAddress([2, 0, 0, 0, 0, 2]),
        );
        let mut log = Log::default();
        for (at_ns, from) in [(1, b), (2, a), (5, a), (9, b), (10, a), (11, b)] {
            log.add(Seen {
                at_ns,
                from: from.0,
            });
        }
        let outage = Outage {
            last_ns: 5,
            first_ns: 9,
            late: 1,
        };
        assert_eq!(log.outage(a, b, 3), Some(outage));
        assert_eq!(log.outage(a, b, 12), None);
        assert_eq!(log.outage(b, a, 10).unwrap().last_ns, 9);
        for at_ns in 0..REMEMBERED as u64 {
            log.add(Seen { at_ns, from: a.0 });
        }
        assert_eq!(log.0.len(), REMEMBERED);
    }

    #[test]
    fn frames_over_the_cable_are_answered_and_noted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cable");
        let observer = Observer::listen(&path).unwrap();
        let mut link = UnixLink::connect(&path).unwrap();
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        // Who has 10.0.2.2? Tell 10.0.2.15.
        let mut arp = vec![0xff; 6];
        arp.extend(mac.0);
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend(mac.0);
        arp.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        link.send(&arp);
        let mut answer = [0; 2048];
        while link.receive(&mut answer).is_none() {
            std::thread::yield_now();
        }
        assert_eq!(answer[..6], mac.0);
        assert_eq!(observer.frames(mac, 0), 1);
    }
}
