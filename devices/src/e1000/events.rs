//! What the event loop does for the controller: frames and room on the wire, timers, and work that
//! a register access left over.
//!
//! The loop watches the wire only for what the controller can use. A register access on another
//! thread that changes that, or leaves work over, writes to the kick descriptor once.

use std::os::fd::{AsRawFd, RawFd};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::E1000;
use super::timers::Timer;
use crate::wire::WritableSignal;

/// What the loop watches the wire for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    frames: bool,
    room: bool,
}

impl E1000 {
    pub(super) fn wanted(&self) -> Interest {
        Interest {
            frames: self.wants_frames(),
            room: self.wants_room(),
        }
    }

    /// Makes the event loop call back soon.
    pub(super) fn kick(&mut self) {
        if std::mem::replace(&mut self.kicked, true) {
            return;
        }
        if let Err(error) = self.kick_fd.write(1) {
            tracing::error!("cannot wake the NIC's event loop: {error}");
        }
    }

    /// After an access from outside of the loop: tells the loop if it should watch something else.
    pub(super) fn settle(&mut self) {
        if self.wanted() != self.watched {
            self.kick();
        }
    }

    /// What the event loop does on a kick, a timer or an event of the wire; harmless at any time.
    pub(super) fn serve(&mut self) {
        if std::mem::replace(&mut self.kicked, false)
            && let Err(error) = self.kick_fd.read()
        {
            tracing::error!("cannot read the NIC's kick: {error}");
        }
        while let Some(timer) = self.timers.due() {
            match timer {
                Timer::Throttle => self.update_interrupt(),
                Timer::ReceiveDelay | Timer::ReceiveAbsolute => self.end_receive_delay(),
                Timer::TransmitDelay | Timer::TransmitAbsolute => self.end_transmit_delay(),
                Timer::Autonegotiation => self.finish_autonegotiation(),
            }
        }
        self.update_link();
        self.transmit();
        self.receive_batch();
    }

    /// Descriptors of the wire with what to watch them for; the second is the same as the first or
    /// absent on some wires.
    fn wire_events(&self, interest: Interest) -> (Events, Option<Events>) {
        let readable = self.wire.readable_fd();
        let mut set = EventSet::empty();
        set.set(EventSet::IN, interest.frames);
        let room = self.wire.writable_fd().map(|writable| {
            let signal = match writable.signal {
                WritableSignal::Out => EventSet::OUT,
                WritableSignal::In => EventSet::IN,
            };
            (
                writable.fd,
                if interest.room {
                    signal
                } else {
                    EventSet::empty()
                },
            )
        });
        match room {
            Some((fd, signal)) if fd == readable => (Events::new_raw(readable, set | signal), None),
            Some((fd, signal)) => (
                Events::new_raw(readable, set),
                Some(Events::new_raw(fd, signal)),
            ),
            None => (Events::new_raw(readable, set), None),
        }
    }

    fn watch(&mut self, ops: &mut EventOps) {
        let wanted = self.wanted();
        if wanted == self.watched {
            return;
        }
        let (readable, writable) = self.wire_events(wanted);
        for events in std::iter::once(readable).chain(writable) {
            if let Err(error) = ops.modify(events) {
                tracing::error!("cannot watch the NIC's wire: {error:?}");
            }
        }
        self.watched = wanted;
    }

    fn descriptors(&self) -> [RawFd; 2] {
        [self.kick_fd.as_raw_fd(), self.timers.fd()]
    }
}

impl MutEventSubscriber for E1000 {
    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.serve();
        self.watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.watched = self.wanted();
        let (readable, writable) = self.wire_events(self.watched);
        let own = self
            .descriptors()
            .map(|fd| Events::new_raw(fd, EventSet::IN));
        for events in own.into_iter().chain([readable]).chain(writable) {
            if let Err(error) = ops.add(events) {
                tracing::error!("cannot watch the NIC: {error:?}");
            }
        }
    }
}
