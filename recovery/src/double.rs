//! A double of a live guest with one module `m`, of which single steps can be made to fail.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use agent_protocol::ClientError;
use agent_protocol::message::{Interface, Module};
use anyhow::{bail, ensure};
use devices::hold::CheckpointBy;
use isolation::attach::Isolated;
use isolation::attach::plan::Wanted;
use isolation::dispatch::after_fault::{AfterFault, FailedCall, FaultPolicy};
use isolation::domain::roots::Root;
use isolation::domain::transaction::AbortPhases;
use isolation::domain::violation::{Violation, ViolationKind};
use isolation::status::ModuleStatus;
use isolation::status::report::ViolationReport;

use crate::guest::{Agent, LiveGuest, Ran};
use crate::request::{IsolationRequest, Spilling};

/// The module's name.
pub(crate) const MODULE: &str = "m";

/// What the guest is like.
#[derive(Default)]
pub(crate) struct State {
    /// The module is there.
    pub loaded: bool,
    /// It cannot be removed.
    pub in_use: bool,
    /// It cannot be isolated.
    pub refuses: bool,
    /// A call fails as soon as there are gates.
    pub fails_at_once: bool,
    pub isolated: bool,
    pub stopped: bool,
    pub removals: u32,
    policy: Option<Box<dyn FaultPolicy>>,
    now: Duration,
}

/// The guest. Clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct Double(Arc<Mutex<State>>);

impl Double {
    /// A guest with the module loaded.
    pub fn new() -> Self {
        let double = Self::default();
        double.state().loaded = true;
        double
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A call of `entry` fails, for the `attempts`th time.
    pub fn fail(&self, entry: &str, attempts: u32) -> AfterFault {
        let mut state = self.state();
        let answer = fail(state.policy.as_mut().unwrap().as_mut(), entry, attempts);
        state.stopped |= answer == AfterFault::Stop;
        answer
    }
}

fn fail(policy: &mut dyn FaultPolicy, entry: &str, attempts: u32) -> AfterFault {
    let report = ViolationReport {
        entry: entry.to_owned(),
        violation: Violation {
            kind: ViolationKind::PrivilegedInstruction,
            root: Root::Driver,
            rip: 0,
            rsp: 0,
            crossings: Vec::new(),
            reached_device: false,
            spills: 0,
            published: None,
        },
        at: String::new(),
        instruction: String::new(),
        touched: None,
        call_chain: Vec::new(),
        stays: None,
        at_ns: 0,
        phases: AbortPhases::default(),
        device_lost: None,
    };
    policy.after_fault(&FailedCall {
        report: &report,
        attempts,
        returns_nothing: false,
    })
}

/// What is asked for of it.
pub(crate) fn request() -> IsolationRequest {
    IsolationRequest {
        module: MODULE.to_owned(),
        entries: Wanted::All,
        budget_us: None,
        checkpoint: CheckpointBy::Exact,
        spilling: Spilling::default(),
    }
}

impl Agent for Double {
    fn set_limit(&mut self, _limit: Duration) {}

    fn wait_until_it_answers(&mut self, _limit: Duration) -> Result<(), ClientError> {
        Ok(())
    }

    fn kernel_release(&self) -> Option<String> {
        None
    }

    fn modules(&mut self, name: Option<&str>) -> Result<Vec<Module>, ClientError> {
        let module = Module {
            name: MODULE.to_owned(),
            size: 4096,
            refcnt: Some(0),
            state: "live".to_owned(),
            holders: Vec::new(),
            sections: Vec::new(),
        };
        let is_asked_for = name.is_none_or(|name| name == MODULE);
        let found = (self.state().loaded && is_asked_for).then_some(module);
        Ok(found.into_iter().collect())
    }

    fn insert_installed(&mut self, _name: &str) -> Result<(), ClientError> {
        self.state().loaded = true;
        Ok(())
    }

    fn insert_file(&mut self, _path: &str) -> Result<(), ClientError> {
        self.insert_installed(MODULE)
    }

    fn remove_module(&mut self, _name: &str) -> Result<(), ClientError> {
        let mut state = self.state();
        if state.in_use {
            return Err(ClientError::Malformed("it is in use".to_owned()));
        }
        state.removals += 1;
        state.loaded = false;
        Ok(())
    }

    fn run(&mut self, _argv: &[&str]) -> Result<Ran, ClientError> {
        Ok(Ran::default())
    }

    fn read_file(&mut self, _path: &str) -> Result<Vec<u8>, ClientError> {
        Ok(Vec::new())
    }

    fn write_file(&mut self, _path: &str, _data: &[u8], _mode: u32) -> Result<(), ClientError> {
        Ok(())
    }

    fn interfaces(&mut self) -> Result<Vec<Interface>, ClientError> {
        Ok(Vec::new())
    }
}

impl LiveGuest for Double {
    type Agent = Self;
    type DeviceState = ();

    fn agent(&self) -> Self {
        self.clone()
    }

    fn isolate(
        &self,
        _request: &IsolationRequest,
        mut policy: Box<dyn FaultPolicy>,
    ) -> anyhow::Result<Isolated> {
        let mut state = self.state();
        ensure!(state.loaded, "it is not loaded");
        ensure!(!state.refuses, "there is no room for it");
        ensure!(!state.isolated, "it is isolated already");
        state.isolated = true;
        state.stopped = false;
        if std::mem::take(&mut state.fails_at_once) {
            fail(policy.as_mut(), "f", 1);
        }
        state.policy = Some(policy);
        Ok(Isolated {
            entries: vec!["f".to_owned()],
            refused: Vec::new(),
            redirected_calls: 0,
            imports: Vec::new(),
            stopped_us: 0,
        })
    }

    fn release(&self, module: &str) -> anyhow::Result<ModuleStatus> {
        let mut state = self.state();
        ensure!(state.isolated, "it is not isolated");
        state.isolated = false;
        Ok(ModuleStatus {
            module: module.to_owned(),
            entries: Vec::new(),
            violations: 0,
            stopped: state.stopped,
            warm_pages: 0,
            broken: None,
        })
    }

    fn stop(&self, _module: &str) -> anyhow::Result<()> {
        let mut state = self.state();
        ensure!(state.isolated, "it is not isolated");
        state.stopped = true;
        Ok(())
    }

    fn driver_changed(&self, _module: &str) {}

    fn begin_suspend_resume(
        &self,
        _agent: &mut Self,
        _module: &str,
        _word: &[u8],
    ) -> anyhow::Result<()> {
        bail!("it has no device")
    }

    fn end_suspend_resume(&self) -> anyhow::Result<Duration> {
        bail!("it has no device")
    }

    fn reset(&self) -> anyhow::Result<()> {
        self.state().isolated = false;
        Ok(())
    }

    fn hold_link(&self, _module: &str, _hold: bool) {}

    fn save_device(&self, _module: &str) -> Option<()> {
        None
    }

    fn restore_device(&self, _module: &str, _state: ()) -> anyhow::Result<()> {
        Ok(())
    }

    fn now(&self) -> Duration {
        self.state().now
    }

    fn wait(&self, time: Duration) {
        self.state().now += time;
    }
}
