//! Memory behind what the call asked for.

use super::Call;
use crate::domain::monitor::{Asked, MAX_ASKED};
use crate::domain::supervisor::Behind;
use crate::domain::view::{PAGE_SIZE, Pfn};
use crate::domain::violation::ViolationKind;
use crate::guest::addr::{Gva, GvaRange};

/// What SLUB fills red zones with (include/linux/poison.h), of objects that are in use and of free
/// ones.
const RED: [u8; 2] = [0xcc, 0xbb];

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

    /// The first bytes that the driver has written behind what the call asked for, where it is known
    /// what was there. The kernel's own red zones are looked at in any case; memory that was zero
    /// only where no kernel function ran but those that hand it out and take it back: another may
    /// have given the object away, and whoever got it has written there.
    pub(super) fn overrun(&mut self) -> Option<ViolationKind> {
        self.tell_asked();
        if self.asked == 0 {
            return None;
        }
        let only_asked = self.crossed() <= self.asked as u64 && !self.went_elsewhere();
        let behind = self.supervisor.behind_asked();
        let mut behind = behind.iter().filter(|one| one.is_red_zone || only_asked);
        behind.find_map(|behind| self.written_in(behind))
    }

    fn written_in(&self, behind: &Behind) -> Option<ViolationKind> {
        let zone = behind.range;
        let is_written = |byte: &u8| match behind.is_red_zone {
            true => !RED.contains(byte),
            false => *byte != 0,
        };
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
