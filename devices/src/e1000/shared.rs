//! The registers that an interrupt handler needs, in the register file or in memory that another
//! process has as well ([`crate::pci::shared`]): ICR with IMS, and STATUS.
//!
//! While they are shared the file's ICR and IMS are not looked at, and its STATUS is the original of
//! what is shown there.

use std::os::fd::OwnedFd;

use super::regs::{ICR, IMC, IMS, ITR, RDT, RegisterFile, STATUS, TDT, icr};
use super::{BAR_MEMORY, E1000};
use crate::pci::shared::{SharedLayout, SharedPage, SharesRegisters};

impl E1000 {
    /// ICR and IMS.
    pub(super) fn causes_and_mask(&self) -> (u32, u32) {
        match &self.shared {
            Some(page) => {
                let (causes, mask) = page.causes_and_mask();
                (causes & icr::ALL, mask & icr::ALL)
            }
            None => (self.regs.get(ICR), self.regs.get(IMS)),
        }
    }

    /// Sets bits of ICR.
    pub(super) fn set_causes(&mut self, causes: u32) {
        match &self.shared {
            Some(page) => page.raise(causes),
            None => self.regs.set(ICR, self.regs.get(ICR) | causes),
        }
    }

    /// Clears bits of ICR, and gives those that were set.
    pub(super) fn take_causes(&mut self, causes: u32) -> u32 {
        match &self.shared {
            Some(page) => page.clear(causes) & icr::ALL,
            None => {
                let set = self.regs.get(ICR);
                self.regs.set(ICR, set & !causes);
                set & causes
            }
        }
    }

    /// Sets or clears bits of IMS.
    pub(super) fn change_mask(&mut self, bits: u32, set: bool) {
        let mask = self.regs.get(IMS);
        match (&self.shared, set) {
            (Some(page), true) => drop(page.unmask(bits)),
            (Some(page), false) => page.mask(bits),
            (None, true) => self.regs.set(IMS, mask | bits),
            (None, false) => self.regs.set(IMS, mask & !bits),
        }
    }

    /// Sets STATUS, before anybody is told that it has changed.
    pub(super) fn set_status(&mut self, status: u32) {
        self.regs.set(STATUS, status);
        if let Some(page) = &self.shared {
            page.set(0, status);
        }
    }

    /// Whoever has the memory is told that it is not used any more.
    fn end_sharing(&mut self) {
        if let Some(page) = self.shared.take() {
            page.end();
        }
    }

    /// The register file with what is shared.
    pub(super) fn registers(&self) -> RegisterFile {
        let mut registers = self.regs.clone();
        let (causes, mask) = self.causes_and_mask();
        registers.set(ICR, causes);
        registers.set(IMS, mask);
        registers
    }

    /// Has all registers be those of `registers`.
    pub(super) fn set_registers(&mut self, registers: RegisterFile) {
        self.regs = registers;
        if let Some(page) = &self.shared {
            page.store(self.regs.get(ICR), self.regs.get(IMS));
            page.set(0, self.regs.get(STATUS));
        }
    }
}

impl SharesRegisters for E1000 {
    fn share(&mut self) -> std::io::Result<(OwnedFd, SharedLayout)> {
        let (page, file) = SharedPage::create()?;
        let registers = self.registers();
        self.end_sharing();
        self.shared = Some(page);
        self.set_registers(registers);
        let layout = SharedLayout {
            bar: BAR_MEMORY,
            causes: ICR,
            set_mask: IMS,
            clear_mask: IMC,
            bits: icr::ALL,
            values: vec![STATUS],
            // Descriptors are fetched, and a throttle is applied, some time after the store.
            late: vec![RDT, TDT, ITR],
        };
        Ok((file, layout))
    }

    fn unshare(&mut self) {
        let registers = self.registers();
        self.end_sharing();
        self.set_registers(registers);
    }

    fn look(&mut self) {
        if self.shared.is_some() {
            self.update_interrupt();
        }
    }
}
