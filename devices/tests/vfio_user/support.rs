//! Both sides of a connection: a host that serves a card in a thread of its own, and what a machine
//! gives a function.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::dma::{DmaSpace, GuestMemory};
use devices::irq::{IrqLine, LineEvents, MsiMessage, MsiVectors};
use devices::nic::{Nic, NicModel, NicParts, RemoteParts};
use devices::vfio_user::{
    Client, ClientInterrupts, Limits, Offered, Server, ServerEvent, VfioUserFunction,
};
use devices::wire::{SendOutcome, Wire, WritableFd, WritableSignal};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xc0, 0xff, 0xee];
pub const MEMORY_BYTES: u64 = 4 << 20;
/// So long nothing takes that happens at all.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `what` gives something.
pub fn eventually<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = what() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "it did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

/// Memory of a guest: so many bytes from address 0 on, in a file.
pub fn memory(bytes: u64) -> (DmaSpace, Arc<File>) {
    let file = Arc::new(memfd(bytes));
    let place = FileOffset::from_arc(file.clone(), 0);
    let part = (GuestAddress(0), bytes as usize, Some(place));
    let memory = GuestMemory::from_ranges_with_files([part]).unwrap();
    (DmaSpace::new(Arc::new(memory)), file)
}

/// Far end of a wire.
#[derive(Default)]
pub struct FarEnd {
    pub to_nic: VecDeque<Vec<u8>>,
    pub from_nic: Vec<Vec<u8>>,
}

struct TestWire {
    far_end: Arc<Mutex<FarEnd>>,
    event: EventFd,
}

impl Wire for TestWire {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        self.far_end.lock().unwrap().from_nic.push(frame.to_vec());
        SendOutcome::Sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let frame = self.far_end.lock().unwrap().to_nic.pop_front();
        let Some(frame) = frame else {
            let _ = self.event.read();
            return None;
        };
        buffer[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn carrier(&self) -> bool {
        true
    }

    fn readable_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.event.as_raw_fd(),
            signal: WritableSignal::Out,
        })
    }
}

/// A wire, with its far end and what to write when frames are put there.
pub fn wire() -> (Box<dyn Wire>, Arc<Mutex<FarEnd>>, EventFd) {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let far_end = Arc::new(Mutex::new(FarEnd::default()));
    let wire = TestWire {
        far_end: far_end.clone(),
        event: event.try_clone().unwrap(),
    };
    (Box::new(wire), far_end, event)
}

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A process that serves a card, as far as one thread can be one.
pub struct Host {
    pub offered: Offered,
    pub far_end: Arc<Mutex<FarEnd>>,
    frames: EventFd,
    new: Sender<Subscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A connection that the host serves.
pub struct Served {
    pub server: Arc<Mutex<Server>>,
    pub events: Receiver<ServerEvent>,
}

impl Served {
    /// Waits until the connection has ended; why it did.
    pub fn gone(&self) -> String {
        loop {
            if let ServerEvent::Gone(why) = self.events.recv_timeout(PATIENCE).unwrap() {
                return why;
            }
        }
    }
}

impl Host {
    pub fn new(model: &str) -> Self {
        let (wire, far_end, frames) = wire();
        let vectors = if model == "virtio" { 3 } else { 0 };
        let (dma, interrupts) = (DmaSpace::empty(), ClientInterrupts::new(vectors));
        let for_card = interrupts.clone();
        let parts = NicParts {
            mac: MAC,
            wire,
            dma: dma.clone(),
            intx: interrupts.line(),
            vectors: &mut |count| {
                assert_eq!(count, vectors);
                Ok(for_card.vectors())
            },
        };
        let nic = NicModel::from_name(model).unwrap().make(parts).unwrap();
        let offered = Offered {
            function: nic.function.clone(),
            dma,
            interrupts,
        };
        Self::of(offered, Some(nic), far_end, frames)
    }

