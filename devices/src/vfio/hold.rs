//! A function of the host whose driver in the guest is isolated: its state is taken and put back by
//! its registers, where they are described.

use super::device::VfioRegisters;
use super::function::VfioFunction;
use crate::hold::DeviceLost;
use crate::hold::goes_on::GoesOn;
use crate::pci::registers::{CheckpointError, Description, RegisterCheckpoint};

impl VfioFunction {
    /// Has the registers and rings of `saved` in the place of what it has.
    fn load(
        &mut self,
        description: &Description,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        let (device, bar) = (self.device().clone(), description.device.bar);
        let registers = &mut VfioRegisters::new(&device, bar);
        // Its rings are written behind it.
        description.quiesce(registers)?;
        let memory = self.dma().clone();
        description.put_back(self, &memory, saved)?;
        // Causes that have masked themselves are not raised anew; their message may be of what has
        // just been taken back.
        let told = description.told(registers);
        let vectors = (0..u32::BITS as u16).filter(|vector| told >> vector & 1 != 0);
        self.interrupt(vectors.collect());
        Ok(())
    }
}

impl GoesOn for VfioFunction {
    type Checkpoint = Box<RegisterCheckpoint>;

    fn take(&mut self, description: Option<&Description>) -> Result<Self::Checkpoint, DeviceLost> {
        let Some(description) = description else {
            let device = self.device().address();
            return Err(DeviceLost(format!(
                "there is no description of the registers of {device}, by which it could be put back"
            )));
        };
        let memory = self.dma().clone();
        let taken = description.take(self, &memory);
        taken
            .map(Box::new)
            .map_err(|error| DeviceLost(error.to_string()))
    }

    fn put_back(
        &mut self,
        description: Option<&Description>,
        saved: &Self::Checkpoint,
    ) -> Result<(), DeviceLost> {
        let result = description.map_or(Ok(()), |description| self.load(description, saved));
        result.map_err(|error| DeviceLost(error.to_string()))
    }

    fn call_ended(&mut self, failed: bool) {
        self.after_call(failed);
    }

    fn withhold_interrupts(&mut self, withhold: bool) {
        self.withhold(withhold);
    }

    fn silence(&mut self) {
        self.stop();
    }
}
