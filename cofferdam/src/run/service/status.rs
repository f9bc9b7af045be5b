//! How a VM is, as its control socket tells.

use std::collections::BTreeMap;

use devices::clock::monotonic_ns;

use super::super::resident::GuestMemory;
use super::super::summary::nic_status;
use super::VmService;
use crate::control::protocol::{Reply, Status, VmState};

impl VmService {
    pub(super) fn status(&self) -> Result<Reply, String> {
        let vm = self.vm.status();
        let resident = self.resident.read(self.guest_memory());
        let resident = resident.map_err(|error| {
            format!("the VM cannot read in /proc/self how much memory it has: {error}")
        })?;
        let mut exits = BTreeMap::new();
        for counts in &vm.exits {
            if let Ok(serde_json::Value::Object(counts)) = serde_json::to_value(counts) {
                for (reason, count) in counts {
                    *exits.entry(reason).or_default() += count.as_u64().unwrap_or(0);
                }
            }
        }
        self.nics.forget_gone(&self.vm);
        let nics: Vec<_> = self.nics.all().iter().map(nic_status).collect();
        let first = nics.first();
        Ok(Reply::Status(Box::new(Status {
            name: self.name.clone(),
            pid: std::process::id(),
            state: match vm.state {
                vmm::VmState::Created => VmState::Starting,
                vmm::VmState::Running => VmState::Running,
                vmm::VmState::Paused => VmState::Paused,
                vmm::VmState::Stopped => VmState::Ending,
            },
            guest_panic: self.told.panic.line(),
            uptime_ms: monotonic_ns().saturating_sub(self.told.started_ns) / 1_000_000,
            ready_ns: vm.first_entry_ns,
            vmm_rss_kib: resident.own_kib,
            guest_rss_kib: resident.guest_kib,
            mark_pages: self.vm.mark_pages(),
            resets: vm.resets,
            config: self.config.clone(),
            exits,
            isolation: self.isolator().status(),
            recovery: self.supervisor.status().into_iter().collect(),
            nic: first.map(|nic| nic.counters.clone()).unwrap_or_default(),
            nics,
        })))
    }

    /// Where guest memory is mapped now.
    fn guest_memory(&self) -> GuestMemory<'_> {
        let ram = self.vm.ram();
        let may_be_private = ram.is_template() || self.isolator().has_domains();
        // Of a NIC that is elsewhere registers may be mapped here, which are shared memory too.
        match may_be_private || self.nics.elsewhere().is_some() {
            true => GuestMemory::Mapped(ram.regions()),
            false => GuestMemory::Shared,
        }
    }
}
