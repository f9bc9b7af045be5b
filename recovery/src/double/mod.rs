//! A guest without a machine: one driver with one interface, whose steps can be made to fail, and a
//! clock that only waiting moves.

mod agent;
pub(crate) mod module_file;

pub(crate) use agent::DoubleAgent;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use agent_protocol::ClientError;
use agent_protocol::message::AgentError;
use anyhow::ensure;
use isolation::attach::plan::Wanted;
use isolation::attach::request::{Contain, Isolated, Strength};
use isolation::dispatch::after_fault::{AfterFault, FailedCall, FaultPolicy};
use isolation::domain::roots::Root;
use isolation::domain::transaction::AbortPhases;
use isolation::domain::violation::{Violation, ViolationKind};
use isolation::status::ModuleStatus;
use isolation::status::report::{Told, ViolationReport};
use isolation::suspend_resume::DriverCalls;

use crate::asker::Asker;
use crate::guest::{LiveGuest, WentBackTo};
use crate::request::{IsolationRequest, Spilling};
use crate::supervisor::Supervisor;

/// The driver.
pub(crate) const DRIVER: &str = "driver";
/// Its file under `/lib/modules`.
pub(crate) const INSTALLED: &str = "/lib/modules/6.1/kernel/driver.ko";
/// The address of its device.
pub(crate) const ADDRESS: &str = "0000:00:02.0";
/// The folder of its device.
pub(crate) const DEVICE: &str = "/sys/bus/pci/devices/0000:00:02.0";

/// The file of a build of the driver.
pub(crate) fn build(id: u8) -> Vec<u8> {
    module_file::module(DRIVER, "name=driver\0vermagic=6.1 SMP\0", &[id; 20])
}

/// What is asked for in these tests.
pub(crate) fn request() -> IsolationRequest {
    IsolationRequest {
        module: DRIVER.to_owned(),
        entries: Wanted::Named(vec!["xmit".to_owned()]),
        budget_us: None,
        checkpoint: devices::hold::CheckpointBy::Exact,
        spilling: Spilling::default(),
        contain: Contain::Full,
        keep_faults: None,
    }
}

/// Does something to a guest: puts it back to where it was.
pub(crate) type Rewind = dyn Fn(&Double) + Send + Sync;

/// The state of the guest.
pub(crate) struct World {
    pub now: Duration,
    /// What was done to it, in order.
    pub done: Vec<String>,
    /// Whether a step fails, by its name in `done` and how many were done before it.
    pub fails: fn(&str, usize) -> bool,
    /// The file of the driver that is loaded.
    pub loaded: Option<Vec<u8>>,
    pub files: HashMap<String, Vec<u8>>,
    pub mtu: u32,
    pub up: bool,
    /// Builds whose interface gets no link.
    pub no_link: Vec<Vec<u8>>,
    pub policy: Option<Box<dyn FaultPolicy>>,
    /// A call fails as soon as there are gates.
    pub fails_at_once: bool,
    pub stopped: bool,
    /// What was said last of whether the driver is given up.
    pub given_up: bool,
    /// Done when that is said.
    pub told: Option<Arc<Rewind>>,
    /// What fails is the domain itself.
    pub domain_fails: bool,
    /// Agents that there are: the real one serves one at a time.
    pub agents: usize,
    pub link_held: bool,
    /// Changes whenever a driver comes or goes.
    pub device: u32,
    /// Functions of the driver that are to be called.
    pub calls: Option<DriverCalls>,
    /// Which instance of the driver is loaded.
    pub instance: u32,
    /// Whether its device is awake.
    pub awake: bool,
    /// Whether the guest's kernel knows the device.
    pub known: bool,
    /// Whether the driver has it.
    pub bound: bool,
    /// What is said of who has it in place of the truth.
    pub says: Option<&'static str>,
    /// What was learnt of the guest.
    pub learnt: u32,
    /// What puts the guest back to its last mark, if there is one.
    pub mark: Option<Arc<Rewind>>,
    /// There is a snapshot of it, with the first build loaded.
    pub has_snapshot: bool,
}

/// The guest.
#[derive(Clone)]
pub(crate) struct Double(Arc<Mutex<World>>);

