//! What is received and freed: a `struct sk_buff`, with the buffer that its data is in and the
//! `struct skb_shared_info` at the end of that.
//!
//! ```text
//!   head ──────────── data ─────────── tail ──────── end ─────────────────────────
//!   │ headroom        │ len - data_len │ tailroom    │ skb_shared_info: fragments │
//! ```

use serde::Deserialize;

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocation, AllocationKind, Allocations, FindAllocation};
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::guest::field::{Bits, Field};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::models;
use crate::policy::call::CallMemory;

/// Largest structures that are believed, in bytes.
const MAX_BYTES: u64 = 4096;
/// Most fragments of a packet (`MAX_SKB_FRAGS` can be configured up to 45).
const MAX_FRAGMENTS: u64 = 45;
/// Largest buffer of a packet that is believed.
const MAX_BUFFER: u64 = 1 << 22;
/// Most allocations that are looked up for one call: no honest poll hands over as many buffers and
/// fragments.
const MAX_LOOKUPS: u32 = 1024;
/// Most caches of packets that are remembered.
const MAX_CACHES: usize = 8;
/// Low bits of the pointer to a fragment's page that say what kind it is.
const PAGE_TAG: u64 = 3;

/// What is known of packets.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PacketModel {
    #[serde(deserialize_with = "models::kept")]
    zero: &'static [&'static str],
    #[serde(deserialize_with = "models::kept")]
    shared_zero: &'static [&'static str],
    #[serde(deserialize_with = "models::kept")]
    zero_bits: &'static [&'static str],
    page_bit: &'static str,
    #[serde(deserialize_with = "models::kept")]
    caches: &'static [&'static str],
    #[serde(deserialize_with = "models::kept")]
    caches_of_two: &'static [&'static str],
}

/// Where things are in a `struct sk_buff`.
#[derive(Debug)]
struct Header {
    bytes: usize,
    device: Field,
    head: Field,
    data: Field,
    tail: Field,
    end: Field,
    length: Field,
    data_length: Field,
    users: Field,
    link_header: Field,
    zero: Vec<Field>,
    zero_bits: Vec<Bits>,
    /// The buffer is a piece of a page.
    in_page: Bits,
}

/// Where things are in a `struct skb_shared_info`.
#[derive(Debug)]
struct Shared {
    bytes: usize,
    fragments: Field,
    references: Field,
    zero: Vec<Field>,
    /// Offset of the first fragment, and the length of each.
    first: usize,
    fragment_bytes: usize,
    page: Field,
    length: Field,
    offset: Field,
}

/// Packets of a guest with certain types.
#[derive(Debug)]
pub(super) struct Packets {
    header: Header,
    shared: Shared,
    /// Names of the slab caches of packets, and of those with two packets in an object.
    names: (&'static [&'static str], &'static [&'static str]),
    /// Those that were met, and whether they are of two.
    caches: Vec<(Gva, bool)>,
    /// Allocations that may still be looked up for this call.
    lookups: u32,
}

impl Packets {
    pub(super) fn new(model: &PacketModel, types: &Btf) -> Option<Self> {
        Some(Self {
            header: Header::new(model, types)?,
            shared: Shared::new(model, types)?,
            names: (model.caches, model.caches_of_two),
            caches: Vec::new(),
            lookups: 0,
        })
    }

    /// A call is about to be looked at.
    pub(super) fn begin(&mut self) {
        self.lookups = MAX_LOOKUPS;
    }

