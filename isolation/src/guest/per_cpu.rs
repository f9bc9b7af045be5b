//! How far memory goes of which each processor has its own (`alloc_percpu`): from the bookkeeping of mm/percpu.c.
//!
//! A per-CPU pointer is an offset; its address on a processor is that plus the processor's base. The allocator's chunks
//! note in a bitmap where allocations begin and end (`bound_map`), and in another what is handed out (`alloc_map`), a bit for
//! each four bytes. A chunk is found as the kernel finds it: the first ones by their addresses, others by what their pages'
//! `struct page` says.

use super::addr::Gva;
use super::btf::Btf;
use super::memory_model::Field;
use super::paging::VirtMemory;
use super::phys::GuestPhys;
use super::symbols::SymbolTable;

/// Bytes for which a bit stands (`PCPU_MIN_ALLOC_SIZE`, include/linux/percpu.h).
const BIT_BYTES: u64 = 4;

/// Most bytes that one allocation has: more than a unit of the smallest chunks (`PCPU_MIN_UNIT_SIZE`).
const MAX_BYTES: u64 = 64 << 10;

/// Most pages that a chunk has for one processor: 2 MiB.
const MAX_PAGES: u64 = 512;

/// The kernel's array of `struct page`.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageArray {
    /// Its begin, the description of page 0.
    pub(super) at: Gva,
    /// Bytes of one description.
    pub(super) bytes: u64,
}

/// Where the allocator keeps what it knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct PerCpuModel {
    /// Variables that point at the chunks that were there first; the second may be null.
    first: [Option<Gva>; 2],
    /// What is to be added to a pointer for its address in the chunk's first unit.
    offset: u64,
    page_index: Field,
    base: Field,
    start: Field,
    end: Field,
    pages: Field,
    bounds: Field,
    handed_out: Field,
}

impl PerCpuModel {
    /// `None` if this kernel keeps it otherwise.
    pub(super) fn new<M: GuestPhys>(
        types: &Btf,
        symbols: &SymbolTable,
        virt: &VirtMemory<'_, M>,
    ) -> Option<Self> {
        let chunk = types.find_struct("pcpu_chunk")?;
        let field = |name| Field::find(types, chunk, name);
        let at = |name| symbols.kernel_symbol(name).map(|symbol| symbol.at);
        let base = virt.read_u64(at("pcpu_base_addr")?).ok()?;
        let start = at("__per_cpu_start").map_or(0, |at| at.0);
        Some(Self {
            first: [at("pcpu_first_chunk"), at("pcpu_reserved_chunk")],
            offset: base.wrapping_sub(start),
            page_index: Field::find(types, types.find_struct("page")?, "index")?,
            base: field("base_addr")?,
            start: field("start_offset")?,
            end: field("end_offset")?,
            pages: field("nr_pages")?,
            bounds: field("bound_map")?,
            handed_out: field("alloc_map")?,
        })
    }

    /// Bytes from the per-CPU pointer `pointer` to the end of its allocation, 0 if none is there; `at` is where it points
    /// on some processor. `None` if that is not known.
    pub(super) fn bytes_from<M: GuestPhys>(
        &self,
        pages: PageArray,
        virt: &VirtMemory<'_, M>,
        pointer: u64,
        at: Gva,
    ) -> Option<u64> {
        let in_unit = pointer.wrapping_add(self.offset);
        let chunk = self.chunk(pages, virt, in_unit, at)?;
        let offset = in_unit.checked_sub(self.base.read(virt, chunk)?)?;
        let pages = self.pages.read(virt, chunk)?.min(MAX_PAGES);
        let left = (pages * 4096).checked_sub(offset)?.min(MAX_BYTES);
        let bit = offset / BIT_BYTES;
        let bits = left / BIT_BYTES;
        let map = Gva(self.handed_out.read(virt, chunk)?);
        if !is_set(virt, map, bit)? {
            return Some(0);
        }
        let map = Gva(self.bounds.read(virt, chunk)?);
        let len = next_set(virt, map, bit + 1, bits)? + 1;
        Some(len * BIT_BYTES - offset % BIT_BYTES)
    }

