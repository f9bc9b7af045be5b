//! Whose turn it is, and whose a frame is.

use std::collections::{BTreeMap, VecDeque};

use super::super::{SendOutcome, Wire};
use super::member::Member;
use super::{Parked, PortCounters, PortId, TurnError, TurnTimes};
use crate::clock::monotonic_ns;

/// Turns that are remembered.
const REMEMBERED: usize = 64;
/// Frames of others that one call sorts out at most, before the NIC is asked to look again.
const SORTED_AT_ONCE: usize = 64;
/// Frames at most that are taken off a wire that nobody had the turn at.
const STALE_FRAMES: usize = 4096;

/// See the module.
pub struct State {
    wire: Box<dyn Wire>,
    parked: Parked,
    holder: Option<PortId>,
    members: BTreeMap<PortId, Member>,
    next: u64,
    /// What the far end of the wire sees of the NIC's link.
    shown_link: bool,
    /// The far end is to see the link of a NIC that has just got the turn, once that has seen the
    /// carrier.
    link_due: bool,
    last_frame_ns: Option<u64>,
    times: VecDeque<TurnTimes>,
    turns: u64,
    lost_without_turn: u64,
}

/// Whose a frame is.
enum Owner {
    Holder,
    Other(PortId),
}

impl State {
    pub fn new(wire: Box<dyn Wire>, parked: Parked) -> Self {
        Self {
            wire,
            parked,
            holder: None,
            members: BTreeMap::new(),
            next: 0,
            shown_link: false,
            link_due: false,
            last_frame_ns: None,
            times: VecDeque::new(),
            turns: 0,
            lost_without_turn: 0,
        }
    }

    pub fn add(&mut self, member: Member) -> PortId {
        self.next += 1;
        let id = PortId(self.next);
        self.members.insert(id, member);
        id
    }

    /// The port is gone, and its turn with it.
    pub fn remove(&mut self, id: PortId) {
        if self.holder == Some(id) {
            self.take_away();
        }
        self.members.remove(&id);
    }

    pub fn holder(&self) -> Option<PortId> {
        self.holder
    }

    pub fn counters(&self, id: PortId) -> Option<PortCounters> {
        self.members.get(&id).map(|member| member.counters)
    }

    pub fn lost_without_turn(&self) -> u64 {
        self.lost_without_turn
    }

    pub fn times(&self, serial: u64) -> Option<TurnTimes> {
        self.times
            .iter()
            .find(|turn| turn.serial == serial)
            .copied()
    }

    /// See [`super::Turns::give`].
    pub fn give(&mut self, to: Option<PortId>) -> Result<u64, TurnError> {
        if to == self.holder {
            return Ok(self.turns);
        }
        let Some(id) = to else {
            self.take_away();
            return Ok(self.turns);
        };
        let member = self.members.get(&id).ok_or(TurnError::Gone)?;
        // What can fail comes first.
        if member.plugged {
            member.watch(&*self.wire).map_err(TurnError::Watch)?;
        }
        match self.holder.take() {
            Some(old) => self.park(old),
            None => self.lose_stale_frames(),
        }
        self.holder = Some(id);
        self.link_due = true;
        self.turns += 1;
        if self.times.len() == REMEMBERED {
            self.times.pop_front();
        }
        self.times.push_back(TurnTimes {
            serial: self.turns,
            since_ns: monotonic_ns(),
            last_frame_before_ns: self.last_frame_ns,
            first_frame_ns: None,
        });
        if let Some(member) = self.members.get_mut(&id) {
            member.stop_waiting();
            member.counters.turns += 1;
            member.wake();
        }
        Ok(self.turns)
    }

    /// Nobody has the turn any more.
    fn take_away(&mut self) {
        if let Some(old) = self.holder.take() {
            self.park(old);
        }
        self.show_link(false);
    }

    fn park(&mut self, id: PortId) {
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        if member.plugged {
            member.unwatch(&*self.wire);
        }
        let stall = match self.parked {
            Parked::Stall(limit) if member.plugged && self.wire.carrier() => Some(limit),
            _ => None,
        };
        member.park(stall);
    }

    /// Takes off the wire what came while nobody had the turn. What waits for a port goes on
    /// waiting.
    fn lose_stale_frames(&mut self) {
        let mut buffer = vec![0; super::super::MAX_FRAME_BYTES];
        for _ in 0..STALE_FRAMES {
            let Some(frame) = self.wire.receive(&mut buffer) else {
                break;
            };
            let frame = buffer.get(..frame).unwrap_or(&buffer);
            match self.owner(frame) {
                Owner::Other(id) => self.keep_for(id, frame),
                Owner::Holder => self.lost_without_turn += 1,
            }
        }
    }

    /// See [`super::Turns::plug`].
    pub fn plug(&mut self, id: PortId, plugged: bool) -> Result<(), TurnError> {
        let has_turn = self.holder == Some(id);
        let member = self.members.get_mut(&id).ok_or(TurnError::Gone)?;
        if member.plugged == plugged {
            return Ok(());
        }
        if has_turn && plugged {
            member.watch(&*self.wire).map_err(TurnError::Watch)?;
        } else if has_turn {
            member.unwatch(&*self.wire);
        }
        if !plugged {
            member.stop_waiting();
            member.lose_waiting();
        }
        member.plugged = plugged;
        member.wake();
        if has_turn && plugged {
            self.lose_stale_frames();
        }
        Ok(())
    }