impl Double {
    /// The driver's first build is loaded, its interface is up and has an MTU that drivers do not
    /// begin with.
    pub fn new() -> Self {
        let installed = [
            (INSTALLED, build(1)),
            (
                "/lib/modules/6.1/modules.dep",
                b"kernel/driver.ko:\n".to_vec(),
            ),
        ];
        Self(Arc::new(Mutex::new(World {
            now: Duration::ZERO,
            done: Vec::new(),
            fails: |_, _| false,
            loaded: Some(build(1)),
            files: installed
                .into_iter()
                .map(|(path, data)| (path.to_owned(), data))
                .collect(),
            mtu: 1400,
            up: true,
            no_link: Vec::new(),
            policy: None,
            fails_at_once: false,
            stopped: false,
            given_up: false,
            told: None,
            domain_fails: false,
            agents: 0,
            link_held: false,
            device: 7,
            calls: None,
            instance: 1,
            awake: true,
            known: true,
            bound: true,
            says: None,
            learnt: 1,
            mark: None,
            has_snapshot: false,
        })))
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    /// A call of an isolated function fails.
    pub fn fail(&self) -> AfterFault {
        let mut world = self.world();
        let kind = match world.domain_fails {
            true => ViolationKind::DomainFailed,
            false => ViolationKind::PrivilegedInstruction,
        };
        fail(world.policy.as_mut().unwrap().as_mut(), kind)
    }

    /// How often a step was done.
    pub fn count(&self, what: &str) -> usize {
        let world = self.world();
        world.done.iter().filter(|done| *done == what).count()
    }

    /// Writes a step down; whether it is to fail.
    fn step(&self, what: &str) -> Result<(), ClientError> {
        let mut world = self.world();
        let before = world.done.iter().filter(|done| *done == what).count();
        world.done.push(what.to_owned());
        match (world.fails)(what, before) {
            true => Err(refused(what)),
            false => Ok(()),
        }
    }

    fn insert(&self, path: &str) -> Result<(), ClientError> {
        self.step(&format!("insert {path}"))?;
        let mut world = self.world();
        let file = world.files.get(path).cloned();
        world.loaded = Some(file.ok_or_else(|| refused(path))?);
        (world.mtu, world.up) = (1500, false);
        world.device += 1;
        world.instance += 1;
        Ok(())
    }
}

/// A violation of a call of `entry`.
pub(crate) fn report(entry: &str) -> ViolationReport {
    ViolationReport {
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
        image: None,
        told: Told::Error,
    }
}

fn fail(policy: &mut dyn FaultPolicy, kind: ViolationKind) -> AfterFault {
    let mut report = report("xmit");
    report.violation.kind = kind;
    let decided = policy.after_fault(&FailedCall {
        entry: &report.entry,
        violation: &report.violation,
        device_lost: false,
        attempts: 1,
        unheard: false,
        out_of_time: false,
        in_a_row: false,
    });
    if let Some(listener) = policy.listener() {
        listener(&report);
    }
    decided
}

fn refused(what: &str) -> ClientError {
    ClientError::Agent(AgentError {
        message: format!("{what}: refused"),
        errno: Some(16),
    })
}

impl LiveGuest for Double {
    type Agent = DoubleAgent;
    type DeviceState = u32;
    type Learnt = u32;

    fn agent(&self) -> DoubleAgent {
        self.world().agents += 1;
        DoubleAgent(self.clone())
    }

    fn isolate(
        &self,
        request: &IsolationRequest,
        mut policy: Box<dyn FaultPolicy>,
        asker: &dyn Asker,
    ) -> anyhow::Result<Isolated> {
        asker.tell("isolating")?;
        assert_eq!(self.world().agents, 0, "the agent would never answer");
        self.step("isolate")?;
        let mut world = self.world();
        ensure!(world.loaded.is_some(), "not loaded");
        ensure!(world.policy.is_none(), "isolated already");
        if std::mem::take(&mut world.fails_at_once) {
            fail(policy.as_mut(), ViolationKind::PrivilegedInstruction);
        }
        world.policy = Some(policy);
        world.stopped = false;
        let Wanted::Named(entries) = request.entries.clone() else {
            panic!("these tests name what they isolate");
        };
        Ok(Isolated {
            entries,
            ..Isolated::default()
        })
    }

    fn settle_reports(&self) {}

