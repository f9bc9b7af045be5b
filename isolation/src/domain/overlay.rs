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
        write(pfn, &guest, &self.patches, view)?;
        // Only now: what could not be written is tried again the next time.
        self.guest = guest;
        Ok(())
    }

    /// Makes P's page the guest's with the patches.
    fn write(&self, pfn: Pfn, view: &mut PrivateView) -> Result<(), ViewError> {
        write(pfn, &self.guest, &self.patches, view)
    }
}

/// Makes P's page `guest` with the patches.
fn write(
    pfn: Pfn,
    guest: &Page,
    patches: &Patches,
    view: &mut PrivateView,
) -> Result<(), ViewError> {
    let mut page = *guest;
    for (offset, byte) in patches {
        page[*offset] = *byte;
    }
    view.write_private(pfn.gpa(), &page)
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
        view.write_private(pfn.gpa() + offset as u64, &[byte])?;
        Arc::make_mut(&mut overlay.patches).insert(offset, byte);
        Ok(())
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

    /// The same for all of them. The guest may run: then it has to be done again when it is held.
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
        let byte = overlay.guest[offset];
        view.write_private(pfn.gpa() + offset as u64, &[byte])?;
        Arc::make_mut(&mut overlay.patches).remove(&offset);
        Ok(())
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
            if same_patches && *view.shared_page(*pfn)? == *overlay.guest {
                continue;
            }
            let guest = view.copy_shared(*pfn)?;
            write(*pfn, &guest, patches, view)?;
            *overlay = Overlay {
                guest,
                patches: patches.clone(),
            };
        }
        view.drop_pages(&gone)?;
        for pfn in &gone {
            self.pages.remove(pfn);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::domain::test_memory;

    /// A view of four pages with a byte patched on the second, over which the guest has written
    /// since; and what to put in the place of its private memory, which has no such page.
    fn outdated() -> (Overlays, PrivateView, devices::dma::GuestMemory) {
        let shared = test_memory(4);
        let mut view = PrivateView::new(shared.clone()).unwrap();
        let mut overlays = Overlays::default();
        overlays.patch(Pfn(1), 5, 0xcc, &mut view).unwrap();
        shared.write_obj(0x77u8, GuestAddress(0x1006)).unwrap();
        let none = std::sync::Arc::into_inner(test_memory(1)).unwrap();
        (overlays, view, none)
    }

    #[test]
    fn what_could_not_be_followed_is_followed_the_next_time() {
        let (mut overlays, mut view, mut none) = outdated();
        view.swap_private(&mut none);
        assert!(overlays.follow_all(&mut view).is_err());
        view.swap_private(&mut none);
        overlays.follow_all(&mut view).unwrap();
        let page = view.private_page(Pfn(1)).unwrap();
        assert_eq!(page[5..8], [0xcc, 0x77, 0]);
    }

    #[test]
    fn what_could_not_be_patched_or_put_back_is_not_said_to_be() {
        let (mut overlays, mut view, mut none) = outdated();
        let kept = overlays.keep();
        overlays.patch(Pfn(1), 9, 0xdd, &mut view).unwrap();
        view.swap_private(&mut none);
        assert!(overlays.patch(Pfn(1), 10, 0xee, &mut view).is_err());
        assert_eq!(overlays.patched(Pfn(1), 10), None);
        assert!(overlays.unpatch(Pfn(1), 5, &mut view).is_err());
        assert_eq!(overlays.patched(Pfn(1), 5), Some(0xcc));
        assert!(overlays.put_back(&kept, &mut view).is_err());
        assert_eq!(overlays.patched(Pfn(1), 9), Some(0xdd));
        view.swap_private(&mut none);
        overlays.put_back(&kept, &mut view).unwrap();
        assert_eq!(overlays.patched(Pfn(1), 9), None);
        let page = view.private_page(Pfn(1)).unwrap();
        assert_eq!(page[5..10], [0xcc, 0x77, 0, 0, 0]);
    }
}
