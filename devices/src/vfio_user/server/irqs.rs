//! What a client says about interrupts.

use std::os::fd::OwnedFd;

use vmm_sys_util::eventfd::EventFd;

use super::commands::Device;
use super::interrupts::eventfd;
use crate::vfio_user::message::{
    INTX, IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, IrqAction, IrqData, IrqInfo, MSIX, Payload,
    SetIrqs,
};

impl Device {
    pub(super) fn irq_info(&self, question: &IrqInfo) -> Result<Vec<u8>, i32> {
        let count = self.irqs.get(question.index as usize);
        let flags = match question.index {
            INTX => IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED,
            _ => IRQ_EVENTFD,
        };
        let info = IrqInfo {
            argsz: IrqInfo::BYTES,
            flags,
            index: question.index,
            count: *count.ok_or(libc::EINVAL)?,
        };
        Ok(info.to_bytes())
    }

    pub(super) fn set_irqs(&mut self, set: &SetIrqs, fds: Vec<OwnedFd>) -> Result<(), i32> {
        let there = *self.irqs.get(set.index as usize).ok_or(libc::EINVAL)?;
        let end = set.start.checked_add(set.count).ok_or(libc::EINVAL)?;
        if end > there || !fds.is_empty() && set.data != IrqData::Events {
            return Err(libc::EINVAL);
        }
        let events = fds.into_iter().map(eventfd).collect::<Option<Vec<_>>>();
        let events = events.ok_or(libc::EINVAL)?;
        let turns_off = set.data == IrqData::None && set.action == IrqAction::Trigger;
        match set.index {
            _ if set.count == 0 && !(turns_off && set.start == 0) => Err(libc::EINVAL),
            INTX => self.set_line(set, events),
            MSIX => self.set_vectors(set, events),
            // There are none of them to turn off.
            _ => Ok(()),
        }
    }

    fn set_line(&mut self, set: &SetIrqs, mut events: Vec<EventFd>) -> Result<(), i32> {
        if events.len() > 1 {
            return Err(libc::EINVAL);
        }
        let event = events.pop();
        let now = match &set.data {
            IrqData::None => true,
            IrqData::Bools(bools) => bools.first() == Some(&true),
            IrqData::Events => false,
        };
        match (set.action, &set.data) {
            (IrqAction::Trigger, _) if set.count == 0 => {
                self.interrupts.set_trigger(None);
                self.replaced.extend(self.interrupts.set_unmask(None));
            }
            (IrqAction::Trigger, IrqData::Events) => self.interrupts.set_trigger(event),
            (IrqAction::Unmask, IrqData::Events) => {
                self.replaced.extend(self.interrupts.set_unmask(event));
            }
            (IrqAction::Mask, IrqData::Events) => return Err(libc::ENOTTY),
            (IrqAction::Trigger, _) if now => self.interrupts.trigger_line(),
            (IrqAction::Mask, _) if now => self.interrupts.set_masked(true),
            (IrqAction::Unmask, _) if now => self.interrupts.set_masked(false),
            _ => {}
        }
        Ok(())
    }

    fn set_vectors(&mut self, set: &SetIrqs, events: Vec<EventFd>) -> Result<(), i32> {
        if set.action != IrqAction::Trigger {
            return Err(libc::ENOTTY);
        }
        let range = set.start..set.start + set.count;
        match &set.data {
            IrqData::None if set.count == 0 => {
                for vector in 0..self.irqs[MSIX as usize] {
                    self.interrupts.set_vector(vector, None);
                }
            }
            IrqData::None => range.for_each(|vector| self.interrupts.trigger_vector(vector)),
            IrqData::Bools(bools) => {
                let wanted = range.zip(bools).filter(|(_, wanted)| **wanted);
                wanted.for_each(|(vector, _)| self.interrupts.trigger_vector(vector));
            }
            IrqData::Events if events.is_empty() => {
                range.for_each(|vector| self.interrupts.set_vector(vector, None));
            }
            IrqData::Events if events.len() != set.count as usize => return Err(libc::EINVAL),
            IrqData::Events => {
                for (vector, event) in range.zip(events) {
                    self.interrupts.set_vector(vector, Some(event));
                }
            }
        }
        Ok(())
    }
}
