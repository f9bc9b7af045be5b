//! What is to be done with a packet, a block I/O, a request or a poll whose call did not take
//! place.
//!
//! A value tells most callers that a call failed. But who submits a `bio` gets no value, and who
//! gives a packet to a device without a queue has nowhere to keep it: they rely on the driver to
//! end what it was given. In its place the guest calls the kernel function that the driver would
//! have called. Which function of the driver it is that has this duty is read where the kernel
//! reads it, in the tables of operations that belong to the very object.
//!
//! And a function that sets something up and returns nothing has a caller who goes on with what was
//! not set up: the guest calls a function of the kernel's own that makes something harmless of it.
//! Which call that is tells the place that it returns to.
//!
//! All that is read is the guest's and hostile: what does not lead where it should is no duty.

use std::sync::LazyLock;

use serde::Deserialize;

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::{Btf, Function, Kind};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;
use crate::models;

use super::abort_value::REGISTER_ARGUMENTS;
use super::reach::Path;

/// `BLK_STS_IOERR` (include/linux/blk_types.h).
const BLK_STS_IOERR: u8 = 10;
/// `NETDEV_TX_OK` (include/linux/netdevice.h).
const NETDEV_TX_OK: u64 = 0;

/// Kernel functions that free a packet that was dropped, in any context, the newest first, with
/// what they take as the reason: since Linux 6.4, and before.
const DROPS: &[(&str, &str)] = &[
    ("dev_kfree_skb_any_reason", "SKB_DROP_REASON_NOT_SPECIFIED"),
    ("__dev_kfree_skb_any", "SKB_REASON_DROPPED"),
];

/// What the functions get in which a block driver learns that requests are done, or does them
/// later: nobody asks again if they fail.
const LATER: &[&str] = &[
    "work_struct",
    "timer_list",
    "hrtimer",
    "tasklet_struct",
    "virtqueue",
    "kiocb",
    "callback_head",
];

/// Structures that only block drivers have something to do with.
const OF_BLOCK_DRIVERS: &[&str] = &["gendisk", "blk_mq_tag_set"];

/// Whether the module defines a structure with a disk, or a pointer to one.
pub fn serves_blocks(types: &Btf) -> bool {
    let has = |type_id| {
        let to = types.pointee(type_id).unwrap_or(type_id);
        let names = types.names_of(to);
        OF_BLOCK_DRIVERS.iter().any(|name| names.contains(name))
    };
    types.base().is_some()
        && types.own_ids().any(|id| match types.kind(id) {
            Some(Kind::Struct { members, .. }) => members.iter().any(|member| has(member.type_id)),
            _ => false,
        })
}

/// Whether a function of a block driver's is one that completes requests and that nobody calls
/// again: it returns nothing that its caller could know a failure by, and gets one of the objects
/// of such functions.
fn completes_requests(types: &Btf, function: &Function<'_>) -> bool {
    let first = function.params.iter().next();
    let to = first.and_then(|p| types.pointee(p.type_id));
    let is_later = to.is_some_and(|to| {
        let names = types.names_of(to);
        LATER.iter().any(|name| names.contains(name))
    });
    let returns = types.resolve(function.returns).map(|(_, kind)| kind);
    is_later
        && (matches!(returns, Some(Kind::Void))
            || types
                .names_of(function.returns)
                .contains(&"hrtimer_restart"))
}

/// Why no answer would do if the function `name` of a block driver failed, if that is so: whoever
/// relies on it would wait for ever.
pub fn no_answer(types: &Btf, name: &str) -> Option<&'static str> {
    completes_requests(types, &types.find_function(name)?)
        .then_some("if it failed, the requests that it is to complete would never end")
}

/// What the guest does in place of a function that was not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// A byte to be stored first.
    pub store: Option<(Gva, u8)>,
    /// The kernel function that the guest calls, and its arguments.
    pub call: (u64, [u64; REGISTER_ARGUMENTS]),
    /// What is returned instead of the error.
    pub value: Option<u64>,
    /// For the log.
    pub what: &'static str,
    /// Somebody has to hear of it: what was asked for is not there.
    pub is_makeshift: bool,
}

