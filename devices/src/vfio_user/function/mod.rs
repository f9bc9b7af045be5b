//! A function that a server has, as a function of this machine.
//!
//! The server's function is the whole one: every access to configuration space and registers goes
//! there. What the VMM itself has to know is kept here as well, and is what the guest reads: where
//! the base address registers are, what the command register enables, and where MSI-X vectors go.
//! Writes to memory registers are posted, as on the bus; all others are waited for, and so are those
//! of a function whose server lets some of its registers be mapped: the guest reaches those by
//! itself.
//!
//! Interrupts come by eventfds that this machine gives the server: INTx until the guest turns MSI-X
//! on, then its vectors.
//!
//! Lock order: the function's own lock, then that of its client.

mod areas;
mod hold;
mod interrupts;
mod shape;
mod shared;
mod state;

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet as EpollSet};
use vmm_sys_util::eventfd::EventFd;

use self::shape::{CONFIG_BYTES, Shape};
use self::shared::{Shared, Store};
use super::channel::Counters;
use super::client::{Client, ClientError};
use super::message::CONFIG_REGION;
use crate::dma::DmaSpace;
use crate::irq::{IrqLine, LineEvents, MsiVectors};
use crate::pci::areas::BarArea;
use crate::pci::config::{BAR_COUNT, ConfigError, ConfigSpace, Status, offset};
use crate::pci::msix::{Msix, MsixLayout};
use crate::pci::{BarIndex, BarRange, BarSize, BarSpace, PciFunction};
use crate::rate_limit::RateLimit;
use crate::state::{Part, StateError};

