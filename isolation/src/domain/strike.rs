//! A fault that waits in P's copy of the driver until a call comes to it.
//!
//! ```text
//!   call begins          call comes there            goes on
//!   out PORT_STRIKE ───► exit: noted, fault's code ─► at the same address
//! ```
//!
//! So it is known of each call whether it came to the fault, which is not seen from how it ends.

use devices::clock::monotonic_ns;

use super::Domain;
use super::error::DomainError;
use super::monitor::{self, PORT_STRIKE};
use super::transaction::OUT_BYTES;

/// What waits.
#[derive(Debug)]
pub(super) struct Strike {
    at: u64,
    code: Vec<u8>,
    /// What was patched there before, byte by byte.
    before: Vec<Option<u8>>,
    /// When a call came there first, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    reached_ns: Option<u64>,
}

impl Domain {
    /// Has calls run `code` at `at` until [`Domain::clear_strike`]. Code of one byte has no room
    /// for what tells that a call came there.
    pub fn set_strike(&mut self, at: u64, code: &[u8]) -> Result<(), DomainError> {
        self.clear_strike()?;
        let places = at..at.saturating_add(code.len() as u64);
        let before: Result<_, _> = places.map(|at| self.patched(at)).collect();
        let out = monitor::out(PORT_STRIKE);
        match code.len() < out.len() {
            true => self.patch(at, code)?,
            false => self.patch(at, &out)?,
        }
        self.strike = Some(Strike {
            at,
            code: code.to_vec(),
            before: before?,
            reached_ns: None,
        });
        Ok(())
    }

    /// P has the driver's own code there again. When a call came there first, as far as that is
    /// told, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub fn clear_strike(&mut self) -> Result<Option<u64>, DomainError> {
        let Some(strike) = self.strike.take() else {
            return Ok(None);
        };
        for (at, byte) in (strike.at..).zip(strike.before) {
            match byte {
                Some(byte) => self.patch(at, &[byte])?,
                None => self.unpatch(at)?,
            }
        }
        Ok(strike.reached_ns)
    }

    /// Where the fault waits that P, stopped at a port with this RIP, has come to. KVMs differ in
    /// whether they have moved on already.
    pub(super) fn strike_at(&self, rip: u64) -> Option<u64> {
        let strike = self.strike.as_ref()?;
        let waits =
            strike.reached_ns.is_none() && [rip, rip.wrapping_sub(OUT_BYTES)].contains(&strike.at);
        waits.then_some(strike.at)
    }

    /// A call has come there: what waited is the fault now.
    pub(super) fn strike(&mut self) -> Result<(), DomainError> {
        let Some(strike) = &mut self.strike else {
            return Ok(());
        };
        strike.reached_ns = Some(monotonic_ns());
        let (at, code) = (strike.at, strike.code.clone());
        self.patch(at, &code)
    }
}
