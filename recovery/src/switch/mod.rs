//! A device goes from one guest to another: which steps there are, what is done when one fails, how
//! long each takes.
//!
//! ```text
//!   old guest: prepare ─► quiesce ─► save ─► unmap ─┐
//!   new guest:                                       └─► map ─► load ─► resume ─► complete
//! ```
//!
//! During `prepare` and `complete` the device runs: what need not be done while nobody has it is
//! done there.
//!
//! Whatever fails, the device ends in one of three states: the new guest has it, the old one has it
//! again, or nobody has it and it is silenced, which cannot fail. What a guest's device was is in
//! the device or in what was saved of it: a saved context is kept until the device has been resumed
//! with it. Where it can be neither saved nor gone on with, that is said.

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A step of a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The device still runs for its guest, and what that does to it waits: what it does not need
    /// any more is taken away.
    Prepare,
    /// The device stands still for its guest: nothing is under way, it reads and writes no memory,
    /// interrupts nobody.
    Quiesce,
    /// Its state is put into the guest's context.
    Save,
    /// The guest's memory is taken away from it, all that there is of it still.
    Unmap,
    /// The next guest's memory is given to it, as much as it needs to go on.
    Map,
    /// It takes over the state in the next guest's context.
    Load,
    /// It goes on, for that guest, and what that does to it waits.
    Resume,
    /// It has all that it may have of its guest, which goes on, too.
    Complete,
}

impl Step {
    /// All of them, in their order.
    pub const ALL: [Self; 8] = [
        Self::Prepare,
        Self::Quiesce,
        Self::Save,
        Self::Unmap,
        Self::Map,
        Self::Load,
        Self::Resume,
        Self::Complete,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::Quiesce => "quiesce",
            Self::Save => "save",
            Self::Unmap => "unmap",
            Self::Map => "map",
            Self::Load => "load",
            Self::Resume => "resume",
            Self::Complete => "complete",
        })
    }
}

/// A device that guests have by turns. A step that fails may have been done in part.
pub trait Switchable {
    /// Which guest.
    type Guest;

    /// Takes from the device, which runs for `guest`, what it does not need to go on with what it
    /// was last told to do. Nothing needs to be done here.
    ///
    /// # Errors
    /// Something cannot be taken away; whether it was is not known.
    fn prepare(&mut self, _guest: &Self::Guest) -> Result<(), String> {
        Ok(())
    }
    /// Makes the device stand still, which `guest` has. A second time is as good as once.
    fn quiesce(&mut self, guest: &Self::Guest) -> Result<(), String>;
    /// Puts the state of the device, which stands still, into `guest`'s context. On an error the
    /// context is not to be used.
    fn save(&mut self, guest: &Self::Guest) -> Result<(), String>;
    /// Takes `guest`'s memory from the device, also where it has only a part of it: none is left.
    fn unmap(&mut self, guest: &Self::Guest) -> Result<(), String>;
    /// Gives `guest`'s memory to the device, which has nobody's or only a part of the same one's:
    /// at least what it needs to do what it was last told to.
    fn map(&mut self, guest: &Self::Guest) -> Result<(), String>;
    /// Has the device take over what is in `guest`'s context, which is kept.
    fn load(&mut self, guest: &Self::Guest) -> Result<(), String>;
    /// Lets the device go on for `guest`. One that was not stopped runs on.
    fn resume(&mut self, guest: &Self::Guest) -> Result<(), String>;
    /// Gives the device, which runs for `guest`, what [`Self::prepare`] took and [`Self::map`] left
    /// out. Nothing needs to be done here where those leave nothing out.
    ///
    /// # Errors
    /// It does not have all of it.
    fn complete(&mut self, _guest: &Self::Guest) -> Result<(), String> {
        Ok(())
    }
    /// Keeps the device from reading and writing memory and from interrupting, whatever state it is
    /// in, and takes all memory from it. The state of a guest that it ran for is kept as well as
    /// can be. Nobody has it then; the next switch is from nobody.
    fn silence(&mut self);
}

