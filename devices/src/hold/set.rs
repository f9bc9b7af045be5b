//! All devices of one driver as one that can be held.
//!
//! They are held one inside the other, in the order in which they are given. Whoever holds several
//! sets at a time gives all of them in the same order, for instance that of their slots.

use std::sync::Arc;

use super::{Access, DeviceAddress, DeviceLost, DeviceState, HeldDevice, Holdable, OutsideChanges};

/// Two devices, or more by being one of the two. See the module.
pub struct HoldableSet {
    first: Arc<dyn Holdable>,
    rest: Arc<dyn Holdable>,
}

impl HoldableSet {
    /// All of `devices` as one; `None` if there is none.
    pub fn of(devices: impl IntoIterator<Item = Arc<dyn Holdable>>) -> Option<Arc<dyn Holdable>> {
        let devices: Vec<_> = devices.into_iter().collect();
        let all = devices.into_iter().rev();
        all.reduce(|rest, first| Arc::new(Self { first, rest }))
    }
}

impl Holdable for HoldableSet {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) -> Result<(), DeviceLost> {
        let mut inner = Ok(());
        self.first.hold(&mut |first| {
            inner = self.rest.hold(&mut |rest| with(&mut Held { first, rest }));
        })?;
        inner
    }
}

struct Held<'a> {
    first: &'a mut dyn HeldDevice,
    rest: &'a mut dyn HeldDevice,
}

/// The state of both.
struct Both(DeviceState, DeviceState);

fn both(state: &DeviceState) -> Option<&Both> {
    state.0.downcast_ref()
}

impl Held<'_> {
    fn is_of_first(&self, at: DeviceAddress) -> bool {
        match at {
            DeviceAddress::Memory(gpa) => self.first.owns(gpa),
            DeviceAddress::Port(port) => self.first.owns_port(port),
        }
    }

    fn owner(&mut self, at: DeviceAddress) -> &mut dyn HeldDevice {
        if self.is_of_first(at) {
            &mut *self.first
        } else {
            &mut *self.rest
        }
    }
}

impl HeldDevice for Held<'_> {
    fn owns(&self, gpa: u64) -> bool {
        self.first.owns(gpa) || self.rest.owns(gpa)
    }

    fn owns_port(&self, port: u16) -> bool {
        self.first.owns_port(port) || self.rest.owns_port(port)
    }

    fn sleeps_at(&self, gpa: u64) -> bool {
        self.first.sleeps_at(gpa) || self.rest.sleeps_at(gpa)
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        self.owner(at).read(at, data);
    }

    fn read_past(
        &mut self,
        at: DeviceAddress,
        bytes: usize,
        waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        self.owner(at).read_past(at, bytes, waiting)
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        self.owner(at).write(at, data);
    }

    fn uses_memory(&self, at: DeviceAddress, bytes: usize, access: Access) -> bool {
        let owner = match self.is_of_first(at) {
            true => &*self.first,
            false => &*self.rest,
        };
        owner.uses_memory(at, bytes, access)
    }

    fn checkpoint(&mut self) {
        self.first.checkpoint();
        self.rest.checkpoint();
    }

    fn stand_still(&mut self) {
        self.first.stand_still();
        self.rest.stand_still();
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        // Each is put back, whatever becomes of the other.
        let results = (self.first.restore(), self.rest.restore());
        results.0.and(results.1)
    }

    fn state(&self) -> Option<DeviceState> {
        let both = Both(self.first.state()?, self.rest.state()?);
        Some(DeviceState(Arc::new(both)))
    }

    fn undo(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        let (mut of_first, mut of_rest) = (Vec::new(), Vec::new());
        for (before, after) in parts {
            let (Some(before), Some(after)) = (both(before), both(after)) else {
                return Err("its checkpoints are another device's".to_owned());
            };
            of_first.push((before.0.clone(), after.0.clone()));
            of_rest.push((before.1.clone(), after.1.clone()));
        }
        let now = self.first.state();
        self.first.undo(&of_first)?;
        let result = self.rest.undo(&of_rest);
        if let (Err(reason), Some(now)) = (&result, now) {
            // All or nothing.
            let lost =
                |error| format!("{reason}, and another device of its driver is lost: {error}");
            self.first.put_back(&now).map_err(lost)?;
        }
        result
    }

    fn put_back(&mut self, state: &DeviceState) -> Result<(), DeviceLost> {
        let foreign = || DeviceLost("its state is another device's".to_owned());
        let Both(first, rest) = both(state).ok_or_else(foreign)?;
        let results = (self.first.put_back(first), self.rest.put_back(rest));
        results.0.and(results.1)
    }

    fn requests_changed(&self, before: &DeviceState, after: &DeviceState) -> bool {
        both(before)
            .zip(both(after))
            .is_some_and(|(before, after)| {
                self.first.requests_changed(&before.0, &after.0)
                    || self.rest.requests_changed(&before.1, &after.1)
            })
    }

    fn memory(&mut self) -> Vec<(u64, u64)> {
        let mut memory = self.first.memory();
        memory.extend(self.rest.memory());
        memory
    }

    fn freeze_interrupts(&mut self) {
        self.first.freeze_interrupts();
        self.rest.freeze_interrupts();
    }

    fn withhold_interrupts(&mut self, withhold: bool) {
        self.first.withhold_interrupts(withhold);
        self.rest.withhold_interrupts(withhold);
    }

    fn call_ended(&mut self, failed: bool) {
        self.first.call_ended(failed);
        self.rest.call_ended(failed);
    }

    fn keep_outside(&mut self) {
        self.first.keep_outside();
        self.rest.keep_outside();
    }

    fn show_outside(&mut self, changes: OutsideChanges) {
        self.first.show_outside(changes);
        self.rest.show_outside(changes);
    }

    fn silence(&mut self) {
        self.first.silence();
        self.rest.silence();
    }
}
