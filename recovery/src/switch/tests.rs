//! A device with one set of registers, for which every step fails, once or again on the way back,
//! with or without its effect.

use super::*;

/// A device that has rules, and checks them at every step.
#[derive(Debug, Default)]
struct Device {
    /// Whether it may reach memory and interrupt.
    runs: bool,
    /// Whose memory it reaches.
    mapped: Vec<u32>,
    /// Only a part of it.
    in_part: bool,
    /// Whose state is in its registers: each guest's is its number. A step that fails in the middle
    /// leaves neither's.
    registers: Option<u32>,
    /// What was saved of each guest.
    contexts: [Option<u32>; 3],
    silenced: bool,
    /// Which calls fail, counted from 0, and whether they have had their effect then.
    fails: Vec<(usize, bool)>,
    calls: usize,
}

impl Device {
    /// Guest 0 has it, guests 1 and 2 are parked.
    fn new(fails: &[(usize, bool)]) -> Self {
        Self {
            runs: true,
            mapped: vec![0],
            registers: Some(0),
            contexts: [None, Some(1), Some(2)],
            fails: fails.to_vec(),
            ..Self::default()
        }
    }

    /// Nobody has it.
    fn silent(fails: &[(usize, bool)]) -> Self {
        Self {
            contexts: [Some(0), Some(1), Some(2)],
            silenced: true,
            fails: fails.to_vec(),
            ..Self::default()
        }
    }

    fn call(&mut self, effect: impl FnOnce(&mut Self)) -> Result<(), String> {
        assert!(self.mapped.len() <= 1, "two guests' memory at a time");
        let call = self.calls;
        self.calls += 1;
        let failing = self.fails.iter().find(|fail| fail.0 == call).copied();
        if failing.is_none_or(|(_, with_effect)| with_effect) {
            effect(self);
        }
        failing.map_or(Ok(()), |_| Err(format!("call {call}")))
    }

    /// Whoever has the device has it as it was, and nobody's state is lost.
    fn check(&self, holder: Option<u32>) {
        assert_eq!(self.silenced, holder.is_none());
        assert_eq!(
            self.runs,
            holder.is_some(),
            "it runs for whoever has it only"
        );
        assert_eq!(self.mapped, holder.into_iter().collect::<Vec<_>>());
        assert!(
            holder.is_none() || !self.in_part,
            "it lacks memory of its guest"
        );
        for guest in 0..3 {
            let is_there = match holder == Some(guest) {
                true => self.registers == Some(guest),
                false => self.contexts[guest as usize] == Some(guest),
            };
            assert!(
                is_there || self.lost(guest),
                "the state of guest {guest}: {self:?}"
            );
        }
    }

    /// A guest's state that could not be saved, and that it could not go on with, cannot be had by
    /// anybody.
    fn lost(&self, guest: u32) -> bool {
        guest == 0 && self.silenced && self.contexts[0].is_none()
    }
}

impl Switchable for Device {
    type Guest = u32;

    fn prepare(&mut self, guest: &u32) -> Result<(), String> {
        assert_eq!(self.mapped, [*guest]);
        assert!(self.runs, "nobody waits for what was done already");
        self.call(|device| device.in_part = true)
    }

    fn quiesce(&mut self, guest: &u32) -> Result<(), String> {
        assert_eq!(self.mapped, [*guest]);
        self.call(|device| device.runs = false)
    }

    fn save(&mut self, guest: &u32) -> Result<(), String> {
        assert!(!self.runs, "saved while it runs");
        assert_eq!(self.registers, Some(*guest), "another's state is saved");
        self.call(|device| device.contexts[*guest as usize] = Some(*guest))
    }

    fn unmap(&mut self, guest: &u32) -> Result<(), String> {
        assert!(!self.runs, "memory is taken from a device that runs");
        self.call(|device| device.mapped.retain(|mapped| mapped != guest))
    }

    fn map(&mut self, guest: &u32) -> Result<(), String> {
        assert!(!self.runs, "memory is given to a device that runs");
        assert!(self.mapped.is_empty() || self.mapped == [*guest]);
        self.call(|device| {
            device.mapped = vec![*guest];
            device.in_part = true;
        })
    }

    fn load(&mut self, guest: &u32) -> Result<(), String> {
        assert_eq!(self.mapped, [*guest]);
        let state = self.contexts[*guest as usize];
        assert_eq!(state, Some(*guest), "there is nothing to load");
        self.registers = None;
        self.call(|device| device.registers = state)
    }

    fn resume(&mut self, guest: &u32) -> Result<(), String> {
        assert_eq!(self.mapped, [*guest]);
        assert_eq!(
            self.registers,
            Some(*guest),
            "it would run with another's state"
        );
        self.call(|device| {
            device.runs = true;
            device.silenced = false;
            // From now on the device changes it.
            device.contexts[*guest as usize] = None;
        })
    }