/// Why a server's function cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Its connection.
    #[error(transparent)]
    Client(ClientError),
    /// Its base address registers.
    #[error("the device's server has a function that cannot be: {0}")]
    Config(#[from] ConfigError),
    /// The whole of it.
    #[error("the device's server has a function that cannot be used: {0}")]
    Unusable(&'static str),
    /// Its state.
    #[error("the device's server does not give its state away")]
    Kept,
    /// Its server has gone.
    #[error("the device's server has gone")]
    Gone,
    /// It is stopped, and a server that is new would not be.
    #[error("the device's state is being taken")]
    Stopped,
    /// Another function than before.
    #[error("the device's server has another function than before")]
    Another,
    /// Interrupt vectors.
    #[error("no interrupt vectors: {0}")]
    Vectors(String),
    /// What the event loop watches.
    #[error("cannot watch the device's server: {0}")]
    Watch(#[from] std::io::Error),
}

/// Gives so many message-signalled vectors.
pub type MakeVectors<'a> = &'a mut dyn FnMut(u16) -> Result<Arc<dyn MsiVectors>, String>;

/// See the module.
pub struct VfioUserFunction {
    /// Also locked where nothing else changes, so that a state can be taken.
    client: Mutex<Client>,
    connected: Arc<AtomicBool>,
    /// Has the client's socket while it is connected: the event loop sees this descriptor only.
    watched: Epoll,
    /// It is watched for room too: there is an answer that the socket did not take.
    awaits_room: bool,
    /// See [`VfioUserFunction::stop`].
    stopped: bool,
    dma: DmaSpace,
    line: Option<LineEvents>,
    /// Whose events those are: they end with it.
    _intx: Arc<dyn IrqLine>,
    shape: Shape,
    /// While it is connected: what the guest reaches of its registers without a message.
    areas: Vec<Arc<BarArea>>,
    /// While it is connected: registers that need no message.
    shared: Option<Shared>,
    config: ConfigSpace,
    shown_otherwise: Vec<(u16, u8)>,
    msix: Option<Msix>,
    /// What triggers the vectors of `msix`.
    events: Vec<EventFd>,
    log: RateLimit,
}

impl VfioUserFunction {
    /// The function behind `client`, which is reset, reaches what the client's memory is, and
    /// interrupts by `intx` or by what `vectors` gives.
    ///
    /// # Errors
    /// It cannot be used here.
    pub fn new(
        mut client: Client,
        intx: Arc<dyn IrqLine>,
        vectors: MakeVectors<'_>,
    ) -> Result<Self, FunctionError> {
        // What an earlier client left is not this guest's.
        match client.reset() {
            Ok(()) | Err(ClientError::Unsupported(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let mut shape = Shape::read(&mut client)?;
        let line = intx.events();
        shape.has_intx &= line.is_some();
        let (mut msix, mut events) = (None, Vec::new());
        if let Some(place) = shape.msix {
            let vectors = vectors(place.count).map_err(FunctionError::Vectors)?;
            let all: Option<Vec<_>> = (0..place.count).map(|n| vectors.event(n)).collect();
            match all {
                Some(all) if vectors.count() == place.count => {
                    // The pending bits are the server's, and are asked for there.
                    let layout = MsixLayout {
                        bar: place.bar,
                        table_offset: place.table_offset,
                        pba_bar: place.bar,
                        pba_offset: place.table_offset,
                    };
                    msix = Some(Msix::at(vectors, layout, place.capability));
                    events = all;
                }
                // Nobody outside can send them.
                _ => shape.msix = None,
            }
        }
        let config = shape.config()?;
        let mut function = Self {
            areas: areas::of(&client, &shape)?,
            dma: client.dma().clone(),
            client: Mutex::new(client),
            connected: Arc::new(AtomicBool::new(true)),
            watched: Epoll::new()?,
            awaits_room: false,
            stopped: false,
            line,
            _intx: intx,
            shown_otherwise: shape.shown_otherwise(),
            shared: None,
            shape,
            config,
            msix,
            events,
            log: RateLimit::default(),
        };
        function.attach()?;
        Ok(function)
    }

    /// Whether its server is there.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// The same, for whoever must not wait for the function.
    pub fn connected(&self) -> Arc<AtomicBool> {
        self.connected.clone()
    }

    /// Numbers of messages of the connection.
    pub fn counters(&self) -> Counters {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.counters()
    }

    /// Goes on with a server that has the same function. Its state is the server's; where its
    /// registers are placed, what is enabled and where its interrupts go is this machine's.
    ///
    /// # Errors
    /// The server cannot be used, or has another function; what was there before is then gone as
    /// well. It is stopped: nothing has changed then.
    pub fn reconnect(&mut self, stream: UnixStream) -> Result<(), FunctionError> {
        if self.stopped {
            return Err(FunctionError::Stopped);
        }
        let limits = self.client().limits();
        self.disconnect("it is to be connected anew");
        let mut client = Client::new(stream, self.dma.clone(), limits)?;
        let mut shape = Shape::read(&mut client)?;
        shape.has_intx &= self.line.is_some();
        if self.msix.is_none() {
            shape.msix = None;
        }
        if shape != self.shape {
            return Err(FunctionError::Another);
        }
        self.areas = areas::of(&client, &shape)?;
        self.client = Mutex::new(client);
        self.connected.store(true, Ordering::Relaxed);
        let result = self.attach().and_then(|()| self.configure());
        if result.is_err() {
            self.disconnect("it could not be set up");
        }
        result
    }

    /// Ends the connection; the function is then as one whose server has gone.
    pub fn disconnect(&mut self, why: &str) {
        self.client().disconnect();
        self.gone(why);
    }

    fn client(&mut self) -> &mut Client {
        self.client
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What the event loop has to hear of the server. One that reaches all memory by itself asks
    /// for none, and to be woken by each reply to somebody else costs two switches of threads.
    fn hears(&self) -> EpollSet {
        let all = self.dma.memory().iter().count();
        match self.dma.regions().len() == all {
            true => EpollSet::READ_HANG_UP,
            false => EpollSet::IN,
        }
    }

    /// Gives the server memory and interrupts, and watches its socket.
    fn attach(&mut self) -> Result<(), FunctionError> {
        let fd = self.client().as_fd().as_raw_fd();
        let event = EpollEvent::new(self.hears(), 0);
        self.watched.ctl(ControlOperation::Add, fd, event)?;
        self.awaits_room = false;
        let regions = self.dma.regions();
        for region in &regions {
            self.client().dma_map(region)?;
        }
        self.connect_interrupts()?;
        self.shared = Shared::of(self.client())?;
        Ok(())
    }

    /// Writes what is kept here to the server's function. Bus mastering comes last.
    fn configure(&mut self) -> Result<(), FunctionError> {
        let mut bytes = [0; CONFIG_BYTES];
        self.config.read(0, &mut bytes);
        let client = self
            .client
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let bars = usize::from(offset::BAR0)..usize::from(offset::BAR0) + 4 * BAR_COUNT;
        for at in bars.step_by(4) {
            client.region_write(CONFIG_REGION, at as u64, &bytes[at..at + 4])?;
        }
        if let (Some(msix), Some(place)) = (&self.msix, &self.shape.msix) {
            let start = u64::from(place.table_offset);
            for (n, dword) in msix.table().chunks(4).enumerate() {
                client.region_write(place.bar.into(), start + 4 * n as u64, dword)?;
            }
            let at = u64::from(msix.capability_offset()) + 2;
            client.region_write(CONFIG_REGION, at, &msix.control().to_le_bytes())?;
        }
        let command = usize::from(offset::COMMAND);
        client.region_write(CONFIG_REGION, command as u64, &bytes[command..command + 2])?;
        Ok(())
    }

    /// What a call gave, if it was carried out.
    fn check<T>(&mut self, result: Result<T, ClientError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.watch_for_room();
                Some(value)
            }
            Err(error @ (ClientError::Refused { .. } | ClientError::Unsupported(_))) => {
                if let Some(held_back) = self.log.permit() {
                    tracing::warn!(held_back, %error, "an access to a device was not carried out");
                }
                None
            }
            Err(error) => {
                self.gone(&error.to_string());
                None
            }
        }
    }

    /// Has the event loop send on what the socket did not take.
    fn watch_for_room(&mut self) {
        let unsent = self.client().has_unsent();
        if unsent == self.awaits_room || !self.is_connected() {
            return;
        }
        let mut set = self.hears();
        set.set(EpollSet::OUT, unsent);
        let fd = self.client().as_fd().as_raw_fd();
        let event = EpollEvent::new(set, 0);
        if let Err(error) = self.watched.ctl(ControlOperation::Modify, fd, event) {
            tracing::error!(%error, "cannot watch a device's server for room");
        }
        self.awaits_room = unsent;
    }

    /// The server has gone: said once.
    fn gone(&mut self, why: &str) {
        if !self.connected.swap(false, Ordering::Relaxed) {
            return;
        }
        tracing::warn!("a device is gone until its server is back: {why}");
        // What is in the memory that it had given is no device's any more.
        self.areas.clear();
        self.shared = None;
        let fd = self.client().as_fd().as_raw_fd();
        let none = EpollEvent::default();
        if let Err(error) = self.watched.ctl(ControlOperation::Delete, fd, none) {
            tracing::error!(%error, "cannot stop watching a device's server");
        }
    }

    fn within(&self, bar: BarIndex, offset: u64, data: &[u8]) -> bool {
        let end = offset.checked_add(data.len() as u64);
        let bytes = self.shape.region_bytes.get(usize::from(bar));
        end.zip(bytes).is_some_and(|(end, bytes)| end <= *bytes)
    }

    /// Whether a store to `bar` need not be waited for. Beside areas it is: what the guest stores
    /// there later would be earlier.
    fn is_posted(&self, bar: BarIndex) -> bool {
        if !self.areas.is_empty() {
            return false;
        }
        let mut bars = self.shape.bars.iter();
        bars.any(|one| one.bar == bar && one.space != BarSpace::Io)
    }
}

impl PciFunction for VfioUserFunction {
    fn config_read(&mut self, at: u16, data: &mut [u8]) {
        data.fill(0xff);
        let room = CONFIG_BYTES.saturating_sub(at.into()).min(data.len());
        if room == 0 || !self.is_connected() {
            return;
        }
        let mut bytes = vec![0; room];
        let read = self
            .client()
            .region_read(CONFIG_REGION, at.into(), &mut bytes);
        if self.check(read).is_none() {
            return;
        }
        for (n, byte) in bytes.iter_mut().enumerate() {
            let at = at + n as u16;
            let mut ours = [0];
            self.config.read(at, &mut ours);
            let bar = offset::BAR0..offset::BAR0 + 4 * BAR_COUNT as u16;
            let kept = (offset::COMMAND..offset::STATUS).contains(&at) || bar.contains(&at);
            if kept || at == offset::INTERRUPT_LINE {
                *byte = ours[0];
            }
            if at == offset::STATUS && !self.shape.shows_capabilities() {
                *byte &= !(Status::CAPABILITIES_LIST.bits() as u8);
            }
            let mut otherwise = self.shown_otherwise.iter();
            if let Some((_, shown)) = otherwise.find(|(place, _)| *place == at) {
                *byte = *shown;
            }
        }
        data[..room].copy_from_slice(&bytes);
    }

    fn config_write(&mut self, at: u16, data: &[u8]) {
        let room = CONFIG_BYTES.saturating_sub(at.into()).min(data.len());
        let data = &data[..room];
        if room == 0 || !self.is_connected() {
            return;
        }
        self.config.write(at, data);
        if let Some(control) = self.control_after(at, data) {
            self.write_control(control, at, data);
            return;
        }
        let written = self.client().region_write(CONFIG_REGION, at.into(), data);
        self.check(written);
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.config.decoded()
    }

    fn bars(&self) -> Vec<BarSize> {
        self.config.bars()
    }

    fn areas(&self) -> &[Arc<BarArea>] {
        &self.areas
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !self.is_connected() || !self.within(bar, offset, data) {
            return;
        }
        if let Some(msix) = self.msix.as_ref().filter(|msix| msix.is_table(bar, offset)) {
            msix.bar_read(bar, offset, data);
            return;
        }
        let shared = self.shared.as_ref();
        if let Some(value) = shared.and_then(|shared| shared.load(bar, offset, data.len())) {
            data.copy_from_slice(&value.to_le_bytes());
            return;
        }
        let read = self.client().region_read(bar.into(), offset, data);
        match (self.check(read), &mut self.shared) {
            (None, _) => data.fill(0xff),
            (Some(()), Some(shared)) => shared.answered(),
            (Some(()), None) => {}
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if !self.is_connected() || !self.within(bar, offset, data) {
            return;
        }
        let table = self.msix.as_mut().filter(|msix| msix.is_table(bar, offset));
        let Some(msix) = table else {
            let shared = self.shared.as_mut();
            if shared.map(|shared| shared.store(bar, offset, data)) == Some(Store::Done) {
                return;
            }
            let posted = self.is_posted(bar);
            let client = self.client();
            let written = match posted {
                true => client.post_write(bar.into(), offset, data),
                false => client.region_write(bar.into(), offset, data),
            };
            self.check(written);
            return;
        };
        let masks = msix.masks(offset, data);
        if !masks {
            msix.bar_write(bar, offset, data);
        }
        let written = self.client().region_write(bar.into(), offset, data);
        self.check(written);
        if let (true, Some(msix)) = (masks, &mut self.msix) {
            msix.bar_write(bar, offset, data);
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        if self.is_connected() {
            let reset = self.client().reset();
            self.check(reset);
        }
        if let Some(msix) = &mut self.msix {
            msix.reset_with(0);
        }
        if self.is_connected() {
            self.reconnect_interrupts();
        }
    }

    fn save(&self) -> Result<Part, StateError> {
        self.save_part()
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.restore_part(state)
    }
}

impl MutEventSubscriber for VfioUserFunction {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if self.is_connected() {
            let served = self.client().serve();
            self.check(served);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.watched, EventSet::IN)) {
            tracing::error!("cannot watch a device's server: {error:?}");
        }
    }
}
