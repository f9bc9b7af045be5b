//! Pages that devices write while calls run.
//!
//! ```text
//!   P is about to write a page of the guest's memory, in either root
//!        └─► a fault ─► P's copy is made, and what it was made from remembered ─► the page is open
//!   commit: what P has otherwise than *that* is published, byte by byte; what a device wrote meanwhile stays
//! ```
//!
//! Where all devices can be held nobody writes the guest's pages during a call, and a copy can be
//! compared with the guest's page at any time. Where one cannot (a function of the host, a NIC in
//! another process) a page that has changed in between would be written back as it was: a packet
//! that has just come, a descriptor that has just been completed. So both roots keep the mapping of
//! all memory closed, and each page is opened by its first store.

use std::collections::HashMap;

use super::Domain;
use super::error::DomainError;
use super::roots::Root;
use super::view::Pfn;
use crate::guest::addr::Gva;

/// Where pages are open of which P has a copy with a known base: they are closed when that is
/// dropped.
#[derive(Debug, Default)]
pub struct Copied(HashMap<Pfn, Vec<(Root, u64)>>);

impl Copied {
    /// `pfn` is open in `root` by the page at `page`.
    pub fn note(&mut self, pfn: Pfn, root: Root, page: u64) {
        let places = self.0.entry(pfn).or_default();
        if !places.contains(&(root, page)) {
            places.push((root, page));
        }
    }

    /// All are closed.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl Domain {
    /// Whether devices write the memory at `va` while calls run.
    pub(super) fn moves(&self, va: u64) -> bool {
        self.moving.is_some_and(|moving| moving.contains(Gva(va)))
    }

    /// Drops P's copies of `pages` (sorted, no duplicates), whose next write is a fault again where
    /// devices write them; returns the number of system calls made.
    pub(super) fn drop_copies(&mut self, pages: &[Pfn]) -> Result<u32, DomainError> {
        if self.moving.is_some() {
            for pfn in pages {
                for (root, page) in self.copied.0.remove(pfn).unwrap_or_default() {
                    self.roots.close(root, page, &mut self.monitor);
                    if root == Root::Driver {
                        self.opened.remove(pfn);
                    }
                }
            }
        }
        Ok(self.view.drop_pages(pages)?)
    }
}
