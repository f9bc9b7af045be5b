//! Where a kernel keeps what it knows about its memory: symbols, structures and their members.

use super::addr::{Gva, GvaRange};
use super::btf::{Btf, TypeId};
use super::field::Field;
use super::paging::VirtMemory;
use super::per_cpu::{PageArray, PerCpuModel};
use super::phys::GuestPhys;
use super::slab::{SlabMark, SlabModel};
use super::symbols::SymbolTable;

/// Variables that hold where the areas of kernel memory begin.
const BASES: [&str; 3] = ["page_offset_base", "vmalloc_base", "vmemmap_base"];

/// Structures, and their members with how they are called in a message.
const MEMBERS: [(&str, &[(&str, &str)]); 3] = [
    (
        "page",
        &[("flags", "page.flags"), ("_refcount", "page._refcount")],
    ),
    ("slab", &[("slab_cache", "slab.slab_cache")]),
    (
        "kmem_cache",
        &[
            ("size", "kmem_cache.size"),
            ("object_size", "kmem_cache.object_size"),
        ],
    ),
];

/// The names that what leads from a page to the first one of its compound page has had.
const COMPOUND_HEAD: &str = "page.compound_head or page.compound_info";
/// The names that the order of a compound page has had.
const COMPOUND_ORDER: &str = "page.compound_order or folio._folio_order or folio._flags_1";
/// The names that the mark of a slab's page has had.
const SLAB_MARK: &str = "PG_slab or PGTY_slab";

/// The kernel's half up to where its image and modules are mapped
/// (Documentation/x86/x86_64/mm.rst).
const KERNEL_HALF: (Gva, Gva) = (Gva(0xffff_8000_0000_0000), Gva(0xffff_ffff_8000_0000));

/// Where the kernel has all memory mapped, by which it writes what devices write, too; all that may
/// be it where that is not known.
pub fn mapping_of_memory<M: GuestPhys>(
    symbols: &SymbolTable,
    virt: &VirtMemory<'_, M>,
) -> Option<GvaRange> {
    let base = |name| {
        let symbol = symbols.kernel_symbol(name)?;
        virt.read_u64(symbol.at).ok().map(Gva)
    };
    let (half, image) = KERNEL_HALF;
    let [direct_map, vmalloc, _] = BASES.map(base);
    let known = direct_map.zip(vmalloc).filter(|(from, _)| *from >= half);
    let known = known.and_then(|(from, end)| GvaRange::until(from, end.min(image)));
    known.or_else(|| GvaRange::until(half, image))
}

/// Where the kernel keeps what it knows about its memory.
#[derive(Debug, Clone, Copy)]
pub struct MemoryModel {
    /// Start of the mapping of all memory (`page_offset_base`).
    pub(super) direct_map: Gva,
    /// Start of the area for `vmalloc` (`vmalloc_base`).
    pub(super) vmalloc: Gva,
    /// Start of the array of `struct page` (`vmemmap_base`).
    pub(super) vmemmap: Gva,
    pub(super) kfence_pool: Option<Gva>,
    pub(super) page_bytes: u64,
    pub(super) flags: Field,
    compound_head: Field,
    pub(super) compound_order: Field,
    pub(super) refcount: Field,
    /// Links free pages.
    pub(super) lru: Option<Field>,
    pub(super) slab_mark: SlabMark,
    pub(super) head_bit: u8,
    pub(super) slabs: SlabModel,
    /// None if it keeps memory of each processor in a way that is not known.
    pub(super) per_cpu: Option<PerCpuModel>,
}

/// What is missing to know allocations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's kernel keeps its memory in a way this program does not know ({missing} not found)"
)]
pub struct UnknownMemoryModel {
    /// Type, field or symbol.
    pub missing: &'static str,
}

impl MemoryModel {
    /// From the kernel's types and symbols, and the bases that it chose at boot. Knows SLUB as of
    /// Linux 5.17 to 6.9, 6.12, 6.13 and 7.3.
    pub fn new<M: GuestPhys>(
        types: &Btf,
        symbols: &SymbolTable,
        virt: &VirtMemory<'_, M>,
    ) -> Result<Self, UnknownMemoryModel> {
        let need = |missing| move || UnknownMemoryModel { missing };
        let structure = |name| types.find_struct(name).ok_or_else(need(name));
        let field = |of, name| Field::find(types, of, name).ok_or_else(need(name));
        let pointer = |name| {
            let symbol = symbols.kernel_symbol(name).ok_or_else(need(name))?;
            virt.read_u64(symbol.at).map(Gva).map_err(|_| need(name)())
        };
        let bit = |name| {
            let value = types
                .enum_value(name)
                .and_then(|value| u8::try_from(value).ok());
            value.filter(|bit| *bit < 64).ok_or_else(need(name))
        };
        let (direct_map, vmalloc) = (pointer("page_offset_base")?, pointer("vmalloc_base")?);
        if vmalloc <= direct_map {
            return Err(UnknownMemoryModel {
                missing: "vmalloc_base",
            });
        }
        let (page, slab, cache) = (
            structure("page")?,
            structure("slab")?,
            structure("kmem_cache")?,
        );
        let page_bytes = types
            .size_of(page)
            .filter(|bytes| (16..=512).contains(bytes));
        Ok(Self {
            direct_map,
            vmalloc,
            vmemmap: pointer("vmemmap_base")?,
            kfence_pool: pointer("__kfence_pool").ok().filter(|pool| pool.0 != 0),
            page_bytes: page_bytes.ok_or_else(need("struct page"))?,
            flags: field(page, "flags")?,
            compound_head: compound_head(types, page).ok_or_else(need(COMPOUND_HEAD))?,
            compound_order: compound_order(types, page).ok_or_else(need(COMPOUND_ORDER))?,
            refcount: field(page, "_refcount")?,
            lru: types.find_member(page, "lru").map(|member| Field {
                offset: u64::from(member.bit_offset / 8),
                bytes: 8,
            }),
            slab_mark: SlabMark::find(types, page).ok_or_else(need(SLAB_MARK))?,
            head_bit: bit("PG_head")?,
            slabs: SlabModel::new(types, slab, cache).map_err(|missing| need(missing)())?,
            per_cpu: PerCpuModel::new(types, symbols, virt),
        })
    }

