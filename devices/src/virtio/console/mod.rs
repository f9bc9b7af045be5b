//! Virtio console (section 5.3) with one named port that is bridged to a unix stream socket on the
//! host: the guest agent's channel.
//!
//! ```text
//!   guest: /dev/vport*p1 ◄─ queue 4 ─ to_guest ◄── read ──  client of the listener
//!                        ── queue 5 ─► to_client ── write ─►  (one at a time)
//! ```
//!
//! - One client at a time: others wait in the listener's backlog until it has gone.
//! - The guest sees the port as connected (PORT_OPEN) while there is a client. Each client is a new
//!   session: the guest sees the port close in between, whatever order things happen in.
//! - A client that comes before the guest has opened the port waits: nothing is read from it until
//!   then. When the guest closes the port or resets the device, the client is disconnected.
//! - What the guest writes while there is no client is lost.
//! - A driver that goes on with a device that it has reset itself, as at the end of the guest's own
//!   suspend, does not ask for its ports again: it says that it has them.
//! - Both directions hold one buffer's worth and then leave the rest where it is.
//!
//! Sockets are registered edge-triggered, so that either side can be moved on from whatever thread
//! has news. Only the event loop registers and drops them.

#[cfg(test)]
pub(crate) mod tests;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use event_manager::{EventOps, EventSet, Events};
use serde::{Deserialize, Serialize};

use super::{Chain, DeviceError, DeviceKind, Queues, VirtioDevice, read_structure};
use crate::state::{Form, Part, StateError};

/// VIRTIO_CONSOLE_F_MULTIPORT.
const F_MULTIPORT: u64 = 1 << 1;
/// The only port. Port 0 would be a console.
const PORT: u32 = 1;
const MAX_NR_PORTS: u32 = 2;
const CONTROL_IN: u16 = 2;
const CONTROL_OUT: u16 = 3;
const PORT_IN: u16 = 4;
const PORT_OUT: u16 = 5;
const QUEUE_SIZE: u16 = 64;

const FORM: Form = Form {
    kind: "virtio console",
    version: 1,
};

/// Bytes taken from the client at a time.
const TO_GUEST_BYTES: usize = 4096;
/// Longest single write of the guest.
const MAX_WRITE_BYTES: usize = 1 << 20;

/// Control messages (section 5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
const CONTROL_BYTES: usize = 8;

/// What the driver was told about the port and what it still has to be told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Announcements {
    /// The driver is ready to hear of ports.
    device_ready: bool,
    port_added: bool,
    /// The driver has the port.
    port_ready: bool,
    named: bool,
    open: bool,
    /// A session ended that the driver was told of: it must see the port closed.
    must_close: bool,
}

struct Client {
    stream: UnixStream,
    /// Gone, and shut down: the event loop will drop it.
    finished: bool,
}

/// See the module.
pub struct Console {
    port_name: String,
    listener: UnixListener,
    client: Option<Client>,
    announcements: Announcements,
    guest_open: bool,
    /// Read from the client, not yet given to the guest.
    to_guest: Vec<u8>,
    /// Taken from the guest, not yet written to the client.
    to_client: Vec<u8>,
    /// Most buffers that the driver has had in the queue of control messages to it: it puts one
    /// back when it has dealt with the message in it.
    control_buffers: u16,
}