    /// The chunk that the address `in_unit` of the first unit, `at` on some processor, lies in (`pcpu_chunk_addr_search`).
    fn chunk<M: GuestPhys>(
        &self,
        pages: PageArray,
        virt: &VirtMemory<'_, M>,
        in_unit: u64,
        at: Gva,
    ) -> Option<Gva> {
        for variable in self.first.into_iter().flatten() {
            let chunk = Gva(virt.read_u64(variable).ok()?);
            if chunk.0 != 0 && self.covers(virt, chunk, in_unit)? {
                return Some(chunk);
            }
        }
        let found = virt.space.walk(virt.memory, at).ok()?;
        let offset = (found.gpa.0 >> 12).checked_mul(pages.bytes)?;
        let page = pages.at.checked_add(offset)?;
        self.page_index.read(virt, page).map(Gva)
    }

    /// Whether a chunk that was there first has the address (`pcpu_addr_in_chunk`).
    fn covers<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        chunk: Gva,
        in_unit: u64,
    ) -> Option<bool> {
        let base = self.base.read(virt, chunk)?;
        let pages = self.pages.read(virt, chunk)?.min(MAX_PAGES);
        let first = base.checked_add(self.start.read(virt, chunk)?)?;
        let end = (base.checked_add(pages * 4096)?).checked_sub(self.end.read(virt, chunk)?)?;
        Some((first..end).contains(&in_unit))
    }
}

/// Whether bit `bit` of the bitmap at `map` is set.
fn is_set<M: GuestPhys>(virt: &VirtMemory<'_, M>, map: Gva, bit: u64) -> Option<bool> {
    let word = virt.read_u64(map.checked_add(bit / 64 * 8)?).ok()?;
    Some(word >> (bit % 64) & 1 != 0)
}

