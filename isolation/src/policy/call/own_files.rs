//! Pages of files of the driver's, where it is a file system: inline functions of the kernel that
//! became part of it lock and mark them (`lock_page`, `SetPageUptodate`,
//! include/linux/page-flags.h), and it fills them and notes their blocks, whoever has allocated
//! them and when.
//!
//! ```text
//!   struct page ─ mapping ─► host ─► i_sb ─► s_type ─► owner = the module
//!       its description, and what it holds
//!   struct buffer_head ─ b_page ─► such a page
//!       the block's state
//! ```

use super::own_per_cpu::THIS_MODULE;
use super::{CallMemory, DriverPolicy};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::btf::Btf;
use crate::guest::modules::ModuleLayout;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;
use crate::policy::reach::Path;

/// From a page to the module of the file system that it is of.
const OWNER: &str = "mapping->host->i_sb->s_type->owner";
/// The slab cache of blocks of pages (fs/buffer.c), the structure, and its member with the page.
const BLOCKS: &str = "buffer_head";
const BLOCKS_PAGE: &str = "b_page";

/// How pages and blocks of the driver's files are told.
#[derive(Debug)]
pub(super) struct OwnFiles {
    /// The driver's `struct module`.
    module: Gva,
    owner: Path,
    page_of_block: Option<Path>,
}

impl OwnFiles {
    /// `None` on a kernel with other structures.
    pub(super) fn new(types: &Btf, layout: &ModuleLayout) -> Option<Self> {
        let mut sections = layout.sections.iter();
        let module = sections.find(|section| section.name == THIS_MODULE)?;
        Self::of(types, module.range.first())
    }

    fn of(types: &Btf, module: Gva) -> Option<Self> {
        let block = types.find_struct(BLOCKS);
        Some(Self {
            module,
            owner: Path::find(types, types.find_struct("page")?, OWNER)?,
            page_of_block: block.and_then(|id| Path::find(types, id, BLOCKS_PAGE)),
        })
    }

    /// Whether the `struct page` at `description` is of a file of the driver's.
    fn has_page<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, description: Gva) -> bool {
        self.owner.read(virt, description) == Some(self.module.0)
    }

    /// Whether the `struct buffer_head` at `block` is of such a page.
    fn has_block<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, block: Gva) -> bool {
        let page = self.page_of_block.as_ref();
        let page = page.and_then(|path| path.read(virt, block));
        page.is_some_and(|page| self.has_page(virt, Gva(page)))
    }
}

impl DriverPolicy {
    /// Whether the `struct page` at `description` is of a file of the driver's.
    pub(super) fn is_of_own_files<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        description: Gva,
    ) -> bool {
        let files = self.own_files.as_ref();
        files.is_some_and(|files| files.has_page(memory.private, description))
    }

    /// Opens the page that `at` lies in, or the block that it is part of, of a file of the
    /// driver's.
    pub(super) fn open_in_own_files<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> bool {
        let Some(files) = self.own_files.as_ref() else {
            return false;
        };
        let virt = memory.private;
        let allocations = Allocations::new(&self.memory, virt);
        let Some(found) = allocations.allocation_at(at) else {
            return false;
        };
        let first = found.range.first();
        let (is_own, label) = match found.kind {
            AllocationKind::Pages => {
                let description = self.memory.description_of(first);
                let is_own = description.is_some_and(|page| files.has_page(virt, page));
                (is_own, "page of a file of the driver's")
            }
            AllocationKind::Slab => {
                let is_own = files.has_block(virt, first)
                    && allocations.cache_name(&found).as_deref() == Some(BLOCKS);
                (is_own, "block of a file of the driver's")
            }
            AllocationKind::Vmalloc | AllocationKind::PerCpu => return false,
        };
        is_own
            && self.open(found.range, ObjectKind::Passing, label.into())
            && self.table.may_write(GvaRange::aligned(at, 1))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::paging::{Entry, Levels};

    const AT: u64 = 0xffff_8880_0000_0000;
    const PAGE: u64 = AT;
    const MAPPING: u64 = AT + 0x100;
    const INODE: u64 = AT + 0x200;
    const SUPER: u64 = AT + 0x300;
    const KIND: u64 = AT + 0x400;
    const MODULE: u64 = AT + 0x500;
    const BLOCK: u64 = AT + 0x600;

    fn types() -> Btf {
        let mut e = Encoder::new(None);
        let mut to = e.pointer(crate::guest::btf::TypeId::VOID);
        for (name, member, offset) in [
            ("file_system_type", "owner", 8),
            ("super_block", "s_type", 16),
            ("inode", "i_sb", 24),
            ("address_space", "host", 0),
            ("page", "mapping", 24),
            ("buffer_head", "b_page", 16),
        ] {
            let of = e.structure(name, 64, &[(member, to, offset)]);
            to = e.pointer(of);
        }
        Btf::parse(&e.bytes(), None).unwrap()
    }

    fn guest() -> TestGuest {
        let mut guest = TestGuest::new(Levels::Four);
        let data = Entry::WRITE | Entry::NO_EXECUTE;
        guest.put(Gva(AT), &[0; 0x700], data);
        for (at, word) in [
            (PAGE + 24, MAPPING),
            (MAPPING, INODE),
            (INODE + 24, SUPER),
            (SUPER + 16, KIND),
            (KIND + 8, MODULE),
            (BLOCK + 16, PAGE),
        ] {
            guest.put(Gva(at), &word.to_le_bytes(), data);
        }
        guest
    }

    #[test]
    fn pages_and_blocks_of_files_are_the_modules_whose_file_system_it_is() {
        let (types, mut guest) = (types(), guest());
        let own = OwnFiles::of(&types, Gva(MODULE)).unwrap();
        let virt = guest.virt();
        assert!(own.has_page(virt, Gva(PAGE)) && own.has_block(virt, Gva(BLOCK)));
        assert!(!own.has_page(virt, Gva(BLOCK)) && !own.has_block(virt, Gva(PAGE)));
        let another = OwnFiles::of(&types, Gva(MODULE + 8)).unwrap();
        assert!(!another.has_page(virt, Gva(PAGE)));
        // Anonymous memory (the lowest bit), none, and what is no memory.
        let data = Entry::WRITE | Entry::NO_EXECUTE;
        for mapping in [MAPPING + 1, 0, 0x10, u64::MAX] {
            guest.put(Gva(PAGE + 24), &mapping.to_le_bytes(), data);
            assert!(!own.has_page(guest.virt(), Gva(PAGE)), "{mapping:x}");
            assert!(!own.has_block(guest.virt(), Gva(BLOCK)), "{mapping:x}");
        }
    }

    #[test]
    fn a_kernel_without_these_structures_has_none() {
        let types = Btf::parse(&Encoder::new(None).bytes(), None).unwrap();
        assert!(OwnFiles::of(&types, Gva(MODULE)).is_none());
    }
}
