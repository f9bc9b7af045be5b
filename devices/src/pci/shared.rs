//! Registers of a function that another process reaches in memory in place of asking for them: the
//! causes of its interrupts with their mask, and registers that only say how the function is.
//!
//! ```text
//!   offset 0   causes: u32 │ mask: u32     one word, changed by atomic operations of both sides
//!   offset 8   values: u32 each            written by the function alone
//!   offset 72  u32: 1 once the function does not use the memory any more
//! ```
//!
//! A driver's interrupt handler does nothing but reading causes, masking, and reading something so
//! that its stores have arrived; each of these is a wait for the other process otherwise. The side
//! that has the function sets causes and then looks at the mask, the other one sets the mask and
//! then looks at the causes: since both are one word, one of the two sees that an interrupt is due.
//! It is the function that interrupts; the other side tells it where it has unmasked a cause that
//! was set ([`SharedPage::unmask`]).
//!
//! What is here decides about interrupts of that client's own guest and nothing else, so that it is
//! the client's to change. The function takes of it only bits that its registers have.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::BarIndex;
use crate::dma::ForeignMapping;

/// Bytes of the memory.
const PAGE_BYTES: usize = 4096;
/// Where the values begin.
const VALUES: usize = 8;
/// Where it is said that the memory is not used any more.
const ENDED: usize = VALUES + 4 * MAX_SHARED;
/// Most registers of a kind in a [`SharedLayout`].
pub const MAX_SHARED: usize = 16;

/// Which registers are in the memory, by their offsets in a base address register. Each is 32 bits
/// wide; an access of another width is none of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedLayout {
    /// The base address register.
    pub bar: BarIndex,
    /// A load gives the causes and clears them.
    pub causes: u32,
    /// A store sets bits of the mask of causes that interrupt; a load gives the mask.
    pub set_mask: u32,
    /// A store clears bits of the mask.
    pub clear_mask: u32,
    /// Bits that causes and mask have.
    pub bits: u32,
    /// Loads give the values in the memory, in this order, and do nothing.
    pub values: Vec<u32>,
    /// Registers of which the device takes notice in its own time: what is loaded above need not
    /// show what a store to one of these has begun.
    pub late: Vec<u32>,
}

/// A function that can have registers in memory.
pub trait SharesRegisters {
    /// Puts the registers into memory that nobody has yet: its file, and what is where. Whoever had
    /// memory before changes nothing any more.
    ///
    /// # Errors
    /// There is no memory for it.
    fn share(&mut self) -> std::io::Result<(OwnedFd, SharedLayout)>;

    /// Takes the registers out of memory, with the values that they have.
    fn unshare(&mut self);

    /// Brings the interrupt in line with what was done to the memory. To be called before an
    /// interrupt that was acknowledged may come again.
    fn look(&mut self);
}

/// The memory, as both sides have it. Clones are the same.
#[derive(Debug, Clone)]
pub struct SharedPage(Arc<ForeignMapping>);