/// An object that a function of the driver's has to end: it is the one in a table of operations.
#[derive(Debug, Clone)]
struct Duty {
    /// From the object to the table's pointer to the function.
    function: Path,
    /// The kernel function that ends the object.
    ends: u64,
}

/// No function whose calls are told by where they return to is longer, in bytes.
const LONGEST_CALLER: u64 = 4096;

/// What models/stand_ins.toml tells.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
struct StandIns {
    stand_in: Vec<KnownStandIn>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KnownStandIn {
    called_by: &'static str,
    run: &'static str,
    what: &'static str,
}

static STAND_INS: LazyLock<StandIns> =
    LazyLock::new(|| models::built_in(include_str!("../../models/stand_ins.toml")));

/// A function of the kernel's that is run in the place of one that sets something up.
#[derive(Debug, Clone)]
struct StandIn {
    /// Where the caller is.
    caller: GvaRange,
    /// What is run.
    run: u64,
    /// What it makes.
    what: &'static str,
}

/// How packets are dropped.
#[derive(Debug, Clone, Copy)]
struct Drops {
    /// The kernel function, and its second argument.
    call: (u64, u64),
    /// `sk_buff.queue_mapping`, 2 bytes.
    mapping: u64,
    /// `net_device._tx`.
    queues: u64,
    /// `net_device.num_tx_queues`, 4 bytes.
    count: u64,
    queue_bytes: u64,
    /// `netdev_queue.qdisc`, and in there `enqueue`, which is NULL if there is no queue.
    qdisc: u64,
    enqueue: u64,
}

/// What the kernel expects of drivers, of a guest with certain types and symbols. What it does not
/// have is not expected.
#[derive(Debug, Clone, Default)]
pub struct Completions {
    bio: Option<(Duty, u64)>,
    request: Option<Duty>,
    poll: Option<Duty>,
    drops: Option<Drops>,
    stand_ins: Vec<StandIn>,
}

impl Completions {
    /// Of a guest with these types and symbols.
    pub fn new(types: &Btf, symbols: &SymbolTable) -> Self {
        let duty = |of: &str, function: &str, ends: &str| {
            Some(Duty {
                function: Path::find(types, types.find_struct(of)?, function)?,
                ends: symbols.kernel_symbol(ends)?.at.0,
            })
        };
        let bio = || {
            let status = types.find_member(types.find_struct("bio")?, "bi_status")?;
            let submits = duty("bio", "bi_bdev->bd_disk->fops->submit_bio", "bio_endio")?;
            Some((submits, u64::from(status.bit_offset / 8)))
        };
        let stand_ins = STAND_INS.stand_in.iter().filter_map(|known| {
            let caller = symbols.kernel_symbol(known.called_by)?.at;
            Some(StandIn {
                caller: symbols.extent(caller, GvaRange::new(caller, LONGEST_CALLER)?)?,
                run: symbols.kernel_symbol(known.run)?.at.0,
                what: known.what,
            })
        });
        Self {
            stand_ins: stand_ins.collect(),
            bio: bio(),
            request: duty("request", "q->mq_ops->complete", "blk_mq_end_request"),
            poll: duty("napi_struct", "poll", "napi_complete_done"),
            drops: Drops::new(types, symbols),
        }
    }

