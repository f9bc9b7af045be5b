//! Counts in the kernel's objects that inline functions write for whoever has the object:
//! references to routes, sockets, connections, packets. What kind of object it is, its slab cache
//! tells.

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
use crate::guest::btf::Btf;
use crate::guest::phys::GuestPhys;
use crate::policy::reach::{member_range, reference_counts};

/// Objects of the slab caches with these names begin with a structure, of which these members are
/// written besides its reference counts.
struct Kind {
    caches: &'static [&'static str],
    structure: &'static str,
    members: &'static [&'static str],
}

const KINDS: &[Kind] = &[
    // `dst_hold`, `dst_use_noref` (include/net/dst.h); a `rcuref_t` since Linux 6.4.
    Kind {
        // Named after their structures since Linux 6.9.
        caches: &[
            "ip_dst_cache",
            "ip6_dst_cache",
            "xfrm_dst_cache",
            "rtable",
            "rt6_info",
            "xfrm_dst",
        ],
        structure: "dst_entry",
        members: &["__refcnt", "__rcuref", "__use", "lastuse"],
    },
    // `sock_hold` (include/net/sock.h); `fq_enqueue` says who paces (net/sched/sch_fq.c).
    Kind {
        caches: &[
            "TCP",
            "TCPv6",
            "UDP",
            "UDPv6",
            "UDP-Lite",
            "UDPLITEv6",
            "RAW",
            "RAWv6",
            "PING",
            "PINGv6",
        ],
        structure: "sock",
        members: &["sk_pacing_status"],
    },
    // `nf_conntrack_get` (include/linux/netfilter/nf_conntrack_common.h).
    Kind {
        caches: &["nf_conntrack"],
        structure: "nf_conn",
        members: &[],
    },
    // `get_pid` (include/linux/pid.h).
    Kind {
        caches: &["pid"],
        structure: "pid",
        members: &[],
    },
    // `skb_get` (include/linux/skbuff.h).
    Kind {
        caches: super::PACKET_CACHES,
        structure: "sk_buff",
        members: &[],
    },
];

/// Where such counts are, from the beginning of an object.
#[derive(Debug, Default)]
pub(super) struct SharedCounts(Vec<(&'static [&'static str], Vec<GvaRange>)>);

impl SharedCounts {
    /// What of it this kernel has.
    pub(super) fn new(types: &Btf) -> Self {
        let kinds = KINDS.iter().filter_map(|kind| {
            let id = types.find_struct(kind.structure)?;
            let members = kind.members.iter();
            let members = members.filter_map(|name| member_range(types, id, name));
            let counts = reference_counts(types, id);
            Some((kind.caches, counts.into_iter().chain(members).collect()))
        });
        Self(kinds.collect())
    }

    /// The count that `at` is part of, and the slab cache of the object.
    pub(super) fn at<M: GuestPhys>(
        &self,
        allocations: &Allocations<'_, M>,
        at: Gva,
    ) -> Option<(GvaRange, String)> {
        let found = allocations.allocation_at(at)?;
        if found.kind != AllocationKind::Slab {
            return None;
        }
        let object = found.range.first();
        let offset = Gva(at.0 - object.0);
        let is_count = |counts: &[GvaRange]| counts.iter().copied().find(|c| c.contains(offset));
        // Most stores are elsewhere, and a name takes reading.
        if !self.0.iter().any(|(_, counts)| is_count(counts).is_some()) {
            return None;
        }
        let name = allocations.cache_name(&found)?;
        let (_, counts) = self
            .0
            .iter()
            .find(|(caches, _)| caches.contains(&name.as_str()))?;
        let count = is_count(counts)?;
        let first = object.checked_add(count.first().0)?;
        Some((GvaRange::new(first, count.len_bytes())?, name))
    }
}
