//! Memory that changes by itself after a mark, and what else has changed.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::VmService;
use super::machine::REST_TIME;
use crate::control::protocol::Reply;

/// Most pieces of memory that are named in one answer.
const MOST_NAMED: usize = 64;

/// What is known to change by itself, by mark: pieces by their first byte, with what is behind
/// their last one.
#[derive(Debug, Default)]
pub struct Learned(Mutex<HashMap<String, BTreeMap<u64, u64>>>);

impl Learned {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, BTreeMap<u64, u64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is no such mark any more, or another one.
    pub fn forget(&self, mark: &str) {
        self.lock().remove(mark);
    }
}

/// Where the piece ends that `at` lies in.
fn end_of(pieces: &BTreeMap<u64, u64>, at: u64) -> Option<u64> {
    let (_, end) = pieces.range(..=at).next_back()?;
    (at < *end).then_some(*end)
}

impl VmService {
    pub(super) fn bystanders(
        &self,
        module: &str,
        mark: &str,
        learn: bool,
    ) -> Result<Reply, String> {
        let mut learned = self.learned.lock();
        let none = BTreeMap::new();
        let known = learned.get(mark).unwrap_or(&none);
        let found = self
            .isolator()
            .bystanders(module, mark, REST_TIME, &mut |at| end_of(known, at))
            .map_err(|error| error.to_string())?;
        if learn {
            // A mark that is none was refused above.
            let pieces = learned.entry(mark.to_owned()).or_default();
            pieces.extend(found.iter().map(|one| (one.range.start, one.range.end)));
        }
        let count = found.len() as u64;
        let named = found.into_iter().take(MOST_NAMED).map(|one| one.what);
        Ok(Reply::Bystanders {
            count,
            named: named.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_known_from_its_first_byte_to_its_last() {
        let pieces = BTreeMap::from([(0x100, 0x140), (0x200, 0x201)]);
        let ends = [0xff, 0x100, 0x13f, 0x140, 0x200, 0x201].map(|at| end_of(&pieces, at));
        let (first, second) = (Some(0x140), Some(0x201));
        assert_eq!(ends, [None, first, first, None, second, None]);
    }
}
