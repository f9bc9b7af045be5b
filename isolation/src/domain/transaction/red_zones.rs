//! Memory behind what the call asked for.

use super::Call;
use crate::domain::monitor::{Asked, MAX_ASKED};
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::domain::violation::ViolationKind;
use crate::guest::addr::{Gva, GvaRange};

/// What SLUB fills memory with (include/linux/poison.h): free, its end, in use.
const POISON: [u8; 3] = [0x6b, 0xa5, 0x5a];

impl Call<'_> {
    /// Tells what the call has asked for since it was last told.
    pub(super) fn tell_asked(&mut self) {
        let count = self.domain.monitor.asked_count();
        if count > self.asked {
            let is_full = count >= MAX_ASKED;
            let from = if is_full { 0 } else { self.asked };
            let mut asked: Vec<Asked> = self.domain.monitor.asked(from).collect();
            if is_full {
                // What else there was is not known.
                asked.iter_mut().for_each(|asked| asked.bytes = None);
            }
            self.asked = count;
            self.supervisor.asked_for(&asked);
        }
    }

    /// The first bytes that were written behind what the call asked for, where that was zero.
    pub(super) fn overrun(&mut self) -> Option<ViolationKind> {
        self.tell_asked();
        if self.asked == 0 {
            return None;
        }
        let zones = self.supervisor.zeroed_behind();
        zones.into_iter().find_map(|zone| self.written_in(zone))
    }

    fn written_in(&self, zone: GvaRange) -> Option<ViolationKind> {
        for page in zone.pages() {
            let piece = zone.intersection(&GvaRange::aligned(page, PAGE_SIZE))?;
            let at = self
                .domain
                .roots
                .translate(piece.first().0, &self.domain.view);
            let gpa = at.ok().flatten()?.gpa;
            let memory = self.domain.view.private_page(Pfn::of(gpa)).ok()?;
            let first = (gpa % PAGE_SIZE) as usize;
            let bytes = memory.get(first..first.checked_add(piece.len_bytes() as usize)?)?;
            let is_written = |byte: &u8| *byte != 0 && !POISON.contains(byte);
            if let Some(offset) = bytes.iter().position(is_written) {
                let run = bytes[offset..].iter().take_while(|byte| is_written(byte));
                let Gva(at) = piece.first();
                return Some(ViolationKind::StrayBytes {
                    address: at + offset as u64,
                    bytes: run.count() as u64,
                });
            }
        }
        None
    }
}
