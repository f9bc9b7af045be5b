//! Memory that one call leaves to the next, so that a warm one allocates nothing.

use super::device::PostedWrite;
use crate::domain::view::Pfn;
use crate::guest::addr::GvaRange;
use crate::policy::diff::PageMask;

/// Most elements for which a list keeps room: what a large call took is given back.
const MOST: usize = 256;

/// Empty lists with room, by the names of the call's fields.
#[derive(Debug, Default)]
pub(in crate::domain) struct Room {
    pub(super) stacks: Vec<GvaRange>,
    pub(super) host_written: Vec<Pfn>,
    pub(super) posted: Vec<PostedWrite>,
    pub(super) passing: Vec<(Pfn, u64)>,
    pub(super) harvested: Vec<Pfn>,
    pub(super) pages: Vec<Pfn>,
    pub(super) changes: Vec<(Pfn, PageMask)>,
}

impl Room {
    /// The same without what is in the lists.
    pub(super) fn emptied(self) -> Self {
        Self {
            stacks: emptied(self.stacks),
            host_written: emptied(self.host_written),
            posted: emptied(self.posted),
            passing: emptied(self.passing),
            harvested: emptied(self.harvested),
            pages: emptied(self.pages),
            changes: emptied(self.changes),
        }
    }
}

fn emptied<T>(mut list: Vec<T>) -> Vec<T> {
    list.clear();
    match list.capacity() > MOST {
        true => Vec::new(),
        false => list,
    }
}