    /// The buffer of what is at `at`, if that is a packet that the network stack can be given as one
    /// that the interface `device` has received.
    pub(super) fn received<M: GuestPhys>(
        &mut self,
        virt: VirtMemory<'_, M>,
        allocations: &Allocations<'_, M>,
        at: Gva,
        device: u64,
    ) -> Option<u64> {
        self.is_packet(allocations, at)?;
        let header = &self.header;
        let object = virt.read_vec(at, header.bytes).ok()?;
        let of = |field: Field| field.of(&object);
        let of_device = of(header.device)? == device && of(header.users)? == 1;
        let is_nobodys = header.zero.iter().all(|field| of(*field) == Some(0))
            && header
                .zero_bits
                .iter()
                .all(|bits| bits.any(&object) == Some(false));
        (of_device && is_nobodys).then_some(())?;
        let (head, end) = (of(header.head)?, of(header.end)?);
        let linear = of(header.length)?.checked_sub(of(header.data_length)?)?;
        let room = of(header.data)?.checked_sub(head)?;
        let fits = room.checked_add(linear)? == of(header.tail)?
            && of(header.tail)? <= end
            && of(header.link_header)? <= room
            && end <= MAX_BUFFER;
        fits.then_some(())?;
        let in_page = header.in_page.any(&object)?;
        let length = of(header.data_length)?;
        let bytes = end.checked_add(self.shared.bytes as u64)?;
        self.is_buffer(allocations, GvaRange::new(Gva(head), bytes)?, in_page)?;
        let shared = virt.read_vec(Gva(head).checked_add(end)?, self.shared.bytes);
        let fragments = self.bytes_of_fragments(&shared.ok()?, allocations)?;
        (fragments == length).then_some(head)
    }

    /// Whether `range` is a buffer that can be given back as one: an object of a slab from its
    /// beginning, or a piece of pages.
    fn is_buffer<M: GuestPhys>(
        &mut self,
        allocations: &Allocations<'_, M>,
        range: GvaRange,
        in_page: bool,
    ) -> Option<()> {
        self.lookups = self.lookups.checked_sub(1)?;
        let found = allocations.allocation_at(range.first())?;
        let is_kind = match found.kind {
            AllocationKind::Slab => {
                let begins = found.range.first() == range.first();
                !in_page && begins && allocations.is_free(range.first()) != Some(true)
            }
            AllocationKind::Pages => in_page,
            AllocationKind::Vmalloc | AllocationKind::PerCpu => false,
        };
        (is_kind && found.range.last() >= range.last()).then_some(())
    }

    /// Whether the packet at `at` can be freed as it is: the call has not changed it, or it is one
    /// that could have been received, of which this is the buffer.
    pub(super) fn may_be_freed<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        allocations: &Allocations<'_, M>,
        at: Gva,
    ) -> Option<Option<u64>> {
        self.is_packet(allocations, at)?;
        let object = memory.private.read_vec(at, self.header.bytes).ok()?;
        if memory.earlier().read_vec(at, self.header.bytes).ok()? == object {
            let of = |field: Field| field.of(&object);
            let shared = Gva(of(self.header.head)?).checked_add(of(self.header.end)?)?;
            let now = memory.private.read_vec(shared, self.shared.bytes).ok()?;
            let before = memory.earlier().read_vec(shared, self.shared.bytes);
            if before.is_ok_and(|before| before == now) {
                return (of(self.header.users)? > 0).then_some(None);
            }
        }
        let device = self.header.device.of(&object)?;
        self.received(memory.private, allocations, at, device)
            .map(Some)
    }

    /// Whether an object of one of the caches of packets begins at `at`, or the second packet in
    /// one of two.
    fn is_packet<M: GuestPhys>(&mut self, allocations: &Allocations<'_, M>, at: Gva) -> Option<()> {
        self.lookups = self.lookups.checked_sub(1)?;
        let found = allocations.allocation_at(at)?;
        let (offset, bytes) = (at.0 - found.range.first().0, self.header.bytes as u64);
        let fits = offset.checked_add(bytes)? <= found.range.len_bytes();
        let is_object = fits && found.kind == AllocationKind::Slab;
        let is_free = allocations.is_free(found.range.first()) == Some(true);
        (is_object && !is_free).then_some(())?;
        let of_two = self.is_of_two(allocations, &found)?;
        (offset == 0 || of_two && offset == bytes).then_some(())
    }

    /// Whether a cache of packets has two in an object; `None` if `found` is in none.
    fn is_of_two<M: GuestPhys>(
        &mut self,
        allocations: &Allocations<'_, M>,
        found: &Allocation,
    ) -> Option<bool> {
        let cache = found.cache?;
        if let Some((_, of_two)) = self.caches.iter().find(|(known, _)| *known == cache) {
            return Some(*of_two);
        }
        let name = allocations.cache_name(found)?;
        let of_two = self.names.1.contains(&name.as_str());
        (of_two || self.names.0.contains(&name.as_str())).then_some(())?;
        if self.caches.len() < MAX_CACHES {
            self.caches.push((cache, of_two));
        }
        Some(of_two)
    }

    /// How many bytes are in the fragments of a packet that has this; `None` if they are not where
    /// they should be.
    fn bytes_of_fragments<M: GuestPhys>(
        &mut self,
        shared: &[u8],
        allocations: &Allocations<'_, M>,
    ) -> Option<u64> {
        let of = |field: Field| field.of(shared);
        let alone = of(self.shared.references)? == 1
            && self.shared.zero.iter().all(|field| of(*field) == Some(0));
        alone.then_some(())?;
        let mut sum = 0u64;
        for index in 0..of(self.shared.fragments).filter(|count| *count <= MAX_FRAGMENTS)? {
            let (page, range) = self.shared.fragment(shared, index)?;
            let first = allocations.page_address(page)?.checked_add(range.0)?;
            self.is_buffer(allocations, GvaRange::new(first, range.1)?, true)?;
            sum = sum.checked_add(range.1)?;
        }
        Some(sum)
    }
}

