//! The server's side: shows one PCI function to one client over a socket.
//!
//! ```text
//!   event loop ─► Server ◄─ the socket (IN; OUT while the client has not taken its replies)
//!                        ◄─ the client's unmask eventfd, by its edges: a read could wait
//!                        ◄─ timer of the client's deadline
//!                        ◄─ kick: more was received than one turn does
//! ```
//!
//! A turn does a bounded number of messages and accesses, and nothing of it waits for the client.
//! While the client has not taken its replies no message of it is looked at. A message that has
//! begun has to be whole within a deadline, and so have replies to be taken and a version to be
//! agreed on.
//!
//! What the client has given ends with its connection, before anybody hears that it has gone: its
//! memory, its eventfds. The function and its state stay.
//!
//! Lock order: the function, then its interrupts. No lock is held while anything is sent or told.

mod commands;
mod interrupts;
mod irqs;
mod memory;
mod migration;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::commands::Device;
pub use self::interrupts::ClientInterrupts;
use super::channel::{Channel, ChannelError, Counters};
use crate::dma::DmaSpace;
use crate::pci::bus::SharedFunction;

/// How long a client may take for what has to be done at some time.
const LIMIT: Duration = Duration::from_secs(5);
/// Messages and accesses of one turn.
const TURN: usize = 1024;

/// What is shown to clients. It outlives each of them; one after the other is served.
#[derive(Clone)]
pub struct Offered {
    /// The function.
    pub function: SharedFunction,
    /// The memory that the function reaches: the client's, while there is one.
    pub dma: DmaSpace,
    /// How the function interrupts.
    pub interrupts: ClientInterrupts,
}

/// What happens to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerEvent {
    /// A version was agreed on.
    Negotiated,
    /// Interrupts of the function go elsewhere, or were triggered or masked; told before the client
    /// hears that it is done.
    InterruptsChanged,
    /// The client has reset the function.
    Reset,
    /// The client has given the function a state, from which it goes on; told before the client
    /// hears that it is done.
    Restored,
    /// The connection has ended, and nothing of the client is left.
    Gone(String),
}

/// Serves a client. See the module.
pub struct Server {
    channel: Channel,
    device: Device,
    notify: Box<dyn FnMut(ServerEvent) + Send>,
    kick: EventFd,
    timer: TimerFd,
    limit: Duration,
    /// What the client has to do next, and until when.
    due: Option<(Due, Instant)>,
    ended: bool,
    watched: Watched,
}

/// What a client is waited for: the same as long as it has not done it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Due {
    received: u64,
    unsent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Watched {
    socket: Option<EventSet>,
    unmask: Option<RawFd>,
}