/// How many of the `most` bits from bit `first` on are clear before one that is set.
fn next_set<M: GuestPhys>(
    virt: &VirtMemory<'_, M>,
    map: Gva,
    first: u64,
    most: u64,
) -> Option<u64> {
    let mut bit = first;
    while bit - first < most {
        let word = virt.read_u64(map.checked_add(bit / 64 * 8)?).ok()?;
        let rest = word >> (bit % 64);
        if rest != 0 {
            bit += u64::from(rest.trailing_zeros());
            break;
        }
        bit = (bit / 64 + 1) * 64;
    }
    (bit - first < most).then_some(bit - first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::paging::{Entry, Levels};
    use crate::guest::symbols::read_kallsyms;

    const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
    const VARIABLES: u64 = 0xffff_ffff_8200_0000;
    const DIRECT: u64 = 0xffff_8880_0000_0000;
    const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
    /// What pointers are offsets to, on the processor that is not the first one as well.
    const BASE: u64 = DIRECT + 0x10_0000;
    const SECOND: u64 = DIRECT + 0x18_0000;
    const FIRST_CHUNK: u64 = DIRECT + 0x2000;
    const CHUNK: u64 = DIRECT + 0x3000;
    const MAPS: u64 = DIRECT + 0x4000;
    /// Where the other chunk's memory is for the second processor, and the pointer to its begin.
    const FAR: u64 = 0xffff_e8ff_ffc0_0000;
    const FAR_POINTER: u64 = FAR - SECOND;

    fn types() -> std::sync::Arc<Btf> {
        let mut e = Encoder::new(None);
        let long = e.int("long unsigned int", 8, 0);
        let int = e.int("int", 4, 1);
        let inner = e.structure("", 24, &[("index", long, 8)]);
        e.structure("page", 64, &[("flags", long, 0), ("", inner, 8)]);
        let members = [
            ("bound_map", long, 0),
            ("base_addr", long, 8),
            ("alloc_map", long, 16),
            ("start_offset", int, 24),
            ("end_offset", int, 28),
            ("nr_pages", int, 32),
        ];
        e.structure("pcpu_chunk", 40, &members);
        std::sync::Arc::new(Btf::parse(&e.bytes(), None).unwrap())
    }

    fn chunk(guest: &mut TestGuest, at: u64, base: u64, start: u32, maps: u64) {
        let words = [maps, base, maps + 0x800, u64::from(start)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.put(Gva(at), &bytes, DATA);
        guest.put(Gva(at + 32), &8u32.to_le_bytes(), DATA);
        guest.put(Gva(maps), &[0; 0x1000], DATA);
    }

    /// Sets bits of a map.
    fn set(guest: &mut TestGuest, map: u64, bits: impl IntoIterator<Item = u64>) {
        for bit in bits {
            let at = Gva(map + bit / 8);
            let mut byte = [0];
            guest.virt().read(at, &mut byte).unwrap();
            guest.put(at, &[byte[0] | 1 << (bit % 8)], DATA);
        }
    }

    /// Two chunks of eight pages. The first begins with 4096 bytes that are the kernel's, and has 24 bytes handed out behind
    /// 8 that are not; the other has 1,024 bytes handed out from its byte 512 on, and eight behind these.
    fn guest() -> TestGuest {
        let mut guest = TestGuest::new(Levels::Four);
        let variables = [BASE, FIRST_CHUNK, 0];
        let bytes: Vec<u8> = variables.iter().flat_map(|v| v.to_le_bytes()).collect();
        guest.put(Gva(VARIABLES), &bytes, DATA);
        chunk(&mut guest, FIRST_CHUNK, BASE, 4096, MAPS);
        set(&mut guest, MAPS, [1024, 1026, 1032]);
        set(&mut guest, MAPS + 0x800, 1026..1032);
        let far_base = FAR_POINTER.wrapping_add(BASE);
        chunk(&mut guest, CHUNK, far_base, 0, MAPS + 0x1000);
        set(&mut guest, MAPS + 0x1000, [0, 128, 384, 386]);
        set(&mut guest, MAPS + 0x1800, 128..386);
        guest.put(Gva(FAR), &[0; 4096], DATA);
        let pfn = |at: u64| {
            let virt = guest.virt();
            virt.space.walk(virt.memory, Gva(at)).unwrap().gpa.0 >> 12
        };
        let described = VMEMMAP + pfn(FAR) * 64;
        guest.put(Gva(described + 16), &CHUNK.to_le_bytes(), DATA);
        guest
    }

    fn bytes_from(guest: &TestGuest, pointer: u64) -> Option<u64> {
        let text = format!(
            "0 A __per_cpu_start\n{VARIABLES:x} D pcpu_base_addr\n{:x} D pcpu_first_chunk\n{:x} D pcpu_reserved_chunk\n",
            VARIABLES + 8,
            VARIABLES + 16
        );
        let symbols = read_kallsyms(text.as_bytes(), |_| true).unwrap();
        let virt = guest.virt();
        let model = PerCpuModel::new(&types(), &symbols, &virt).unwrap();
        let at = Gva(SECOND.wrapping_add(pointer));
        let pages = PageArray {
            at: Gva(VMEMMAP),
            bytes: 64,
        };
        model.bytes_from(pages, &virt, pointer, at)
    }

    #[test]
    fn memory_of_each_processor_goes_to_the_end_of_its_allocation() {
        let guest = guest();
        for (pointer, bytes) in [
            (4096 + 8, 24),
            (4096 + 12, 20),
            (4096 + 13, 19),
            (4096 + 28, 4),
        ] {
            assert_eq!(bytes_from(&guest, pointer), Some(bytes), "{pointer}");
        }
        assert_eq!(bytes_from(&guest, 4096), Some(0), "nobody has it");
        assert_eq!(bytes_from(&guest, 4096 + 32), Some(0), "behind it");
        assert_eq!(bytes_from(&guest, 8), None, "the kernel's own");
        let far = |offset: u64| bytes_from(&guest, FAR_POINTER.wrapping_add(offset));
        assert_eq!(far(512), Some(1024));
        assert_eq!(far(512 + 1000), Some(24));
        assert_eq!(far(1536), Some(8), "the next one's");
        assert_eq!(far(0), Some(0));
        assert_eq!(far(8192), None, "not mapped");
    }

    #[test]
    fn bookkeeping_without_an_end_says_nothing() {
        let mut guest = guest();
        guest.put(Gva(MAPS), &[0; 0x800], DATA);
        assert_eq!(bytes_from(&guest, 4096 + 8), None);
        guest.put(Gva(FIRST_CHUNK + 8), &[0xff; 32], DATA);
        assert_eq!(bytes_from(&guest, 4096 + 8), None);
    }
}
