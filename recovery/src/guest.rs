//! What recovery needs of a live guest: two traits, behind which are a VM process and the agent in
//! its guest, or doubles in tests.
//!
//! The guest's agent serves one client at a time. Isolating asks it as well, and so does everything
//! here that says so: nobody may hold an [`Agent`] meanwhile.

use std::time::Duration;

use agent_protocol::message::{Interface, Module};
use agent_protocol::{Client, ClientError};
use isolation::attach::request::Isolated;
use isolation::dispatch::after_fault::FaultPolicy;
use isolation::status::ModuleStatus;
use isolation::suspend_resume::DriverCalls;

use crate::asker::Asker;
use crate::request::IsolationRequest;

/// How a program in the guest ended, and what it wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ran {
    /// Whether its exit status was 0.
    pub success: bool,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// The agent in a guest, for as long as it listens to nobody else. What it answers comes from the
/// guest and may be anything.
///
/// The errors of all methods are those of [`Client::call`].
pub trait Agent {
    /// How long each call may take from now on.
    fn set_limit(&mut self, limit: Duration);

    /// Waits until an agent answers, at most for `limit`.
    fn wait_until_it_answers(&mut self, limit: Duration) -> Result<(), ClientError>;

    /// Release of the guest's kernel, once the agent has answered something.
    fn kernel_release(&self) -> Option<String>;

    /// The loaded modules, or the one of that name.
    fn modules(&mut self, name: Option<&str>) -> Result<Vec<Module>, ClientError>;

    /// Inserts the module `name` with what it depends on, as `modprobe` does.
    fn insert_installed(&mut self, name: &str) -> Result<(), ClientError>;

    /// Inserts the module in a file of the guest, as `insmod` does.
    fn insert_file(&mut self, path: &str) -> Result<(), ClientError>;

    /// Removes a module.
    fn remove_module(&mut self, name: &str) -> Result<(), ClientError>;

    /// Runs a program and collects what it writes. That it fails is no error.
    fn run(&mut self, argv: &[&str]) -> Result<Ran, ClientError>;

    /// The bytes of a file in the guest.
    fn read_file(&mut self, path: &str) -> Result<Vec<u8>, ClientError>;

    /// Makes a file in the guest, with these permission bits if it is not there yet.
    fn write_file(&mut self, path: &str, data: &[u8], mode: u32) -> Result<(), ClientError>;

    /// The network interfaces.
    fn interfaces(&mut self) -> Result<Vec<Interface>, ClientError>;
}

impl Agent for Client {
    fn set_limit(&mut self, limit: Duration) {
        Client::set_limit(self, limit);
    }

    fn wait_until_it_answers(&mut self, limit: Duration) -> Result<(), ClientError> {
        self.hello(limit).map(drop)
    }

    fn kernel_release(&self) -> Option<String> {
        Some(self.agent()?.kernel.clone())
    }

    fn modules(&mut self, name: Option<&str>) -> Result<Vec<Module>, ClientError> {
        Client::modules(self, name)
    }

    fn insert_installed(&mut self, name: &str) -> Result<(), ClientError> {
        self.load_module(name, "").map(drop)
    }

    fn insert_file(&mut self, path: &str) -> Result<(), ClientError> {
        self.load_module_file(path, "").map(drop)
    }

    fn remove_module(&mut self, name: &str) -> Result<(), ClientError> {
        Client::remove_module(self, name).map(drop)
    }

    fn run(&mut self, argv: &[&str]) -> Result<Ran, ClientError> {
        let result = Client::run(self, argv)?;
        Ok(Ran {
            success: result.success(),
            stdout: result.stdout_text(),
            stderr: String::from_utf8_lossy(&result.stderr).into_owned(),
        })
    }

    fn read_file(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        Client::read_file(self, path)
    }

    fn write_file(&mut self, path: &str, data: &[u8], mode: u32) -> Result<(), ClientError> {
        Client::write_file(self, path, data, mode)
    }

    fn interfaces(&mut self) -> Result<Vec<Interface>, ClientError> {
        Client::interfaces(self)
    }
}