    /// Whether the byte at `at` is part of the reference count of some page.
    pub fn is_page_reference_count(&self, at: Gva) -> bool {
        let Some(offset) = at.0.checked_sub(self.vmemmap.0) else {
            return false;
        };
        let array = ((self.vmalloc.0 - self.direct_map.0) >> 12).saturating_mul(self.page_bytes);
        let field = self.refcount.offset..self.refcount.offset + self.refcount.bytes as u64;
        offset < array && field.contains(&(offset % self.page_bytes))
    }

    /// The `struct page` that `at` lies in, and the page that it describes.
    pub fn described_page(&self, at: Gva) -> Option<(GvaRange, Gva)> {
        let offset = at.0.checked_sub(self.vmemmap.0)?;
        let pfn = offset / self.page_bytes;
        let pages = (self.vmalloc.0 - self.direct_map.0) >> 12;
        let first = Gva(at.0 - offset % self.page_bytes);
        let page = Gva(self.direct_map.0.checked_add(pfn.checked_mul(4096)?)?);
        (pfn < pages).then_some((GvaRange::new(first, self.page_bytes)?, page))
    }

    /// The `struct page` of the page that `at` lies in, an address in the mapping of all memory.
    pub fn description_of(&self, at: Gva) -> Option<Gva> {
        let offset = at.0.checked_sub(self.direct_map.0)?;
        let place = (offset >> 12).checked_mul(self.page_bytes)?;
        let description = self.vmemmap.checked_add(place)?;
        // Where it is none there is no description of it.
        let (_, page) = self.described_page(description)?;
        (page.0 == at.0 & !0xfff).then_some(description)
    }

    /// The `struct page` of the first page of the compound page that the one described at `page` is
    /// part of, and not the first one itself.
    ///
    /// Bit 0 says so. The rest is the address, or, since Linux 7.0 where a `struct page` has a
    /// power of two of bytes, the mask that makes it of `page` (`compound_info_has_mask`,
    /// include/linux/page-flags.h), whose upper bits are all set: no `struct page` is up there.
    pub(super) fn head_of<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        page: Gva,
    ) -> Option<Option<Gva>> {
        let info = self.compound_head.read(virt, page)?;
        Some((info & 1 != 0).then(|| match info >= KERNEL_HALF.1.0 {
            true => Gva(page.0 & info),
            false => Gva(info - 1),
        }))
    }

    /// The kernel's array of `struct page`.
    pub(super) fn pages(&self) -> PageArray {
        PageArray {
            at: self.vmemmap,
            bytes: self.page_bytes,
        }
    }

    /// What of a kernel's types and symbols is not found that [`MemoryModel::new`] needs: all of
    /// it, where that names the first.
    pub fn lacking(types: &Btf, has_symbol: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
        let mut lacking: Vec<&'static str> =
            BASES.into_iter().filter(|name| !has_symbol(name)).collect();
        for (structure, members) in MEMBERS {
            match types.find_struct(structure) {
                None => lacking.push(structure),
                Some(id) => lacking.extend(members.iter().filter_map(|(member, full)| {
                    Field::find(types, id, member).is_none().then_some(*full)
                })),
            }
        }
        if let Some(page) = types.find_struct("page") {
            if compound_head(types, page).is_none() {
                lacking.push(COMPOUND_HEAD);
            }
            if compound_order(types, page).is_none() {
                lacking.push(COMPOUND_ORDER);
            }
            if SlabMark::find(types, page).is_none() {
                lacking.push(SLAB_MARK);
            }
        }
        if types.enum_value("PG_head").is_none() {
            lacking.push("PG_head");
        }
        lacking
    }
}

/// Another name since Linux 7.0, see [`MemoryModel::head_of`].
fn compound_head(types: &Btf, page: TypeId) -> Option<Field> {
    let names = ["compound_head", "compound_info"];
    names.iter().find_map(|name| Field::find(types, page, name))
}

/// The order of a compound page is in its second `struct page`: before Linux 6.3 under that name,
/// since then in `struct folio`, which overlays the first pages, and since 6.6 in the lowest byte
/// of that one's second flags.
fn compound_order(types: &Btf, page: TypeId) -> Option<Field> {
    if let Some(field) = Field::find(types, page, "compound_order") {
        return Some(field);
    }
    let folio = types.find_struct("folio")?;
    let order = Field::find(types, folio, "_folio_order")
        .or_else(|| Field::find(types, folio, "_flags_1"))?;
    let offset = order.offset.checked_sub(types.size_of(page)?)?;
    Some(Field { offset, ..order })
}