/// How long the steps took. A step that was not there is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// [`Step::Prepare`]
    pub prepare_ns: Option<u64>,
    /// [`Step::Quiesce`]
    pub quiesce_ns: Option<u64>,
    /// [`Step::Save`]
    pub save_ns: Option<u64>,
    /// [`Step::Unmap`]
    pub unmap_ns: Option<u64>,
    /// [`Step::Map`]
    pub map_ns: Option<u64>,
    /// [`Step::Load`]
    pub load_ns: Option<u64>,
    /// [`Step::Resume`]
    pub resume_ns: Option<u64>,
    /// [`Step::Complete`]
    pub complete_ns: Option<u64>,
    /// Undoing what had been done when a step failed.
    pub undo_ns: Option<u64>,
}

impl Phases {
    fn of(&mut self, step: Step) -> &mut Option<u64> {
        match step {
            Step::Prepare => &mut self.prepare_ns,
            Step::Quiesce => &mut self.quiesce_ns,
            Step::Save => &mut self.save_ns,
            Step::Unmap => &mut self.unmap_ns,
            Step::Map => &mut self.map_ns,
            Step::Load => &mut self.load_ns,
            Step::Resume => &mut self.resume_ns,
            Step::Complete => &mut self.complete_ns,
        }
    }

    /// All of it.
    pub fn total_ns(&self) -> u64 {
        let all = [
            self.prepare_ns,
            self.quiesce_ns,
            self.save_ns,
            self.unmap_ns,
            self.map_ns,
            self.load_ns,
            self.resume_ns,
            self.complete_ns,
            self.undo_ns,
        ];
        all.into_iter().flatten().fold(0, u64::saturating_add)
    }

    /// Of it, how long the device stood still.
    pub fn still_ns(&self) -> u64 {
        let running = [self.prepare_ns, self.complete_ns];
        let running = running.into_iter().flatten();
        running.fold(self.total_ns(), u64::saturating_sub)
    }
}

/// A step that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFailed {
    /// Which.
    pub step: Step,
    /// Why.
    pub reason: String,
}

impl fmt::Display for StepFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {}", self.step, self.reason)
    }
}

/// Who has the device after a switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Who was to have it; nobody, if nobody was to.
    Switched {},
    /// Who had it before.
    Back {
        /// The step that failed.
        failed: StepFailed,
    },
    /// Nobody, and it is silenced.
    Nobody {
        /// The step that failed.
        failed: StepFailed,
        /// The step that failed when it was given back; `None` if nobody had it before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        on_the_way_back: Option<StepFailed>,
        /// The state of who had it before could not be saved either: that guest's driver has to
        /// begin anew.
        state_lost: bool,
    },
}

/// Takes the device from one guest, if one has it, and gives it to another, if there is one. `from`
/// and `to` differ.
pub fn switch<D: Switchable>(
    device: &mut D,
    from: Option<&D::Guest>,
    to: Option<&D::Guest>,
) -> (Outcome, Phases) {
    let mut run = Run {
        device,
        phases: Phases::default(),
        progress: Progress::default(),
    };
    let outcome = match run.forward(from, to) {
        Ok(()) => Outcome::Switched {},
        Err(failed) => {
            let begin = Instant::now();
            let outcome = run.undo(failed, from, to);
            run.phases.undo_ns = Some(ns(begin.elapsed()));
            outcome
        }
    };
    (outcome, run.phases)
}

/// How far a switch has come, as far as undoing it matters.
#[derive(Debug, Default)]
struct Progress {
    saved: bool,
    unmapping: bool,
    mapping: bool,
    loading: bool,
    resuming: bool,
}

struct Run<'a, D> {
    device: &'a mut D,
    phases: Phases,
    progress: Progress,
}

