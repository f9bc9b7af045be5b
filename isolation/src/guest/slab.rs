//! SLUB's objects: where they lie in a slab, and which of them are free.
//!
//! ```text
//!   slab  │ left red zone │ object (object_size) │ right red zone, link, who had it │ left red zone │ object ...
//!         │◄────────────────────────── size ───────────────────────────────────────►│
//! ```
//!
//! Without the checks of `slub_debug` there is nothing beside the object, and the link to the next
//! free one lies in its middle. Links are stored scrambled (`CONFIG_SLAB_FREELIST_HARDENED`). A
//! slab has a list of free objects, and so has the processor that takes objects from it just now;
//! newer kernels have arrays of them ([`super::sheaves`]). All of it is the guest's memory and
//! hostile: lists are as long as a slab has objects at most.

use super::addr::{Gva, GvaRange};
use super::btf::{Btf, TypeId};
use super::field::Field;
use super::paging::VirtMemory;
use super::phys::GuestPhys;
use super::sheaves::SheafModel;

/// Most bytes beside an object that are compared: red zone, link and two records of who had it.
const MAX_BESIDE: u64 = 1024;

/// Fields of `struct kmem_cache`, `struct slab` and `struct kmem_cache_cpu`.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlabModel {
    pub slab_cache: Field,
    pub size: Field,
    pub object_size: Field,
    pub left_pad: Option<Field>,
    /// Bytes from an object to what SLUB notes beside it, behind the red zone right of it.
    pub in_use: Option<Field>,
    /// Where a free object has the link to the next one, from its start.
    pub link_offset: Option<Field>,
    pub name: Option<Field>,
    /// What links are scrambled with.
    random: Option<Field>,
    /// First free object of a slab.
    freelist: Option<Field>,
    cpu: Option<CpuModel>,
    sheaves: Option<SheafModel>,
}

/// Where a processor has the slab that it takes objects from.
#[derive(Debug, Clone, Copy)]
struct CpuModel {
    /// `kmem_cache.cpu_slab`, a per-CPU pointer.
    of_cache: Field,
    slab: Field,
    freelist: Field,
}

/// How the `struct page` of a slab's first page tells that it is one.
#[derive(Debug, Clone, Copy)]
pub(super) enum SlabMark {
    /// A bit of its flags: `PG_slab` of `enum pageflags`, before Linux 6.10.
    Flag(u8),
    /// The uppermost byte of its type: `PGTY_slab` of `enum pagetype`, since Linux 6.12. Where a
    /// page has no type, its count of mappings is in that place, which never has this byte
    /// (include/linux/page-flags.h).
    Type(Field, u8),
}

impl SlabMark {
    /// From the kernel's types; `page` is `struct page`.
    pub fn find(types: &Btf, page: TypeId) -> Option<Self> {
        let value = |name| u8::try_from(types.enum_value(name)?).ok();
        if let Some(bit) = value("PG_slab").filter(|bit| *bit < 64) {
            return Some(Self::Flag(bit));
        }
        let field = Field::find(types, page, "page_type").filter(|field| field.bytes == 4)?;
        Some(Self::Type(field, value("PGTY_slab")?))
    }

    /// Whether the `struct page` at `page`, with these flags, is the first of a slab.
    pub fn is_slab<M: GuestPhys>(
        self,
        virt: &VirtMemory<'_, M>,
        page: Gva,
        flags: u64,
    ) -> Option<bool> {
        Some(match self {
            Self::Flag(bit) => flags >> bit & 1 != 0,
            Self::Type(field, value) => field.read(virt, page)? >> 24 == u64::from(value),
        })
    }
}

/// An object of a slab.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlabObject {
    /// The `struct slab`.
    pub slab: Gva,
    /// All of the slab.
    pub whole: GvaRange,
    /// The `struct kmem_cache`.
    pub cache: Gva,
    /// The object itself.
    pub range: GvaRange,
}

