//! A function of another process whose driver in the guest is isolated: its server gives its state
//! away and takes it back.

use super::VfioUserFunction;
use crate::hold::DeviceLost;
use crate::hold::goes_on::GoesOn;
use crate::pci::PciFunction;
use crate::pci::config::{Command, offset};
use crate::pci::registers::{Description, DescriptionError, FunctionRegisters};
use crate::state::Part;

/// Largest ring that is kept, in bytes.
const MAX_RING: u64 = 1 << 20;

/// The state of a server's function.
pub struct Saved {
    part: Part,
    /// Rings that it writes: address and contents.
    rings: Vec<(u64, Vec<u8>)>,
}

impl VfioUserFunction {
    /// The description of its registers, if there is one.
    ///
    /// # Errors
    /// One of the descriptions is wrong.
    pub fn description(&mut self) -> Result<Option<Description>, DescriptionError> {
        let mut identity = [0; 4];
        self.config_read(offset::VENDOR_ID, &mut identity);
        let [v0, v1, d0, d1] = identity;
        Description::by_identity(u16::from_le_bytes([v0, v1]), u16::from_le_bytes([d0, d1]))
    }

    fn rings(&mut self, description: Option<&Description>) -> Vec<(u64, Vec<u8>)> {
        let Some(description) = description else {
            return Vec::new();
        };
        let rings = description.rings(&mut FunctionRegisters::new(self, description));
        let rings = rings.into_iter().filter(|(_, bytes)| *bytes <= MAX_RING);
        let contents = rings.filter_map(|(address, bytes)| {
            let mut contents = vec![0; usize::try_from(bytes).ok()?];
            // A ring outside of memory is one that the device cannot write either.
            self.dma.read(address, &mut contents).ok()?;
            Some((address, contents))
        });
        contents.collect()
    }
}

impl GoesOn for VfioUserFunction {
    type Checkpoint = Box<Saved>;

    fn take(&mut self, description: Option<&Description>) -> Result<Self::Checkpoint, DeviceLost> {
        let lost = |error: crate::state::StateError| DeviceLost(error.to_string());
        let part = self.save().map_err(lost)?;
        let rings = self.rings(description);
        Ok(Box::new(Saved { part, rings }))
    }

    fn put_back(
        &mut self,
        _description: Option<&Description>,
        saved: &Self::Checkpoint,
    ) -> Result<(), DeviceLost> {
        for (address, contents) in &saved.rings {
            let written = self.dma.write(*address, contents);
            written.map_err(|error| DeviceLost(error.to_string()))?;
        }
        let restored = self.restore(&saved.part);
        restored.map_err(|error| DeviceLost(error.to_string()))
    }

    // Its interrupts go from the server into the guest; what it has to withhold them by is only to
    // disconnect them, behind which a level that is still asserted triggers anew.
    fn withhold_interrupts(&mut self, withhold: bool) {
        match withhold {
            true => self.disconnect_interrupts(),
            false => self.reconnect_interrupts(),
        }
    }

    fn silence(&mut self) {
        let mut command = [0; 2];
        self.config_read(offset::COMMAND, &mut command);
        let command = Command::from_bits_retain(u16::from_le_bytes(command));
        let silent = command - Command::BUS_MASTER;
        self.config_write(offset::COMMAND, &silent.bits().to_le_bytes());
    }
}
