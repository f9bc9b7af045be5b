//! Taking a machine that runs back to a snapshot of it, in the same process.
//!
//! ```text
//!  read and check every file; like this machine? ─► at rest: who forgets at a reset forgets ─► pages that differ
//!     │ refused: nothing was changed                    ─► vCPUs, clocks ─► devices ─► goes on
//! ```
//!
//! As a rewind to a mark ([`crate::marks`]), but from files: all of memory is compared, and what
//! participants keep is not there, so that they begin anew as at a reset. What fails behind the
//! checks leaves the machine between two states: it stays paused until a rewind succeeds or it is
//! reset.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::restore::fill;
use super::{Chain, PAGE_BYTES, SnapshotError, Tell, copier};
use crate::error::{Error, StateError};
use crate::handle::VmHandle;
use crate::machine::Machine;
use crate::memory::GuestRam;
use crate::participant::RestFor;
use crate::quiesce::Quiesced;
use crate::refused::QuiesceError;
use crate::state::MachineState;
use crate::state::devices::DeviceStates;

/// Pages that are compared at once.
const BATCH_PAGES: u64 = 256;

/// Why a machine did not go back to a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum GoBackError {
    /// The snapshot cannot be used; nothing was changed.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine cannot be in that state; nothing was changed.
    #[error(transparent)]
    Machine(#[from] Error),
    /// It did not come to rest; nothing was changed.
    #[error(transparent)]
    Rest(#[from] QuiesceError),
    /// Who writes guest memory beside this process does not stand still; nothing was changed.
    #[error("{0}")]
    Others(String),
    /// It is between two states.
    #[error(
        "going back to {dir} failed half-way: {reason}; the guest stays paused until a rewind succeeds or it is reset"
    )]
    HalfWay {
        /// The snapshot.
        dir: PathBuf,
        /// What failed.
        reason: String,
    },
}

impl From<StateError> for GoBackError {
    fn from(error: StateError) -> Self {
        Self::Machine(error.into())
    }
}

impl VmHandle {
    /// Takes the machine back to a snapshot of it, or of one that is like it in all that it is made
    /// of. Every file is read and checked before anything is changed. `limit` is how long to wait
    /// for the machine to come to rest; calls that are open in it are not waited for. One that was
    /// running goes on from there, one that was paused stays so; whoever is told of resets
    /// ([`Self::on_reset`]) is told of this, and it counts as one. Marks stay valid, and who
    /// follows changes sees what was put back. Gives how many pages that were. `tell` hears what is
    /// done, and says whether it is still wanted. Not to be called with a device locked.
    ///
    /// # Errors
    /// Nothing was changed, or see [`GoBackError::HalfWay`].
    pub fn go_back_to(
        &self,
        chain: &Chain,
        limit: Duration,
        tell: Tell<'_>,
    ) -> Result<u64, GoBackError> {
        let (here, there) = (self.ram().size_bytes(), chain.top().manifest().memory_bytes);
        if here != there {
            let (found, here) = (there, here);
            return Err(StateError::Memory { found, here }.into());
        }
        let state = MachineState::from_bytes(&chain.top().machine_state()?)?;
        let devices = DeviceStates::from_bytes(&chain.top().device_states()?)?;
        state.fits(self.machine())?;
        chain.check(tell)?;
        // Whoever changes what memory is mapped from would have pages read that are missing.
        let _one = self.one_copying();
        self.quiesce_mixed(RestFor::Rewind, limit, |quiesced| {
            quiesced.is_started().map_err(QuiesceError::from)?;
            // Until all is put back.
            let _still = quiesced.others_rest().map_err(GoBackError::Others)?;
            let now = quiesced.save_devices()?;
            now.are_like(&devices)?;
            let put = quiesced.go_back(chain, &state, &devices);
            quiesced.set_mixed(put.is_err());
            put.map_err(|reason| GoBackError::HalfWay {
                dir: chain.top().dir().to_owned(),
                reason,
            })
        })?
    }
}

impl Quiesced<'_, '_> {
    /// Gives the machine, which is like the saved one, its state; how many pages differed.
    fn go_back(
        &mut self,
        chain: &Chain,
        state: &MachineState,
        devices: &DeviceStates,
    ) -> Result<u64, String> {
        let machine: &Machine = self.machine;
        machine.requests.forget_guests();
        for hook in machine.reset_hooks().iter_mut() {
            hook();
        }
        let put = put_memory_back(&machine.ram, chain).map_err(|error| error.to_string())?;
        self.restore(state).map_err(|error| error.to_string())?;
        let restored = self.restore_devices(devices);
        restored.map_err(|error| error.to_string())?;
        // Another copy may have gone on from there, and this one has already.
        let renewed = machine.renew_generation();
        renewed.map_err(|error| error.to_string())?;
        self.machine.resets.fetch_add(1, Ordering::Relaxed);
        Ok(put)
    }
}

/// Has memory be what `chain` says, by writing the pages that differ: what nobody has touched and
/// is as it was stays untouched.
fn put_memory_back(ram: &GuestRam, chain: &Chain) -> Result<u64, SnapshotError> {
    let (populated, untouched) = (ram.populated(), ram.untouched());
    let all = ram.size_bytes() / PAGE_BYTES;
    let (mut then, mut now) = (Vec::new(), Vec::new());
    let (mut first, mut put) = (0, 0);
    while first < all {
        let end = (first + BATCH_PAGES).min(all);
        if chain.has(first..end) || overlaps(&populated, first * PAGE_BYTES..end * PAGE_BYTES) {
            let bytes = ((end - first) * PAGE_BYTES) as usize;
            then.resize(bytes, 0);
            now.resize(bytes, 0);
            chain.read(first, &mut then)?;
            copier::read(ram, untouched.as_ref(), first * PAGE_BYTES, &mut now)?;
            let size = PAGE_BYTES as usize;
            let pairs = then.chunks(size).zip(now.chunks(size));
            for (number, (then, _)) in (first..).zip(pairs).filter(|(_, (then, now))| then != now) {
                fill(ram, number * PAGE_BYTES, then)?;
                put += 1;
            }
        }
        first = end;
    }
    Ok(put)
}

/// Whether one of `ranges`, which are in rising order, has something of `range`.
fn overlaps(ranges: &[Range<u64>], range: Range<u64>) -> bool {
    let next = ranges.partition_point(|one| one.end <= range.start);
    ranges.get(next).is_some_and(|one| one.start < range.end)
}
