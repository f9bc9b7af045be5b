//! A network of one: a gateway in this process that a guest's NIC can be plugged into without root.
//!
//! It answers ARP, ICMP echo and DHCP, and has the small services of [`services`](self#services).
//! It can ping the guest by itself and records when frames and replies passed ([`GatewayLog`]).
//!
//! It has no thread. A frame is answered on the thread that sends it, before [`Wire::send`]
//! returns; what needs a clock (TCP's timers, probes) runs in an event loop, by [`GatewayTimer`].
//!
//! Lock order: a NIC's own lock, then the gateway's, then the log's. Nothing is called back under
//! the gateway's lock.
//!
//! # Services
//!
//! | port | | |
//! | --- | --- | --- |
//! | 7 | TCP, UDP | echo |
//! | 9 | TCP | takes everything; answers the end of the stream with its checksum and length, as `cksum` prints them |
//! | 19 | TCP | sends numbered lines ([`source_line`]) without end |
//! | 67 | UDP | DHCP |
//! | 7777 | UDP | sends each datagram on to [`MULTICAST_GROUP`] |

mod config;
mod connections;
mod dhcp;
mod handshakes;
mod log;
mod network;
mod port;
mod probe;
mod services;
mod state;
#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use smoltcp::time::Instant;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::network::Network;
use self::port::{Incoming, Outbox};
use self::probe::Probe;
use super::{MAX_FRAME_BYTES, SendOutcome, Wire, WritableFd, WritableSignal};
use crate::clock::monotonic_ns;
use crate::state::{Part, StateError};

pub use self::config::{GatewayConfig, NetworkConfig};
pub use self::log::{GatewayCounters, GatewayEvent, GatewayEventKind, GatewayLog, SILENCE_NS};
pub use self::services::{MULTICAST_GROUP, SOURCE_LINE_BYTES, source_line};

/// Why a gateway could not be made.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A descriptor could not be had.
    #[error("gateway: cannot make an eventfd or timerfd (raise the limit of open files?): {0}")]
    Descriptor(#[source] std::io::Error),
    /// A network that makes no sense.
    #[error("gateway: {0}")]
    Config(&'static str),
}

/// Everything behind the gateway's lock.
struct State {
    networks: Vec<Network>,
    outbox: Outbox,
    probe: Probe,
    carrier: bool,
    /// The readable eventfd is signalled.
    readable_signalled: bool,
    /// A frame was refused: whoever sent it waits for the writable eventfd.
    sender_waits: bool,
    /// The writable eventfd is signalled.
    writable_signalled: bool,
    timer: TimerFd,
    /// What the timer is set to, in nanoseconds of `CLOCK_MONOTONIC`.
    armed_ns: Option<u64>,
}

struct Shared {
    config: GatewayConfig,
    state: Mutex<State>,
    readable: EventFd,
    writable: EventFd,
    timer_fd: RawFd,
    log: Arc<GatewayLog>,
}

/// The gateway's end of the wire, for a NIC.
pub struct Gateway {
    shared: Arc<Shared>,
}

/// Drives the gateway's timers: to be added to the event loop that the NIC is in.
pub struct GatewayTimer {
    shared: Arc<Shared>,
}

/// Controls a gateway from any thread.
#[derive(Clone)]
pub struct GatewayControl {
    shared: Arc<Shared>,
}

impl Gateway {
    /// Makes a gateway; its carrier is there from the start.
    pub fn new(config: &GatewayConfig) -> Result<Self, GatewayError> {
        let first = config.check()?;
        let eventfd = || EventFd::new(EFD_NONBLOCK).map_err(GatewayError::Descriptor);
        let timer = TimerFd::new().map_err(|error| GatewayError::Descriptor(error.into()))?;
        let timer_fd = timer.as_raw_fd();
        let now = smoltcp_now(monotonic_ns());
        let state = State {
            networks: config
                .networks
                .iter()
                .map(|n| Network::new(config, n, now))
                .collect(),
            outbox: Outbox::new(config.queue_frames),
            probe: Probe::new(config.mac, first.address, first.guest_address),
            carrier: true,
            readable_signalled: false,
            sender_waits: false,
            writable_signalled: false,
            timer,
            armed_ns: None,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                config: config.clone(),
                state: Mutex::new(state),
                readable: eventfd()?,
                writable: eventfd()?,
                timer_fd,
                log: Arc::default(),
            }),
        })
    }

    /// The part that an event loop must drive.
    pub fn timer(&self) -> GatewayTimer {
        GatewayTimer {
            shared: self.shared.clone(),
        }
    }

    /// A handle to control the gateway from elsewhere.
    pub fn control(&self) -> GatewayControl {
        GatewayControl {
            shared: self.shared.clone(),
        }
    }
}

impl GatewayControl {
    /// What passed and when.
    pub fn log(&self) -> Arc<GatewayLog> {
        self.shared.log.clone()
    }

    /// Starts to ping the guest every `interval` (at least 1 ms), first of all by asking for its
    /// hardware address. Sequence numbers go on where they were while a probe was running.
    pub fn start_probe(&self, interval: Duration) {
        let mut state = self.shared.lock();
        state.probe.start(interval, monotonic_ns());
        self.shared.run(&mut state, None);
    }

    /// Stops pinging.
    pub fn stop_probe(&self) {
        self.shared.lock().probe.stop();
    }

    /// Pulls the cable or plugs it in. Frames under way are lost when it is pulled.
    pub fn set_carrier(&self, present: bool) {
        let mut state = self.shared.lock();
        if state.carrier == present {
            return;
        }
        state.carrier = present;
        state.outbox.clear();
        self.shared
            .log
            .record(monotonic_ns(), GatewayEventKind::Carrier { present });
        self.shared.signal_readable(&mut state);
        self.shared.signal_writable(&mut state);
    }
}

