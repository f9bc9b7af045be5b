//! Accesses of a PHY through a register of the form of MDIC.

use std::time::Duration;

use super::description::entries::Mdio;
use super::{Access, CheckpointError};

/// Reads of a PHY access that is under way before it is given up.
const MDIO_TRIES: u32 = 1000;
/// Between two of them. An access takes 64 us (8254x manual, 13.4.7).
const MDIO_WAIT: Duration = Duration::from_micros(10);

/// Bits of a register of the form of MDIC (8254x manual, 13.4.7).
pub(super) mod mdic {
    pub const REGISTER_SHIFT: u32 = 16;
    pub const PHY_SHIFT: u32 = 21;
    pub const WRITE: u32 = 1 << 26;
    pub const READ: u32 = 2 << 26;
    pub const READY: u32 = 1 << 28;
    pub const ERROR: u32 = 1 << 30;
    /// Of which PHY, and which register.
    pub const PLACE: u32 = 0x1f << PHY_SHIFT | 0x1f << REGISTER_SHIFT;
    pub const OPERATION: u32 = WRITE | READ;
}

impl Mdio {
    pub fn read(&self, access: &mut Access<'_>, register: u8) -> Result<u16, CheckpointError> {
        self.operate(access, register, mdic::READ)
    }

    pub fn write(
        &self,
        access: &mut Access<'_>,
        register: u8,
        value: u16,
    ) -> Result<(), CheckpointError> {
        self.operate(access, register, mdic::WRITE | u32::from(value))
            .map(drop)
    }

    /// What the register shows when the access that is under way, if there is one, is done.
    pub fn last_answer(&self, access: &mut Access<'_>) -> u32 {
        for _ in 0..MDIO_TRIES {
            let answer = access.read(self.register);
            let is_asked = answer & mdic::OPERATION != 0;
            if answer & (mdic::READY | mdic::ERROR) != 0 || !is_asked {
                return answer;
            }
            std::thread::sleep(MDIO_WAIT);
        }
        0
    }

    fn operate(
        &self,
        access: &mut Access<'_>,
        register: u8,
        operation: u32,
    ) -> Result<u16, CheckpointError> {
        let place = u32::from(register) << mdic::REGISTER_SHIFT;
        let place = place | u32::from(self.phy) << mdic::PHY_SHIFT;
        access.write(self.register, operation | place);
        for _ in 0..MDIO_TRIES {
            let answer = access.read(self.register);
            if answer & mdic::ERROR != 0 {
                break;
            }
            if answer & mdic::READY != 0 {
                return Ok(answer as u16);
            }
            std::thread::sleep(MDIO_WAIT);
        }
        Err(CheckpointError::NoPhy)
    }
}
