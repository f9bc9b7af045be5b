//! NICs that come and go while the guest runs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use recovery::asker::Asker;
use vmm::VmHandle;

use super::machine::MadeNic;
use super::nics::{GuestNic, Nics};
use super::watch::Belongings;
use super::{MAX_NICS, NetConfig};
use crate::options::{MacAddress, NetOption, NicOption, NicSpec, VmName};

/// How long a guest may take to let go of a NIC: its driver has to end, and may be in the middle of
/// a reset.
const LET_GO_TIME: Duration = Duration::from_secs(60);
/// How long this process may take then.
const OWN_TIME: Duration = Duration::from_secs(5);
/// Between two looks at whether it has.
const LOOK: Duration = Duration::from_millis(1);
/// Between two words to who waits.
const TELL: Duration = Duration::from_millis(200);

/// Plugs NICs into a guest's PCI slots and takes them out again.
pub struct Plugging {
    name: VmName,
    vm: VmHandle,
    nics: Nics,
    belongings: Arc<Belongings>,
    /// One at a time.
    busy: Mutex<()>,
}

impl Plugging {
    /// For the guest `name`, which has `nics` now.
    pub fn new(name: VmName, vm: VmHandle, nics: Nics, belongings: Arc<Belongings>) -> Self {
        Self {
            name,
            vm,
            nics,
            belongings,
            busy: Mutex::new(()),
        }
    }

    /// The guest.
    pub fn vm(&self) -> &VmHandle {
        &self.vm
    }

    /// Its NICs.
    pub fn nics(&self) -> &Nics {
        &self.nics
    }

    /// Plugs in a NIC of this guest on a wire.
    ///
    /// # Errors
    /// There is no room, or the host does not have what it needs.
    pub fn plug_net(&self, net: NetOption) -> anyhow::Result<GuestNic> {
        let model = net.nic.unwrap_or_default();
        let wire = net.wire;
        self.plug(NicSpec::Model { model, wire }, net.mac)
    }

    /// Plugs in a NIC that lives elsewhere.
    ///
    /// # Errors
    /// There is no room, or the host does not have what it needs.
    pub fn plug_nic(&self, nic: NicOption) -> anyhow::Result<GuestNic> {
        match nic {
            NicOption::Device { host, mac } => self.plug(NicSpec::Device(host), mac),
            NicOption::Passthrough(address) => self.plug(NicSpec::Passthrough(address), None),
            NicOption::Default(model) => bail!("a {model} needs a wire: give --net"),
        }
    }

    fn plug(&self, nic: NicSpec, mac: Option<MacAddress>) -> anyhow::Result<GuestNic> {
        let _one = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.nics.forget_gone(&self.vm);
        let all = self.nics.all();
        ensure!(all.len() < MAX_NICS, "a VM has at most {MAX_NICS} NICs");
        let is_free = |number: &usize| all.iter().all(|nic| nic.number != *number);
        let number = (0..).find(is_free).context("there is no number left")?;
        let mac = match nic {
            NicSpec::Passthrough(_) => None,
            _ => Some(mac.unwrap_or_else(|| MacAddress::for_nic(&self.name, number))),
        };
        for other in &all {
            if let Some(mac) = mac.filter(|mac| other.config.mac == Some(*mac)) {
                bail!("another NIC of this VM has the address {mac}: give mac=ADDRESS");
            }
        }
        if !matches!(nic, NicSpec::Model { .. }) {
            self.vm.own_memory()?;
        }
        let config = NetConfig {
            nic,
            mac,
            is_another_wire: false,
            saved_model: None,
        };
        let made = MadeNic::new(&self.vm, &self.name, &config, number, &self.belongings)?;
        let nic = made.plug(&self.vm)?;
        self.nics.add(nic.clone());
        Ok(nic)
    }

    /// Asks the guest to let go of the NIC at `address`, waits until it has, and takes it out.
    ///
    /// # Errors
    /// There is none that can go, the guest does not let go of it, or nobody waits any more. A
    /// guest that was asked and lets go later has it taken out then.
    pub fn unplug(&self, address: &str, asker: &dyn Asker) -> anyhow::Result<()> {
        let _one = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.nics.forget_gone(&self.vm);
        let all = self.nics.all();
        let Some(nic) = all.iter().find(|nic| nic.address() == address) else {
            let there: Vec<_> = all.iter().map(GuestNic::address).collect();
            bail!(
                "this VM has no NIC at {address}: `cofferdam status` shows those that it has ({})",
                there.join(", ")
            );
        };
        ensure!(
            nic.came,
            "the NIC at {address} was there when the VM began, and stays: only one that `cofferdam plug` brought can go"
        );
        self.vm.unplug(nic.slot)?;
        let (asked, mut told) = (Instant::now(), None::<Instant>);
        while self.vm.is_plugged(nic.slot) {
            ensure!(
                asked.elapsed() < LET_GO_TIME,
                "the guest has not let go of {address} in {} s: it is taken out when it does",
                LET_GO_TIME.as_secs()
            );
            if told.is_none_or(|told| told.elapsed() > TELL) {
                asker.tell(&format!("waiting for the guest to let go of {address}"))?;
                told = Some(Instant::now());
            }
            std::thread::sleep(LOOK);
        }
        self.nics.forget_gone(&self.vm);
        // The event loop lets go of it a moment later. Whoever is told that it is gone may give
        // what it had, a function of the host or a socket, to another guest at once: so it ends
        // here.
        let last = nic.nic.function.clone();
        let is_model = matches!(nic.config.nic, NicSpec::Model { .. });
        drop(all);
        let ejected = Instant::now();
        while Arc::strong_count(&last) > 1 && ejected.elapsed() < OWN_TIME {
            std::thread::sleep(LOOK);
        }
        // An isolated driver's device is kept until the driver is released, and its wire with it.
        // Only what is not in this process is said to be kept: others wait for it.
        ensure!(
            is_model || Arc::strong_count(&last) == 1,
            "the guest has let go of {address}, and this VM keeps it as long as its driver is isolated: \
             `cofferdam release` it"
        );
        Ok(())
    }
}
