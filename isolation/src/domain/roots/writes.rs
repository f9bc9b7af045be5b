//! Which pages P has written, by the dirty bits of the entries that open them.
//!
//! In the driver root nothing can be written but what was opened, by entries that are the host's
//! own. The processor sets the dirty bit of such an entry before the first store by it (Intel SDM
//! volume 3, section 4.8; AMD64 APM volume 2, section 5.4.2), and KVM does when it carries a store
//! out itself. Bits that are cleared before a call begins therefore tell which pages were written
//! in it, as long as it has been in the driver root alone and on the same tables. P's processor
//! remembers nothing of an entry by then: a call begins with a load of CR3.
//!
//! An entry that is made in the middle of a call has its bit set from the beginning, so that a page
//! is at worst taken for written.

use super::super::monitor::Monitor;
use super::super::view::Pfn;
use super::entry::{bits, entry_at, put_entry};
use super::{Permissions, Root, Roots};

/// An entry of the driver root that lets P write a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Leaf {
    pfn: Pfn,
    /// Page of the monitor area.
    table: u64,
    /// Index in it.
    at: u64,
}

/// All such entries, sorted. One that has come to lead to another page stays until the roots are
/// built anew.
#[derive(Debug, Default)]
pub(super) struct Leaves(Vec<Leaf>);

impl Leaves {
    fn of(&self, pfn: Pfn) -> impl Iterator<Item = &Leaf> {
        let first = self.0.partition_point(|leaf| leaf.pfn < pfn);
        let behind = self.0.iter().skip(first);
        behind.take_while(move |leaf| leaf.pfn == pfn)
    }
}

/// The page that an entry leads to.
fn page_of(entry: u64) -> Pfn {
    Pfn::of(entry & bits::ADDRESS)
}

impl Roots {
    /// Puts the entry of one page into a table of `root`.
    pub(super) fn put_leaf(
        &mut self,
        (root, table, at): (Root, u64, u64),
        entry: u64,
        special: Option<Permissions>,
        monitor: &mut Monitor,
    ) {
        let is_open = root == Root::Driver
            && special.is_some_and(|special| special.write)
            && entry & bits::WRITE != 0;
        if !is_open {
            return put_entry(monitor, table, at, entry);
        }
        put_entry(monitor, table, at, entry | bits::DIRTY);
        let leaf = Leaf {
            pfn: page_of(entry),
            table,
            at,
        };
        if let Err(place) = self.leaves.0.binary_search(&leaf) {
            self.leaves.0.insert(place, leaf);
        }
    }

    /// The entry does not let P write any more.
    pub(super) fn forget_leaf(&mut self, (table, at): (u64, u64), entry: u64) {
        let leaf = Leaf {
            pfn: page_of(entry),
            table,
            at,
        };
        if let Ok(place) = self.leaves.0.binary_search(&leaf) {
            self.leaves.0.remove(place);
        }
    }

    /// From now on [`Roots::is_written`] tells of `pfn` what P does after its next load of the
    /// driver root.
    pub fn forget_written(&self, pfn: Pfn, monitor: &mut Monitor) {
        for leaf in self.leaves.of(pfn) {
            let entry = entry_at(monitor, leaf.table, leaf.at);
            put_entry(monitor, leaf.table, leaf.at, entry & !bits::DIRTY);
        }
    }

    /// Whether P may have written to `pfn` in the driver root. Stores to pages that were closed
    /// meanwhile are not seen.
    pub fn is_written(&self, pfn: Pfn, monitor: &Monitor) -> bool {
        let mut leaves = self.leaves.of(pfn);
        leaves.any(|leaf| entry_at(monitor, leaf.table, leaf.at) & bits::DIRTY != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = 50;
    const OPEN: Option<Permissions> = Some(Permissions {
        write: true,
        execute: false,
    });

    fn entry(pfn: u64) -> u64 {
        pfn << 12 | bits::PRESENT | bits::WRITE
    }

    /// What the processor does at the first store by an entry.
    fn store(at: u64, monitor: &mut Monitor) {
        let entry = entry_at(monitor, TABLE, at);
        put_entry(monitor, TABLE, at, entry | bits::DIRTY);
    }

    fn roots() -> (Roots, Monitor) {
        let monitor = Monitor::new(1 << 33, 0xffff_ffff_fee0_0000, 0x1000, 0x2000);
        (Roots::new(0, None), monitor.unwrap())
    }

    #[test]
    fn a_page_is_written_if_one_of_its_entries_says_so() {
        let (mut roots, mut monitor) = roots();
        for (at, pfn) in [(3, 5), (7, 5), (4, 6)] {
            roots.put_leaf((Root::Driver, TABLE, at), entry(pfn), OPEN, &mut monitor);
            assert!(roots.is_written(Pfn(pfn), &monitor), "it is new");
        }
        for pfn in [5, 6].map(Pfn) {
            roots.forget_written(pfn, &mut monitor);
            assert!(!roots.is_written(pfn, &monitor));
        }
        store(7, &mut monitor);
        assert!(roots.is_written(Pfn(5), &monitor));
        assert!(!roots.is_written(Pfn(6), &monitor));
        roots.forget_written(Pfn(5), &mut monitor);
        store(3, &mut monitor);
        assert!(roots.is_written(Pfn(5), &monitor));
    }

    #[test]
    fn an_entry_that_is_put_in_anew_does_not_hide_a_store() {
        let (mut roots, mut monitor) = roots();
        roots.put_leaf((Root::Driver, TABLE, 3), entry(5), OPEN, &mut monitor);
        roots.forget_written(Pfn(5), &mut monitor);
        store(3, &mut monitor);
        for pfn in [5, 6] {
            roots.put_leaf((Root::Driver, TABLE, 3), entry(pfn), OPEN, &mut monitor);
            assert!(roots.is_written(Pfn(5), &monitor), "now of {pfn}");
        }
    }

    #[test]
    fn only_what_can_be_written_in_the_driver_root_is_known() {
        let (mut roots, mut monitor) = roots();
        let read_only = Some(Permissions {
            write: false,
            execute: true,
        });
        let others = [
            (Root::Driver, entry(5), None),
            (Root::Driver, entry(5), read_only),
            (Root::Driver, entry(5) & !bits::WRITE, OPEN),
            (Root::Kernel, entry(5), OPEN),
        ];
        for (root, entry, special) in others {
            roots.put_leaf((root, TABLE, 3), entry, special, &mut monitor);
            assert_eq!(entry_at(&monitor, TABLE, 3), entry);
            store(3, &mut monitor);
            assert!(!roots.is_written(Pfn(5), &monitor));
        }
        roots.put_leaf((Root::Driver, TABLE, 3), entry(5), OPEN, &mut monitor);
        roots.forget_leaf((TABLE, 3), entry(5));
        assert!(roots.leaves.0.is_empty());
    }
}
