//! The marks of a machine: what is kept for each.

use serde::{Deserialize, Serialize};

use super::error::MarkError;
use super::tree::{Id, Tree};
use crate::memory::PAGE_BYTES;
use crate::participant::Kept;
use crate::state::MachineState;
use crate::state::devices::DeviceStates;

/// A mark as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkInfo {
    /// Its name.
    pub name: String,
    /// The mark that it follows, if that was not forgotten, or the one that that one follows.
    pub parent: Option<String>,
    /// Pages that are kept for it.
    pub pages: u64,
    /// Bytes of memory that they take.
    pub bytes: u64,
    /// The guest is at it, or has gone on from it.
    pub current: bool,
}

/// State of a machine at a mark, memory apart.
pub(super) struct MarkState {
    pub machine: MachineState,
    pub devices: DeviceStates,
    /// Which functions those are of, each with its slot.
    pub functions: Vec<(u8, u64)>,
    pub kept: Vec<(String, Kept)>,
}

/// The marks of a machine.
pub(crate) struct Marks {
    pub(super) tree: Tree<MarkState>,
    /// Most bytes of memory that are kept.
    pub(super) limit: u64,
    /// Others have written guest memory since the first one, of whom nobody tells what.
    pub(super) others_wrote: bool,
}

impl Marks {
    /// None yet, of a machine with `memory_bytes` of memory.
    pub fn new(memory_bytes: u64) -> Self {
        Self {
            tree: Tree::default(),
            limit: memory_bytes.saturating_mul(2),
            others_wrote: false,
        }
    }

    fn bytes(&self) -> u64 {
        let pages = self.tree.iter().map(|(_, node)| node.pages.count());
        pages.sum::<u64>() * PAGE_BYTES
    }

    /// What is told of a mark.
    pub(super) fn info(&self, id: Id) -> Option<MarkInfo> {
        let node = self.tree.get(id)?;
        let named = |id: &Id| self.tree.get(*id).is_some_and(|node| node.name.is_some());
        let up = |from: Option<Id>| {
            let above = |&id: &Id| self.tree.get(id)?.parent;
            std::iter::successors(from, above).find(named)
        };
        let name_of = |id| self.tree.get(id)?.name.clone();
        Some(MarkInfo {
            name: node.name.clone()?,
            parent: up(node.parent).and_then(name_of),
            pages: node.pages.count(),
            bytes: node.pages.count() * PAGE_BYTES,
            current: up(self.tree.current()) == Some(id),
        })
    }

    /// Whether `pages` more may be kept.
    pub(super) fn check(&self, pages: u64) -> Result<(), MarkError> {
        let limit = self.limit;
        match self.bytes().saturating_add(pages * PAGE_BYTES) <= limit {
            true => Ok(()),
            false => Err(MarkError::TooMuch { limit }),
        }
    }
}
