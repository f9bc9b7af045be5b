//! How far memory goes of which each processor has its own (`alloc_percpu`): from the bookkeeping
//! of mm/percpu.c.
//!
//! A per-CPU pointer is an offset; its address on a processor is that plus the processor's base.
//! The allocator's chunks note in a bitmap where allocations begin and end (`bound_map`), and in
//! another what is handed out (`alloc_map`), a bit for each four bytes. A chunk is found as the
//! kernel finds it: the first one by its addresses, others by what their pages' `struct page` says.

use super::addr::{Gva, GvaRange};
use super::btf::Btf;
use super::field::Field;
use super::paging::VirtMemory;
use super::phys::GuestPhys;
use super::symbols::SymbolTable;

/// Bytes for which a bit stands (`PCPU_MIN_ALLOC_SIZE`, include/linux/percpu.h).
const BIT_BYTES: u64 = 4;

/// Most bytes that one allocation has: more than a unit of the smallest chunks
/// (`PCPU_MIN_UNIT_SIZE`).
const MAX_BYTES: u64 = 64 << 10;

/// Most pages that a chunk has for one processor: 2 MiB.
const MAX_PAGES: u64 = 512;

/// Most processors of a guest.
const MAX_CPUS: usize = 8;

/// The kernel's array of `struct page`.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageArray {
    /// Its begin, the description of page 0.
    pub(super) at: Gva,
    /// Bytes of one description.
    pub(super) bytes: u64,
}

/// What is known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PerCpu {
    /// It is no per-CPU memory.
    Other,
    /// It is, and nobody has it, or it is not known who.
    Free,
    /// It is part of what was handed out.
    HandedOut(GvaRange),
}

/// The chunk that was there first.
#[derive(Debug, Clone, Copy)]
struct First {
    chunk: Gva,
    /// Where its first unit begins.
    base: u64,
    /// What of each unit it hands out, from the unit's begin.
    start: u64,
    end: u64,
}

