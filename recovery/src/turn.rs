//! Whose turn it is to change drivers of a guest: one at a time, and nobody while state of the
//! machine is taken or put back.

use std::sync::{Condvar, Mutex};

use crate::lock::lock;

/// Free, taken by somebody, or at rest.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    taken: bool,
    /// Who has taken it has the machine go back itself, and changes nothing meanwhile.
    lent: bool,
    at_rest: bool,
}

impl State {
    fn is_free(&self) -> bool {
        !self.taken && !self.at_rest
    }
}

/// A turn that was taken, until it is dropped.
#[derive(Debug)]
pub(crate) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for a turn.
    pub fn take(&self) -> Taken<'_> {
        let mut state = lock(&self.state);
        while !state.is_free() {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.taken = true;
        Taken(self)
    }

    /// A turn, if nobody has it.
    pub fn try_take(&self) -> Option<Taken<'_>> {
        let mut state = lock(&self.state);
        let is_free = state.is_free();
        state.taken |= is_free;
        is_free.then(|| Taken(self))
    }

    /// Has nobody begin until [`Turn::go_on`]; `false`, with nothing done, if somebody is in the
    /// middle of it.
    pub fn rest(&self) -> bool {
        let mut state = lock(&self.state);
        let may = !state.taken || state.lent;
        state.at_rest |= may;
        may
    }

    /// Whether who has the turn has the machine go back.
    pub fn is_lent(&self) -> bool {
        lock(&self.state).lent
    }

    /// See [`Turn::rest`].
    pub fn go_on(&self) {
        lock(&self.state).at_rest = false;
        self.changed.notify_all();
    }
}

impl Taken<'_> {
    /// Lets state of the machine be taken and put back while `work` is done, which does not change
    /// a driver.
    pub fn lend<T>(&self, work: impl FnOnce() -> T) -> T {
        lock(&self.0.state).lent = true;
        let _lent = Lent(self.0);
        work()
    }
}

/// Ends lending, also in a panic.
struct Lent<'a>(&'a Turn);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).lent = false;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).taken = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_nobody_at_rest() {
        let turn = Turn::default();
        let taken = turn.take();
        assert!(turn.try_take().is_none());
        assert!(!turn.rest(), "somebody is in the middle of it");
        taken.lend(|| {
            assert!(turn.rest() && turn.is_lent());
            turn.go_on();
        });
        assert!(!turn.is_lent());
        drop(taken);
        assert!(turn.rest());
        assert!(turn.try_take().is_none());
        turn.go_on();
        assert!(turn.try_take().is_some());
    }

    #[test]
    fn who_waits_goes_on_when_the_machine_does() {
        let turn = Turn::default();
        assert!(turn.rest());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(turn.take()));
            turn.go_on();
            waiting.join().unwrap();
        });
        assert!(turn.try_take().is_some());
    }
}
