//! Resets of a device by its registers, and what a reset must not bring back: somebody else's
//! station address.

use super::description::Description;
use super::description::entries::{Station, Why};
use super::{Access, CheckpointError, RegisterAccess, wait_until};

impl Description {
    /// The description of a function, if there is one by which it can be taken from one user to
    /// another.
    ///
    /// # Errors
    /// One of the descriptions is wrong.
    pub fn of_function(vendor: u16, device: u16) -> Result<Option<Self>, super::DescriptionError> {
        let description = Self::by_identity(vendor, device)?;
        let stands_still = |one: &Self| !one.quiet.is_empty() && one.reset.is_some();
        Ok(description.filter(stands_still))
    }

    /// The description of a function's registers, if there is one.
    ///
    /// # Errors
    /// One of the descriptions is wrong.
    pub fn by_identity(vendor: u16, device: u16) -> Result<Option<Self>, super::DescriptionError> {
        let all = [Self::intel_82540em()?, Self::intel_82574l()?];
        let mut all = all.into_iter();
        Ok(all.find(|one| (one.device.vendor, one.device.device) == (vendor, device)))
    }

    /// Whether storing `value` at `offset` resets the device.
    pub fn resets(&self, offset: u64, value: u32) -> bool {
        let mut resets = self.reset.iter();
        resets.any(|reset| u64::from(reset.offset) == offset && value & reset.bits != 0)
    }

    /// Resets the device, and gives it this station address.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reset(
        &self,
        registers: &mut dyn RegisterAccess,
        address: [u8; 6],
    ) -> Result<(), CheckpointError> {
        if let Some(reset) = &self.reset {
            let value = registers.load(reset.offset);
            registers.store(reset.offset, value | reset.bits);
        }
        self.after_reset(registers, address)
    }

    /// Waits until a reset that has begun is over, does what a device may have left undone of it,
    /// and gives the device this station address in place of the one that it has read from its own
    /// memory.
    ///
    /// # Errors
    /// It does not come back.
    pub fn after_reset(
        &self,
        registers: &mut dyn RegisterAccess,
        address: [u8; 6],
    ) -> Result<(), CheckpointError> {
        let mut access = Access(registers);
        if let Some(reset) = &self.reset {
            let is_over = || {
                access.read(reset.offset) & reset.bits == 0
                    && access.read(reset.done_offset) & reset.done == reset.done
            };
            if !wait_until(reset.wait_us, is_over) {
                return Err(CheckpointError::Resets(reset.wait_us));
            }
            for at in &reset.zero {
                if access.read(*at) != 0 {
                    access.write(*at, 0);
                }
            }
        }
        if let Some(station) = &self.station {
            let (low, high) = station.values(address);
            // A half-written address is not valid.
            access.write(station.high, 0);
            access.write(station.low, low);
            access.write(station.high, high);
        }
        Ok(())
    }

    /// The registers with the station address and their values for this one, the lower half first.
    pub fn station_stores(&self, address: [u8; 6]) -> Option<[(u32, u32); 2]> {
        let station = self.station.as_ref()?;
        let (low, high) = station.values(address);
        Some([(station.low, low), (station.high, high)])
    }

    /// Reads away what reading clears, such as statistics and causes of interrupts: they are of
    /// another user. Gives how many frames the device says to have lost.
    pub fn read_away(&self, registers: &mut dyn RegisterAccess) -> u64 {
        let mut lost = 0;
        for untouched in self
            .untouched
            .iter()
            .filter(|one| one.why == Why::ReadClears)
        {
            for at in (untouched.offset..)
                .step_by(4)
                .take(untouched.count as usize)
            {
                lost += self.lost_in(at.into(), registers.load(at));
            }
        }
        lost
    }

    /// How many frames the device has lost since that was read last, for want of room, as far as it
    /// counts them. It forgets them by that.
    pub fn read_lost(&self, registers: &mut dyn RegisterAccess) -> u64 {
        let lost = self.lost.iter();
        lost.map(|lost| self.lost_in(lost.offset.into(), registers.load(lost.offset)))
            .sum()
    }

    /// How many lost frames a load says that gives `value` at `offset`: none, if that counts
    /// something else, or nobody answers.
    pub fn lost_in(&self, offset: u64, value: u32) -> u64 {
        let counts = self
            .lost
            .iter()
            .any(|lost| u64::from(lost.offset) == offset);
        match counts && value != u32::MAX {
            true => value.into(),
            false => 0,
        }
    }
}

impl Station {
    pub(super) fn values(&self, [a, b, c, d, e, f]: [u8; 6]) -> (u32, u32) {
        let low = u32::from_le_bytes([a, b, c, d]);
        (low, self.valid | u32::from(u16::from_le_bytes([e, f])))
    }
}
