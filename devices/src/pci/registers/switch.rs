//! Taking a device that runs from one user's state to another's, by its registers.
//!
//! ```text
//!   look ─► quiesce ─► save ─► (the first user's memory out, the other one's in) ─► load ─► resume
//!     └──────────────── go_on: the first user has it again ◄───┘
//! ```
//!
//! The rings stay in their user's memory, which nobody changes while another one has the device.
//! Between `quiesce` and `resume` the device neither reads nor writes memory, nor does it
//! interrupt.

use super::description::Description;
use super::description::entries::Quieting;
use super::parked::FromImage;
use super::{Access, CheckpointError, RegisterAccess, RegisterCheckpoint, wait_until};

/// What was changed of a device that stands still, as it was before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    values: Vec<u32>,
}

impl Quieting {
    /// The register's value with the device at rest.
    fn at_rest(&self, value: u32) -> u32 {
        match self.through {
            Some(_) => 0,
            None => value & !self.clear | self.set,
        }
    }

    fn apply(&self, access: &mut Access<'_>) {
        match self.through {
            Some(clear) => access.write(clear, u32::MAX),
            None => {
                let value = access.read(self.offset);
                access.write(self.offset, self.at_rest(value));
            }
        }
    }
}

impl Description {
    /// How the device runs, to be taken before [`Description::quiesce`].
    ///
    /// # Errors
    /// It is another device, or does not answer.
    pub fn look(&self, registers: &mut dyn RegisterAccess) -> Result<Running, CheckpointError> {
        let mut access = Access(registers);
        self.is_device(&mut access)?;
        let values = self.quiet.iter().map(|quiet| access.read(quiet.offset));
        Ok(Running {
            values: values.collect(),
        })
    }

    /// Makes the device stand still. A second time is as good as once.
    ///
    /// # Errors
    /// It does not. [`Description::go_on`] has it run again.
    pub fn quiesce(&self, registers: &mut dyn RegisterAccess) -> Result<(), CheckpointError> {
        let mut access = Access(registers);
        self.is_device(&mut access)?;
        for quiet in &self.quiet {
            quiet.apply(&mut access);
        }
        let Some(idle) = &self.idle else {
            return Ok(());
        };
        match wait_until(idle.wait_us, || access.read(idle.offset) & idle.busy == 0) {
            true => Ok(()),
            false => Err(CheckpointError::Restless(idle.wait_us)),
        }
    }

    /// Takes the state of a device that stands still, and ran as `running` says. Rings are not part
    /// of it.
    ///
    /// # Errors
    /// It sleeps, or does not answer.
    pub fn save(
        &self,
        registers: &mut dyn RegisterAccess,
        running: &Running,
    ) -> Result<RegisterCheckpoint, CheckpointError> {
        let mut saved = self.read_state(registers, None)?;
        for (quiet, value) in self.quiet.iter().zip(&running.values) {
            for (register, (_, values)) in self.register.iter().zip(&mut saved.registers) {
                if register.offset == quiet.offset {
                    values.clear();
                    values.push(*value);
                }
            }
        }
        Ok(saved)
    }

    /// Has a device take over a state, and stand still. Its user's memory is there already.
    ///
    /// # Errors
    /// The state is another device's, or the device does not hold it: nobody can rely on it then.
    pub fn load(
        &self,
        registers: &mut dyn RegisterAccess,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        self.fits(saved)?;
        let mut access = Access(registers);
        self.is_device(&mut access)?;
        self.put_config_back(&mut access, saved)?;
        self.stop(&mut access);
        self.put_phy_back(&mut access, saved)?;
        for (register, (_, values)) in self.register.iter().zip(&saved.registers) {
            let mut quiets = self.quiet.iter();
            let quiet = quiets.find(|quiet| quiet.offset == register.offset);
            for (index, (at, value)) in register.offsets().zip(values).enumerate() {
                let value = quiet.map_or(*value, |quiet| quiet.at_rest(*value));
                register.put_back(&mut access, index, at, value, &saved.image)?;
            }
        }
        Ok(())
    }

    /// Lets a device run that [`Description::load`] gave this state, and has its driver look at
    /// everything: what it was told last is not known.
    ///
    /// # Errors
    /// The device does not hold what it is given.
    pub fn resume(
        &self,
        registers: &mut dyn RegisterAccess,
        saved: &RegisterCheckpoint,
    ) -> Result<(), CheckpointError> {
        self.fits(saved)?;
        let of = |quiet: &Quieting| {
            let mut registers = self.register.iter().zip(&saved.registers);
            let (_, (_, values)) = registers.find(|(one, _)| one.offset == quiet.offset)?;
            values.first().copied()
        };
        let values = self.quiet.iter().filter_map(of).collect();
        let running = Running { values };
        let mut access = Access(registers);
        self.have_run(&mut access, &running, &saved.image)?;
        saved.image.ask_again(&mut access);
        for store in &self.after {
            access.write(store.offset, store.value);
        }
        Ok(())
    }

    /// Has a device that stands still run as before.
    ///
    /// # Errors
    /// The device does not hold what it is given.
    pub fn go_on(
        &self,
        registers: &mut dyn RegisterAccess,
        running: &Running,
    ) -> Result<(), CheckpointError> {
        self.have_run(&mut Access(registers), running, &FromImage::default())
    }

    fn have_run(
        &self,
        access: &mut Access<'_>,
        running: &Running,
        image: &FromImage,
    ) -> Result<(), CheckpointError> {
        for (quiet, value) in self.quiet.iter().zip(&running.values).rev() {
            let mut registers = self.register.iter();
            if let Some(register) = registers.find(|one| one.offset == quiet.offset) {
                register.put_back(access, 0, quiet.offset, *value, image)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
