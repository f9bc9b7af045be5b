//! Work that may take long: what a person is told of it, and how it is given up.

use std::io::IsTerminal;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::ending::Ending;
use crate::signals::{Asked, EndingSignal, Signals, stop_process};

/// After so long a person is told what is done.
const PATIENCE: Duration = Duration::from_millis(1500);

/// And then not more often than this.
const BETWEEN: Duration = Duration::from_secs(1);

/// Tells a person at a terminal what is done, if it takes long.
pub struct LongWork {
    begun: Instant,
    told: Option<Instant>,
    is_terminal: bool,
}

impl LongWork {
    /// It begins now.
    pub fn begin() -> Self {
        Self {
            begun: Instant::now(),
            told: None,
            is_terminal: std::io::stderr().is_terminal(),
        }
    }

    /// This is done now.
    pub fn tell(&mut self, what: &str) {
        let is_due = self.begun.elapsed() > PATIENCE
            && self.told.is_none_or(|told| told.elapsed() > BETWEEN);
        if self.is_terminal && is_due {
            eprintln!("{what}");
            self.told = Some(Instant::now());
        }
    }
}

/// A signal that asks for the end, noted so that work can be given up in order.
#[derive(Default)]
pub struct Interrupt(Arc<OnceLock<EndingSignal>>);

impl Interrupt {
    /// Takes signals that ask for the end from now on. To be called before other threads are there.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn watch() -> anyhow::Result<Self> {
        let signals = Signals::block().context("cannot block signals")?;
        let interrupt = Self::default();
        let noted = interrupt.0.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                loop {
                    match signals.wait() {
                        // A second one does not wait for the order.
                        Ok(Asked::End(signal)) => {
                            if noted.set(signal).is_err() {
                                signal.end_process();
                            }
                        }
                        Ok(Asked::Stop) => stop_process(),
                        Ok(Asked::Continued) => {}
                        Err(error) => {
                            tracing::error!("signals cannot be waited for: {error}");
                            return;
                        }
                    }
                }
            })
            .context("cannot start the signal thread")?;
        Ok(interrupt)
    }

    /// Whether one has come.
    pub fn has_come(&self) -> bool {
        self.0.get().is_some()
    }

    /// How a command ends whose work has ended like this: by the signal if one came, whatever
    /// became of the work.
    ///
    /// # Errors
    /// The work failed, and not because it was given up.
    pub fn ending(&self, work: anyhow::Result<()>) -> anyhow::Result<Ending> {
        match self.0.get() {
            Some(signal) => Ok(Ending::Signal(*signal)),
            None => work.map(|()| Ending::SUCCESS),
        }
    }
}
