//! What all threads of one machine share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use devices::bus::Bus;
use devices::i8042::I8042;
use devices::pci::bus::PciBus;
use devices::serial::Serial;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::at_work::AtWork;
use crate::bar_slots::BarSlots;
use crate::dirty::DirtyTracking;
use crate::error::Error;
use crate::exits::ExitCounters;
use crate::gate::Gate;
use crate::generation::GenerationId;
use crate::hotplug::Hotplug;
use crate::irq::{Gsi, GsiRouting, LineInput};
use crate::lifecycle::Requests;
use crate::memory::GuestRam;
use crate::outside::Outside;
use crate::panic::PanicDevice;
use crate::participant::Participant;
use crate::power::{EVENT_GENERATION, PowerDevice};
use crate::snapshot::SnapshotId;

use crate::trap::TrapHandler;

/// Called at each reset, see [`crate::VmHandle::on_reset`].
pub(crate) type ResetHook = Box<dyn FnMut() + Send>;

/// A vCPU as the machine shares it. Its thread keeps the descriptor locked while it runs.
pub(crate) struct Vcpu {
    pub fd: Mutex<VcpuFd>,
    pub exits: ExitCounters,
    /// It is at the gate in the middle of an instruction, its registers are not those between two.
    pub incomplete: AtomicBool,
}

impl Vcpu {
    /// One that has never run.
    pub fn new(fd: VcpuFd) -> Self {
        Self {
            fd: Mutex::new(fd),
            exits: ExitCounters::default(),
            incomplete: AtomicBool::new(false),
        }
    }
}

/// How far the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Made, not yet started.
    Created,
    /// Has vCPU threads.
    Started,
    /// Its threads have ended.
    Stopped,
}

/// What operations from outside change, one at a time.
#[derive(Debug)]
pub(crate) struct Operations {
    pub phase: Phase,
    pub paused: bool,
    /// A rewind failed half-way: it must not go on.
    pub mixed: bool,
    /// It was paused for that alone, and so goes on when it is reset.
    pub paused_by_mix: bool,
}

pub(crate) struct Machine {
    // Fields are dropped in this order: dirty rings, vCPUs, then the VM, then the memory that it
    // maps.
    pub dirty: DirtyTracking,
    pub vcpus: Vec<Vcpu>,
    pub vm: Arc<VmFd>,
    pub bar_slots: Arc<BarSlots>,
    pub kvm: Kvm,
    pub ram: GuestRam,
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub pci: Arc<PciBus>,
    pub power: Arc<PowerDevice>,
    pub hotplug: Arc<Hotplug>,
    pub panic: Arc<PanicDevice>,
    pub serial: Arc<Mutex<Serial>>,
    /// The keyboard controller, if it has one.
    pub i8042: OnceLock<Arc<Mutex<I8042>>>,
    pub at_work: AtWork,
    /// The last snapshot that was taken.
    pub last_snapshot: Mutex<Option<SnapshotId>>,
    /// As written at each start; a machine that goes on from a state gets another one.
    pub generation: Mutex<GenerationId>,
    /// Inputs of the I/O APIC.
    pub lines: Arc<[Arc<Gsi>]>,
    pub routing: Arc<GsiRouting>,
    pub gate: Arc<Gate>,
    pub requests: Arc<Requests>,
    pub operations: Mutex<Operations>,
    pub trap: RwLock<Option<Arc<dyn TrapHandler>>>,
    /// Monotonic time at which guest code first ran, 0 before.
    pub first_entry_ns: AtomicU64,
    pub resets: AtomicU64,
    pub reset_hooks: Mutex<Vec<ResetHook>>,
    pub participants: Mutex<Vec<Arc<dyn Participant>>>,
    /// Who writes its memory beside this process.
    pub outside: Mutex<Option<Arc<dyn Outside>>>,
}

impl Machine {
    /// Gives a machine that goes on from a state an ID that its other copies have not, and tells
    /// the guest, when memory is there and before any vCPU runs.
    pub fn renew_generation(&self) -> Result<(), Error> {
        let id = GenerationId::random()?;
        *self
            .generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = id;
        id.write(&self.ram)?;
        self.power.announce(EVENT_GENERATION);
        Ok(())
    }

    pub fn trap_handler(&self) -> Option<Arc<dyn TrapHandler>> {
        self.trap
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub fn has_trap_handler(&self) -> bool {
        self.trap
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    pub fn operations(&self) -> MutexGuard<'_, Operations> {
        self.operations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn reset_hooks(&self) -> MutexGuard<'_, Vec<ResetHook>> {
        self.reset_hooks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The last snapshot that was taken: what is followed for snapshots changed since then.
    pub fn last_snapshot(&self) -> MutexGuard<'_, Option<SnapshotId>> {
        self.last_snapshot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that have to come to rest, see [`crate::quiesce`].
    pub fn participants(&self) -> MutexGuard<'_, Vec<Arc<dyn Participant>>> {
        self.participants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keyboard controller, if it has one.
    pub fn i8042(&self) -> Option<MutexGuard<'_, I8042>> {
        self.i8042
            .get()
            .map(|controller| devices::i8042::lock(controller))
    }

    /// A device's connection to input `gsi` of the I/O APIC, one of
    /// [`crate::layout::IO_APIC_PINS`].
    pub fn line(&self, gsi: u32) -> Arc<LineInput> {
        Arc::new(LineInput::new(self.lines[gsi as usize].clone()))
    }

    /// All vCPUs' descriptors; the threads must be at the gate.
    pub fn lock_vcpus(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus
            .iter()
            .map(|vcpu| vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }

    pub fn mark_entered(&self) {
        let now = devices::clock::monotonic_ns();
        // Only the first start counts.
        let _ = self
            .first_entry_ns
            .compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    }
}
