//! State of the interrupt controllers and the timer.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The controllers, in the order in which they are saved.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// State of the interrupt controllers and the timer of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ChipState {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl ChipState {
    /// Takes the state.
    pub fn save(vm: &VmFd) -> Result<Self, Error> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut chips {
            vm.get_irqchip(chip)
                .map_err(Error::kvm("read an interrupt controller"))?;
        }
        let pit = vm.get_pit2().map_err(Error::kvm("read the timer"))?;
        Ok(Self { chips, pit })
    }

    /// Whether it has the controllers that a machine has.
    pub(super) fn are_ours(&self) -> bool {
        self.chips
            .iter()
            .zip(CHIPS)
            .all(|(chip, id)| chip.chip_id == id)
    }

    /// Puts it back.
    pub fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.chips {
            vm.set_irqchip(chip)
                .map_err(Error::kvm("set an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(Error::kvm("set the timer"))
    }
}