impl<D: Switchable> Run<'_, D> {
    fn step(
        &mut self,
        step: Step,
        act: impl FnOnce(&mut D) -> Result<(), String>,
    ) -> Result<(), StepFailed> {
        let begin = Instant::now();
        let result = act(self.device);
        *self.phases.of(step) = Some(ns(begin.elapsed()));
        result.map_err(|reason| StepFailed { step, reason })
    }

    fn forward(
        &mut self,
        from: Option<&D::Guest>,
        to: Option<&D::Guest>,
    ) -> Result<(), StepFailed> {
        if let Some(old) = from {
            self.step(Step::Prepare, |device| device.prepare(old))?;
            self.step(Step::Quiesce, |device| device.quiesce(old))?;
            self.step(Step::Save, |device| device.save(old))?;
            self.progress.saved = true;
            self.progress.unmapping = true;
            self.step(Step::Unmap, |device| device.unmap(old))?;
        }
        let Some(new) = to else {
            self.device.silence();
            return Ok(());
        };
        self.progress.mapping = true;
        self.step(Step::Map, |device| device.map(new))?;
        self.progress.loading = true;
        self.step(Step::Load, |device| device.load(new))?;
        self.progress.resuming = true;
        self.step(Step::Resume, |device| device.resume(new))?;
        self.step(Step::Complete, |device| device.complete(new))
    }

    fn undo(
        &mut self,
        failed: StepFailed,
        from: Option<&D::Guest>,
        to: Option<&D::Guest>,
    ) -> Outcome {
        let back = match from {
            Some(old) => self.back(old, to).map_err(Some),
            None => Err(None),
        };
        match back {
            Ok(()) => Outcome::Back { failed },
            Err(on_the_way_back) => {
                let saved = from.is_none_or(|old| self.rescue(old));
                self.device.silence();
                Outcome::Nobody {
                    failed,
                    on_the_way_back,
                    state_lost: !saved,
                }
            }
        }
    }

    /// Saves what can be saved of a guest that does not get the device back. Says whether its state
    /// is in its context.
    fn rescue(&mut self, old: &D::Guest) -> bool {
        if self.progress.saved {
            return true;
        }
        let quiet = self.device.quiesce(old);
        quiet.and_then(|()| self.device.save(old)).is_ok()
    }

    /// Gives the device back to the old guest. What is done here is not timed step by step.
    fn back(&mut self, old: &D::Guest, new: Option<&D::Guest>) -> Result<(), StepFailed> {
        let fails = |step| move |reason| StepFailed { step, reason };
        let Progress {
            saved,
            unmapping,
            mapping,
            loading,
            resuming,
        } = self.progress;
        if let Some(new) = new.filter(|_| mapping) {
            if resuming {
                let quiet = self.device.quiesce(new);
                quiet.map_err(fails(Step::Quiesce))?;
                // It may have gone on already, and changed what its context was.
                self.device.save(new).map_err(fails(Step::Save))?;
            }
            self.device.unmap(new).map_err(fails(Step::Unmap))?;
        }
        if unmapping {
            self.device.map(old).map_err(fails(Step::Map))?;
        }
        if saved && loading {
            self.device.load(old).map_err(fails(Step::Load))?;
        }
        self.device.resume(old).map_err(fails(Step::Resume))?;
        // What there is of it is in the device now, and no longer what was saved.
        self.progress.saved = false;
        self.device.complete(old).map_err(fails(Step::Complete))
    }
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Whose turn is next: the one after `now` among `all`, which are in their order and may be asked
/// for it; the first one if `now` is not among them. `None` if that is `now` itself, or there is
/// nobody.
pub fn next_after<'a, G: PartialEq>(all: &'a [G], now: Option<&G>) -> Option<&'a G> {
    let place = now.and_then(|now| all.iter().position(|one| one == now));
    let next = place.map_or(0, |place| (place + 1) % all.len());
    all.get(next).filter(|next| Some(*next) != now)
}
