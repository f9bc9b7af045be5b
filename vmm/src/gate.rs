//! Who may run guest code: one gate for all vCPU threads of a machine.
//!
//! ```text
//!              kick: attention + signal                 no stop, no inhibit, not held
//!   in guest ───────────────────────────► at the gate ─────────────────────────────► in guest
//!                                            │ (parked: registers complete, VcpuFd free)
//!                                            └── stop ──► thread ends
//! ```
//!
//! Three things close the gate: *inhibits* (counted: a pause, a reset under way, a look at the
//! registers), a *hold* (one vCPU keeps running, the others do not), and *stop* (for good). A kick
//! sets the vCPU's attention flag and sends its thread a real-time signal, whose handler sets
//! `kvm_run.immediate_exit`: a `KVM_RUN` under way returns, one about to start returns at once.
//!
//! The gate's lock is a leaf: nothing else is locked while it is held.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
    /// Number of the vCPU that this thread runs.
    static CURRENT_VCPU: Cell<Option<u8>> = const { Cell::new(None) };
}

/// Whether the calling thread runs a vCPU (of any machine).
pub(crate) fn on_vcpu_thread() -> bool {
    CURRENT_VCPU.get().is_some()
}

/// The signal that takes a vCPU thread out of the guest, with a handler once a machine exists.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set only while this thread owns a mapped kvm_run structure, and
        // the byte is shared with the kernel, which reads it atomically.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the kick signal's handler for the process.
pub(crate) fn install_kick_handler() -> std::io::Result<()> {
    // SAFETY: all-zero is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as *const () as usize;
    // KVM_RUN returns EINTR all the same; other system calls of the thread need not notice.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler only touches a thread-local cell without destructor, which is
    // async-signal-safe, and lives as long as the program.
    let result = unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// What a vCPU thread does after it passed the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Run guest code.
    Run,
    /// End.
    Stop,
}

#[derive(Debug, Default)]
struct Member {
    thread: Option<libc::pthread_t>,
    /// At the gate, with the vCPU's registers complete and its descriptor unlocked.
    parked: bool,
    /// Out of the guest on its own account, waiting for another one's hold to end.
    waiting_for_hold: bool,
}

#[derive(Debug)]
struct State {
    inhibits: u32,
    holder: Option<u8>,
    stop: bool,
    members: Vec<Member>,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    attention: Vec<AtomicBool>,
}

impl Gate {
    /// A gate for `vcpus` threads, open.
    pub fn new(vcpus: u8) -> Self {
        let members = (0..vcpus).map(|_| Member::default()).collect();
        Self {
            state: Mutex::new(State {
                inhibits: 0,
                holder: None,
                stop: false,
                members,
            }),
            changed: Condvar::new(),
            attention: (0..vcpus).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the calling thread the one that runs vCPU `index`, until the guard is dropped.
    pub fn enter(&self, index: u8, vcpu: &mut VcpuFd) -> ThreadGuard<'_> {
        // The thread may have inherited a mask that blocks it.
        if let Err(error) = vmm_sys_util::signal::unblock_signal(kick_signal()) {
            tracing::error!(?error, "a vCPU cannot be interrupted");
        }
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        CURRENT_VCPU.set(Some(index));
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        self.lock().members[usize::from(index)].thread = Some(thread);
        ThreadGuard { gate: self, index }
    }

    /// Whether vCPU `index` has to come to the gate.
    pub fn attention(&self, index: u8) -> bool {
        self.attention[usize::from(index)].load(Ordering::Acquire)
    }

    /// Called by a vCPU thread with its vCPU unlocked: waits until it may run.
    pub fn pass(&self, index: u8) -> Pass {
        let mut state = self.lock();
        loop {
            if state.stop {
                return Pass::Stop;
            }
            let held = state.holder.is_some_and(|holder| holder != index);
            let member = &mut state.members[usize::from(index)];
            if member.parked && (state.inhibits > 0 || held) {
                state = self.wait(state);
                continue;
            }
            if state.inhibits == 0 && !held {
                state.members[usize::from(index)].parked = false;
                self.attention[usize::from(index)].store(false, Ordering::Release);
                return Pass::Run;
            }
            state.members[usize::from(index)].parked = true;
            self.changed.notify_all();
        }
    }

    fn kick(&self, state: &State, except: Option<u8>) {
        for (index, member) in state.members.iter().enumerate() {
            if except == Some(index as u8) || member.parked {
                continue;
            }
            self.attention[index].store(true, Ordering::Release);
            if let Some(thread) = member.thread {
                // SAFETY: a thread takes its id out of the list, under this lock, before it ends. A
                // failure means that the thread is gone, and then there is nothing to kick.
                unsafe { libc::pthread_kill(thread, kick_signal()) };
            }
        }
    }

    /// Closes the gate; vCPUs come to it soon. To be undone by [`Gate::release`].
    pub fn inhibit(&self) {
        let mut state = self.lock();
        state.inhibits += 1;
        self.kick(&state, None);
    }

    /// Takes one [`Gate::inhibit`] back.
    pub fn release(&self) {
        let mut state = self.lock();
        state.inhibits = state.inhibits.saturating_sub(1);
        if state.inhibits == 0 {
            self.changed.notify_all();
        }
    }

    /// Waits until every vCPU thread that exists is at the gate. Only while it is inhibited, and
    /// not on a vCPU's thread.
    pub fn wait_all_parked(&self) {
        let mut state = self.lock();
        while state
            .members
            .iter()
            .any(|m| m.thread.is_some() && !m.parked)
        {
            state = self.wait(state);
        }
    }

    /// Ends all vCPU threads.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.kick(&state, None);
        self.changed.notify_all();
    }

    /// Called on the thread of vCPU `index`, out of the guest: keeps all others out of it until
    /// [`Gate::unhold`]. Waits while another vCPU holds.
    pub fn hold(&self, index: u8) {
        let mut state = self.lock();
        while state.holder.is_some() {
            state.members[usize::from(index)].waiting_for_hold = true;
            self.changed.notify_all();
            state = self.wait(state);
        }
        state.members[usize::from(index)].waiting_for_hold = false;
        state.holder = Some(index);
        self.kick(&state, Some(index));
        let runs = |(other, member): (usize, &Member)| {
            other != usize::from(index)
                && member.thread.is_some()
                && !member.parked
                && !member.waiting_for_hold
        };
        while state.members.iter().enumerate().any(runs) {
            state = self.wait(state);
        }
    }

    /// Ends the hold.
    pub fn unhold(&self) {
        let mut state = self.lock();
        state.holder = None;
        self.changed.notify_all();
    }
}

/// The calling thread runs a vCPU as long as this lives.
pub(crate) struct ThreadGuard<'a> {
    gate: &'a Gate,
    index: u8,
}

impl Drop for ThreadGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        let member = &mut state.members[usize::from(self.index)];
        member.thread = None;
        member.parked = false;
        self.gate.changed.notify_all();
        drop(state);
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
        CURRENT_VCPU.set(None);
    }
}