impl SharedPage {
    /// New memory, whose size nobody can change, with nothing set.
    ///
    /// # Errors
    /// There is none.
    pub fn create() -> std::io::Result<(Self, OwnedFd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("registers", flags)?;
        ftruncate(&file, PAGE_BYTES as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let ours = File::from(file.as_fd().try_clone_to_owned()?);
        Ok((Self::of_file(&ours)?, file))
    }

    /// The memory behind `file`, which another process has given.
    ///
    /// # Errors
    /// It is none: see [`ForeignMapping::new`].
    pub fn of_file(file: &File) -> std::io::Result<Self> {
        let mapping = ForeignMapping::new(file, 0, PAGE_BYTES)?;
        Ok(Self(Arc::new(mapping)))
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the mapping is a page long and lives as long as `self`; it is only ever accessed
        // by atomic operations here, and what another process does to it is no access of this
        // program.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().cast()) }
    }

    fn value(&self, index: usize) -> &AtomicU32 {
        self.at(VALUES + 4 * index.min(MAX_SHARED - 1))
    }

    /// One of the values, or what is behind them.
    fn at(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as above, and the places of this module are within the page and aligned.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(at).cast()) }
    }

    /// The causes that are set, and the mask.
    pub fn causes_and_mask(&self) -> (u32, u32) {
        split(self.word().load(Ordering::SeqCst))
    }

    /// Sets both.
    pub fn store(&self, causes: u32, mask: u32) {
        let word = u64::from(mask) << 32 | u64::from(causes);
        self.word().store(word, Ordering::SeqCst);
    }

    /// Sets causes.
    pub fn raise(&self, causes: u32) {
        self.word().fetch_or(causes.into(), Ordering::SeqCst);
    }

    /// Clears causes, and gives those of them that were set.
    pub fn clear(&self, causes: u32) -> u32 {
        let keep = !u64::from(causes);
        split(self.word().fetch_and(keep, Ordering::SeqCst)).0 & causes
    }

    /// Sets bits of the mask. Whether an interrupt may be due that was not before.
    pub fn unmask(&self, bits: u32) -> bool {
        let before = self
            .word()
            .fetch_or(u64::from(bits) << 32, Ordering::SeqCst);
        split(before).0 & bits != 0
    }

    /// Clears bits of the mask.
    pub fn mask(&self, bits: u32) {
        let keep = !(u64::from(bits) << 32);
        self.word().fetch_and(keep, Ordering::SeqCst);
    }

    /// Says that the function does not use the memory any more.
    pub fn end(&self) {
        self.at(ENDED).store(1, Ordering::SeqCst);
    }

    /// Whether that was said.
    pub fn has_ended(&self) -> bool {
        self.at(ENDED).load(Ordering::SeqCst) != 0
    }

    /// The value of the register that is number `index` of [`SharedLayout::values`].
    pub fn get(&self, index: usize) -> u32 {
        self.value(index).load(Ordering::SeqCst)
    }

    /// Sets it.
    pub fn set(&self, index: usize, value: u32) {
        self.value(index).store(value, Ordering::SeqCst);
    }
}

/// Causes and mask of the word.
fn split(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_have_the_same_causes_and_mask() {
        let (ours, file) = SharedPage::create().unwrap();
        let theirs = SharedPage::of_file(&File::from(file)).unwrap();
        ours.raise(0x84);
        assert!(!theirs.unmask(0x1), "nothing is due");
        assert!(theirs.unmask(0x5));
        assert_eq!(ours.causes_and_mask(), (0x84, 0x5));
        assert_eq!(theirs.clear(0x0f), 0x4);
        theirs.mask(0x1);
        assert_eq!(ours.causes_and_mask(), (0x80, 0x4));
        ours.store(1, 2);
        assert_eq!(theirs.causes_and_mask(), (1, 2));
        ours.set(3, 0xffff_fffe);
        assert_eq!((theirs.get(3), theirs.get(2)), (0xffff_fffe, 0));
    }

    #[test]
    fn nobody_changes_the_size_of_the_memory() {
        let (page, file) = SharedPage::create().unwrap();
        assert!(ftruncate(&file, 0).is_err() && ftruncate(&file, 8192).is_err());
        page.raise(1);
        assert_eq!(page.causes_and_mask(), (1, 0));
    }

    /// However the two sides' steps fall, one of them sees that an interrupt is due.
    #[test]
    fn a_cause_and_its_unmasking_at_once_are_noticed_by_one_side() {
        let (ours, file) = SharedPage::create().unwrap();
        let theirs = SharedPage::of_file(&File::from(file)).unwrap();
        let barrier = std::sync::Barrier::new(2);
        for _ in 0..2000 {
            ours.store(0, 0);
            let (due, told) = std::thread::scope(|scope| {
                let device = scope.spawn(|| {
                    barrier.wait();
                    ours.raise(1);
                    let (causes, mask) = ours.causes_and_mask();
                    causes & mask != 0
                });
                barrier.wait();
                let told = theirs.unmask(1);
                (device.join().unwrap(), told)
            });
            assert!(due || told);
        }
    }
}