impl Wire for Gateway {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        let shared = &*self.shared;
        let mut state = shared.lock();
        if std::mem::take(&mut state.writable_signalled) {
            drain(&shared.writable);
        }
        if !state.carrier || frame.len() > MAX_FRAME_BYTES {
            shared.log.frame_refused();
            return SendOutcome::Dropped;
        }
        if state.outbox.is_full() {
            state.sender_waits = true;
            return SendOutcome::Full;
        }
        shared.run(&mut state, Some(frame));
        SendOutcome::Sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        loop {
            let Some(outgoing) = state.outbox.pop() else {
                if state.readable_signalled {
                    state.readable_signalled = false;
                    drain(&shared.readable);
                }
                return None;
            };
            if state.outbox.is_half_empty() {
                if state.outbox.blocked {
                    shared.run(&mut state, None);
                }
                shared.signal_writable(&mut state);
            }
            match buffer.get_mut(..outgoing.frame.len()) {
                Some(room) => {
                    room.copy_from_slice(&outgoing.frame);
                    shared.log.frame_to_guest();
                    return Some(outgoing.frame.len());
                }
                None => shared.log.frame_too_long(),
            }
        }
    }

    fn carrier(&self) -> bool {
        self.shared.lock().carrier
    }

    fn save(&self) -> Result<Option<Part>, StateError> {
        self.save_state().map(Some)
    }

    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        self.restore_state(state)
    }

    fn readable_fd(&self) -> RawFd {
        self.shared.readable.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.shared.writable.as_raw_fd(),
            signal: WritableSignal::In,
        })
    }
}

impl MutEventSubscriber for GatewayTimer {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut state = self.shared.lock();
        // Setting the timer again, which `run` does, also clears its expiration. It is not read:
        // another thread may have set it since, and a read would then wait.
        state.armed_ns = None;
        self.shared.run(&mut state, None);
        if state.armed_ns.is_none()
            && let Err(error) = state.timer.clear()
        {
            tracing::error!(%error, "gateway timer cannot be cleared");
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new_raw(self.shared.timer_fd, EventSet::IN)) {
            tracing::error!(%error, "gateway timer cannot be watched: TCP and probes will stall");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves the stack usable or not; the guest notices, nobody else.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `frame` and does everything that is due.
    fn run(&self, state: &mut State, frame: Option<&[u8]>) {
        let now_ns = monotonic_ns();
        let now = smoltcp_now(now_ns);
        state.outbox.blocked = false;
        match frame {
            Some(frame) => self.take(state, frame, now_ns),
            None => {
                for network in &mut state.networks {
                    network.run(now, None, &mut state.outbox);
                }
            }
        }
        if state.carrier
            && let Some(frame) = state.probe.poll(now_ns, &self.log)
        {
            state.outbox.replace_probe(frame);
        }
        if !state.outbox.is_empty() {
            self.signal_readable(state);
        }
        self.arm(state, now_ns);
    }

    /// Takes a frame from the guest.
    fn take(&self, state: &mut State, frame: &[u8], now_ns: u64) {
        self.log.frame_from_guest(now_ns);
        let Some(incoming) = Incoming::parse(frame) else {
            self.log.frame_refused();
            return;
        };
        let Some(index) = state.networks.iter().position(|n| n.vlan == incoming.vlan) else {
            self.log.frame_refused();
            return;
        };
        if index == 0 && state.probe.observe(&incoming.frame, now_ns, &self.log) {
            return;
        }
        let now = smoltcp_now(now_ns);
        state.networks[index].run(now, Some(&incoming.frame), &mut state.outbox);
    }

    /// Sets the timer to when something is due next, if it is not set to an earlier time.
    fn arm(&self, state: &mut State, now_ns: u64) {
        let now = smoltcp_now(now_ns);
        let mut next_ns = if state.carrier {
            state.probe.next_ns()
        } else {
            None
        };
        // A stack that waits for room runs when there is room.
        if !state.outbox.blocked {
            for network in &mut state.networks {
                let at = network
                    .next_run(now)
                    .map(|at| at.total_micros().max(0) as u64 * 1000);
                next_ns = next_ns.into_iter().chain(at).min();
            }
        }
        let Some(next_ns) = next_ns else { return };
        if state.armed_ns.is_some_and(|armed_ns| armed_ns <= next_ns) {
            return;
        }
        // Zero would disarm it.
        let delay = Duration::from_nanos(next_ns.saturating_sub(now_ns).max(1000));
        match state.timer.reset(delay, None) {
            Ok(()) => state.armed_ns = Some(next_ns),
            Err(error) => tracing::error!(%error, "gateway timer cannot be set"),
        }
    }

    fn signal_readable(&self, state: &mut State) {
        if !std::mem::replace(&mut state.readable_signalled, true) {
            signal(&self.readable);
        }
    }

    fn signal_writable(&self, state: &mut State) {
        if std::mem::take(&mut state.sender_waits) {
            state.writable_signalled = true;
            signal(&self.writable);
        }
    }
}

fn signal(eventfd: &EventFd) {
    if let Err(error) = eventfd.write(1) {
        tracing::error!(%error, "gateway cannot signal its eventfd");
    }
}

fn drain(eventfd: &EventFd) {
    // An empty eventfd answers EAGAIN, which is what is wanted.
    let _ = eventfd.read();
}

fn smoltcp_now(now_ns: u64) -> Instant {
    Instant::from_micros((now_ns / 1000) as i64)
}
