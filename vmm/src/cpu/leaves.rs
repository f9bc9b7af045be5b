//! CPUID leaves as a list that can be looked up and changed.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::error::Error;

/// Leaves of one vCPU.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    /// Leaf `function`, sub-leaf `index` (0 for leaves that have none).
    pub fn get(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.0
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
    }

    /// As [`Leaves::get`], to be changed.
    pub fn get_mut(&mut self, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0
            .iter_mut()
            .find(|entry| (entry.function, entry.index) == (function, index))
    }

    /// Takes a leaf away with all its sub-leaves.
    pub fn remove(&mut self, function: u32) {
        self.0.retain(|entry| entry.function != function);
    }

    /// Adds one.
    pub fn push(&mut self, entry: kvm_cpuid_entry2) {
        self.0.push(entry);
    }

    /// All of them, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0.iter_mut()
    }

    /// The list as KVM takes it.
    pub fn to_kvm(&self) -> Result<CpuId, Error> {
        CpuId::from_entries(&self.0).map_err(|_| Error::KvmLacks("room for CPUID leaves"))
    }
}

impl From<&[kvm_cpuid_entry2]> for Leaves {
    fn from(entries: &[kvm_cpuid_entry2]) -> Self {
        Self(entries.to_vec())
    }
}

/// A leaf as tests write it: function, index, and registers EAX, EBX, ECX, EDX.
#[cfg(test)]
pub(crate) type Entry = (u32, u32, [u32; 4]);

#[cfg(test)]
impl Leaves {
    /// These leaves.
    pub(crate) fn of(entries: &[Entry]) -> Self {
        let entries =
            entries.iter().map(
                |&(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
                    function,
                    index,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                },
            );
        Self(entries.collect())
    }

    /// As KVM lists them.
    pub(crate) fn as_slice(&self) -> &[kvm_cpuid_entry2] {
        &self.0
    }
}