/// Where the allocator keeps what it knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct PerCpuModel {
    first: Option<First>,
    /// What is to be added to a pointer for its address on each processor (`__per_cpu_offset`); 0
    /// for none.
    bases: [u64; MAX_CPUS],
    /// What is to be added to a pointer for its address in a chunk's first unit.
    offset: u64,
    page_chunk: Field,
    base: Field,
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
        let word = |at: Gva| virt.read_u64(at).ok();
        let start = at("__per_cpu_start").map_or(0, |at| at.0);
        let mut bases = [0; MAX_CPUS];
        let count = word(at("nr_cpu_ids")?)? & u64::from(u32::MAX);
        let count = usize::try_from(count).map_or(MAX_CPUS, |count| count.min(MAX_CPUS));
        let offsets = at("__per_cpu_offset")?;
        for (index, base) in bases.iter_mut().enumerate().take(count) {
            *base = word(offsets.checked_add(index as u64 * 8)?)?;
        }
        let mut model = Self {
            first: None,
            bases,
            offset: word(at("pcpu_base_addr")?)?.wrapping_sub(start),
            page_chunk: page_chunk(types)?,
            base: field("base_addr")?,
            pages: field("nr_pages")?,
            bounds: field("bound_map")?,
            handed_out: field("alloc_map")?,
        };
        model.first = at("pcpu_first_chunk").and_then(|variable| {
            let chunk = Gva(word(variable)?);
            let read = |name| field(name)?.read(virt, chunk);
            let bytes = model.unit_bytes(virt, chunk)?;
            Some(First {
                chunk,
                base: model.base.read(virt, chunk)?,
                start: read("start_offset")?,
                end: bytes.checked_sub(read("end_offset")?)?,
            })
        });
        Some(model)
    }

    /// Where a per-CPU pointer points on each processor.
    pub(super) fn addresses(&self, pointer: u64) -> impl Iterator<Item = Gva> + '_ {
        let bases = self.bases.iter().filter(|base| **base != 0);
        bases.map(move |base| Gva(base.wrapping_add(pointer)))
    }

    /// What is at `at`, which is mapped.
    pub(super) fn find<M: GuestPhys>(
        &self,
        pages: PageArray,
        virt: &VirtMemory<'_, M>,
        at: Gva,
        in_direct_map: bool,
    ) -> PerCpu {
        // The first chunk lies in the direct map, all others in the area for `vmalloc`.
        let chunk = match in_direct_map {
            true => self.first.map(|first| first.chunk),
            false => self.chunk_of_page(pages, virt, at),
        };
        let found = chunk.and_then(|chunk| Some((chunk, self.in_chunk(virt, chunk, at)?)));
        let Some((chunk, offset)) = found else {
            return PerCpu::Other;
        };
        match self.allocation(virt, chunk, offset) {
            Some((before, bytes)) => {
                let first = at.checked_sub(before);
                let range = first.and_then(|first| GvaRange::new(first, bytes));
                range.map_or(PerCpu::Free, PerCpu::HandedOut)
            }
            None => PerCpu::Free,
        }
    }

    /// How far in a unit of `chunk` the address `at` is, if it is in one.
    fn in_chunk<M: GuestPhys>(&self, virt: &VirtMemory<'_, M>, chunk: Gva, at: Gva) -> Option<u64> {
        let (base, range) = match self.first {
            Some(first) if first.chunk == chunk => (first.base, first.start..first.end),
            _ => (
                self.base.read(virt, chunk)?,
                0..self.unit_bytes(virt, chunk)?,
            ),
        };
        let bases = self.bases.iter().filter(|base| **base != 0);
        let mut offsets = bases.filter_map(|of_cpu| {
            let pointer = at.0.wrapping_sub(*of_cpu);
            pointer.wrapping_add(self.offset).checked_sub(base)
        });
        offsets.find(|offset| range.contains(offset))
    }

    fn unit_bytes<M: GuestPhys>(&self, virt: &VirtMemory<'_, M>, chunk: Gva) -> Option<u64> {
        Some(self.pages.read(virt, chunk)?.min(MAX_PAGES) * 4096)
    }

    /// Of the allocation that `offset` in a unit of `chunk` lies in, how many bytes lie before it,
    /// and how many it has.
    fn allocation<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        chunk: Gva,
        offset: u64,
    ) -> Option<(u64, u64)> {
        let bit = offset / BIT_BYTES;
        let handed_out = Gva(self.handed_out.read(virt, chunk)?);
        if !is_set(virt, handed_out, bit)? {
            return None;
        }
        let bounds = Gva(self.bounds.read(virt, chunk)?);
        let most = MAX_BYTES / BIT_BYTES;
        let first = last_set(virt, bounds, bit, most)?;
        let left = (self.unit_bytes(virt, chunk)? / BIT_BYTES).checked_sub(bit)?;
        let end = bit + 1 + next_set(virt, bounds, bit + 1, most.min(left))?;
        Some((offset - first * BIT_BYTES, (end - first) * BIT_BYTES))
    }

    /// The chunk that the page of `at` says that it is of (`pcpu_get_page_chunk`).
    fn chunk_of_page<M: GuestPhys>(
        &self,
        pages: PageArray,
        virt: &VirtMemory<'_, M>,
        at: Gva,
    ) -> Option<Gva> {
        let found = virt.space.walk(virt.memory, at).ok()?;
        let offset = (found.gpa.0 >> 12).checked_mul(pages.bytes)?;
        let chunk = self.page_chunk.read(virt, pages.at.checked_add(offset)?)?;
        (chunk != 0 && chunk.is_multiple_of(8)).then_some(Gva(chunk))
    }
}

/// Where the description of a page of a chunk has the chunk (`pcpu_set_page_chunk`, mm/percpu.c):
/// `index`, or `private` where a page has none any more (seen in Linux 7.3).
fn page_chunk(types: &Btf) -> Option<Field> {
    let page = types.find_struct("page")?;
    Field::find(types, page, "index").or_else(|| Field::find(types, page, "private"))
}

fn word_of<M: GuestPhys>(virt: &VirtMemory<'_, M>, map: Gva, bit: u64) -> Option<u64> {
    virt.read_u64(map.checked_add(bit / 64 * 8)?).ok()
}

/// Whether bit `bit` of the bitmap at `map` is set.
fn is_set<M: GuestPhys>(virt: &VirtMemory<'_, M>, map: Gva, bit: u64) -> Option<bool> {
    Some(word_of(virt, map, bit)? >> (bit % 64) & 1 != 0)
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
        let rest = word_of(virt, map, bit)? >> (bit % 64);
        if rest != 0 {
            bit += u64::from(rest.trailing_zeros());
            break;
        }
        bit = (bit / 64 + 1) * 64;
    }
    (bit - first < most).then_some(bit - first)
}