    fn release(&self, module: &str) -> anyhow::Result<ModuleStatus> {
        ensure!(self.world().policy.is_some(), "not isolated");
        self.step("release")?;
        self.world().policy = None;
        Ok(ModuleStatus {
            module: module.to_owned(),
            entries: Vec::new(),
            violations: 0,
            stopped: false,
            warm_pages: 0,
            broken: None,
            strength: Strength::default(),
        })
    }

    fn stop(&self, _module: &str) -> anyhow::Result<()> {
        self.step("stop")?;
        ensure!(self.world().policy.is_some(), "not isolated");
        self.world().stopped = true;
        Ok(())
    }

    fn set_given_up(&self, module: &str, given_up: bool) {
        assert_eq!(module, DRIVER);
        self.world().given_up = given_up;
        let told = self.world().told.clone();
        if let Some(told) = told {
            told(self);
        }
    }

    fn driver_changed(&self, _module: &str) {}

    fn begin_suspend_resume(
        &self,
        _agent: &mut DoubleAgent,
        calls: DriverCalls,
        _module: &str,
        _word: &[u8],
    ) -> anyhow::Result<()> {
        self.step("begin suspend")?;
        self.world().calls = Some(calls);
        Ok(())
    }

    fn end_suspend_resume(&self) -> anyhow::Result<Duration> {
        let calls = self.world().calls.take();
        let name = match calls {
            Some(DriverCalls::Suspend) => "driver suspends",
            Some(DriverCalls::Resume) => "driver resumes",
            _ => "end suspend",
        };
        self.step(name)?;
        Ok(Duration::from_millis(3))
    }

    fn reset(&self) -> anyhow::Result<()> {
        self.step("reset")?;
        let mut world = self.world();
        world.policy = None;
        world.loaded = Some(build(1));
        Ok(())
    }

    fn go_back(&self) -> anyhow::Result<WentBackTo> {
        self.step("go back")?;
        let mark = self.world().mark.clone();
        if let Some(mark) = mark {
            mark(self);
            return Ok(WentBackTo::Mark);
        }
        let mut world = self.world();
        ensure!(world.has_snapshot, "there is no mark");
        world.policy = None;
        world.loaded = Some(build(1));
        Ok(WentBackTo::Snapshot)
    }

    fn learnt(&self) -> u32 {
        self.world().learnt
    }

    fn put_learnt_back(&self, learnt: &u32) {
        self.world().learnt = *learnt;
    }

    fn hold_link(&self, _module: &str, hold: bool) {
        self.world().link_held = hold;
    }

    fn save_device(&self, _module: &str) -> Option<u32> {
        Some(self.world().device)
    }

    fn restore_device(&self, _module: &str, state: u32) -> anyhow::Result<()> {
        self.step("restore device")?;
        self.world().device = state;
        Ok(())
    }

    fn set_power(&self, _module: &str, awake: bool) -> bool {
        let step = if awake { "wake" } else { "sleep" };
        let works = self.step(step).is_ok();
        let mut world = self.world();
        if works {
            // It forgets what it was.
            world.device += 100;
            world.awake = awake;
        }
        world.now += Duration::from_micros(7);
        works
    }

    fn now(&self) -> Duration {
        self.world().now
    }

    fn wait(&self, time: Duration) {
        self.world().now += time;
    }
}

/// As the machine has a guest come to rest: once more as long as whoever is in the way soon is not,
/// such as a rung whose last step is done and told.
#[track_caller]
pub fn come_to_rest(supervisor: &Supervisor<Double>) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while let Err(unsettled) = supervisor.come_to_rest() {
        let again = unsettled.soon && std::time::Instant::now() < deadline;
        assert!(again, "{unsettled:?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// A double with its supervisor.
pub(crate) fn supervised() -> (Arc<Supervisor<Double>>, Double) {
    let guest = Double::new();
    (Supervisor::start(guest.clone()).unwrap(), guest)
}

/// What was done to the guest since the last time, the writes of words left aside.
pub(crate) fn done(guest: &Double) -> Vec<String> {
    let done = std::mem::take(&mut guest.world().done);
    let is_word = |step: &String| step.starts_with("write ") || step == "begin suspend";
    done.into_iter().filter(|step| !is_word(step)).collect()
}

/// Why it was refused.
pub(crate) fn refusal<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}