impl Server {
    /// Serves the client at the other end of `stream` with what is offered. `notify` hears of it on
    /// the event loop's thread, while no lock is held.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(
        stream: UnixStream,
        offered: Offered,
        notify: Box<dyn FnMut(ServerEvent) + Send>,
    ) -> std::io::Result<Self> {
        let mut server = Self {
            channel: Channel::new(stream)?,
            device: Device::new(offered),
            notify,
            kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            timer: TimerFd::new()?,
            limit: LIMIT,
            due: None,
            ended: false,
            watched: Watched::default(),
        };
        server.check_due()?;
        Ok(server)
    }

    /// Lets the client take so long for what has to be done.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
        self.due = None;
        // What fails here is told when the loop comes by.
        let _ = self.check_due();
    }

    /// Ends the connection. What the client has given is dropped before this returns.
    pub fn disconnect(&mut self) {
        self.end("it was disconnected");
    }

    /// Whether the connection has ended.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Numbers of messages.
    pub fn counters(&self) -> Counters {
        self.channel.counters().clone()
    }

    fn end(&mut self, why: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // The descriptor stays until the loop has stopped watching it.
        self.channel.shut_down();
        self.device.forget_client();
        (self.notify)(ServerEvent::Gone(why.to_owned()));
    }

    /// Does what the client wants, as much as one turn does.
    pub(super) fn turn(&mut self) -> Result<(), ChannelError> {
        let (mut work, mut filled) = (0, false);
        while self.channel.flush()? {
            if work > TURN {
                let kicked = self.kick.write(1);
                return kicked.map_err(|_| ChannelError::Violation("cannot be served"));
            }
            let Some(message) = self.channel.next()? else {
                if std::mem::replace(&mut filled, true) || !self.channel.fill()? {
                    break;
                }
                continue;
            };
            let carried_out = self.device.carry_out(message)?;
            for event in carried_out.events {
                (self.notify)(event);
            }
            work += carried_out.work;
            if let Some((header, payload)) = carried_out.reply {
                let fds: Vec<_> = carried_out.fds.iter().map(AsFd::as_fd).collect();
                self.channel.send(header, &payload, &fds)?;
            }
            if let Some(why) = carried_out.refused {
                return Err(ChannelError::Violation(why));
            }
        }
        match self.device.memory_has_shrunk() {
            true => Err(ChannelError::Violation(
                "has taken memory away from under the device",
            )),
            false => Ok(()),
        }
    }

    /// Sets the timer for what the client has to do, if that is something new.
    fn check_due(&mut self) -> std::io::Result<()> {
        let unsent = self.channel.has_unsent();
        let waits = unsent || self.channel.has_part() || !self.device.has_version();
        let due = waits.then(|| Due {
            received: self.channel.counters().counts().received,
            unsent,
        });
        if due != self.due.map(|(due, _)| due) {
            self.due = due.map(|due| (due, Instant::now() + self.limit));
            if due.is_some() {
                self.timer.reset(self.limit, None)?;
            }
        }
        Ok(())
    }

    fn is_overdue(&self) -> bool {
        self.due.is_some_and(|(_, until)| Instant::now() >= until)
    }

    /// Has the loop watch what matters now.
    fn watch(&mut self, ops: &mut EventOps) {
        let socket = match (self.ended, self.channel.has_unsent()) {
            (true, _) => None,
            (false, true) => Some(EventSet::OUT),
            (false, false) => Some(EventSet::IN),
        };
        let wanted = Watched {
            socket,
            unmask: self.device.unmask_fd().filter(|_| !self.ended),
        };
        let fd = self.channel.as_fd().as_raw_fd();
        let mut results = Vec::new();
        match (self.watched.socket, wanted.socket) {
            (before, now) if before == now => {}
            (None, Some(set)) => results.push(ops.add(Events::new_raw(fd, set))),
            (Some(_), Some(set)) => results.push(ops.modify(Events::new_raw(fd, set))),
            (Some(set), None) => results.push(ops.remove(Events::new_raw(fd, set))),
            (None, None) => {}
        }
        if self.watched.unmask != wanted.unmask {
            // One that was replaced is still open.
            if let Some(fd) = self.watched.unmask {
                results.push(ops.remove(Events::new_raw(fd, EventSet::IN)));
            }
            if let Some(fd) = wanted.unmask {
                let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
                results.push(ops.add(Events::new_raw(fd, edges)));
            }
        }
        self.device.close_replaced();
        self.watched = wanted;
        for error in results.into_iter().filter_map(Result::err) {
            tracing::error!("cannot watch a client: {error:?}");
        }
    }
}

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.kick.as_raw_fd() {
            // It was written, so this does not wait.
            let _ = self.kick.read();
        }
        let unmask = self.device.unmask_fd() == Some(events.fd());
        if !self.ended {
            let result = self.turn().and_then(|()| {
                let set = self.check_due();
                set.map_err(|_| ChannelError::Violation("cannot be given a deadline"))
            });
            match result {
                Err(error) => self.end(&error.to_string()),
                Ok(()) if self.is_overdue() => self.end("it was silent for too long"),
                Ok(()) => {}
            }
        }
        // What the guest wrote before it acknowledged the interrupt was carried out in this turn.
        if unmask {
            self.device.unmask();
        }
        self.watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.kick.as_raw_fd(), self.timer.as_raw_fd()] {
            let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                tracing::error!("cannot watch a client: {error:?}");
            }
        }
        self.watch(ops);
    }
}
