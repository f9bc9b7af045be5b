//! A VM's context at a device host: its part of the card, and whoever is at its socket.
//!
//! One thread serves both, with an event loop: what the guest does to the NIC, what comes from the
//! wire, and the end of the connection follow one another. When a client goes its memory is taken
//! away, then the NIC's bus mastering is switched off and its port is unplugged, before that thread
//! does anything else. The NIC's state stays. A client that comes back to it writes the command
//! register last; one that is a new guest's resets it first.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::Context as _;
use devices::vfio_user::Counters;
use devices::vfio_user::server::{Server, ServerEvent};
use devices::wire::turns::PortCounters;
use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm::SharedSubscriber;

use super::happened::Happened;
use super::held::lock;
use super::protocol::{ContextStatus, Messages};
use super::share::Share;
use crate::options::{MacAddress, VmName};

/// A client that is attached, or about to be.
struct Client {
    serial: u64,
    /// Once it is served.
    served: Option<(SubscriberId, Counters)>,
}

/// See the module.
pub struct Context<S> {
    /// The VM that it belongs to.
    pub vm: VmName,
    /// Its part of the card.
    pub share: S,
    /// Its VM does not run for now.
    pub away: AtomicBool,
    /// The guest's driver of it was given up: none of its calls is run.
    pub driver_lost: AtomicBool,
    mac: Mutex<MacAddress>,
    client: Mutex<Option<Client>>,
    /// There is one. Apart from it: whoever holds the NIC asks for this, and whoever holds the
    /// client may wait for the NIC.
    taken: AtomicBool,
    /// It has gone, by its own thread's word. Who takes its place away hears of that later: it may
    /// wait for a switch that asks for this.
    gone: Arc<AtomicBool>,
    attached: AtomicU64,
    endpoint: RemoteEndpoint<SharedSubscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Share> Context<S> {
    /// A context for `vm`, whose part of the card is `share` with the address `mac`, with no
    /// client.
    pub fn new(vm: VmName, mac: MacAddress, share: S) -> anyhow::Result<Self> {
        let mut manager = EventManager::new().context("no event loop for a NIC")?;
        if let Some(events) = share.events() {
            manager.add_subscriber(events);
        }
        let endpoint = manager.remote_endpoint();
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(format!("nic-{vm}"))
            .spawn(move || serve(manager, &stopped))
            .context("no thread for a NIC")?;
        Ok(Self {
            vm,
            share,
            away: AtomicBool::default(),
            driver_lost: AtomicBool::default(),
            mac: Mutex::new(mac),
            client: Mutex::new(None),
            taken: AtomicBool::default(),
            gone: Arc::default(),
            attached: AtomicU64::default(),
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// Its address.
    pub fn mac(&self) -> MacAddress {
        *lock(&self.mac)
    }

    /// Whether a client has it that has not gone. Waits for nobody.
    pub fn is_connected(&self) -> bool {
        self.is_taken() && !self.gone.load(Ordering::Acquire)
    }

    /// Whether its place is a client's, which may have gone. Waits for nobody.
    pub fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Acquire)
    }

    /// Whether it may be given the turn.
    pub fn wants_turns(&self) -> bool {
        self.is_connected() && !self.away.load(Ordering::Relaxed)
    }

    /// Keeps the place for a client that is about to be served; `None` if there is one.
    pub fn reserve(&self, mac: MacAddress) -> Option<u64> {
        let mut client = lock(&self.client);
        if client.is_some() {
            return None;
        }
        let serial = self.attached.fetch_add(1, Ordering::Relaxed) + 1;
        *client = Some(Client {
            serial,
            served: None,
        });
        self.gone.store(false, Ordering::Release);
        self.taken.store(true, Ordering::Release);
        self.away.store(false, Ordering::Relaxed);
        self.driver_lost.store(false, Ordering::Relaxed);
        let mut own = lock(&self.mac);
        if *own != mac {
            *own = mac;
            self.share.set_address(mac);
        }
        Some(serial)
    }

    /// Serves client number `serial` at `stream`, whose guest may go on from a snapshot. What
    /// becomes of it is told to `keeper`.
    pub fn serve(
        &self,
        (serial, goes_on): (u64, bool),
        stream: UnixStream,
        keeper: Sender<Happened>,
    ) -> anyhow::Result<()> {
        let vm = self.vm.clone();
        let mut listener = self.share.listener(goes_on.then(|| self.mac()));
        let gone = self.gone.clone();
        let notify = move |event| {
            listener(&event);
            match event {
                ServerEvent::Gone(why) => {
                    gone.store(true, Ordering::Release);
                    let vm = vm.clone();
                    // The keeper goes only with the process.
                    let _ = keeper.send(Happened::Gone { vm, serial, why });
                }
                event => tracing::debug!(%vm, ?event, "client"),
            }
        };
        // Under the lock: whoever hears that it has gone finds it here.
        let mut client = lock(&self.client);
        let server = Server::new(stream, self.share.offered(), Box::new(notify))?;
        let counters = server.counters();
        let subscriber: SharedSubscriber = Arc::new(Mutex::new(server));
        let id = self
            .endpoint
            .call_blocking(move |ops| -> Result<_, event_manager::Error> {
                Ok(ops.add_subscriber(subscriber))
            })
            .map_err(|error| anyhow::anyhow!("its event loop does not answer: {error}"))?;
        if let Some(client) = client.as_mut() {
            client.served = Some((id, counters));
        }
        Ok(())
    }

    /// Client number `serial` has gone. Says whether that is news.
    pub fn client_has_gone(&self, serial: u64) -> bool {
        let mut client = lock(&self.client);
        let Some(gone) = client.take_if(|client| client.serial == serial) else {
            return false;
        };
        self.taken.store(false, Ordering::Release);
        drop(client);
        if let Some((id, _)) = gone.served {
            let removed = self
                .endpoint
                .call_blocking(move |ops| ops.remove_subscriber(id).map(drop));
            if let Err(error) = removed {
                tracing::error!(vm = %self.vm, "a client's end stays behind: {error}");
            }
        }
        true
    }

    /// How it is.
    pub fn status(&self) -> ContextStatus {
        let memory = self.share.offered().dma.memory();
        let (connected, counters) = {
            let client = lock(&self.client);
            let served = client.as_ref().and_then(|client| client.served.as_ref());
            (
                client.is_some(),
                served.map(|(_, counters)| counters.clone()),
            )
        };
        let mut status = ContextStatus {
            vm: self.vm.to_string(),
            mac: self.mac().to_string(),
            connected,
            away: self.away.load(Ordering::Relaxed),
            turn: self.share.has_turn(),
            carrier: false,
            attached: self.attached.load(Ordering::Relaxed),
            frames: PortCounters::default(),
            dma_maps: memory.iter().count(),
            dma_bytes: memory.iter().map(GuestMemoryRegion::len).sum(),
            mapped_bytes: None,
            passed: None,
            messages: counters.map(|counters| {
                let counts = counters.counts();
                Messages {
                    sent: counts.sent,
                    received: counts.received,
                    posted: counts.posted,
                }
            }),
        };
        // With nothing locked: it may wait for the NIC, for as long as a switch takes.
        self.share.fill(&mut status);
        status
    }
}

impl<S> Drop for Context<S> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(error) = self.endpoint.kick() {
            tracing::error!(vm = %self.vm, "a NIC's thread stays behind: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vm = %self.vm, "a NIC's thread panicked");
        }
    }
}

/// Runs an event loop until it is stopped.
pub fn serve(mut manager: EventManager<SharedSubscriber>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = manager.run() {
            tracing::error!("a NIC's event loop ends: {error}");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::{OnceLock, Weak};
    use std::time::Duration;

    use devices::dma::DmaSpace;
    use devices::pci::{BarIndex, BarRange, PciFunction};
    use devices::vfio_user::Offered;
    use devices::vfio_user::server::ClientInterrupts;

    use super::*;
    use crate::device::share::Listener;

    struct NoFunction;

    impl PciFunction for NoFunction {
        fn config_read(&mut self, _: u16, _: &mut [u8]) {}
        fn config_write(&mut self, _: u16, _: &[u8]) {}
        fn decoded(&self) -> Vec<BarRange> {
            Vec::new()
        }
        fn bar_read(&mut self, _: BarIndex, _: u64, _: &mut [u8]) {}
        fn bar_write(&mut self, _: BarIndex, _: u64, _: &[u8]) {}
        fn reset(&mut self) {}
    }

    /// Looks, whenever it is asked how it is, whether its context's client is free.
    #[derive(Default)]
    struct Looks {
        context: OnceLock<Weak<Context<Looks>>>,
        free: AtomicUsize,
    }

    impl Share for Looks {
        fn offered(&self) -> Offered {
            Offered {
                function: Arc::new(Mutex::new(NoFunction)),
                dma: DmaSpace::empty(),
                interrupts: ClientInterrupts::new(1),
            }
        }
        fn events(&self) -> Option<SharedSubscriber> {
            None
        }
        fn set_address(&self, _: MacAddress) {}
        fn plug(&self, _: bool) -> anyhow::Result<()> {
            Ok(())
        }
        fn has_turn(&self) -> bool {
            false
        }
        fn listener(&self, _: Option<MacAddress>) -> Listener {
            Box::new(|_| {})
        }
        fn fill(&self, _: &mut ContextStatus) {
            let context = self.context.get().unwrap().upgrade().unwrap();
            if context.client.try_lock().is_ok() {
                self.free.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn context() -> Arc<Context<Looks>> {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let context = Context::new("left".parse().unwrap(), mac, Looks::default()).unwrap();
        let context = Arc::new(context);
        let known = context.share.context.set(Arc::downgrade(&context));
        assert!(known.is_ok());
        context
    }

    /// A switch has the NIC, and asks whether the client is there.
    #[test]
    fn who_waits_for_a_nic_holds_no_lock_that_a_switch_asks_for() {
        let context = context();
        context.status();
        let serial = context.reserve(context.mac()).unwrap();
        assert!(context.status().connected);
        assert!(context.client_has_gone(serial) && !context.client_has_gone(serial));
        assert!(!context.status().connected);
        assert_eq!(context.share.free.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn whether_a_client_is_there_is_known_while_it_is_being_served() {
        let context = context();
        assert!(!context.is_connected());
        let serial = context.reserve(context.mac()).unwrap();
        let held = lock(&context.client);
        let (done, is_done) = std::sync::mpsc::channel();
        let asks = context.clone();
        std::thread::spawn(move || done.send(asks.is_connected()));
        let connected = is_done.recv_timeout(Duration::from_secs(120));
        drop(held);
        assert_eq!(connected, Ok(true));
        assert!(context.client_has_gone(serial));
        assert!(!context.is_connected());
    }
}
