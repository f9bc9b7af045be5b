//! The device host: the contexts, whose turn it is, and how it goes on.
//!
//! Lock order: the switch under way, the list of contexts, one of them, its NIC, the turns at a
//! wire. The list is not locked while a switch takes its steps. A switch holds NICs and locks no
//! context: whether a client is there is known without.

mod attaching;
mod status;

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use devices::clock::monotonic_ns;
use recovery::switch::{Outcome, next_after};

use super::HostConfig;
use super::card::Card;
use super::context::Context;
use super::happened::Happened;
use super::held::lock;
use super::hello::{Welcome, write_line};
use super::history::History;
use super::protocol::{Reason, SWITCH_TIME, SwitchRecord};
use super::share::Share;
use crate::control::protocol::BEAT;
use crate::options::VmName;

/// How long a switch waits for another one.
const TURN_TIME: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);

/// A context of a card's.
type ContextOf<C> = Context<<C as Card>::Share>;

/// See the module.
pub struct Host<C: Card> {
    config: HostConfig,
    card: C,
    contexts: Mutex<Vec<Arc<ContextOf<C>>>>,
    switching: Mutex<()>,
    history: Mutex<History>,
    /// The time slice, if the turn is passed on by time.
    every: Mutex<Option<Duration>>,
    keeper: Sender<Happened>,
    started_ns: u64,
}

impl<C: Card> Host<C> {
    /// A host without contexts.
    pub fn new(config: HostConfig, card: C, keeper: Sender<Happened>) -> Self {
        Self {
            config,
            card,
            contexts: Mutex::default(),
            switching: Mutex::default(),
            history: Mutex::default(),
            every: Mutex::default(),
            keeper,
            started_ns: monotonic_ns(),
        }
    }

    /// Gives the turn to `to` if nobody has it. Looked at while no switch is under way: in the
    /// middle of one nobody may have the turn, which is somebody's when it is over.
    fn give_what_is_nobodys(
        &self,
        switching: &MutexGuard<'_, ()>,
        to: Option<Arc<ContextOf<C>>>,
        reason: Reason,
    ) -> anyhow::Result<()> {
        if to.is_some() && self.holder().is_none() {
            self.pass_on_now(switching, None, to, reason)?;
        }
        Ok(())
    }

    /// Passes `context`'s turn on, if it has it.
    fn leave(&self, context: &Arc<ContextOf<C>>, reason: Reason) {
        // One that is under way may be giving it the turn; nobody would take that away again.
        let switching = lock(&self.switching);
        if !context.share.has_turn() {
            return;
        }
        let next = self.next(Some(context));
        if let Err(error) = self.pass_on_now(&switching, Some(context), next, reason) {
            tracing::warn!(vm = %context.vm, "its turn is not passed on: {error:#}");
        }
    }

    /// Gives the turn to `vm`, for somebody who asks.
    pub fn switch_to(&self, vm: &VmName) -> anyhow::Result<SwitchRecord> {
        let context = self.context(vm)?;
        self.may_be_given_turn(&context)?;
        let switching = self.begin()?;
        // It may have gone or come to rest while another switch was waited for.
        self.may_be_given_turn(&context)?;
        let record = self.pass_on_now(&switching, None, Some(context), Reason::Asked)?;
        record.with_context(|| format!("{vm} has the turn already"))
    }

    /// That a VM can be given the turn.
    fn may_be_given_turn(&self, context: &ContextOf<C>) -> anyhow::Result<()> {
        let (vm, name) = (&context.vm, &self.config.name);
        ensure!(
            context.is_connected(),
            "{vm} is not attached to {name} now: start it with `cofferdam run --name {vm} --nic device={name}`"
        );
        ensure!(
            !context.away.load(Ordering::Relaxed),
            "{vm} is paused, or the driver of its NIC was given up: let it go on first, with `cofferdam resume {vm}` or \
             `cofferdam release`"
        );
        Ok(())
    }

    /// The time slice is over.
    pub fn slice(&self) {
        let passed = self.begin().and_then(|switching| {
            let holder = self.holder();
            let next = self.next(holder.as_ref());
            match next {
                Some(_) => self.pass_on_now(&switching, holder.as_ref(), next, Reason::Slice),
                None => Ok(None),
            }
        });
        if let Err(error) = passed {
            tracing::debug!("no switch at the end of a time slice: {error:#}");
        }
    }

    /// Gives the turn to the next one who wants it, if nobody has it. Says whether that is still
    /// so.
    pub fn try_again(&self) -> bool {
        let next = self.next(None);
        let is_wanted = next.is_some();
        let given = self
            .begin()
            .and_then(|switching| self.give_what_is_nobodys(&switching, next, Reason::Again));
        match given {
            Ok(()) => false,
            Err(error) => {
                tracing::info!("nobody gets the turn yet: {error:#}");
                is_wanted
            }
        }
    }

    /// Passes the turn on after each such time, or not.
    pub fn set_every(&self, every: Option<Duration>) {
        *lock(&self.every) = every;
        // The keeper goes only with the process.
        let _ = self.keeper.send(Happened::Slices(every));
    }

    /// The driver of the device in `vm` was given up: it does not run for now, and is not asked for
    /// anything.
    pub fn driver_lost(&self, vm: &VmName) -> anyhow::Result<()> {
        let context = self.context(vm)?;
        context.driver_lost.store(true, Ordering::Relaxed);
        self.rests(&context);
        Ok(())
    }

    fn rests(&self, context: &Arc<ContextOf<C>>) {
        context.away.store(true, Ordering::Relaxed);
        self.leave(context, Reason::Yielded);
    }