impl SlabModel {
    /// From the kernel's types; `slab` and `cache` are `struct slab` and `struct kmem_cache`. The
    /// error names what is missing.
    pub fn new(types: &Btf, slab: TypeId, cache: TypeId) -> Result<Self, &'static str> {
        let need = |of, name| Field::find(types, of, name).ok_or(name);
        let cpu = || {
            let cpu = types.find_struct("kmem_cache_cpu")?;
            Some(CpuModel {
                of_cache: Field::find(types, cache, "cpu_slab")?,
                slab: Field::find(types, cpu, "slab")?,
                freelist: Field::find(types, cpu, "freelist")?,
            })
        };
        Ok(Self {
            slab_cache: need(slab, "slab_cache")?,
            size: need(cache, "size")?,
            object_size: need(cache, "object_size")?,
            left_pad: Field::find(types, cache, "red_left_pad"),
            in_use: Field::find(types, cache, "inuse"),
            link_offset: Field::find(types, cache, "offset"),
            name: Field::find(types, cache, "name"),
            random: Field::find(types, cache, "random"),
            freelist: Field::find(types, slab, "freelist"),
            cpu: cpu(),
            sheaves: SheafModel::new(types, cache),
        })
    }

    /// The object of the slab `whole` that `at` lies in.
    pub fn object<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        at: Gva,
        slab: Gva,
        whole: GvaRange,
    ) -> Option<SlabObject> {
        let cache = Gva(self.slab_cache.read(virt, slab)?);
        let size = self.size.read(virt, cache).filter(|size| *size >= 8)?;
        let object_size = self.object_size.read(virt, cache)?;
        let index = at.0.checked_sub(whole.first().0)? / size;
        let start = whole
            .first()
            .checked_add(index.checked_mul(size)?)?
            .checked_add(self.left_pad(virt, cache)?)?;
        let range = GvaRange::new(start, object_size.min(size))?;
        let fits = whole.covers(&range) && range.contains(at);
        fits.then_some(SlabObject {
            slab,
            whole,
            cache,
            range,
        })
    }

    fn left_pad<M: GuestPhys>(&self, virt: &VirtMemory<'_, M>, cache: Gva) -> Option<u64> {
        match self.left_pad {
            Some(field) => field.read(virt, cache),
            None => Some(0),
        }
    }

    /// Whether the cache's objects lie one behind the other, with nothing between them.
    pub fn is_plain<M: GuestPhys>(&self, virt: &VirtMemory<'_, M>, cache: Gva) -> Option<bool> {
        let object_size = self.object_size.read(virt, cache)?;
        Some(object_size == self.size.read(virt, cache)?)
    }

    /// The red zone right of `object`, if SLUB has some around the objects of this cache: it fills
    /// and looks at it itself (`check_object`, mm/slub.c).
    pub fn red_zone<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        cache: Gva,
        object: GvaRange,
    ) -> Option<GvaRange> {
        // Only with red zones there is a pad.
        self.left_pad(virt, cache).filter(|pad| *pad > 0)?;
        let bytes = self.in_use?.read(virt, cache)?;
        let bytes = bytes.checked_sub(object.len_bytes())?.min(MAX_BESIDE);
        GvaRange::new(object.last().checked_add(1)?, bytes)
    }

    /// Where `object` has its link.
    fn link_at<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        cache: Gva,
        object: Gva,
    ) -> Option<Gva> {
        object.checked_add(self.link_offset?.read(virt, cache)?)
    }

    /// Whether `object` is on a list of free ones: its slab's, or that of the processor with
    /// `per_cpu_base`; or in a sheaf. `None` if these are not known, or damaged.
    pub fn is_free<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        object: &SlabObject,
        per_cpu_base: Option<u64>,
    ) -> Option<bool> {
        let size = self
            .size
            .read(virt, object.cache)
            .filter(|size| *size >= 8)?;
        if let Some(sheaves) = &self.sheaves
            && sheaves.holds(virt, object.cache, object.range.first(), per_cpu_base)?
        {
            return Some(true);
        }
        let most = object.whole.len_bytes() / size;
        let random = match self.random {
            Some(field) => Some(field.read(virt, object.cache)?),
            None => None,
        };
        let of_slab = self.freelist?.read(virt, object.slab)?;
        let of_cpu = per_cpu_base.and_then(|base| self.cpu_list(virt, object, base));
        for mut at in [Some(of_slab), of_cpu].into_iter().flatten().map(Gva) {
            let mut left = most;
            while at.0 != 0 {
                if at == object.range.first() {
                    return Some(true);
                }
                left = left.checked_sub(1)?;
                let link = self.link_at(virt, object.cache, at)?;
                if !object.whole.contains(at) {
                    return None;
                }
                let stored = virt.read_u64(link).ok()?;
                // `freelist_ptr` (mm/slub.c).
                at = Gva(random.map_or(stored, |random| stored ^ random ^ link.0.swap_bytes()));
            }
        }
        Some(false)
    }

    /// First of the free objects of `object`'s slab that a processor has for itself.
    fn cpu_list<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        object: &SlabObject,
        base: u64,
    ) -> Option<u64> {
        let model = self.cpu?;
        let cpu = Gva(base.wrapping_add(model.of_cache.read(virt, object.cache)?));
        let slab = model.slab.read(virt, cpu)?;
        (slab == object.slab.0).then_some(model.freelist.read(virt, cpu)?)
    }

    /// The link of `object` and what lies beside it up to the next one, as long as that is
    /// sensible: where SLUB notes that it is handed out or free.
    pub fn notes<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        cache: Gva,
        object: GvaRange,
    ) -> Option<Vec<u8>> {
        let link = self.link_at(virt, cache, object.first())?;
        let mut notes = virt.read_vec(link, 8).ok()?;
        let size = self.size.read(virt, cache)?;
        let pad = self.left_pad(virt, cache)?;
        let beside = size.checked_sub(pad)?.checked_sub(object.len_bytes());
        if let (Some(bytes), Some(behind)) = (beside, object.last().checked_add(1)) {
            let bytes = bytes.min(MAX_BESIDE) as usize;
            notes.extend(virt.read_vec(behind, bytes).unwrap_or_default());
        }
        Some(notes)
    }
}
