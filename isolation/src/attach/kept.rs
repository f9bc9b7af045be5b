//! What is isolated at a mark of the machine, and is again when the machine is rewound to it.
//!
//! ```text
//!   isolated     mark     released, restarted, reset ...     rewound
//!   ────────────► │ ───────────────────────────────────────► │ as at the mark
//!                 └─ state kept      └─ onto the shelf ──────┘ and back from it
//! ```
//!
//! Rewound memory has the gates of the mark, whatever became of the modules since. So a module's
//! domain is not taken down as long as there is a mark that knows it, and what was isolated after
//! the mark is not isolated any more. Counters and reports of violations go on: they are about what
//! happened, and rewinding does not undo that.

use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::{MutexGuard, PoisonError};

use devices::dma::GuestMemory;
use vmm::Kept;

use super::Isolator;
use super::clean::CleanBytes;
use super::leaving::AllLeaving;
use super::removal::RemovalWatch;
use super::text_fault::TextFault;
use crate::compensation::call_loop::CallLoop;
use crate::dispatch::armed::Armed;
use crate::dispatch::fault::Faults;
use crate::domain::kept::KeptDomain;
use crate::policy::call::KeptPolicy;

/// What an isolator has to have again.
#[derive(Default)]
struct KeptIsolation {
    watch: Option<RemovalWatch>,
    leaving: AllLeaving,
    text_fault: Option<TextFault>,
    modules: HashMap<String, KeptModule>,
}

/// A module that was isolated, at rest: none of its calls was open.
struct KeptModule {
    /// Tells which one it was.
    wanted: Arc<()>,
    /// What takes its gates out.
    clean: Vec<CleanBytes>,
    domain: KeptDomain,
    policy: Option<KeptPolicy>,
    faults: Faults,
    /// Addresses of the gates whose last call has failed.
    failed_last: BTreeSet<u64>,
    call_loop: Option<CallLoop>,
    stopped: bool,
    broken: Option<String>,
}

impl Armed {
    fn keep(&self, memory: &GuestMemory) -> KeptModule {
        let failed = self.gates.iter().filter(|(_, gate)| gate.failed_last);
        KeptModule {
            wanted: self.wanted.clone(),
            clean: self.clean(memory),
            domain: self.domain.keep(),
            policy: self.policy.as_ref().map(|policy| policy.keep()),
            faults: self.faults.clone(),
            failed_last: failed.map(|(at, _)| *at).collect(),
            call_loop: self.open.call_loop,
            stopped: self.stopped,
            broken: self.broken.clone(),
        }
    }

    /// The guest is as it was when `kept` was.
    fn put_back(&mut self, kept: &KeptModule) {
        self.open.spilled.clear();
        self.open.guest_calls.clear();
        self.open.returning.clear();
        self.packets.queues.forget();
        (
            self.packets.guarding,
            self.device.withholding,
            self.device.outside_kept,
        ) = (false, false, false);
        self.failures.again = None;
        self.failures.nobody_runs_again();
        for (at, gate) in &mut self.gates {
            gate.failed_last = kept.failed_last.contains(at);
            gate.rests = false;
        }
        if let (Some(policy), Some(kept)) = (&mut self.policy, &kept.policy) {
            policy.put_back(kept);
        }
        self.faults = kept.faults.clone();
        self.open.call_loop = kept.call_loop;
        self.stopped = kept.stopped;
        // What broke since is tried again, and breaks again if it has to.
        self.broken = kept.broken.clone();
        if let Err(error) = self.domain.put_back(&kept.domain) {
            tracing::error!("the domain is not used any more: {error}");
            self.broken = Some(error.to_string());
        }
    }
}

impl Isolator {
    /// What has to be as it is now when the guest's memory is. The machine is at rest.
    pub(super) fn keep_modules(&self) -> Kept {
        let memory = self.vm.ram().memory();
        let modules = self.modules();
        let kept = KeptIsolation {
            watch: *self.watch(),
            leaving: self.leaving().clone(),
            text_fault: self.text_fault().clone(),
            modules: modules
                .iter()
                .map(|(name, armed)| (name.clone(), armed.keep(memory)))
                .collect(),
        };
        self.drop_unwanted();
        let kept: Arc<dyn Any + Send + Sync> = Arc::new(kept);
        Some(kept)
    }

    /// The guest is as it was when `kept` was: the same is isolated.
    pub(super) fn put_modules_back(&self, kept: &Kept) -> Result<(), String> {
        let nothing = KeptIsolation::default();
        let kept = match kept {
            None => &nothing,
            Some(kept) => kept
                .downcast_ref::<KeptIsolation>()
                .ok_or("what was kept of isolated modules is something else")?,
        };
        let memory = self.vm.ram().memory();
        let mut modules = self.modules();
        let mut shelf = self.shelf();
        for (_, mut armed) in modules.drain() {
            armed.guest_is_gone();
            shelf.push(armed);
        }
        for (name, then) in &kept.modules {
            let is_it = |armed: &Armed| Arc::ptr_eq(&armed.wanted, &then.wanted);
            let Some(at) = shelf.iter().position(is_it) else {
                // Not as long as the mark holds it. Gates that lead nowhere must not stay.
                tracing::error!("{name} is not isolated any more: its domain is gone");
                then.clean.iter().for_each(|clean| clean.write(memory));
                continue;
            };
            let mut armed = shelf.swap_remove(at);
            armed.put_back(then);
            modules.insert(name.clone(), armed);
        }
        drop(shelf);
        *self.watch() = kept.watch;
        self.leaving().clone_from(&kept.leaving);
        self.text_fault().clone_from(&kept.text_fault);
        *self.suspending() = None;
        self.drop_unwanted();
        Ok(())
    }

    /// `armed` is not isolated any more. It goes, unless there is a mark at which it was.
    pub(super) fn put_away(&self, armed: Armed) {
        if is_wanted(&armed) {
            self.shelf().push(armed);
        }
    }

    /// Modules that are not isolated any more and whose domains are there for marks of the machine.
    /// Those that no mark knows any more are taken down when the next mark is made or gone back to.
    pub fn kept_for_marks(&self) -> usize {
        self.shelf().len()
    }

    /// Takes down what no mark knows any more. The guest does not wait for it: that takes longer
    /// than a rewind.
    fn drop_unwanted(&self) {
        let unwanted: Vec<Armed> = {
            let mut shelf = self.shelf();
            let all = std::mem::take(&mut *shelf).into_iter();
            let (wanted, unwanted) = all.partition(is_wanted);
            *shelf = wanted;
            unwanted
        };
        if !unwanted.is_empty() {
            // Where there can be no thread it is done here.
            let thread = std::thread::Builder::new().name("domain-end".to_owned());
            let _ended = thread.spawn(move || drop(unwanted));
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Vec<Armed>> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_wanted(armed: &Armed) -> bool {
    Arc::strong_count(&armed.wanted) > 1
}