    fn complete(&mut self, guest: &u32) -> Result<(), String> {
        assert_eq!(self.mapped, [*guest]);
        assert!(self.runs, "its guest would wait for nothing");
        self.call(|device| device.in_part = false)
    }

    fn silence(&mut self) {
        // What is in its registers and nowhere else.
        if let Some(guest) = self.registers {
            self.contexts[guest as usize] = Some(guest);
        }
        self.runs = false;
        self.silenced = true;
        self.mapped.clear();
    }
}

/// Every step fails, and then every step on the way back, each with and without its effect.
#[test]
fn whatever_fails_one_guest_has_the_device_or_nobody_and_no_state_is_lost() {
    let (mut back, mut nobody, mut switched) = (0, 0, 0);
    let places = |from: usize| (from..20).flat_map(|call| [(call, false), (call, true)]);
    for (from, to) in [(Some(0), Some(1)), (None, Some(1)), (Some(0), None)] {
        for first in places(0) {
            for second in places(first.0 + 1) {
                let fails = [first, second];
                let mut device = match from {
                    Some(_) => Device::new(&fails),
                    None => Device::silent(&fails),
                };
                let (outcome, phases) = switch(&mut device, from.as_ref(), to.as_ref());
                let holder = match &outcome {
                    Outcome::Switched {} => to,
                    Outcome::Back { .. } => from,
                    Outcome::Nobody { .. } => None,
                };
                device.check(holder);
                match outcome {
                    Outcome::Switched {} => switched += 1,
                    Outcome::Back { failed } => {
                        back += 1;
                        assert_eq!(failed.reason, format!("call {}", first.0));
                        assert!(phases.undo_ns.is_some());
                    }
                    Outcome::Nobody { state_lost, .. } => {
                        nobody += 1;
                        assert!(!state_lost);
                    }
                }
                // Nothing that failed is in the way of the next switch, to another guest.
                device.fails.clear();
                let (outcome, _) = switch(&mut device, holder.as_ref(), Some(&2));
                assert_eq!(outcome, Outcome::Switched {});
                device.check(Some(2));
            }
        }
    }
    assert!(
        back > 100 && nobody > 100 && switched > 100,
        "{back} {nobody} {switched}"
    );
}

#[test]
fn a_state_that_cannot_be_saved_at_all_is_said_to_be_lost() {
    // Save, resume, and save once more.
    let mut device = Device::new(&[(2, false), (3, false), (5, false)]);
    let (outcome, _) = switch(&mut device, Some(&0), Some(&1));
    let Outcome::Nobody {
        failed,
        on_the_way_back,
        state_lost: true,
    } = outcome
    else {
        panic!("{outcome:?}");
    };
    assert_eq!(
        (failed.step, on_the_way_back.unwrap().step),
        (Step::Save, Step::Resume)
    );
    assert!(device.silenced && !device.runs && device.mapped.is_empty());
}

#[test]
fn each_step_is_timed_and_done_once_in_its_order() {
    let mut device = Device::new(&[]);
    let (outcome, phases) = switch(&mut device, Some(&0), Some(&1));
    assert_eq!((outcome, device.calls), (Outcome::Switched {}, 8));
    assert!(phases.still_ns() <= phases.total_ns());
    let Phases {
        prepare_ns,
        quiesce_ns,
        save_ns,
        unmap_ns,
        map_ns,
        load_ns,
        resume_ns,
        complete_ns,
        undo_ns,
    } = phases;
    let first = [prepare_ns, quiesce_ns, save_ns, unmap_ns];
    let all = first
        .into_iter()
        .chain([map_ns, load_ns, resume_ns, complete_ns]);
    let mut all = all.collect::<Vec<_>>().into_iter();
    assert!(all.all(|ns| ns.is_some()) && undo_ns.is_none());
    let (_, phases) = switch(&mut device, Some(&1), None);
    assert_eq!((phases.map_ns, phases.resume_ns), (None, None));
}

#[test]
fn turns_go_round() {
    assert_eq!(next_after(&["a", "b", "c"], Some(&"a")), Some(&"b"));
    assert_eq!(next_after(&["a", "b", "c"], Some(&"c")), Some(&"a"));
    assert_eq!(next_after(&["a", "b"], Some(&"gone")), Some(&"a"));
    assert_eq!(next_after(&["a", "b"], None), Some(&"a"));
    assert_eq!(next_after(&["a"], Some(&"a")), None);
    assert_eq!(next_after::<&str>(&[], Some(&"a")), None);
}
