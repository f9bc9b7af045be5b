//! What is received and freed: a `struct sk_buff`, with the buffer that its data is in and the
//! `struct skb_shared_info` at the end of that.
//!
//! ```text
//!   head ──────────── data ─────────── tail ──────── end ─────────────────────────
//!   │ headroom        │ len - data_len │ tailroom    │ skb_shared_info: fragments │
//! ```

use serde::Deserialize;

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::guest::field::Field;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::models;
use crate::policy::call::{CallMemory, PACKET_CACHES};

/// Largest structures that are believed, in bytes.
const MAX_BYTES: u64 = 4096;
/// Most fragments of a packet (`MAX_SKB_FRAGS` can be configured up to 45).
const MAX_FRAGMENTS: u64 = 45;
/// Largest buffer of a packet that is believed.
const MAX_BUFFER: u64 = 1 << 22;
/// Offset of the link-layer header where there is none.
const NO_HEADER: u64 = 0xffff;
/// Low bits of the pointer to a fragment's page that say what kind it is.
const PAGE_TAG: u64 = 3;

/// What is known of packets.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
pub(super) struct PacketModel {
    #[serde(deserialize_with = "models::kept")]
    zero: &'static [&'static str],
    #[serde(deserialize_with = "models::kept")]
    shared_zero: &'static [&'static str],
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
    /// Slab caches of packets, as they were met.
    caches: Vec<Gva>,
}

impl Packets {
    pub(super) fn new(model: &PacketModel, types: &Btf) -> Option<Self> {
        Some(Self {
            header: Header::new(model, types)?,
            shared: Shared::new(model, types)?,
            caches: Vec::new(),
        })
    }

    /// Whether what is at `at` is a packet that the network stack can be given as one that the
    /// interface `device` has received.
    pub(super) fn is_received<M: GuestPhys>(
        &mut self,
        virt: VirtMemory<'_, M>,
        allocations: &Allocations<'_, M>,
        at: Gva,
        device: u64,
    ) -> Option<()> {
        self.is_packet(allocations, at)?;
        let header = &self.header;
        let object = virt.read_vec(at, header.bytes).ok()?;
        let of = |field: Field| field.of(&object);
        let of_device = of(header.device)? == device && of(header.users)? == 1;
        let is_nobodys = header.zero.iter().all(|field| of(*field) == Some(0));
        (of_device && is_nobodys).then_some(())?;
        let (head, end) = (of(header.head)?, of(header.end)?);
        let linear = of(header.length)?.checked_sub(of(header.data_length)?)?;
        let room = of(header.data)?.checked_sub(head)?;
        let link = of(header.link_header)?;
        let fits = room.checked_add(linear)? == of(header.tail)?
            && of(header.tail)? <= end
            && (link <= end || link == NO_HEADER)
            && end <= MAX_BUFFER;
        fits.then_some(())?;
        let bytes = end.checked_add(self.shared.bytes as u64)?;
        is_allocated(allocations, GvaRange::new(Gva(head), bytes)?)?;
        let shared = virt.read_vec(Gva(head).checked_add(end)?, self.shared.bytes);
        let fragments = self.shared.bytes_of_fragments(&shared.ok()?, allocations)?;
        (fragments == of(header.data_length)?).then_some(())
    }

    /// Whether the packet at `at` can be freed as it is: the call has not changed it, or it is one
    /// that could have been received.
    pub(super) fn may_be_freed<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        allocations: &Allocations<'_, M>,
        at: Gva,
    ) -> Option<()> {
        self.is_packet(allocations, at)?;
        let object = memory.private.read_vec(at, self.header.bytes).ok()?;
        if memory.earlier().read_vec(at, self.header.bytes).ok()? == object {
            let of = |field: Field| field.of(&object);
            let shared = Gva(of(self.header.head)?).checked_add(of(self.header.end)?)?;
            let now = memory.private.read_vec(shared, self.shared.bytes).ok()?;
            let before = memory.earlier().read_vec(shared, self.shared.bytes);
            if before.is_ok_and(|before| before == now) {
                return (of(self.header.users)? > 0).then_some(());
            }
        }
        let device = self.header.device.of(&object)?;
        self.is_received(memory.private, allocations, at, device)
    }

    /// Whether an object of one of the caches of packets begins at `at`, or the second packet in
    /// one of two.
    fn is_packet<M: GuestPhys>(&mut self, allocations: &Allocations<'_, M>, at: Gva) -> Option<()> {
        let found = allocations.allocation_at(at)?;
        let offset = at.0 - found.range.first().0;
        let begins = offset == 0 || offset == self.header.bytes as u64;
        (begins && found.kind == AllocationKind::Slab).then_some(())?;
        let cache = found.cache?;
        if self.caches.contains(&cache) {
            return Some(());
        }
        let name = allocations.cache_name(&found)?;
        PACKET_CACHES.contains(&name.as_str()).then_some(())?;
        if self.caches.len() < PACKET_CACHES.len() {
            self.caches.push(cache);
        }
        Some(())
    }
}

impl Header {
    fn new(model: &PacketModel, types: &Btf) -> Option<Self> {
        let own = types.find_struct("sk_buff")?;
        let field = |name| Field::find(types, own, name);
        let zero = model.zero.iter().filter_map(|name| field(name));
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

    /// How many bytes are in the fragments of a packet that has this; `None` if they are not where
    /// they should be.
    fn bytes_of_fragments<M: GuestPhys>(
        &self,
        shared: &[u8],
        allocations: &Allocations<'_, M>,
    ) -> Option<u64> {
        let of = |field: Field| field.of(shared);
        let alone =
            of(self.references)? == 1 && self.zero.iter().all(|field| of(*field) == Some(0));
        alone.then_some(())?;
        let mut sum = 0u64;
        for index in 0..of(self.fragments).filter(|count| *count <= MAX_FRAGMENTS)? {
            let index = usize::try_from(index).ok()?;
            let at = self
                .first
                .checked_add(index.checked_mul(self.fragment_bytes)?)?;
            let fragment = shared.get(at..at.checked_add(self.fragment_bytes)?)?;
            let page = Gva(self.page.of(fragment)?);
            let page = (page.0 & PAGE_TAG == 0).then(|| allocations.page_address(page));
            let first = page.flatten()?.checked_add(self.offset.of(fragment)?)?;
            let bytes = self.length.of(fragment)?;
            is_allocated(allocations, GvaRange::new(first, bytes)?)?;
            sum = sum.checked_add(bytes)?;
        }
        Some(sum)
    }
}

fn bytes_of(types: &Btf, id: TypeId) -> Option<usize> {
    let bytes = types.size_of(id).filter(|bytes| *bytes <= MAX_BYTES)?;
    usize::try_from(bytes).ok()
}

/// Whether all of `range` was handed out as one.
fn is_allocated<M: GuestPhys>(allocations: &Allocations<'_, M>, range: GvaRange) -> Option<()> {
    let found = allocations.allocation_at(range.first())?;
    (found.range.last() >= range.last()).then_some(())
}
