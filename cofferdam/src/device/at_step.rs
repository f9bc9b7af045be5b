//! Switches that can be made to wait at a step: tests end what takes part in a switch just there.
//!
//! Only in builds with debug assertions, and only in a process with [`VARIABLE`]: the path of a
//! file. As long as it has the name of a step in it, a switch waits before that step, and says so
//! by an empty file beside it, with `.reached` after its name.

#[cfg(debug_assertions)]
use std::path::PathBuf;

use recovery::switch::{Outcome, Phases, Switchable};

/// The environment variable with the path.
#[cfg(debug_assertions)]
const VARIABLE: &str = "COFFERDAM_SWITCH_WAITS";

/// Where switches are made to wait, if they are.
#[derive(Debug, Clone, Default)]
pub struct Waiting {
    /// The file.
    #[cfg(debug_assertions)]
    file: Option<PathBuf>,
}

impl Waiting {
    /// What this process was started with.
    pub fn of_process() -> Self {
        Self {
            #[cfg(debug_assertions)]
            file: std::env::var_os(VARIABLE).map(PathBuf::from),
        }
    }

    /// For a test in this process: the file is `path`.
    #[cfg(all(test, debug_assertions))]
    pub fn at(path: PathBuf) -> Self {
        Self { file: Some(path) }
    }

    /// See [`recovery::switch::switch`].
    pub fn switch<D: Switchable>(
        &self,
        device: &mut D,
        from: Option<&D::Guest>,
        to: Option<&D::Guest>,
    ) -> (Outcome, Phases) {
        #[cfg(debug_assertions)]
        if let Some(file) = self.file.clone() {
            return recovery::switch::switch(&mut waits::Waits { device, file }, from, to);
        }
        recovery::switch::switch(device, from, to)
    }
}

#[cfg(debug_assertions)]
mod waits {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use recovery::switch::{Step, Switchable};

    /// Whoever asked has gone by then.
    const LIMIT: Duration = Duration::from_secs(600);
    /// Between two looks.
    const LOOK: Duration = Duration::from_millis(1);

    /// A device that waits before steps.
    pub struct Waits<'a, D> {
        pub device: &'a mut D,
        pub file: PathBuf,
    }

    impl<D> Waits<'_, D> {
        fn wait(&self, step: Step) {
            let deadline = Instant::now() + LIMIT;
            let is_asked =
                || std::fs::read_to_string(&self.file).is_ok_and(|text| text == step.to_string());
            let mut said = false;
            while is_asked() && Instant::now() < deadline {
                if !said {
                    said = std::fs::write(self.file.with_added_extension("reached"), "").is_ok();
                }
                std::thread::sleep(LOOK);
            }
        }
    }

    impl<D: Switchable> Switchable for Waits<'_, D> {
        type Guest = D::Guest;

        fn prepare(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Prepare);
            self.device.prepare(guest)
        }

        fn quiesce(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Quiesce);
            self.device.quiesce(guest)
        }

        fn save(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Save);
            self.device.save(guest)
        }

        fn unmap(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Unmap);
            self.device.unmap(guest)
        }

        fn map(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Map);
            self.device.map(guest)
        }

        fn load(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Load);
            self.device.load(guest)
        }

        fn resume(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Resume);
            self.device.resume(guest)
        }

        fn complete(&mut self, guest: &Self::Guest) -> Result<(), String> {
            self.wait(Step::Complete);
            self.device.complete(guest)
        }

        fn silence(&mut self) {
            self.device.silence();
        }
    }
}