/// The last bit up to bit `last` that is set, if it is one of the `most` bits up to there.
fn last_set<M: GuestPhys>(virt: &VirtMemory<'_, M>, map: Gva, last: u64, most: u64) -> Option<u64> {
    let mut bit = last;
    loop {
        let rest = word_of(virt, map, bit)? << (63 - bit % 64);
        if rest != 0 {
            let found = bit.checked_sub(u64::from(rest.leading_zeros()))?;
            return (last - found < most).then_some(found);
        }
        bit = (bit / 64 * 64).checked_sub(1)?;
        if last - bit >= most {
            return None;
        }
    }
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

    /// Two chunks of eight pages. The first begins with 4096 bytes that are the kernel's, and has
    /// 24 bytes handed out behind 8 that are not; the other has 1,024 bytes handed out from its
    /// byte 512 on, and eight behind these.
    fn guest() -> TestGuest {
        let mut guest = TestGuest::new(Levels::Four);
        // Two processors, whose bases lie half a megabyte apart.
        let variables = [BASE, FIRST_CHUNK, 2, BASE, SECOND];
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
        guest.put(Gva(FAR + 0x10_0000), &[0; 4096], DATA);
        let pfn = |at: u64| {
            let virt = guest.virt();
            virt.space.walk(virt.memory, Gva(at)).unwrap().gpa.0 >> 12
        };
        let described = VMEMMAP + pfn(FAR) * 64;
        guest.put(Gva(described + 16), &CHUNK.to_le_bytes(), DATA);
        guest
    }

    fn find(guest: &TestGuest, at: u64) -> PerCpu {
        let text = format!(
            "0 A __per_cpu_start\n{VARIABLES:x} D pcpu_base_addr\n{:x} D pcpu_first_chunk\n{:x} D nr_cpu_ids\n{:x} D __per_cpu_offset\n",
            VARIABLES + 8,
            VARIABLES + 16,
            VARIABLES + 24
        );
        let symbols = read_kallsyms(text.as_bytes(), |_| true).unwrap();
        let virt = guest.virt();
        let model = PerCpuModel::new(&types(), &symbols, &virt).unwrap();
        let addresses: Vec<Gva> = model.addresses(0x40).collect();
        assert_eq!(addresses, [Gva(BASE + 0x40), Gva(SECOND + 0x40)]);
        let pages = PageArray {
            at: Gva(VMEMMAP),
            bytes: 64,
        };
        model.find(pages, &virt, Gva(at), at < FAR)
    }

    fn handed_out(at: u64, bytes: u64) -> PerCpu {
        PerCpu::HandedOut(GvaRange::new(Gva(at), bytes).unwrap())
    }

    #[test]
    fn memory_of_each_processor_goes_from_the_begin_to_the_end_of_its_allocation() {
        let guest = guest();
        for unit in [BASE, SECOND] {
            let first = unit + 4096 + 8;
            for at in [first, first + 5, first + 23] {
                assert_eq!(find(&guest, at), handed_out(first, 24), "{at:x}");
            }
            for at in [unit + 4096, first + 24] {
                assert_eq!(find(&guest, at), PerCpu::Free, "nobody has it");
            }
            assert_eq!(find(&guest, unit + 8), PerCpu::Other, "the kernel's own");
        }
        assert_eq!(find(&guest, BASE + 8 * 4096), PerCpu::Other, "no unit");
        assert_eq!(find(&guest, FAR + 512 + 1000), handed_out(FAR + 512, 1024));
        let next = handed_out(FAR + 1536, 8);
        assert_eq!(find(&guest, FAR + 1536), next, "the next one's");
        assert_eq!(find(&guest, FAR), PerCpu::Free);
        assert_eq!(find(&guest, FAR + 8192), PerCpu::Other, "not mapped");
        assert_eq!(
            find(&guest, FAR + 0x10_0000),
            PerCpu::Other,
            "no chunk's page"
        );
    }

    #[test]
    fn bookkeeping_without_an_end_says_nothing() {
        let mut guest = guest();
        let at = BASE + 4096 + 8;
        guest.put(Gva(MAPS), &[0; 0x800], DATA);
        assert_eq!(find(&guest, at), PerCpu::Free);
        guest.put(Gva(FIRST_CHUNK), &[0xff; 24], DATA);
        assert_eq!(find(&guest, at), PerCpu::Other);
    }
}