/// Where a guest went back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WentBackTo {
    /// A mark: what is isolated, and how its ladders stand, are of that moment.
    Mark,
    /// A snapshot in a directory: nothing is isolated, as in a guest that has booted.
    Snapshot,
}

/// A guest that runs: its agent, the isolation of its modules, and the machine around it.
pub trait LiveGuest: Send + Sync + 'static {
    /// A client of its agent.
    type Agent: Agent;
    /// The state of a device.
    type DeviceState: Clone + Send + Sync + 'static;
    /// What was learnt of the guest, to be known again after a rewind.
    type Learnt: Send + Sync + 'static;

    /// A client of its agent.
    fn agent(&self) -> Self::Agent;

    /// Puts functions of a module into a domain; `policy` is asked after each call that failed.
    /// Uses the agent. `asker` is told of steps that take long.
    ///
    /// # Errors
    /// Why they cannot be isolated; also that `asker` has gone before anything was done.
    fn isolate(
        &self,
        request: &IsolationRequest,
        policy: Box<dyn FaultPolicy>,
        asker: &dyn Asker,
    ) -> anyhow::Result<Isolated>;

    /// Returns when whoever listens to a policy's calls ([`FaultPolicy::listener`]) has heard of each
    /// that has failed by now.
    fn settle_reports(&self);

    /// Has the guest run a module's functions itself again; their final counters.
    ///
    /// # Errors
    /// It is not isolated.
    fn release(&self, module: &str) -> anyhow::Result<ModuleStatus>;

    /// Has all isolated functions of a module return errors without being run.
    ///
    /// # Errors
    /// It is not isolated.
    fn stop(&self, module: &str) -> anyhow::Result<()>;

    /// The driver `module` was given up, so that its devices do nothing for the guest any more, or
    /// is not given up any more: it was released or isolated anew, or the guest begins anew.
    fn set_given_up(&self, module: &str, given_up: bool);

    /// The driver is another build now: nothing that is known of its functions and types holds.
    fn driver_changed(&self, module: &str);

    /// Has the next write of `word` to [`isolation::suspend_resume::ATTRIBUTE`] of a device of
    /// `module` call these functions of the driver.
    ///
    /// # Errors
    /// The guest does not have the functions, or does not tell where.
    fn begin_suspend_resume(
        &self,
        agent: &mut Self::Agent,
        calls: DriverCalls,
        module: &str,
        word: &[u8],
    ) -> anyhow::Result<()>;

    /// What came of it, and how long the functions took together.
    ///
    /// # Errors
    /// They were not called, failed, or have not returned.
    fn end_suspend_resume(&self) -> anyhow::Result<Duration>;

    /// Resets the machine.
    ///
    /// # Errors
    /// It cannot be reset now.
    fn reset(&self) -> anyhow::Result<()>;

    /// Has the guest go back to the last mark that was made of it or, where there is none, to its
    /// last snapshot.
    ///
    /// # Errors
    /// There is neither, or it cannot go back to it.
    fn go_back(&self) -> anyhow::Result<WentBackTo>;

    /// What was learnt of the guest by now.
    fn learnt(&self) -> Self::Learnt;

    /// The guest is as it was when `learnt` was known.
    fn put_learnt_back(&self, learnt: &Self::Learnt);

    /// Keeps what the other end of the wire sees of the link of `module`'s device as it is, or lets
    /// it go on. Nothing happens if the device has none.
    fn hold_link(&self, module: &str, hold: bool);

    /// The state of `module`'s device, if it gives it away.
    fn save_device(&self, module: &str) -> Option<Self::DeviceState>;

    /// Puts that state back.
    ///
    /// # Errors
    /// The device does not take it.
    fn restore_device(&self, module: &str, state: Self::DeviceState) -> anyhow::Result<()>;

    /// Puts `module`'s devices into the sleep state D3hot, or wakes them; `false` if they have no
    /// power states, or are none of ours.
    fn set_power(&self, module: &str, awake: bool) -> bool;

    /// The time on a clock that does not run backwards.
    fn now(&self) -> Duration;

    /// Lets time pass between two looks at something that will change.
    fn wait(&self, time: Duration);
}

/// Between two looks at something that will change.
pub(crate) const POLL: Duration = Duration::from_millis(20);