    /// `vm` does not run for now, or runs again.
    pub fn set_away(&self, vm: &VmName, away: bool) -> anyhow::Result<()> {
        let context = self.context(vm)?;
        context.driver_lost.store(false, Ordering::Relaxed);
        if away {
            self.rests(&context);
            return Ok(());
        }
        context.away.store(false, Ordering::Relaxed);
        let switching = lock(&self.switching);
        let back = context.wants_turns().then_some(context);
        self.give_what_is_nobodys(&switching, back, Reason::Returned)
    }

    /// Takes the turn from whoever has it, or from `from` only, if that is given, and gives it to
    /// `to`, while no other switch can begin. `None` if `to` has it, or `from` has it no more.
    fn pass_on_now(
        &self,
        _switching: &MutexGuard<'_, ()>,
        from: Option<&Arc<ContextOf<C>>>,
        to: Option<Arc<ContextOf<C>>>,
        reason: Reason,
    ) -> anyhow::Result<Option<SwitchRecord>> {
        let old = self.holder();
        let number = |context: &Arc<ContextOf<C>>| Arc::as_ptr(context);
        if old.as_ref().map(number) == to.as_ref().map(number)
            || from.is_some() && from.map(number) != old.as_ref().map(number)
        {
            return Ok(None);
        }
        let begin_ns = monotonic_ns();
        let passing = self.card.pass_on(old.as_deref(), to.as_deref());
        let name =
            |context: Option<&Arc<ContextOf<C>>>| context.map(|context| context.vm.to_string());
        let record = SwitchRecord {
            number: 0,
            begin_ns,
            from: name(old.as_ref()),
            to: name(to.as_ref()),
            reason,
            outcome: passing.outcome,
            phases: passing.phases,
            first_frame_ns: None,
            outage_ns: None,
        };
        let times = |turn| self.card.times(turn);
        let record = lock(&self.history).add(record, passing.turn, times);
        match &record.outcome {
            Outcome::Switched {} => Ok(Some(record)),
            Outcome::Back { failed } => bail!("{failed}; the turn is where it was"),
            Outcome::Nobody { failed, .. } => {
                // The keeper goes only with the process.
                let _ = self.keeper.send(Happened::Nobody);
                bail!("{failed}; nobody has the turn")
            }
        }
    }

    /// Waits until no other switch is under way.
    fn begin(&self) -> anyhow::Result<MutexGuard<'_, ()>> {
        self.begin_within(TURN_TIME, &mut || Ok(()))
    }

    /// The same for somebody who attaches at `stream`. One by drivers may take long, and is told of
    /// meanwhile.
    fn begin_for(&self, stream: &UnixStream) -> anyhow::Result<MutexGuard<'_, ()>> {
        if !self.card.is_suspended_by_drivers() {
            return self.begin();
        }
        let mut told = Instant::now();
        self.begin_within(SWITCH_TIME, &mut || {
            if told.elapsed() >= BEAT {
                write_line(stream, &Welcome::Wait {})?;
                told = Instant::now();
            }
            Ok(())
        })
    }

    fn begin_within(
        &self,
        limit: Duration,
        waits: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<MutexGuard<'_, ()>> {
        let deadline = Instant::now() + limit;
        loop {
            waits()?;
            match self.switching.try_lock() {
                Ok(guard) => return Ok(guard),
                Err(TryLockError::Poisoned(guard)) => return Ok(PoisonError::into_inner(guard)),
                Err(TryLockError::WouldBlock) => ensure!(
                    Instant::now() < deadline,
                    "another switch is under way and does not end: see `cofferdam device status {}`",
                    self.config.name
                ),
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Whose turn it is after `now`.
    fn next(&self, now: Option<&Arc<ContextOf<C>>>) -> Option<Arc<ContextOf<C>>> {
        let contexts = self.contexts();
        let now = now.map(Arc::as_ptr);
        let all = contexts
            .iter()
            .filter(|context| context.wants_turns() || now == Some(Arc::as_ptr(context)));
        let all: Vec<_> = all.map(Arc::as_ptr).collect();
        let next = *next_after(&all, now.as_ref())?;
        contexts
            .iter()
            .find(|context| Arc::as_ptr(context) == next)
            .cloned()
    }

    fn holder(&self) -> Option<Arc<ContextOf<C>>> {
        let contexts = self.contexts();
        contexts
            .iter()
            .find(|context| context.share.has_turn())
            .cloned()
    }

    /// Name of the VM that has the turn.
    pub fn turn(&self) -> Option<String> {
        self.holder().map(|context| context.vm.to_string())
    }

    fn context(&self, vm: &VmName) -> anyhow::Result<Arc<ContextOf<C>>> {
        let contexts = self.contexts();
        let found = contexts.iter().find(|context| context.vm == *vm).cloned();
        found.with_context(|| {
            let name = &self.config.name;
            let known: Vec<_> = contexts.iter().map(|context| context.vm.as_str()).collect();
            match known.as_slice() {
                [] => format!(
                    "{vm} is not attached to {name}, nor is any other: start it with `cofferdam run --name {vm} --nic \
                     device={name}`"
                ),
                _ => format!("{vm} is not attached to {name}: {} are", known.join(", ")),
            }
        })
    }

    pub(super) fn contexts(&self) -> MutexGuard<'_, Vec<Arc<ContextOf<C>>>> {
        lock(&self.contexts)
    }

    /// Takes the turn from whoever has it: the process ends.
    pub fn end(&self) {
        self.card.end();
    }
}