    pub fn set_address(&mut self, id: PortId, address: [u8; 6]) {
        if let Some(member) = self.members.get_mut(&id) {
            member.address = address;
        }
    }

    pub fn set_stations(&mut self, id: PortId, addresses: &[[u8; 6]]) {
        if let Some(member) = self.members.get_mut(&id) {
            member.set_stations(addresses);
        }
    }

    pub fn carrier(&mut self, id: PortId) -> bool {
        let has_turn = self.holder == Some(id);
        let member = self.members.get_mut(&id);
        let up = member.is_some_and(|member| member.plugged && (has_turn || member.is_stalled()));
        up && self.wire.carrier()
    }

    /// Whether the port is parked without a carrier.
    pub fn loses_frames(&mut self, id: PortId) -> bool {
        let has_turn = self.holder == Some(id);
        let member = self.members.get_mut(&id);
        !has_turn && member.is_some_and(|member| member.plugged && !member.is_stalled())
    }

    pub fn nic_link(&mut self, id: PortId, up: bool) {
        if let Some(member) = self.members.get_mut(&id) {
            member.nic_up = Some(up);
        }
        // One that has just got the turn may not have seen the carrier yet: its link is not lost.
        if self.holder == Some(id) && (up || !self.link_due) {
            self.show_link(up);
        }
    }

    fn show_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.shown_link, up) != up {
            self.wire.nic_link(up);
        }
    }

    /// Whether the port has the turn and uses it.
    fn is_at_wire(&mut self, id: PortId) -> bool {
        let plugged = self.members.get(&id).is_some_and(|member| member.plugged);
        if self.holder != Some(id) || !plugged {
            return false;
        }
        if std::mem::take(&mut self.link_due) {
            let up = self.members.get(&id).and_then(|member| member.nic_up);
            self.show_link(up.unwrap_or(self.shown_link));
        }
        true
    }

    pub fn send(&mut self, id: PortId, frame: &[u8]) -> SendOutcome {
        let at_wire = self.is_at_wire(id);
        let Some(member) = self.members.get_mut(&id) else {
            return SendOutcome::Dropped;
        };
        member.tried();
        if !at_wire && member.plugged && self.holder != Some(id) && member.is_stalled() {
            return SendOutcome::Full;
        }
        let outcome = match at_wire {
            true => self.wire.send(frame),
            false => SendOutcome::Dropped,
        };
        match outcome {
            SendOutcome::Sent => {
                member.counters.sent += 1;
                member.counters.sent_bytes += frame.len() as u64;
                self.passed();
            }
            SendOutcome::Full => {}
            SendOutcome::Dropped => member.counters.sent_without_carrier += 1,
        }
        outcome
    }

    pub fn receive(&mut self, id: PortId, buffer: &mut [u8]) -> Option<usize> {
        let at_wire = self.is_at_wire(id);
        let member = self.members.get_mut(&id)?;
        if !at_wire {
            // Looks at the time as well.
            member.is_stalled();
            member.seen();
            return None;
        }
        while let Some(frame) = member.waited() {
            // One that does not fit is dropped, as it would be by the wire.
            if let Some(room) = buffer.get_mut(..frame.len()) {
                room.copy_from_slice(&frame);
                member.counters.delivered_after_wait += 1;
                return Some(self.received(id, frame.len()));
            }
        }
        for _ in 0..SORTED_AT_ONCE {
            let Some(length) = self.wire.receive(buffer) else {
                self.members.get_mut(&id)?.seen();
                return None;
            };
            let length = length.min(buffer.len());
            let frame = buffer.get(..length)?;
            match self.owner(frame) {
                Owner::Holder => return Some(self.received(id, length)),
                Owner::Other(other) => {
                    self.keep_for(other, frame);
                    self.members.get_mut(&id)?.counters.refused_as_anothers += 1;
                }
            }
        }
        self.members.get_mut(&id)?.look_again();
        None
    }

    fn received(&mut self, id: PortId, length: usize) -> usize {
        if let Some(member) = self.members.get_mut(&id) {
            member.counters.received += 1;
            member.counters.received_bytes += length as u64;
        }
        self.passed();
        length
    }

    /// A frame has passed between the wire and the port with the turn.
    fn passed(&mut self) {
        let now = monotonic_ns();
        self.last_frame_ns = Some(now);
        if let Some(turn) = self.times.back_mut() {
            turn.first_frame_ns.get_or_insert(now);
        }
    }

    fn keep_for(&mut self, id: PortId, frame: &[u8]) {
        if let Some(member) = self.members.get_mut(&id) {
            member.keep_or_lose(frame);
        }
    }

    /// Whose the frame is, by its destination address. See the module's text.
    fn owner(&self, frame: &[u8]) -> Owner {
        let Some(address) = frame.first_chunk::<6>() else {
            return Owner::Holder;
        };
        if address[0] & 1 != 0 {
            return Owner::Holder;
        }
        let find = |has: fn(&Member, &[u8; 6]) -> bool| {
            let mut members = self.members.iter();
            let found = members.find(|(_, member)| has(member, address));
            found.map(|(id, _)| *id)
        };
        let given = find(|member, address| member.address == *address);
        let own = self.holder.and_then(|id| self.members.get(&id));
        let asked = || {
            let is_own = own.is_some_and(|member| member.stations.contains(address));
            let other = || find(|member, address| member.stations.contains(address));
            if is_own { self.holder } else { other() }
        };
        match given.or_else(asked) {
            Some(id) if self.holder != Some(id) => Owner::Other(id),
            _ => Owner::Holder,
        }
    }
}