    fn of(
        offered: Offered,
        nic: Option<Nic>,
        far_end: Arc<Mutex<FarEnd>>,
        frames: EventFd,
    ) -> Self {
        let (new, added) = channel::<Subscriber>();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            let mut events = EventManager::<Subscriber>::new().unwrap();
            if let Some(nic) = nic {
                events.add_subscriber(nic.events);
            }
            while !stopped.load(Ordering::Relaxed) {
                for subscriber in added.try_iter() {
                    events.add_subscriber(subscriber);
                }
                events.run_with_timeout(1).unwrap();
            }
        };
        Self {
            offered,
            far_end,
            frames,
            new,
            stop,
            thread: Some(std::thread::spawn(run)),
        }
    }

    /// Serves one more client at the other end of `stream`.
    pub fn serve(&self, stream: UnixStream) -> Served {
        self.serve_with(stream, |_| {})
    }

    pub fn serve_with(&self, stream: UnixStream, set: impl FnOnce(&mut Server)) -> Served {
        let (tell, events) = channel();
        let notify = move |event| {
            let _ = tell.send(event);
        };
        let mut server = Server::new(stream, self.offered.clone(), Box::new(notify)).unwrap();
        set(&mut server);
        let server = Arc::new(Mutex::new(server));
        self.new.send(server.clone()).unwrap();
        Served { server, events }
    }

    /// A frame comes over the wire.
    pub fn deliver(&self, frame: &[u8]) {
        self.far_end
            .lock()
            .unwrap()
            .to_nic
            .push_back(frame.to_vec());
        self.frames.write(1).unwrap();
    }

    /// Takes a frame that the card has sent, as soon as there is one.
    pub fn sent(&self) -> Vec<u8> {
        eventually(|| {
            let mut far_end = self.far_end.lock().unwrap();
            (!far_end.from_nic.is_empty()).then(|| far_end.from_nic.remove(0))
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            if !std::thread::panicking() {
                joined.unwrap();
            }
        }
    }
}

/// A machine's interrupts, driven from outside.
pub struct Lines {
    pub trigger: EventFd,
    pub unmask: EventFd,
    pub vectors: Vec<EventFd>,
    pub routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl Lines {
    pub fn new(vectors: usize) -> Arc<Self> {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Arc::new(Self {
            trigger: event(),
            unmask: event(),
            vectors: std::iter::repeat_with(event).take(vectors).collect(),
            routes: Mutex::new(vec![None; vectors]),
        })
    }

    /// Waits for the line to be triggered.
    pub fn triggered(&self) {
        eventually(|| self.trigger.read().ok());
    }

    pub fn is_triggered(&self) -> bool {
        self.trigger.read().is_ok()
    }
}

impl IrqLine for Lines {
    fn set_level(&self, _asserted: bool) {}

    fn events(&self) -> Option<LineEvents> {
        Some(LineEvents {
            trigger: self.trigger.try_clone().unwrap(),
            unmask: self.unmask.try_clone().unwrap(),
        })
    }
}

impl MsiVectors for Lines {
    fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.routes.lock().unwrap()[usize::from(vector)] = message;
    }

    fn trigger(&self, _vector: u16) {}

    fn event(&self, vector: u16) -> Option<EventFd> {
        Some(self.vectors[usize::from(vector)].try_clone().unwrap())
    }
}

pub const LIMITS: Limits = Limits {
    call: Duration::from_secs(10),
    state: Duration::from_secs(10),
};

/// A machine with the card of a server.
pub struct Machine {
    pub nic: Arc<Mutex<VfioUserFunction>>,
    pub dma: DmaSpace,
    pub file: Arc<File>,
    pub lines: Arc<Lines>,
}

impl Machine {
    pub fn new(stream: UnixStream) -> Self {
        Self::with_limits(stream, LIMITS)
    }

    pub fn with_limits(stream: UnixStream, limits: Limits) -> Self {
        let (dma, file) = memory(MEMORY_BYTES);
        let lines = Lines::new(3);
        let client = Client::new(stream, dma.clone(), limits).unwrap();
        let vectors = lines.clone();
        let parts = RemoteParts {
            intx: lines.clone(),
            vectors: &mut |_| Ok(vectors.clone()),
        };
        let (_, nic) = Nic::remote(client, parts).unwrap();
        Self {
            nic,
            dma,
            file,
            lines,
        }
    }

    /// A machine with the card of `host`.
    pub fn on(host: &Host) -> (Self, Served) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = host.serve(theirs);
        (Self::new(ours), served)
    }
}
