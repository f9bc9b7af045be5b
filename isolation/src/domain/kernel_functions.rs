//! What the private VM makes of the kernel's functions: which of them wait, are looked at, have
//! their answers told, run with the driver's rights, or are the guest's alone. All is told before the calls that it is about.

use std::collections::HashMap;
use std::time::Duration;

use super::Domain;
use super::console::Console;
use super::error::DomainError;
use super::monitor::{self, Measure, PORT_FATAL, PORT_SLEEP, PORT_TRAPPED};
use super::waiting::Waiting;

impl Domain {
    /// Has what these kernel functions are given to keep looked at when they are called, at an exit
    /// for each call of them.
    pub fn look_at_arguments(&mut self, functions: impl Iterator<Item = u64>) {
        self.monitor.look_at(functions.collect());
    }

    /// Has told what these kernel functions answer, at two exits for each call of them.
    pub fn tell_answers(&mut self, functions: impl Iterator<Item = u64>) {
        self.monitor.tell_answers(functions.collect());
    }

    /// Has these kernel functions, which need no more, run with the driver's rights when it calls
    /// them, where their calls are not journalled. Their pages are among the common ones.
    pub fn call_directly(&mut self, functions: impl Iterator<Item = u64>) {
        self.monitor.call_directly(functions.collect());
    }

    /// Has these kernel functions wait, where a call may have them wait, until it has ended: their
    /// callers are told what is given with each. To be told before [`Domain::redirect`].
    pub fn let_wait(&mut self, answers: HashMap<u64, u32>) {
        self.monitor.let_wait(answers);
    }

    /// Has it noted how much memory is asked for of these kernel functions. To be told before
    /// [`Domain::redirect`].
    pub fn measure(&mut self, functions: HashMap<u64, Measure>) {
        self.monitor.measure(functions);
    }

    /// Makes the kernel function that begins at `va` one that only the guest may run: a call that
    /// reaches it passes through.
    pub fn trap_function(&mut self, va: u64) -> Result<(), DomainError> {
        self.trapped.insert(va, va);
        self.patch(va, &monitor::out(PORT_TRAPPED))
    }

    /// Makes the kernel function that begins at `va`, which waits for as many `unit`s as its first
    /// argument says, one that a call can wait in without ceasing to be atomic.
    pub fn sleep_function(&mut self, va: u64, unit: Duration) -> Result<(), DomainError> {
        self.sleeps.insert(va, unit);
        self.patch(va, &monitor::out(PORT_SLEEP))
    }

    /// Makes the kernel function that begins at `va` return 0 at once.
    pub fn skip_function(&mut self, va: u64) -> Result<(), DomainError> {
        // xor eax, eax; ret
        self.patch(va, &[0x31, 0xc0, 0xc3])
    }

    /// Has the kernel's console written to after the calls that print: whoever takes it in a call
    /// is told that somebody has it. Where another processor is writing to it at this moment the
    /// caller would wait for that one, which stands still: such a call goes on in the guest.
    pub fn defer_console(&mut self, console: &Console) -> Result<(), DomainError> {
        self.trapped.insert(console.waits_at(), console.take);
        self.patch(console.take, &console.code)
    }

    /// Has calls not wait for others in this kernel function: where there is something to wait for
    /// they go on in the guest.
    pub fn wait_in_guest(&mut self, waiting: &Waiting) -> Result<(), DomainError> {
        self.trapped.insert(waiting.waits_at(), waiting.function);
        self.patch(waiting.function, &waiting.code)
    }

    /// Makes reaching the kernel function that begins at `va` the driver's failure.
    pub fn forbid_function(&mut self, va: u64) -> Result<(), DomainError> {
        self.patch(va, &monitor::out(PORT_FATAL))
    }
}
