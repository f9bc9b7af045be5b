//! What there is of a port on the side of the wire: its addresses, frames that wait, and what its
//! event loop is woken by.
//!
//! ```text
//!   inbound (epoll)  ◄── kick, stall timer, and with the turn the wire's readable descriptor
//!   outbound (epoll) ◄── room, stall timer, and with the turn the wire's writable descriptor
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::super::{Wire, WritableSignal};
use super::PortCounters;

/// Frames that wait for one port at most.
pub const MAX_WAITING_FRAMES: usize = 512;
/// Bytes of them at most.
pub const MAX_WAITING_BYTES: usize = 1 << 20;
/// Addresses that a NIC may ask for; an 82540EM has as many.
const MAX_STATIONS: usize = 16;

/// The descriptors of a port that its event loop watches: inbound, outbound.
pub type Descriptors = [RawFd; 2];

/// An eventfd that says that there is something to look at, until it is drained.
pub struct Kick {
    fd: EventFd,
    signalled: bool,
}

impl Kick {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            signalled: false,
        })
    }

    /// Also where it is signalled already: who watches for edges, and did not look, is woken again.
    pub fn signal(&mut self) {
        self.signalled = true;
        if let Err(error) = self.fd.write(1) {
            tracing::error!(%error, "cannot wake a NIC's event loop");
        }
    }

    pub fn drain(&mut self) {
        if std::mem::take(&mut self.signalled) {
            // Only this drains it: there is something to read.
            let _ = self.fd.read();
        }
    }
}

/// How a port without the turn stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Without a carrier.
    Down,
    /// With one until then.
    Stalled(Instant),
}

/// See the module.
pub struct Member {
    /// The address that its NIC was given.
    pub address: [u8; 6],
    /// Addresses that its NIC receives now.
    pub stations: Vec<[u8; 6]>,
    /// Whether a guest uses it.
    pub plugged: bool,
    /// Of a port without the turn.
    pub standing: Standing,
    /// What its NIC last said of its own end of the link.
    pub nic_up: Option<bool>,
    pub counters: PortCounters,
    waiting: VecDeque<Box<[u8]>>,
    waiting_bytes: usize,
    kick: Kick,
    room: Kick,
    timer: TimerFd,
    inbound: Epoll,
    outbound: Epoll,
}

impl Member {
    pub fn new(address: [u8; 6]) -> std::io::Result<Self> {
        let member = Self {
            address,
            stations: Vec::new(),
            plugged: false,
            standing: Standing::Down,
            nic_up: None,
            counters: PortCounters::default(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            kick: Kick::new()?,
            room: Kick::new()?,
            timer: TimerFd::new()?,
            inbound: Epoll::new()?,
            outbound: Epoll::new()?,
        };
        let timer = member.timer.as_raw_fd();
        add(&member.inbound, member.kick.fd.as_raw_fd(), EventSet::IN)?;
        add(&member.inbound, timer, EventSet::IN)?;
        add(&member.outbound, member.room.fd.as_raw_fd(), EventSet::IN)?;
        add(&member.outbound, timer, EventSet::IN)?;
        Ok(member)
    }

    pub fn descriptors(&self) -> Descriptors {
        [self.inbound.as_raw_fd(), self.outbound.as_raw_fd()]
    }

    pub fn set_stations(&mut self, addresses: &[[u8; 6]]) {
        self.stations.clear();
        self.stations.extend(addresses.iter().take(MAX_STATIONS));
    }

    /// Begins to watch the wire. On an error nothing is watched.
    pub fn watch(&self, wire: &dyn Wire) -> std::io::Result<()> {
        add(&self.inbound, wire.readable_fd(), EventSet::IN)?;
        if let Some(writable) = wire.writable_fd() {
            let events = match writable.signal {
                WritableSignal::Out => EventSet::OUT,
                WritableSignal::In => EventSet::IN,
            };
            add(&self.outbound, writable.fd, events).inspect_err(|_| {
                remove(&self.inbound, wire.readable_fd());
            })?;
        }
        Ok(())
    }

    pub fn unwatch(&self, wire: &dyn Wire) {
        remove(&self.inbound, wire.readable_fd());
        if let Some(writable) = wire.writable_fd() {
            remove(&self.outbound, writable.fd);
        }
    }

    /// Has the NIC look again at frames, carrier and room.
    pub fn wake(&mut self) {
        self.kick.signal();
        self.room.signal();
    }

    /// The NIC has looked for frames and found none.
    pub fn seen(&mut self) {
        self.kick.drain();
    }

    /// The NIC has not seen all: it is to look again.
    pub fn look_again(&mut self) {
        self.kick.signal();
    }

    /// The NIC has tried to send.
    pub fn tried(&mut self) {
        self.room.drain();
    }

    /// The port has lost the turn.
    pub fn park(&mut self, stall: Option<Duration>) {
        self.standing = Standing::Down;
        if let Some(limit) = stall {
            match self.timer.reset(limit.max(Duration::from_nanos(1)), None) {
                Ok(()) => self.standing = Standing::Stalled(Instant::now() + limit),
                Err(error) => {
                    tracing::error!(%error, "a parked NIC has no timer: its link is down")
                }
            }
        }
        self.wake();
    }

    /// The port's wait is over: its carrier goes, or the turn has come.
    pub fn stop_waiting(&mut self) {
        self.standing = Standing::Down;
        if let Err(error) = self.timer.clear() {
            tracing::error!(%error, "a NIC's timer cannot be stopped");
        }
    }

    /// Whether frames for the port wait; ends its wait if that has been too long.
    pub fn is_stalled(&mut self) -> bool {
        match self.standing {
            Standing::Down => false,
            Standing::Stalled(until) if Instant::now() < until => true,
            Standing::Stalled(_) => {
                self.stop_waiting();
                self.lose_waiting();
                self.wake();
                false
            }
        }
    }

    /// Keeps a frame for later, or loses it.
    pub fn keep_or_lose(&mut self, frame: &[u8]) {
        let bytes = self.waiting_bytes.saturating_add(frame.len());
        let room = self.waiting.len() < MAX_WAITING_FRAMES && bytes <= MAX_WAITING_BYTES;
        if self.plugged && self.is_stalled() && room {
            self.waiting.push_back(frame.into());
            self.waiting_bytes = bytes;
            self.counters.waited += 1;
        } else {
            self.counters.lost_while_parked += 1;
        }
    }

    /// The next frame that has waited.
    pub fn waited(&mut self) -> Option<Box<[u8]>> {
        let frame = self.waiting.pop_front()?;
        self.waiting_bytes -= frame.len();
        Some(frame)
    }

    /// What has waited is lost.
    pub fn lose_waiting(&mut self) {
        self.counters.lost_after_wait += self.waiting.len() as u64;
        self.waiting.clear();
        self.waiting_bytes = 0;
    }
}

fn add(epoll: &Epoll, fd: RawFd, events: EventSet) -> std::io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
}

fn remove(epoll: &Epoll, fd: RawFd) {
    if let Err(error) = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
        tracing::error!(%error, "cannot stop watching a wire");
    }
}
