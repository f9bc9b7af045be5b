//! Pages that a root lets P write, though it does not do so by default.

use std::collections::HashSet;

use super::super::monitor::Monitor;
use super::super::view::{PAGE_SIZE, PrivateView};
use super::entry::{bits, entry_at, index, prefix, put_entry};
use super::{Fill, Permissions, Root, RootError, Roots};

impl Roots {
    /// Lets P write the page at `va` in `root`, as far as the guest lets it.
    pub fn open(
        &mut self,
        root: Root,
        va: u64,
        view: &PrivateView,
        monitor: &mut Monitor,
    ) -> Result<Fill, RootError> {
        let page = va & !(PAGE_SIZE - 1);
        let special = &mut self.state_mut(root).special;
        // In the kernel root nothing else is taken away from a page.
        let execute =
            root == Root::Kernel || special.get(&page).is_some_and(|special| special.execute);
        special.insert(
            page,
            Permissions {
                write: true,
                execute,
            },
        );
        self.fill(root, page, view, monitor)
    }

    /// Closes the page at `page`, if it is open for writing in `root`: it can be read still. Not
    /// while P is on that root: the processor may remember that it was open.
    pub fn close(&mut self, root: Root, page: u64, monitor: &mut Monitor) {
        let entry = self.close_entry(root, page);
        if let Some((table, at)) = entry {
            let value = entry_at(monitor, table, at);
            self.forget_leaf((table, at), value);
            put_entry(monitor, table, at, value & !(bits::WRITE | bits::DIRTY));
        }
    }

    /// Takes the right to write the page at `page` away; where its entry is, if there is one that
    /// says otherwise.
    fn close_entry(&mut self, root: Root, page: u64) -> Option<(u64, u64)> {
        let state = self.state_mut(root);
        let special = state.special.get_mut(&page)?;
        special.write = false;
        if !special.execute || root == Root::Kernel {
            state.special.remove(&page);
        }
        let table = state.mirrors.get(&(1, prefix(page, 1)))?;
        Some((*table, index(page, 1)))
    }

    /// Whether the page at `va` was opened for writing in `root`.
    pub fn is_open(&self, root: Root, va: u64) -> bool {
        let page = va & !(PAGE_SIZE - 1);
        let special = self.state(root).special.get(&page);
        special.is_some_and(|special| special.write)
    }

    /// The pages that are open for writing in the driver root.
    pub fn open_pages(&self) -> HashSet<u64> {
        let open = self.driver.special.iter();
        open.filter(|(_, special)| special.write)
            .map(|(page, _)| *page)
            .collect()
    }

    /// Closes all pages that are open for writing in the driver root but those in `keep`. What a
    /// page is mapped to is looked up anew at its next access.
    pub fn close_all_but(&mut self, keep: &HashSet<u64>, monitor: &mut Monitor) {
        for page in self.open_pages().difference(keep) {
            if let Some((table, at)) = self.close_entry(Root::Driver, *page) {
                self.forget_leaf((table, at), entry_at(monitor, table, at));
                put_entry(monitor, table, at, 0);
            }
        }
    }
}
