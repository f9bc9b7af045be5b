//! Pages of code that P has differently from the guest: driver text with its original entry bytes
//! and redirected calls, kernel functions that only the guest may run.
//!
//! The guest patches its own text now and then (static keys, tracing). Each overlay remembers the
//! guest's page it was made from; one overlay a call is compared, in turn, so that a change is
//! followed within as many calls as there are overlays.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use super::view::{Page, Pfn, PrivateView, ViewError};

/// Bytes that P has differently on a page, by offset.
type Patches = BTreeMap<usize, u8>;

#[derive(Debug)]
struct Overlay {
    guest: Box<Page>,
    patches: Arc<Patches>,
}

impl Overlay {
    fn follow(&mut self, pfn: Pfn, view: &mut PrivateView) -> Result<(), ViewError> {
        let guest = view.copy_shared(pfn)?;
        if guest == self.guest {
            return Ok(());
        }
        self.guest = guest;
        self.write(pfn, view)
    }

    /// Makes P's page the guest's with the patches.
    fn write(&self, pfn: Pfn, view: &mut PrivateView) -> Result<(), ViewError> {
        let mut page = self.guest.clone();
        for (offset, byte) in &*self.patches {
            page[*offset] = *byte;
        }
        view.write_private(pfn.gpa(), page.as_slice())
    }
}

/// What was patched at a moment, see [`Overlays::keep`].
#[derive(Debug)]
pub struct KeptOverlays(BTreeMap<Pfn, Arc<Patches>>);

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
                patches: Arc::default(),
            }),
        };
        Arc::make_mut(&mut overlay.patches).insert(offset, byte);
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

    /// P has none of its own pages any more: makes all anew. The guest is held.
    pub fn write_all(&self, view: &mut PrivateView) -> Result<(), ViewError> {
        let mut all = self.pages.iter();
        all.try_for_each(|(pfn, overlay)| overlay.write(*pfn, view))
    }

    /// The byte that is put at `offset` of P's version of `pfn`, if one is.
    pub fn patched(&self, pfn: Pfn, offset: usize) -> Option<u8> {
        self.pages.get(&pfn)?.patches.get(&offset).copied()
    }

    /// P has the guest's byte at `offset` of `pfn` again.
    pub fn unpatch(
        &mut self,
        pfn: Pfn,
        offset: usize,
        view: &mut PrivateView,
    ) -> Result<(), ViewError> {
        let Some(overlay) = self.pages.get_mut(&pfn) else {
            return Ok(());
        };
        Arc::make_mut(&mut overlay.patches).remove(&offset);
        let byte = overlay.guest[offset];
        view.write_private(pfn.gpa() + offset as u64, &[byte])
    }

    /// What is patched now.
    pub fn keep(&self) -> KeptOverlays {
        let patches = self.pages.iter();
        KeptOverlays(
            patches
                .map(|(pfn, overlay)| (*pfn, overlay.patches.clone()))
                .collect(),
        )
    }

    /// Has P have patched what `kept` says, over the guest's pages as they are now. The guest is
    /// held.
    pub fn put_back(
        &mut self,
        kept: &KeptOverlays,
        view: &mut PrivateView,
    ) -> Result<(), ViewError> {
        let mut gone = Vec::new();
        for (pfn, overlay) in &mut self.pages {
            let Some(patches) = kept.0.get(pfn) else {
                gone.push(*pfn);
                continue;
            };
            let same_patches = Arc::ptr_eq(patches, &overlay.patches);
            if !same_patches {
                overlay.patches = patches.clone();
            }
            if *view.shared_page(*pfn)? != *overlay.guest {
                overlay.follow(*pfn, view)?;
            } else if !same_patches {
                overlay.write(*pfn, view)?;
            }
        }
        for pfn in &gone {
            self.pages.remove(pfn);
        }
        view.drop_pages(&gone).map(drop)
    }
}
