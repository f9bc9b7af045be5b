//! The file that keeps the registers' values.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    CTRL, FFMT, LEDCTL, MDIC, MTA, PBA, RA, RAH_AV, RECEIVE_ADDRESSES, VET, VFTA, ctrl, mdic,
};

/// Bytes of register space that [`RegisterFile`] keeps values for.
const FILE_BYTES: u32 = 0xa000;

/// The stored values of all registers.
///
/// It is saved as the offsets and values of the registers that are not 0. A copy has its blocks in
/// common with the original until one of them is changed: a checkpoint is taken in every call that
/// reaches the device, and few registers change between two.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<u32, u32>", into = "BTreeMap<u32, u32>")]
pub struct RegisterFile {
    blocks: Vec<Arc<Block>>,
}

/// Registers of a block.
const BLOCK_WORDS: usize = 256;

type Block = [u32; BLOCK_WORDS];

impl RegisterFile {
    fn zero() -> Self {
        let blocks = FILE_BYTES as usize / size_of::<Block>();
        let empty = Arc::new([0; BLOCK_WORDS]);
        Self {
            blocks: std::iter::repeat_n(empty, blocks).collect(),
        }
    }

    /// All registers as after power-on, before the EEPROM was read.
    pub fn power_on() -> Self {
        let mut file = Self::zero();
        file.set(CTRL, ctrl::FD | ctrl::SPEED_1000);
        file.set(LEDCTL, 0x0706_8302);
        file.set(VET, 0x8100);
        file.set(PBA, 0x0010_0030);
        file.set(MDIC, mdic::READY);
        file
    }

    /// What a device reset leaves: a file as after power-on, with the registers kept that
    /// [`ctrl::RST`] does not touch (14.7): packet buffer allocation, filter tables, wake-up and
    /// statistics registers.
    pub fn after_reset(&self) -> Self {
        let mut file = Self::power_on();
        for kept in [
            PBA..PBA + 4,
            0x4000..0x4200,
            MTA..0x5400,
            VFTA..0x6000,
            FFMT..FILE_BYTES,
        ] {
            for offset in kept.step_by(4) {
                file.set(offset, self.get(offset));
            }
        }
        // Address pairs keep their addresses and lose their valid bits.
        for pair in 0..RECEIVE_ADDRESSES {
            let (low, high) = (RA + 8 * pair, RA + 8 * pair + 4);
            file.set(low, self.get(low));
            file.set(high, self.get(high) & !RAH_AV);
        }
        file
    }

    /// Value of the register at `offset`, 0 where there is none.
    pub fn get(&self, offset: u32) -> u32 {
        let word = (offset / 4) as usize;
        let block = self.blocks.get(word / BLOCK_WORDS);
        block.map_or(0, |block| block[word % BLOCK_WORDS])
    }

    /// Sets the register at `offset`, without any mask.
    pub fn set(&mut self, offset: u32, value: u32) {
        let word = (offset / 4) as usize;
        if self.get(offset) != value
            && let Some(block) = self.blocks.get_mut(word / BLOCK_WORDS)
        {
            Arc::make_mut(block)[word % BLOCK_WORDS] = value;
        }
    }

    /// These values without what was done between `before` and `after`: a register that was changed
    /// then and not since gets its old value. The error is the one of `entangled` that was changed
    /// then and since.
    pub fn without(mut self, before: &Self, after: &Self, entangled: &[u32]) -> Result<Self, u32> {
        let blocks = before.blocks.iter().zip(&after.blocks);
        let blocks = (0u32..).step_by(size_of::<Block>()).zip(blocks);
        for (first, (before, after)) in blocks.filter(|(_, (before, after))| before != after) {
            let words = before.iter().zip(after.iter());
            let words = (first..).step_by(4).zip(words);
            for (offset, (before, after)) in words.filter(|(_, (before, after))| before != after) {
                let now = self.get(offset);
                if now == *after {
                    self.set(offset, *before);
                } else if now != *before && entangled.contains(&offset) {
                    return Err(offset);
                }
            }
        }
        Ok(self)
    }

    /// Whether all of `bits` are set in the register at `offset`.
    pub fn is_set(&self, offset: u32, bits: u32) -> bool {
        self.get(offset) & bits == bits
    }
}

impl fmt::Debug for RegisterFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(BTreeMap::from(self.clone())).finish()
    }
}

impl From<RegisterFile> for BTreeMap<u32, u32> {
    fn from(file: RegisterFile) -> Self {
        let words = file.blocks.iter().flat_map(|block| **block);
        let values = (0u32..).step_by(4).zip(words);
        values.filter(|&(_, value)| value != 0).collect()
    }
}

impl TryFrom<BTreeMap<u32, u32>> for RegisterFile {
    type Error = String;

    fn try_from(values: BTreeMap<u32, u32>) -> Result<Self, String> {
        let mut file = Self::zero();
        for (offset, value) in values {
            if !offset.is_multiple_of(4) || offset >= FILE_BYTES {
                return Err(format!("there is no register at offset {offset:#x}"));
            }
            file.set(offset, value);
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::e1000::regs::RDBAL;

    #[test]
    fn a_register_file_survives_its_saved_form() {
        let mut file = RegisterFile::power_on();
        file.set(RDBAL, 0x1230);
        let saved = serde_json::to_string(&file).unwrap();
        assert_eq!(serde_json::from_str::<RegisterFile>(&saved).unwrap(), file);
    }

    #[test]
    fn a_saved_register_that_does_not_exist_is_refused() {
        assert!(serde_json::from_str::<RegisterFile>("{\"3\":1}").is_err());
        assert!(serde_json::from_str::<RegisterFile>("{\"40960\":1}").is_err());
    }

    #[test]
    fn reset_keeps_filters_and_forgets_rings() {
        let mut file = RegisterFile::power_on();
        file.set(MTA + 4, 7);
        file.set(RDBAL, 0x1000);
        file.set(RA + 12, RAH_AV | 5);
        let file = file.after_reset();
        assert_eq!(
            (file.get(MTA + 4), file.get(RDBAL), file.get(RA + 12)),
            (7, 0, 5)
        );
    }
}
