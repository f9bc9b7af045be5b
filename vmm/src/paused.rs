//! vCPUs in hand, while none runs guest code.

use std::sync::MutexGuard;

use kvm_ioctls::VcpuFd;

/// All vCPUs of a machine that runs no guest code.
pub struct PausedVcpus<'a> {
    vcpus: Vec<MutexGuard<'a, VcpuFd>>,
}

impl<'a> PausedVcpus<'a> {
    pub(crate) fn new(vcpus: Vec<MutexGuard<'a, VcpuFd>>) -> Self {
        Self { vcpus }
    }

    pub(crate) fn fds(&self) -> &[MutexGuard<'a, VcpuFd>] {
        &self.vcpus
    }

    /// Number of vCPUs.
    pub fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// vCPU `index`.
    pub fn get(&mut self, index: usize) -> Option<&mut VcpuFd> {
        self.vcpus.get_mut(index).map(|guard| &mut **guard)
    }

    /// All of them in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut VcpuFd> {
        self.vcpus.iter_mut().map(|guard| &mut **guard)
    }
}
