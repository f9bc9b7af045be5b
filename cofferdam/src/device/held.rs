//! What is held: a mutex, and the functions of the VMs that take part in a switch.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::context::Context;

/// Holds a mutex. What it guards is whole after each statement, so that a panic of who had it is in
/// nobody's way.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Functions `F` of VMs with shares `S`, each held from the first step of a switch that touches it.
pub struct Held<'a, S, F>(Vec<(&'a Context<S>, MutexGuard<'a, F>)>);

impl<'a, S, F> Held<'a, S, F> {
    /// Nothing is held.
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// The function of `guest`, which is held from now on.
    pub fn of(&mut self, guest: &'a Context<S>, function: &'a Mutex<F>) -> &mut F {
        let known = |(other, _): &(&Context<S>, _)| std::ptr::eq(*other, guest);
        let place = self.0.iter().position(known).unwrap_or_else(|| {
            self.0.push((guest, lock(function)));
            self.0.len() - 1
        });
        &mut self.0[place].1
    }

    /// All that are held.
    pub fn all(&mut self) -> impl Iterator<Item = (&'a Context<S>, &mut F)> {
        let held = self.0.iter_mut();
        held.map(|(guest, function)| (*guest, &mut **function))
    }

    /// Holds nothing any more.
    pub fn let_go(&mut self) {
        self.0.clear();
    }
}