impl Console {
    /// A console whose port `port_name` (`org.cofferdam.agent.0`) is served on `listener`. Whoever
    /// bound the listener removes its path.
    pub fn new(port_name: &str, listener: UnixListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            port_name: port_name.to_owned(),
            listener,
            client: None,
            announcements: Announcements::default(),
            guest_open: false,
            to_guest: Vec::new(),
            to_client: Vec::new(),
            control_buffers: 0,
        })
    }

    /// Whether the guest has the port open.
    pub fn guest_open(&self) -> bool {
        self.guest_open
    }

    fn host_open(&self) -> bool {
        self.client.as_ref().is_some_and(|client| !client.finished)
    }

    /// Ends the client's session.
    fn finish_client(&mut self) {
        let Some(client) = self.client.as_mut().filter(|client| !client.finished) else {
            return;
        };
        client.finished = true;
        // It may have gone already. Either way its descriptor now shows the event that has it
        // dropped.
        let _ = client.stream.shutdown(Shutdown::Both);
        self.announcements.must_close = self.announcements.open;
        self.to_guest.clear();
        self.to_client.clear();
    }

    /// Does what can be done in all directions.
    fn run(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        self.control_buffers = self.control_buffers.max(queues.available(CONTROL_IN)?);
        self.drain_guest(queues)?;
        // Feeding may begin with an announcement and may end in one.
        self.announce(queues)?;
        self.feed_guest(queues)?;
        self.announce(queues)
    }

    /// Sends control messages that are due, as far as the driver has room for them.
    fn announce(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        while let Some((event, value)) = self.next_announcement() {
            let Some(chain) = queues.pop(CONTROL_IN)? else {
                return Ok(());
            };
            let mut message = Vec::with_capacity(CONTROL_BYTES + self.port_name.len());
            message.extend(PORT.to_le_bytes());
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            if event == PORT_NAME {
                message.extend(self.port_name.as_bytes());
            }
            let written = chain.write(queues.memory(), 0, &message)?;
            queues.push(CONTROL_IN, &chain, written)?;
            let said = &mut self.announcements;
            match event {
                PORT_ADD => said.port_added = true,
                PORT_NAME => said.named = true,
                _ => {
                    said.open = value == 1;
                    said.must_close = false;
                }
            }
        }
        Ok(())
    }

    fn next_announcement(&self) -> Option<(u16, u16)> {
        let said = &self.announcements;
        if !said.device_ready {
            None
        } else if !said.port_added {
            Some((PORT_ADD, 1))
        } else if !said.port_ready {
            None
        } else if !said.named {
            Some((PORT_NAME, 1))
        } else if said.open && (said.must_close || !self.host_open()) {
            Some((PORT_OPEN, 0))
        } else if !said.open && self.host_open() {
            Some((PORT_OPEN, 1))
        } else {
            None
        }
    }

    /// Hears what the driver says about its ports.
    fn hear(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = queues.pop(CONTROL_OUT)? {
            let mut message = [0; CONTROL_BYTES];
            let length = chain.read(queues.memory(), 0, &mut message)?;
            queues.push(CONTROL_OUT, &chain, 0)?;
            if length < CONTROL_BYTES {
                continue;
            }
            let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
            let port = u32::from_le_bytes([p0, p1, p2, p3]);
            let yes = u16::from_le_bytes([v0, v1]) == 1;
            match u16::from_le_bytes([e0, e1]) {
                DEVICE_READY => self.announcements.device_ready = yes,
                PORT_READY if port == PORT => {
                    // A driver that has the port from before it suspended the device, and so reset
                    // it, says no more than that (`virtcons_restore` of Linux).
                    if yes {
                        self.announcements.device_ready = true;
                        self.announcements.port_added = true;
                    }
                    self.announcements.port_ready = yes;
                }
                PORT_OPEN if port == PORT => {
                    if self.guest_open && !yes {
                        self.finish_client();
                    }
                    self.guest_open = yes;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the driver has dealt with all that it was told. What a client says must not overtake
    /// the news that the session before it has ended: the guest would answer, and then end the
    /// wrong session. The driver notifies when it has.
    fn is_heard(&self, queues: &mut Queues<'_>) -> Result<bool, DeviceError> {
        Ok(queues.available(CONTROL_IN)? >= self.control_buffers)
    }

    /// Moves what the client wrote into the guest's buffers.
    fn feed_guest(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        if !self.is_heard(queues)? {
            return Ok(());
        }
        while self.guest_open && self.announcements.open && !self.announcements.must_close {
            if self.to_guest.is_empty() && !self.read_client() {
                break;
            }
            let Some(chain) = queues.pop(PORT_IN)? else {
                break;
            };
            let written = chain.write(queues.memory(), 0, &self.to_guest)?;
            self.to_guest.drain(..written);
            queues.push(PORT_IN, &chain, written)?;
        }
        Ok(())
    }

    /// Reads from the client. Returns whether there is something for the guest.
    fn read_client(&mut self) -> bool {
        let Some(client) = self.client.as_mut().filter(|client| !client.finished) else {
            return false;
        };
        let mut buffer = [0; TO_GUEST_BYTES];
        loop {
            match client.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    self.to_guest.extend_from_slice(&buffer[..length]);
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => break,
            }
        }
        self.finish_client();
        false
    }

    /// Moves what the guest wrote to the client.
    fn drain_guest(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        loop {
            if !self.write_client() {
                return Ok(());
            }
            let Some(chain) = queues.pop(PORT_OUT)? else {
                return Ok(());
            };
            // What was meant for a client that has gone is not for the next one.
            if self.host_open() && !self.announcements.must_close {
                self.to_client = read_all(&chain, queues)?;
            }
            queues.push(PORT_OUT, &chain, 0)?;
        }
    }

    /// Writes to the client. Returns whether nothing is left.
    fn write_client(&mut self) -> bool {
        while !self.to_client.is_empty() {
            let Some(client) = self.client.as_mut().filter(|client| !client.finished) else {
                self.to_client.clear();
                break;
            };
            match client.stream.write(&self.to_client) {
                Ok(length) if length > 0 => {
                    self.to_client.drain(..length);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Ok(_) | Err(_) => self.finish_client(),
            }
        }
        true
    }

    /// Takes the next client if there is none.
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        if self.client.is_some() {
            return;
        }
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::warn!(%error, "cannot accept a client of the agent's socket");
                }
                return;
            }
        };
        if let Err(error) = stream.set_nonblocking(true) {
            tracing::warn!(%error, "cannot use a client of the agent's socket");
            return;
        }
        let wanted =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new(&stream, wanted)) {
            tracing::warn!(%error, "cannot watch a client of the agent's socket");
            return;
        }
        self.client = Some(Client {
            stream,
            finished: false,
        });
    }
}

