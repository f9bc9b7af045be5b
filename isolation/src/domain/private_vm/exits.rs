//! Why P stopped running, and what it is answered.

use kvm_ioctls::VcpuExit;

use super::{PrivateVm, PrivateVmError};

/// Why P stopped running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// `out` or `outs` to a port: `count` stores one after the other, whose values are
    /// [`PrivateVm::port_item`].
    Out {
        /// Port.
        port: u16,
        /// Bytes of each store: 1, 2 or 4.
        bytes: usize,
        /// How many stores: 1, more with a repeated string instruction.
        count: usize,
    },
    /// `in` or `ins` from a port: `count` loads one after the other, answered by
    /// [`PrivateVm::answer_port`].
    In {
        /// Port.
        port: u16,
        /// Bytes of each load: 1, 2 or 4.
        bytes: usize,
        /// How many loads: 1, more with a repeated string instruction.
        count: usize,
    },
    /// Load from an address that is no memory.
    MmioRead {
        /// Guest physical address.
        gpa: u64,
        /// Bytes wanted, 1 to 8.
        bytes: usize,
    },
    /// Store to an address that is no memory.
    MmioWrite {
        /// Guest physical address.
        gpa: u64,
        /// Bytes written, little-endian.
        value: u64,
        /// Their number, 1 to 8.
        bytes: usize,
    },
    /// Read of a model-specific register that KVM does not know or that is P's to trap.
    MsrRead {
        /// Register number.
        index: u32,
    },
    /// Write of such a register.
    MsrWrite {
        /// Register number.
        index: u32,
        /// Value to be written.
        value: u64,
    },
    /// A signal arrived.
    Interrupted,
    /// The dirty ring is full.
    DirtyRingFull,
    /// Shutdown: an exception could not be delivered.
    Shutdown,
    /// Anything else, by its `KVM_EXIT_` number: `hlt`, an emulation failure.
    Other(u32),
}

impl PrivateVm {
    /// Runs until something stops it.
    pub fn run(&mut self) -> Result<Exit, PrivateVmError> {
        self.runs += 1;
        let exit = match self.vcpu_mut().run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Exit::Interrupted);
            }
            Err(source) => {
                return Err(PrivateVmError::Kvm {
                    call: "KVM_RUN",
                    source,
                });
            }
        };
        Ok(match exit {
            VcpuExit::IoOut(port, _) => {
                let (bytes, count) = self.port_access();
                Exit::Out { port, bytes, count }
            }
            VcpuExit::IoIn(port, _) => {
                let (bytes, count) = self.port_access();
                Exit::In { port, bytes, count }
            }
            VcpuExit::MmioRead(gpa, data) => Exit::MmioRead {
                gpa,
                bytes: data.len(),
            },
            VcpuExit::MmioWrite(gpa, data) => Exit::MmioWrite {
                gpa,
                value: little_endian(data),
                bytes: data.len(),
            },
            VcpuExit::X86Rdmsr(exit) => Exit::MsrRead { index: exit.index },
            VcpuExit::X86Wrmsr(exit) => {
                // The write counts as done unless somebody says otherwise; calls that must not make
                // it never run on.
                *exit.error = 0;
                Exit::MsrWrite {
                    index: exit.index,
                    value: exit.data,
                }
            }
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Shutdown => Exit::Shutdown,
            _ => {
                let reason = self.vcpu_mut().get_kvm_run().exit_reason;
                if reason == kvm_bindings::KVM_EXIT_DIRTY_RING_FULL {
                    Exit::DirtyRingFull
                } else {
                    Exit::Other(reason)
                }
            }
        })
    }

    /// Gives the answer to the load of the last [`Exit::MmioRead`].
    pub fn answer_mmio(&mut self, value: u64) {
        let run = self.vcpu_mut().get_kvm_run();
        run.__bindgen_anon_1.mmio.data = value.to_le_bytes();
    }

    /// Bytes of each access and number of accesses of the exit for port I/O that just happened.
    fn port_access(&mut self) -> (usize, usize) {
        let run = self.vcpu_mut().get_kvm_run();
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the member in use.
        let io = unsafe { run.__bindgen_anon_1.io };
        (usize::from(io.size), io.count as usize)
    }

    /// Where access `index` of the last exit for port I/O has its value; `None` behind the last
    /// one.
    fn port_data(&mut self, index: usize) -> Option<&mut [u8]> {
        let run = self.vcpu_mut().get_kvm_run();
        // SAFETY: only called after KVM_EXIT_IO, so `io` is the member in use.
        let io = unsafe { run.__bindgen_anon_1.io };
        let bytes = usize::from(io.size);
        if index >= io.count as usize || !matches!(bytes, 1 | 2 | 4) {
            return None;
        }
        // SAFETY: KVM puts `count` values of `size` bytes at this offset within the mapping that
        // `kvm_run` is the head of (KVM API, section 5, KVM_EXIT_IO); nobody else uses it until
        // KVM_RUN, and the borrow of `self` keeps that away.
        unsafe {
            let data = std::ptr::from_mut(run).cast::<u8>();
            let data = data.add(io.data_offset as usize + index * bytes);
            Some(std::slice::from_raw_parts_mut(data, bytes))
        }
    }

    /// Value of store `index` of the last [`Exit::Out`].
    pub fn port_item(&mut self, index: usize) -> u32 {
        let data = self.port_data(index);
        data.map_or(0, |data| little_endian(data) as u32)
    }

    /// Gives the answer to load `index` of the last [`Exit::In`].
    pub fn answer_port(&mut self, index: usize, value: u32) {
        if let Some(data) = self.port_data(index) {
            let bytes = data.len();
            data.copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
    }
}

fn little_endian(data: &[u8]) -> u64 {
    data.iter()
        .take(8)
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}
