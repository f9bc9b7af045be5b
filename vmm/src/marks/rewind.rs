//! Going back to a mark.
//!
//! What could refuse is asked before anything is changed. If something fails after that, the
//! machine is in no state that it ever was in: it stays paused and does not go on until a rewind to
//! a mark succeeds or it is reset.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::add_differing;
use super::error::MarkError;
use super::kept::{MarkState, Marks};
use super::pages::Places;
use super::tree::Id;
use crate::dirty::User;
use crate::error::Error;
use crate::handle::VmHandle;
use crate::participant::RestFor;
use crate::quiesce::Quiesced;
use crate::refused::QuiesceError;

/// A rewind that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewound {
    /// The mark.
    pub mark: String,
    /// Pages that were put back.
    pub pages: u64,
    /// What took how long.
    pub phases: RewindPhases,
}

/// Nanoseconds of the host's monotonic clock that the phases of a rewind took, one after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewindPhases {
    /// Bringing the machine to rest.
    pub rest_ns: u64,
    /// Finding out which pages changed.
    pub find_ns: u64,
    /// Putting pages back.
    pub memory_ns: u64,
    /// Putting vCPUs, interrupt controllers and clocks back.
    pub machine_ns: u64,
    /// Putting devices back.
    pub devices_ns: u64,
    /// Putting back what participants keep.
    pub participants_ns: u64,
}

impl RewindPhases {
    /// All of them but bringing the machine to rest.
    pub fn work_ns(&self) -> u64 {
        let phases = [
            self.find_ns,
            self.memory_ns,
            self.machine_ns,
            self.devices_ns,
            self.participants_ns,
        ];
        phases.iter().fold(0, |sum, ns| sum.saturating_add(*ns))
    }
}

/// Why a machine was not rewound.
#[derive(Debug, thiserror::Error)]
pub enum RewindError {
    /// Nothing was changed.
    #[error(transparent)]
    Refused(#[from] MarkError),
    /// It is between two states.
    #[error(
        "the rewind to {mark} failed half-way: {reason}; the guest stays paused until a rewind succeeds or it is reset"
    )]
    HalfWay {
        /// The mark.
        mark: String,
        /// What failed.
        reason: String,
    },
}

impl From<QuiesceError> for RewindError {
    fn from(error: QuiesceError) -> Self {
        Self::Refused(error.into())
    }
}

/// Measures phases.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.0, now));
        u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX)
    }
}

impl VmHandle {
    /// Takes the machine back to the mark with this name, or to the one that it has gone on from
    /// last. `limit` is how long to wait for it to come to rest. A machine that was running goes on
    /// from the mark, one that was paused stays so. Not to be called with a device locked.
    ///
    /// # Errors
    /// [`RewindError::Refused`]: nothing was changed. [`RewindError::HalfWay`]: see the module's
    /// text.
    pub fn rewind(&self, name: Option<&str>, limit: Duration) -> Result<Rewound, RewindError> {
        let mut watch = Stopwatch(Instant::now());
        let marks = &mut *self.kept_marks();
        let target = match name {
            Some(name) => marks
                .tree
                .find(name)
                .ok_or_else(|| MarkError::NoSuchMark(name.to_owned()))?,
            None => marks.tree.current().ok_or(MarkError::NoMark)?,
        };
        self.quiesce_mixed(RestFor::Rewind, limit, |quiesced| {
            let rest_ns = watch.lap();
            let result = quiesced.rewind(marks, target, &mut watch);
            if let Ok(rewound) = &result {
                marks.tree.set_current(target);
                quiesced.set_mixed(false);
                let phases = RewindPhases {
                    rest_ns,
                    ..rewound.phases
                };
                return Ok(Rewound {
                    phases,
                    ..rewound.clone()
                });
            }
            if let Err(RewindError::HalfWay { .. }) = result {
                // Its memory is the mark's by now: the next rewind begins there.
                marks.tree.set_current(target);
                quiesced.set_mixed(true);
            }
            result
        })?
    }
}

impl Quiesced<'_, '_> {
    fn rewind(
        &mut self,
        marks: &Marks,
        target: Id,
        watch: &mut Stopwatch,
    ) -> Result<Rewound, RewindError> {
        let node = marks.tree.get(target).ok_or(MarkError::NoMark)?;
        let (Some(name), Some(state)) = (&node.name, &node.state) else {
            return Err(MarkError::NoMark.into());
        };
        self.fits(state)?;
        // Until all is put back.
        let others = self.others_rest().map_err(MarkError::Others)?;
        self.machine.requests.forget_guests();
        let mut phases = RewindPhases::default();
        let ram = &self.machine.ram;
        let mut tracker = self.machine.dirty.lock();
        tracker.collect(ram).map_err(MarkError::State)?;
        let set = tracker.set(User::Marks).ok_or(MarkError::NoMark)?;
        marks.tree.add_path(target, set);
        if marks.others_wrote || others.is_some() {
            add_differing(ram, &marks.tree, target, set);
        }
        phases.find_ns = watch.lap();
        let places = Places::of(ram);
        for &page in set.pages() {
            places.put(page, marks.tree.content(target, page));
        }
        let pages = set.pages().len() as u64;
        tracker.rewound(User::Marks);
        drop(tracker);
        phases.memory_ns = watch.lap();
        let half_way = |reason: String| RewindError::HalfWay {
            mark: name.clone(),
            reason,
        };
        let failed = |error: Error| half_way(error.to_string());
        self.restore(&state.machine).map_err(failed)?;
        phases.machine_ns = watch.lap();
        self.restore_devices(&state.devices).map_err(failed)?;
        phases.devices_ns = watch.lap();
        let participants = self.machine.participants().clone();
        for participant in participants {
            let name = participant.name();
            let kept = state.kept.iter().find(|(who, _)| *who == name);
            let kept = kept.and_then(|(_, kept)| kept.clone());
            participant
                .put_back(&kept)
                .map_err(|reason| half_way(format!("{name}: {reason}")))?;
        }
        phases.participants_ns = watch.lap();
        drop(others);
        Ok(Rewound {
            mark: name.clone(),
            pages,
            phases,
        })
    }

    /// Whether the machine has what the mark's had: the same functions, not only as many.
    fn fits(&self, state: &MarkState) -> Result<(), MarkError> {
        let slots = |functions: &[(u8, u64)]| functions.iter().map(|(slot, _)| *slot).collect();
        let now = self.machine.pci.serials();
        let (has, had): (Vec<_>, Vec<_>) = (slots(&now), slots(&state.functions));
        if has != had {
            return Err(MarkError::Devices { has, had });
        }
        let others = now.iter().zip(&state.functions);
        let others = others.filter(|(now, then)| now != then);
        let slots: Vec<_> = others.map(|((slot, _), _)| *slot).collect();
        match slots.is_empty() {
            true => Ok(()),
            false => Err(MarkError::Exchanged { slots }),
        }
    }
}
