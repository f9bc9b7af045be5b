//! Pages of code that P has differently from the guest: driver text with its original entry bytes and
//! redirected calls, kernel functions that only the guest may run.
//!
//! The guest patches its own text now and then (static keys, tracing). Each overlay remembers the
//! guest's page it was made from; one overlay a call is compared, in turn, so that a change is
//! followed within as many calls as there are overlays.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::view::{Page, Pfn, PrivateView, ViewError};

#[derive(Debug)]
struct Overlay {
    guest: Box<Page>,
    patches: BTreeMap<usize, u8>,
}

impl Overlay {
    fn follow(&mut self, pfn: Pfn, view: &mut PrivateView) -> Result<(), ViewError> {
        let guest = view.copy_shared(pfn)?;
        if guest == self.guest {
            return Ok(());
        }
        self.guest = guest;
        let mut page = self.guest.clone();
        for (offset, byte) in &self.patches {
            page[*offset] = *byte;
        }
        view.write_private(pfn.gpa(), page.as_slice())
    }
}

/// All overlays of a domain.
#[derive(Debug, Default)]
pub struct Overlays {
    pages: BTreeMap<Pfn, Overlay>,
    next: Option<Pfn>,
}

impl Overlays {
    /// Whether P has its own version of `pfn`.
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.pages.contains_key(&pfn)
    }

    /// Puts `byte` at `offset` of P's version of `pfn`.
    pub fn patch(
        &mut self,
        pfn: Pfn,
        offset: usize,
        byte: u8,
        view: &mut PrivateView,
    ) -> Result<(), ViewError> {
        let overlay = match self.pages.entry(pfn) {
            Entry::Occupied(overlay) => overlay.into_mut(),
            Entry::Vacant(place) => place.insert(Overlay {
                guest: view.copy_shared(pfn)?,
                patches: BTreeMap::new(),
            }),
        };
        overlay.patches.insert(offset, byte);
        view.write_private(pfn.gpa() + offset as u64, &[byte])
    }

    /// Compares the next overlay with the guest's page and makes it anew if that changed.
    pub fn follow_one(&mut self, view: &mut PrivateView) -> Result<(), ViewError> {
        let from = self.next.unwrap_or(Pfn(0));
        let Some((pfn, overlay)) = self.pages.range_mut(from..).next() else {
            self.next = None;
            return Ok(());
        };
        self.next = Some(Pfn(pfn.0 + 1));
        // The guest is held: no copy is needed to compare.
        if *view.shared_page(*pfn)? == *overlay.guest {
            return Ok(());
        }
        overlay.follow(*pfn, view)
    }

    /// The same for all of them.
    pub fn follow_all(&mut self, view: &mut PrivateView) -> Result<(), ViewError> {
        let mut all = self.pages.iter_mut();
        all.try_for_each(|(pfn, overlay)| overlay.follow(*pfn, view))
    }
}