    /// What has to be done in place of the function with its gate at `gate` and these `arguments`,
    /// which returns to `caller` and was not run or was taken back as a whole; `None` if its value
    /// says it all. A packet is
    /// kept by the kernel if the device has a queue, unless the driver or this function
    /// `is_stopped`, so that it would be kept for good; and a device that is always polled again
    /// after a failure would be polled for ever.
    pub fn of<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        gate: u64,
        (transmits, is_stopped): (bool, bool),
        arguments: &[u64; REGISTER_ARGUMENTS],
        caller: Option<Gva>,
    ) -> Option<Completion> {
        let mut stand_ins = self.stand_ins.iter();
        if let Some(stand_in) =
            stand_ins.find(|known| caller.is_some_and(|at| known.caller.contains(at)))
        {
            return Some(Completion {
                store: None,
                call: (stand_in.run, *arguments),
                value: None,
                what: stand_in.what,
                is_makeshift: true,
            });
        }
        let object = Gva(arguments[0]);
        let has = |duty: &Duty| duty.function.leads_to(virt, object, gate);
        if transmits {
            let drops = self.drops?;
            let keeps = drops.has_queue(virt, object, Gva(arguments[1]))?;
            return (is_stopped || !keeps).then_some(Completion {
                store: None,
                call: (drops.call.0, [object.0, drops.call.1, 0, 0, 0, 0]),
                value: Some(NETDEV_TX_OK),
                what: "the packet is dropped",
                is_makeshift: false,
            });
        }
        if let Some((duty, status)) = self.bio.as_ref().filter(|(duty, _)| has(duty)) {
            return Some(Completion {
                store: Some((object.checked_add(*status)?, BLK_STS_IOERR)),
                call: (duty.ends, [object.0, 0, 0, 0, 0, 0]),
                value: None,
                what: "the I/O ends with an error",
                is_makeshift: false,
            });
        }
        if let Some(duty) = self.poll.as_ref().filter(|duty| is_stopped && has(duty)) {
            return Some(Completion {
                store: None,
                // Nothing was done.
                call: (duty.ends, [object.0, 0, 0, 0, 0, 0]),
                value: Some(0),
                what: "the device is not polled again",
                is_makeshift: false,
            });
        }
        let duty = self.request.as_ref().filter(|duty| has(duty))?;
        Some(Completion {
            store: None,
            call: (duty.ends, [object.0, BLK_STS_IOERR.into(), 0, 0, 0, 0]),
            value: None,
            what: "the request ends with an error",
            is_makeshift: false,
        })
    }
}

impl Drops {
    fn new(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let offset = |of: &str, member: &str| {
            let member = types.find_member(types.find_struct(of)?, member)?;
            Some(u64::from(member.bit_offset / 8))
        };
        let mut calls = DROPS.iter().filter_map(|(function, reason)| {
            let reason = u64::try_from(types.enum_value(reason)?).ok()?;
            Some((symbols.kernel_symbol(function)?.at.0, reason))
        });
        Some(Self {
            call: calls.next()?,
            mapping: offset("sk_buff", "queue_mapping")?,
            queues: offset("net_device", "_tx")?,
            count: offset("net_device", "num_tx_queues")?,
            queue_bytes: types.size_of(types.find_struct("netdev_queue")?)?,
            qdisc: offset("netdev_queue", "qdisc")?,
            enqueue: offset("Qdisc", "enqueue")?,
        })
    }

    /// Whether `device` has a queue in which the kernel keeps `packet`.
    fn has_queue<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        packet: Gva,
        device: Gva,
    ) -> Option<bool> {
        let (mut mapping, mut count) = ([0; 2], [0; 4]);
        virt.read(packet.checked_add(self.mapping)?, &mut mapping)
            .ok()?;
        virt.read(device.checked_add(self.count)?, &mut count)
            .ok()?;
        let mapping = u16::from_le_bytes(mapping);
        if u32::from(mapping) >= u32::from_le_bytes(count) {
            return None;
        }
        let word = |at: Gva, offset: u64| virt.read_u64(at.checked_add(offset)?).ok();
        let first = Gva(word(device, self.queues)?);
        let queue = first.checked_add(u64::from(mapping).checked_mul(self.queue_bytes)?)?;
        let qdisc = Gva(word(queue, self.qdisc)?);
        Some(word(qdisc, self.enqueue)? != 0)
    }
}

#[cfg(test)]
#[path = "completion_tests.rs"]
mod tests;
