//! Ends a run when a signal asks for it: in order if that works, by force if it does not.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use vmm::VmHandle;

use super::terminal::{self, RawTerminal};
use crate::runtime_dir::VmDir;
use crate::signals::{Asked, EndingSignal, Signals, stop_process};

/// How long an orderly end may take: a vCPU may be stuck in a write to a console that nobody reads.
const PATIENCE: Duration = Duration::from_secs(3);

/// What must be gone when the process ends.
#[derive(Debug, Default)]
pub struct Belongings(Mutex<Things>);

#[derive(Debug, Default)]
struct Things {
    // Dropped in this order: a person should get the terminal back first.
    terminal: Option<RawTerminal>,
    sockets: Vec<PathBuf>,
    dir: Option<VmDir>,
}

impl Belongings {
    /// The VM's folder.
    pub fn add_dir(&self, dir: VmDir) {
        self.lock().dir = Some(dir);
    }

    /// This process cannot remove the VM's folder any more, only what is in it.
    pub fn dir_stays(&self) {
        if let Some(dir) = &mut self.lock().dir {
            dir.stays();
        }
    }

    /// A socket that this process made.
    pub fn add_socket(&self, path: PathBuf) {
        self.lock().sockets.push(path);
    }

    /// The terminal in raw mode.
    pub fn add_terminal(&self, terminal: RawTerminal) {
        self.lock().terminal = Some(terminal);
    }

    /// Puts back and removes everything.
    pub fn clear(&self) {
        let Things {
            terminal,
            sockets,
            dir,
        } = std::mem::take(&mut *self.lock());
        drop(terminal);
        for path in sockets {
            if let Err(error) = std::fs::remove_file(&path)
                // A link removes its own socket when it is dropped.
                && error.kind() != ErrorKind::NotFound
            {
                tracing::warn!("{} stays behind: {error}", path.display());
            }
        }
        drop(dir);
    }

    fn lock(&self) -> MutexGuard<'_, Things> {
        // Each change is one assignment: there is no half of it to be afraid of.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a run stands.
#[derive(Default)]
struct State {
    /// The VM, once it can be turned off.
    vm: Option<VmHandle>,
    /// The signal that asked for the end.
    asked: Option<EndingSignal>,
    /// The main thread is done.
    finished: bool,
}

struct Shared {
    belongings: Arc<Belongings>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Watches over a run.
pub struct Watch(Arc<Shared>);

impl Watch {
    /// Starts to listen to `signals`.
    pub fn start(signals: Signals) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            belongings: Arc::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let listener = Arc::clone(&shared);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || listener.listen(&signals))
            .context("cannot start the signal thread")?;
        Ok(Self(shared))
    }

    /// What must be gone at the end.
    pub fn belongings(&self) -> &Arc<Belongings> {
        &self.0.belongings
    }

    /// From now on `vm` is turned off by a signal. `false` when one came already.
    pub fn attach(&self, vm: VmHandle) -> bool {
        let mut state = self.0.lock();
        state.vm = Some(vm);
        state.asked.is_none()
    }

    /// Whether a signal has asked for the end.
    pub fn is_asked(&self) -> bool {
        self.0.lock().asked.is_some()
    }

    /// The run is over: clears everything away. Returns the signal that asked for the end, if any.
    pub fn finish(self) -> Option<EndingSignal> {
        self.0.belongings.clear();
        let mut state = self.0.lock();
        state.finished = true;
        state.vm = None;
        self.0.changed.notify_all();
        state.asked
    }
}

impl Shared {
    fn listen(&self, signals: &Signals) {
        loop {
            match signals.wait() {
                Ok(Asked::End(signal)) => self.end(signal),
                Ok(Asked::Stop) => {
                    terminal::restore();
                    stop_process();
                    if let Err(error) = terminal::resume() {
                        tracing::warn!("the terminal does not become raw again: {error}");
                    }
                }
                Ok(Asked::Continued) => {}
                Err(error) => {
                    tracing::error!("signals cannot be waited for: {error}");
                    return;
                }
            }
        }
    }

    /// Turns the VM off and waits for the end; a second signal does not wait.
    fn end(&self, signal: EndingSignal) {
        tracing::info!("{} asks for the end", signal.name());
        let mut state = self.lock();
        let again = state.asked.replace(signal).is_some();
        if let Some(vm) = &state.vm
            && let Err(error) = vm.power_off()
        {
            tracing::debug!("power off: {error}");
        }
        let patience = if again { Duration::ZERO } else { PATIENCE };
        let (state, _) = self
            .changed
            .wait_timeout_while(state, patience, |state| !state.finished)
            .unwrap_or_else(PoisonError::into_inner);
        if !state.finished {
            tracing::warn!("the VM does not end in order: ending it by force");
            self.belongings.clear();
            signal.end_process();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
