//! Why a machine cannot be made or run. Each message is one line that says what to do.

use crate::boot::BootError;
use crate::memory::MemoryError;

/// Version of the encoding of a machine's state and of what it means. Changes with every change of
/// either.
pub const STATE_VERSION: u32 = 1;
/// The same of the states of a machine's devices, each of which has a version of its own besides.
/// Those of a machine without a keyboard controller are written as version
/// [`DEVICE_STATES_VERSION_WITHOUT_I8042`], which was there before there was one.
pub const DEVICE_STATES_VERSION: u32 = 2;
/// See [`DEVICE_STATES_VERSION`].
pub const DEVICE_STATES_VERSION_WITHOUT_I8042: u32 = 1;

/// Why a machine cannot be made or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `/dev/kvm`.
    #[error(
        "there is no /dev/kvm: load the module kvm_intel or kvm_amd, and turn on virtualisation in the firmware"
    )]
    NoKvm,
    /// `/dev/kvm` may not be opened.
    #[error("/dev/kvm may not be opened: run as root or join the group `kvm`")]
    KvmForbidden,
    /// `/dev/kvm` is there but does not work.
    #[error("/dev/kvm cannot be used: {0}")]
    KvmUnusable(#[source] kvm_ioctls::Error),
    /// KVM cannot do something that is needed.
    #[error("this host's KVM lacks {0}: use a newer kernel")]
    KvmLacks(&'static str),
    /// KVM refused something.
    #[error("KVM did not {what}: {source}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The host refused something other than KVM.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// A machine has 1 to 8 vCPUs.
    #[error("a guest has 1 to {max} vCPUs, not {0}", max = crate::MAX_VCPUS)]
    VcpuCount(u8),
    /// All PCI slots or interrupt vectors are in use.
    #[error("more message-signalled interrupts than KVM can route: use fewer devices")]
    TooManyVectors,
    /// All PCI slots are in use.
    #[error("all 31 PCI slots are in use: use fewer devices")]
    NoFreeSlot,
    /// A PCI slot cannot be used.
    #[error(transparent)]
    Slot(#[from] devices::pci::bus::SlotError),
    /// The ACPI tables do not fit.
    #[error("the ACPI tables are too large: use fewer devices")]
    AcpiTooLarge,
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A state cannot be put back.
    #[error(transparent)]
    State(#[from] StateError),
    /// The event loop failed.
    #[error("the event loop failed: {0}")]
    EventLoop(event_manager::Error),
    /// A vCPU cannot go on.
    #[error("{0}")]
    VcpuFailed(String),
}

impl Error {
    /// For `map_err`: KVM did not do `what`.
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}

/// Why bytes are not the state of a machine, or of this one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// Other bytes altogether.
    #[error("these bytes are not {0}")]
    NoState(&'static str),
    /// Of another version.
    #[error("the state has version {found}, this program reads {known}: use the one that wrote it")]
    Version {
        /// Its version.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// Not all of it is there, or more than that.
    #[error("the state is {found} bytes long, not {told}")]
    Length {
        /// Bytes that its head tells of.
        told: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// It was changed.
    #[error("the state is damaged: its checksum is wrong")]
    Checksum,
    /// It is not as this program writes it.
    #[error("the state is not as this program writes it: {0}")]
    Content(&'static str),
    /// Of a machine with other vCPUs.
    #[error("the state is of a machine with {found} vCPUs, this one has {here}")]
    Vcpus {
        /// In the state.
        found: usize,
        /// In the machine.
        here: usize,
    },
    /// Of a machine with other memory.
    #[error("the state is of a machine with {found} bytes of memory, this one has {here}")]
    Memory {
        /// In the state.
        found: u64,
        /// In the machine.
        here: u64,
    },
    /// The guest ran on a processor that this one cannot stand in for.
    #[error("the state needs {0}")]
    Processor(String),
    /// A message is routed from where this machine has no device.
    #[error("the state routes message {0}, which no device of this machine has")]
    Route(u32),
    /// A PCI function's state, or the slots that they are in.
    #[error(transparent)]
    Functions(#[from] devices::pci::bus::BusStateError),
    /// The serial port's state.
    #[error("serial port: {0}")]
    Serial(devices::state::StateError),
    /// The keyboard controller's state.
    #[error("keyboard controller: {0}")]
    KeyboardController(devices::state::StateError),
    /// One of the two has a keyboard controller.
    #[error(
        "{} has a mouse, {} has none",
        if *.here { "this machine" } else { "the saved machine" },
        if *.here { "the saved one" } else { "this one" }
    )]
    OneHasMouse {
        /// It is the one here.
        here: bool,
    },
    /// Other functions came while the machine ran.
    #[error(
        "in the saved machine the functions in slots {found:?} came while it ran, in this one those in {here:?}"
    )]
    Plugged {
        /// Slots in the state.
        found: Vec<u8>,
        /// Slots here.
        here: Vec<u8>,
    },
}