impl Header {
    fn new(model: &PacketModel, types: &Btf) -> Option<Self> {
        let own = types.find_struct("sk_buff")?;
        let field = |name| Field::find(types, own, name);
        // What a kernel was built without is in none of its packets.
        let zero = model.zero.iter().filter_map(|name| field(name));
        let bits = |name: &&str| Bits::find(types, own, name);
        let zero_bits = model.zero_bits.iter().filter_map(bits);
        Some(Self {
            bytes: bytes_of(types, own)?,
            device: field("dev")?,
            head: field("head")?,
            data: field("data")?,
            tail: field("tail")?,
            end: field("end")?,
            length: field("len")?,
            data_length: field("data_len")?,
            users: field("users")?,
            link_header: field("mac_header")?,
            zero: zero.collect(),
            zero_bits: zero_bits.collect(),
            in_page: Bits::find(types, own, model.page_bit)?,
        })
    }
}

impl Shared {
    fn new(model: &PacketModel, types: &Btf) -> Option<Self> {
        let own = types.find_struct("skb_shared_info")?;
        let field = |name| Field::find(types, own, name);
        let zero = model.shared_zero.iter().filter_map(|name| field(name));
        let fragments = types.find_member(own, "frags")?;
        let Kind::Array { element, .. } = types.resolve(fragments.type_id)?.1 else {
            return None;
        };
        // A `struct bio_vec`; since Linux 6.9 a `struct skb_frag` of other names.
        let of_fragment = |names: [&str; 2]| {
            let mut found = names.iter();
            found.find_map(|name| Field::find(types, element, name))
        };
        Some(Self {
            bytes: bytes_of(types, own)?,
            fragments: field("nr_frags")?,
            references: field("dataref")?,
            zero: zero.collect(),
            first: usize::try_from(fragments.bit_offset / 8).ok()?,
            fragment_bytes: bytes_of(types, element)?,
            page: of_fragment(["bv_page", "netmem"])?,
            length: of_fragment(["bv_len", "len"])?,
            offset: of_fragment(["bv_offset", "offset"])?,
        })
    }

    /// The page of a fragment, as a `struct page`, with the fragment's offset and length in it.
    fn fragment(&self, shared: &[u8], index: u64) -> Option<(Gva, (u64, u64))> {
        let index = usize::try_from(index).ok()?;
        let at = self
            .first
            .checked_add(index.checked_mul(self.fragment_bytes)?)?;
        let fragment = shared.get(at..at.checked_add(self.fragment_bytes)?)?;
        let page = self.page.of(fragment)?;
        (page & PAGE_TAG == 0).then_some(())?;
        let range = (self.offset.of(fragment)?, self.length.of(fragment)?);
        Some((Gva(page), range))
    }
}

fn bytes_of(types: &Btf, id: TypeId) -> Option<usize> {
    let bytes = types.size_of(id).filter(|bytes| *bytes <= MAX_BYTES)?;
    usize::try_from(bytes).ok()
}
