//! Who is told which regions of a space come and go.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{DmaRegion, DmaSpace};

/// Is told of the regions of a [`DmaSpace`] that come and go: those that others can reach by a
/// descriptor ([`DmaSpace::regions`]).
pub trait DmaListener: Send + Sync {
    /// The space reaches `removed` no more, and reaches `added` now. What was removed is there until
    /// this returns. Called on the thread that changes the space, one change after the other; it may
    /// look at the space and must not change it.
    fn changed(&self, removed: &[DmaRegion], added: &[DmaRegion]);
}

/// The listeners of a space.
#[derive(Default)]
pub(super) struct Listeners(Mutex<Vec<Weak<dyn DmaListener>>>);

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listeners")
    }
}

impl Listeners {
    pub fn add(&self, listener: Weak<dyn DmaListener>) {
        self.lock().push(listener);
    }

    /// Does `change` to `space` and tells of it.
    pub fn around(&self, space: &DmaSpace, change: impl FnOnce()) {
        let mut all = self.lock();
        all.retain(|one| one.strong_count() > 0);
        let listening: Vec<Arc<_>> = all.iter().filter_map(Weak::upgrade).collect();
        if listening.is_empty() {
            return change();
        }
        let (_kept, before) = (space.memory(), space.regions());
        change();
        let after = space.regions();
        let removed = without(&before, &after);
        let added = without(&after, &before);
        if removed.is_empty() && added.is_empty() {
            return;
        }
        for one in listening {
            one.changed(&removed, &added);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<dyn DmaListener>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those of `some` that are not among `others`.
fn without(some: &[DmaRegion], others: &[DmaRegion]) -> Vec<DmaRegion> {
    let is_there = |one: &DmaRegion| others.iter().any(|other| is_same(one, other));
    some.iter().filter(|one| !is_there(one)).cloned().collect()
}

/// The same bytes of the same file at the same address.
fn is_same(one: &DmaRegion, other: &DmaRegion) -> bool {
    let place = |region: &DmaRegion| (region.address, region.len, region.offset);
    place(one) == place(other) && Arc::ptr_eq(&one.file, &other.file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::{ForeignRegion, GuestMemory};
    use std::fs::File;

    /// Addresses of what it was told of: removed, added, and what the space reached by then.
    #[derive(Default)]
    struct Heard(Mutex<Vec<(Vec<u64>, Vec<u64>)>>);

    impl DmaListener for Heard {
        fn changed(&self, removed: &[DmaRegion], added: &[DmaRegion]) {
            let places = |all: &[DmaRegion]| all.iter().map(|one| one.address).collect();
            let heard = (places(removed), places(added));
            self.0.lock().unwrap().push(heard);
        }
    }

    fn region(address: u64) -> ForeignRegion {
        let fd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(0x1000).unwrap();
        ForeignRegion::new(DmaRegion {
            address,
            len: 0x1000,
            file: Arc::new(file),
            offset: 0,
        })
        .unwrap()
    }

    #[test]
    fn whoever_listens_hears_what_comes_and_goes_and_nothing_else() {
        let space = DmaSpace::empty();
        let heard = Arc::new(Heard::default());
        let other = Arc::new(Heard::default());
        let listener: Weak<dyn DmaListener> = Arc::downgrade(&heard) as _;
        space.clone().listen(listener);
        space.listen(Arc::downgrade(&other) as _);
        let (low, high, another_low) = (region(0), region(0x5000), region(0));
        let set = |regions: &[&ForeignRegion]| {
            space.replace(ForeignRegion::memory(regions.iter().copied()));
            heard.0.lock().unwrap().drain(..).collect::<Vec<_>>()
        };
        assert_eq!(set(&[&low]), [(vec![], vec![0])]);
        assert_eq!(set(&[&low, &high]), [(vec![], vec![0x5000])]);
        assert_eq!(set(&[&low, &high]), []);
        // Another file at the same address is another region.
        assert_eq!(set(&[&another_low, &high]), [(vec![0], vec![0])]);
        assert_eq!(other.0.lock().unwrap().len(), 3);
        drop(other);
        assert_eq!(set(&[]), [(vec![0, 0x5000], vec![])]);
        drop(heard);
        space.replace(GuestMemory::new());
    }
}
