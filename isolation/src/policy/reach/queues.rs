//! Packets that a driver keeps in queues (`struct sk_buff_head`, include/linux/skbuff.h): a ring of
//! packets, linked by their first member, with the queue's head in it.

use super::{Reach, Start};
use crate::guest::addr::Gva;
use crate::guest::allocations::FindAllocation;
use crate::guest::phys::GuestPhys;

/// Most packets of one question.
const MAX_PACKETS: usize = 256;

impl<M: GuestPhys, A: FindAllocation> Reach<'_, M, A> {
    /// The packets in the queues whose heads are at `queues`, as many as are looked at. Stops in
    /// each where it is damaged.
    pub fn queued_in(&self, queues: &[Gva]) -> Vec<Start> {
        let Some(type_id) = self.struct_named("sk_buff") else {
            return Vec::new();
        };
        let mut found: Vec<Start> = Vec::new();
        for head in queues {
            let mut at = *head;
            while found.len() < MAX_PACKETS {
                let Some(next) = self.virt.read_u64(at).ok().map(Gva) else {
                    break;
                };
                // An object of its own, or the kernel's or another driver's memory would be taken
                // for a packet.
                let begins = |at: Gva| {
                    let object = self.allocations.allocation_at(at);
                    object.is_some_and(|object| object.range.first() == at)
                };
                if next == *head || !begins(next) {
                    break;
                }
                at = next;
                found.push(Start {
                    at,
                    type_id,
                    name: "packet in a queue of the driver's".into(),
                });
            }
        }
        found
    }
}