fn read_all(chain: &Chain, queues: &Queues<'_>) -> Result<Vec<u8>, DeviceError> {
    let length = chain.readable_bytes();
    if length > MAX_WRITE_BYTES {
        return Err(DeviceError::Request(
            "a write to a console port is longer than 1 MiB",
        ));
    }
    let mut data = vec![0; length];
    chain.read(queues.memory(), 0, &mut data)?;
    Ok(data)
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 3,
            pci_class: 0x07_8000,
            name: "console",
        }
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Two of each port, and two for control behind those of port 0 (section 5.3.2).
        vec![QUEUE_SIZE; 2 * (MAX_NR_PORTS as usize + 1)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr.
        let mut config = [0; 12];
        config[4..8].copy_from_slice(&MAX_NR_PORTS.to_le_bytes());
        read_structure(&config, offset, data);
    }

    fn activate(&mut self, _: u64, _: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.finish_client();
        self.announcements = Announcements::default();
        self.guest_open = false;
        self.control_buffers = 0;
    }

    fn save(&self) -> Result<Part, StateError> {
        let mut said = self.announcements.clone();
        // A client does not go along: the driver must see its session end.
        said.must_close |= said.open;
        Part::new(FORM, &(self.port_name.clone(), said, self.guest_open))
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        let (name, said, guest_open): (String, Announcements, bool) = state.open(FORM)?;
        if name != self.port_name {
            return Err(FORM.does_not_fit("its port has another name"));
        }
        // Who was talking to the guest as it was before learns that it is gone.
        self.finish_client();
        self.announcements = said;
        self.guest_open = guest_open;
        Ok(())
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        match queue {
            CONTROL_OUT => self.hear(queues)?,
            CONTROL_IN | PORT_IN | PORT_OUT => {}
            // Those of port 0, which there is not.
            _ => return Ok(()),
        }
        self.run(queues)
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let wanted = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new(&self.listener, wanted)) {
            tracing::error!(%error, "the agent's socket cannot be watched: nobody can connect");
        }
    }

    fn event(
        &mut self,
        events: Events,
        ops: &mut EventOps<'_>,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        let of_client = |client: &Client| client.stream.as_raw_fd() == events.fd();
        if self.client.as_ref().is_some_and(of_client) {
            // While the guest has the port open, a client that left is noticed when what it had to
            // say was read to the end.
            let left = EventSet::READ_HANG_UP | EventSet::HANG_UP;
            if events.event_set().contains(EventSet::ERROR)
                || !self.guest_open && events.event_set().intersects(left)
            {
                self.finish_client();
            }
        }
        let result = self.run(queues);
        if let Some(client) = self.client.take_if(|client| client.finished)
            && let Err(error) = ops.remove(Events::empty(&client.stream))
        {
            tracing::warn!(%error, "cannot forget a client of the agent's socket");
        }
        self.accept(ops);
        // A new client changes what the driver has to be told.
        result.and_then(|()| self.run(queues))
    }
}
