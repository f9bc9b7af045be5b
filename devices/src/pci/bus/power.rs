//! Power states of functions, by the PCI power management capability (PCI Bus Power Management
//! Interface 1.2, section 3.2).

use super::PciBus;
use crate::pci::config::offset::{CAPABILITIES_POINTER, STATUS};

/// Bit of the status register: there is a list of capabilities (PCI Local Bus 3.0, section 6.2.3).
const CAPABILITIES_LIST: u16 = 1 << 4;
/// First byte behind the header, where capabilities can be.
const FIRST_CAPABILITY: u8 = 0x40;
/// Most capabilities that there is room for.
const MAX_CAPABILITIES: usize = 48;
/// Identity of the power management capability.
const POWER_MANAGEMENT: u8 = 0x01;
/// Power management control and status: its offset in the capability, the power state in it, and
/// PME status, which a 1 clears.
const CONTROL: u16 = 4;
const STATE: u16 = 3;
const PME_STATUS: u16 = 1 << 15;

/// A power state that software chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerState {
    /// The function works.
    D0,
    /// It answers accesses to its configuration space only, and forgets all else.
    D3Hot,
}

impl PciBus {
    /// Puts function 0 in `slot` into a power state; `false` if it has no power management
    /// capability, and nothing was done.
    pub fn set_power_state(&self, slot: u8, state: PowerState) -> bool {
        let Some(capability) = self.find_capability(slot, POWER_MANAGEMENT) else {
            return false;
        };
        let at = capability + CONTROL;
        let bits = match state {
            PowerState::D0 => 0,
            PowerState::D3Hot => 3,
        };
        let control = self.config_word(slot, at) & !(STATE | PME_STATUS) | bits;
        self.config_write(slot, at, &control.to_le_bytes());
        true
    }

    /// Offset of a capability of function 0 in `slot`.
    fn find_capability(&self, slot: u8, id: u8) -> Option<u16> {
        let status = self.config_word(slot, STATUS);
        if status == u16::MAX || status & CAPABILITIES_LIST == 0 {
            return None;
        }
        let byte = |offset: u16| (self.config_word(slot, offset) & 0xff) as u8;
        let mut at = byte(CAPABILITIES_POINTER);
        // A list may lead anywhere, and round and round.
        for _ in 0..MAX_CAPABILITIES {
            if at < FIRST_CAPABILITY {
                return None;
            }
            let here = u16::from(at & !3);
            if byte(here) == id {
                return Some(here);
            }
            at = byte(here + 1);
        }
        None
    }

    fn config_word(&self, slot: u8, offset: u16) -> u16 {
        let mut word = [0; 2];
        self.config_read(slot, offset, &mut word);
        u16::from_le_bytes(word)
    }
}
