//! A mark of a hand-made guest, made and gone back to by hand: memory copied, registers read and
//! set, and the isolator asked to keep and to put back.

use std::time::Duration;

use isolation::attach::clean::CleanBytes;
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};
use vmm::{Kept, Participant, QuiesceError};

use crate::guest::Guest;

/// Memory of the guest, in bytes.
const MEMORY: usize = 8 << 20;
const PAGE: usize = 4096;
/// What does not come to rest by then does not.
const NEVER: Duration = Duration::from_secs(60);

/// A guest as it was.
pub struct Mark {
    pub memory: Vec<u8>,
    regs: (kvm_regs, kvm_sregs),
    kept: Kept,
    /// What isolation has put into the memory, as it is without.
    pub clean: Vec<CleanBytes>,
}

/// All of a guest's memory.
pub fn memory(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY];
    let memory = guest.handle.ram().memory();
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

impl Mark {
    /// As the guest is once it has come to rest, for which it gets until `limit`.
    pub fn within(guest: &Guest, limit: Duration) -> Result<Self, QuiesceError> {
        guest.handle.quiesce(limit, |at_rest| {
            let vcpu = at_rest.vcpus().get(0).unwrap();
            Self {
                memory: memory(guest),
                regs: (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap()),
                kept: guest.isolator.keep().unwrap(),
                clean: guest.isolator.clean_bytes(),
            }
        })
    }

    pub fn of(guest: &Guest) -> Self {
        Self::within(guest, NEVER).unwrap()
    }

    /// Makes the guest what it was, and looks whether it is. Returns how many pages had changed.
    pub fn rewind(&self, guest: &Guest) -> usize {
        let changed = |at_rest: &mut vmm::Quiesced<'_, '_>| {
            let (regs, sregs) = &self.regs;
            let vcpu = at_rest.vcpus().get(0).unwrap();
            vcpu.set_sregs(sregs).unwrap();
            vcpu.set_regs(regs).unwrap();
            let now = memory(guest);
            let pages = self.memory.chunks(PAGE).zip(now.chunks(PAGE)).enumerate();
            let mut changed = 0;
            for (page, (then, _)) in pages.filter(|(_, (then, now))| then != now) {
                let at = GuestAddress((page * PAGE) as u64);
                guest.handle.ram().memory().write_slice(then, at).unwrap();
                changed += 1;
            }
            guest.isolator.put_back(&self.kept).unwrap();
            assert!(
                memory(guest) == self.memory,
                "what is put back is in memory"
            );
            changed
        };
        guest.handle.quiesce(NEVER, changed).unwrap()
    }

    /// The memory without isolation.
    pub fn clean_memory(&self) -> Vec<u8> {
        let mut memory = self.memory.clone();
        for clean in &self.clean {
            let at = usize::try_from(clean.at.0).unwrap();
            memory[at..at + clean.bytes.len()].copy_from_slice(&clean.bytes);
        }
        memory
    }
}

/// A mark of the machine's own.
pub struct MachineMark(Vec<u8>);

impl MachineMark {
    const NAME: &str = "warm";

    pub fn of(guest: &Guest) -> Self {
        guest.handle.pause().unwrap();
        guest.handle.mark(Self::NAME, NEVER).unwrap();
        let memory = memory(guest);
        guest.handle.resume().unwrap();
        Self(memory)
    }

    /// Has the machine go back, and looks whether its memory is as it was.
    pub fn rewind(&self, guest: &Guest) {
        // A machine that is paused cannot wait for what ends when it goes on.
        guest.handle.rewind(Some(Self::NAME), NEVER).unwrap();
        guest.handle.pause().unwrap();
        guest.handle.rewind(Some(Self::NAME), NEVER).unwrap();
        assert!(memory(guest) == self.0, "memory is not that of the mark");
        guest.handle.resume().unwrap();
    }
}
