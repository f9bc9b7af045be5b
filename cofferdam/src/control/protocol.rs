//! Requests to a VM process and its answers: one line of JSON each.
//!
//! ```text
//! {"request":"status"}                          {"ok":{"reply":"status","state":"running",...}}
//! {"request":"pause"}                           {"ok":{"reply":"done"}}
//! {"request":"fly"}                             {"error":"this is not a request: ..."}
//! {"request":"upgrade",...}                     {"progress":"removing e1000"}
//!                                               {"progress":"removing e1000"}     every second, as a sign of life
//!                                               {"ok":{"reply":"upgraded",...}}
//! ```
//!
//! All times named `_ns` are readings of the host's `CLOCK_MONOTONIC`, which is the same for every
//! process: they can be compared with the asker's own.

mod console;
mod faults;
mod status;
mod time;
mod traces;

use std::path::PathBuf;
use std::time::Duration;

use agent_protocol::message::Bytes;
use devices::edge::EdgeOrder;
use devices::hold::CheckpointBy;
use devices::i8042::{MouseCounts, MouseEvent};
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::dispatch::call_trace::TraceTaken;
use isolation::dispatch::fault::{FaultCount, InstructionAt};
use isolation::fault_image::KeepFaults;
use isolation::status::ModuleStatus;
use recovery::by_turns::{GivenAway, TakenOver};
use recovery::fault::FaultKind;
use recovery::ladder::LadderConfig;
use recovery::module_file::MAX_MODULE_BYTES;
use recovery::request::Spilling;
use recovery::resume_device::DevicePhases;
use recovery::upgrade::UpgradeReport;
use recovery::violations::Violations;
use serde::{Deserialize, Serialize};
use vmm::snapshot::Taken;
use vmm::{MarkInfo, Rewound};

use super::Protocol;
pub use console::ConsoleOutput;
pub use faults::{Disturbance, FaultsState, FaultyCalls, FunctionBytes};
pub use status::{ConfigSummary, NetSummary, NicStatus, ProbeReading, Status, VmState};
pub use traces::TraceWanted;

/// Longest request, with its line end, in bytes: a module's file in base64 and something around it.
pub const MAX_REQUEST_BYTES: u64 = (MAX_MODULE_BYTES / 3 + 1) * 4 + (64 << 10);

/// Between two words of a VM process that is at work on a request for long.
pub const BEAT: Duration = Duration::from_secs(1);

/// Most that is typed into a console at once, in bytes: a pipe takes as much whole or not at all
/// (`PIPE_BUF`, pipe(7)).
pub const MAX_TYPED_BYTES: usize = 4096;

/// Longest answer, with its line end, in bytes.
pub const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Requests to a VM process.
#[derive(Debug)]
pub struct VmProtocol;

impl Protocol for VmProtocol {
    type Request = Request;
    type Reply = Reply;
    const WHO: &'static str = "the VM";
    const END: &'static str = "cofferdam stop --force";

    fn may_take(request: &Request) -> Option<Duration> {
        request.may_take()
    }
}

/// What can be asked of a VM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How is it? Answer: [`Reply::Status`].
    Status {},
    /// Hold all vCPUs; nothing happens if they are held already.
    Pause {},
    /// Let the vCPUs go on; nothing happens if they run already.
    Resume {},
    /// Reset the machine, as its reset button would.
    Reset {},
    /// Press the power button: a guest that listens for it shuts down.
    PowerButton {},
    /// Wake a guest that has suspended itself; one that is awake does not mind.
    Wake {},
    /// End at once, as if the power cord was pulled.
    Quit {},
    /// Have the user-mode gateway ping the guest until told to stop.
    ProbeStart {
        /// Time between two pings, in microseconds.
        interval_us: u64,
    },
    /// Stop the pings.
    ProbeStop {},
    /// Take a snapshot. Answer: [`Reply::Snapshot`].
    Snapshot {
        /// Where: a directory that is not there yet, or an empty one. Absolute.
        dir: PathBuf,
        /// The snapshot that it is to be a diff of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<PathBuf>,
        /// Have it followed from now on what changes.
        #[serde(default)]
        track: bool,
        /// The VM ends with it.
        #[serde(default)]
        stop: bool,
    },
    /// Plug a NIC in while the guest runs, one of the two. Answer: [`Reply::Plugged`].
    Plug {
        /// As `--net` of `run` takes it; paths are absolute.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        net: Option<String>,
        /// As `--nic` of `run` takes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nic: Option<String>,
    },
    /// Have the guest let go of a NIC that came while it ran, and take it out.
    Unplug {
        /// Its PCI address in the guest.
        address: String,
    },
    /// Set a mark where the guest is. Answer: [`Reply::Marked`].
    Mark {
        /// Its name.
        name: String,
    },
    /// Take the guest back to a mark. Answer: [`Reply::Rewound`].
    Rewind {
        /// Its name; the mark that the guest has gone on from last otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Which marks are there? Answer: [`Reply::Marks`].
    Marks {},
    /// Forget a mark. Others stay. Answer: [`Reply::Marks`].
    ForgetMark {
        /// Its name.
        name: String,
    },
    /// What of memory has been in use since a mark and is otherwise? Answer: [`Reply::Bystanders`].
    Bystanders {
        /// An isolated module.
        module: String,
        /// The mark.
        mark: String,
        /// Are these to be left out from now on, until there is another mark of that name?
        learn: bool,
    },
    /// Put functions of a guest's module into a domain. Answer: [`Reply::Isolated`].
    Isolate {
        /// Name of the module.
        module: String,
        /// Which functions.
        entries: Wanted,
        /// Time that a call may take, in microseconds; the default otherwise.
        budget_us: Option<u64>,
        /// How the device's state is taken before a call reaches it.
        #[serde(default)]
        device_checkpoint: CheckpointBy,
        /// What is done about calls that fail.
        #[serde(default)]
        recovery: LadderConfig,
        /// What calls go on in the guest for.
        #[serde(default)]
        spilling: Spilling,
        /// How far calls have to be contained.
        #[serde(default)]
        contain: Contain,
        /// Where images of the guest at faults are kept; none are if this is missing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep_faults: Option<KeepFaults>,
    },
    /// Take a module out of its domain. Answer: [`Reply::Released`].
    Release {
        /// Name of the module.
        module: String,
    },
    /// Put another build of a driver module in the place of the one that runs. Answer:
    /// [`Reply::Upgraded`].
    Upgrade {
        /// Name of the module.
        module: String,
        /// The new module's file.
        file: Bytes,
        /// How long the new one may take to have its interfaces back with their configuration, in
        /// milliseconds.
        limit_ms: u64,
    },
    /// Have a driver suspend its devices with its own function, and leave them so. Answer:
    /// [`Reply::DeviceSuspended`].
    SuspendDevice {
        /// Name of the module.
        module: String,
    },
    /// Have a driver resume its devices if they are suspended (answer: [`Reply::DeviceResumed`]),
    /// else suspend and resume them (answer: [`Reply::Resumed`]), with its own functions.
    ResumeDevice {
        /// Name of the module.
        module: String,
    },
    /// A device host is about to give the device that it has to another VM: the guest's driver is
    /// to suspend it. Answer: [`Reply::GivenAway`].
    HandOver {
        /// Name of the device host.
        device: String,
    },
    /// The device of a device host is this VM's: the guest's driver is to resume it, or to find it.
    /// Answer: [`Reply::TakenOver`].
    TakeOver {
        /// Name of the device host.
        device: String,
    },
    /// What did calls of a module do wrong? Answer: [`Reply::Violations`].
    Violations {
        /// Name of the module.
        module: String,
    },
    /// Record the next calls of an isolated module, in the place of those asked for before. Answer:
    /// [`Reply::TraceBegun`].
    BeginTrace {
        /// Name of the module.
        module: String,
        /// Which calls.
        wanted: TraceWanted,
    },
    /// Take some of what was recorded. Answer: [`Reply::Trace`].
    TakeTrace {
        /// Name of the module.
        module: String,
        /// Number of the trace.
        id: u64,
    },
    /// Record no more calls, and forget those that were.
    EndTrace {
        /// Name of the module.
        module: String,
        /// Number of the trace.
        id: u64,
    },
    /// Which instructions does a function of an isolated module have? Answer:
    /// [`Reply::Instructions`].
    Instructions {
        /// Name of the module.
        module: String,
        /// Name of the function.
        function: String,
    },
    /// Put a fault into calls of an isolated function. Faults that were ordered before are kept
    /// until they are used up. The guest's own text is not touched.
    Inject {
        /// Name of the module.
        module: String,
        /// Name of the isolated function.
        entry: String,
        /// Where in it, in bytes from its start.
        offset: u64,
        /// What goes wrong.
        fault: FaultKind,
        /// Every how many calls, at least 1.
        every: u32,
        /// How many calls.
        times: u64,
    },
    /// Which bytes is a function of a loaded module, isolated or not? Answer:
    /// [`Reply::FunctionText`].
    FunctionText {
        /// Name of the module.
        module: String,
        /// Name of the function.
        function: String,
    },
    /// Put other code in the place of one instruction of a driver: for calls of an isolated
    /// function into the domain's copy, or into the guest's own text, where it stays.
    InjectCode {
        /// Name of the module.
        module: String,
        /// Name of the function.
        function: String,
        /// Where in it, in bytes from its start.
        offset: u64,
        /// The instruction that is there.
        old: Bytes,
        /// What is to be there, as many bytes.
        new: Bytes,
        /// It fits where the instruction is another one, as calls out of the module are in the
        /// domain's copy.
        #[serde(default)]
        replaces_whole: bool,
        /// Into which calls; into the guest's own text otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        calls: Option<FaultyCalls>,
    },
    /// What became of faults of a module? Answer: [`Reply::Faults`].
    Faults {
        /// Name of the module.
        module: String,
    },
    /// Take back what is not used up of faults of a module. Answer: [`Reply::Faults`].
    UndoFaults {
        /// Name of the module.
        module: String,
    },
    /// What became of that fault? Answer: [`Reply::FaultCount`].
    FaultCount {
        /// Name of the module.
        module: String,
    },
    /// Have something go wrong at the edge of a NIC from now on. Answer: [`Reply::Disturbed`].
    Disturb {
        /// Which NIC: its number from 0 or its PCI address in the guest. May be left out where
        /// there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nic: Option<String>,
        /// What, where and when.
        order: EdgeOrder,
    },
    /// Have it go right again. Answer: [`Reply::Disturbances`], those that were taken back.
    Undisturb {
        /// Which NIC; all of them otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nic: Option<String>,
        /// Number of the disturbance; all of them otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        number: Option<u64>,
    },
    /// What goes wrong at the edges of NICs? Answer: [`Reply::Disturbances`].
    Disturbances {
        /// Which NIC; all of them otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nic: Option<String>,
    },
    /// What does the guest print on its console? Answer: [`Reply::Console`].
    Console {
        /// From this byte on, counted from the first that it printed; from the oldest that is kept
        /// otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<u64>,
        /// How long to wait where nothing is there yet, in milliseconds; 1000 at most.
        #[serde(default)]
        wait_ms: u64,
    },
    /// Type into the guest's console, all of it or nothing.
    Type {
        /// At most [`MAX_TYPED_BYTES`].
        bytes: Bytes,
    },
    /// Have the mouse see something, or nothing. Answer: [`Reply::Mouse`].
    Mouse {
        /// What.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        event: Option<MouseEvent>,
    },
    /// What was seen? Answer: [`Reply::Probe`].
    ProbeRead {
        /// Only what happened at this time or later counts.
        since_ns: u64,
    },
}

/// An answer of a VM process, or of another one that is asked in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<R = Reply> {
    /// It was done.
    Ok(R),
    /// It was not, and why, for the person who asked.
    Error(String),
    /// It is being done: what of it. Any number of these come before one of the others.
    Progress(String),
}

impl<R: Serialize> Answer<R> {
    /// The answer as it travels.
    pub fn line(&self) -> String {
        line(self)
    }
}

/// A value as one line of JSON.
pub(crate) fn line(value: &impl Serialize) -> String {
    // Only maps with keys that are no text fail to become JSON, and there are none in here.
    let mut line = serde_json::to_string(value).unwrap_or_default();
    line.push('\n');
    line
}

/// What a request brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It was done.
    Done {},
    /// How the VM is.
    Status(Box<Status>),
    /// The snapshot that was taken.
    Snapshot(Taken),
    /// The NIC that was plugged in.
    Plugged(NicStatus),
    /// The mark that was set.
    Marked(MarkInfo),
    /// The rewind that was done.
    Rewound(Rewound),
    /// The marks that there are, parents before those that follow them.
    Marks {
        /// All of them.
        marks: Vec<MarkInfo>,
    },
    /// Pieces of memory that are otherwise: how many, and the first of them.
    Bystanders {
        /// All of them.
        count: u64,
        /// Names of at most 64.
        named: Vec<String>,
    },
    /// What was isolated, as `isolation::attach::request::Isolated` writes it.
    Isolated(serde_json::Value),
    /// The final counters of a module that is isolated no more.
    Released(Box<ModuleStatus>),
    /// Devices were suspended and resumed.
    Resumed {
        /// How long each took, from the call of one function to the return of the other, in
        /// microseconds.
        times_us: Vec<u64>,
    },
    /// Devices were suspended, in these phases.
    DeviceSuspended(DevicePhases),
    /// Devices that were suspended work again, brought back in these phases.
    DeviceResumed(DevicePhases),
    /// The guest has nothing to do with its device any more.
    GivenAway {
        /// How that came.
        how: GivenAway,
    },
    /// The guest has its device.
    TakenOver {
        /// How that came.
        how: TakenOver,
    },
    /// How an upgrade ended.
    Upgraded(Box<UpgradeReport>),
    /// Violations.
    Violations {
        /// Whether the module is isolated now.
        isolated: bool,
        /// All since the VM began, counted, the latest last; also of a module that was released.
        all: Vec<Violations>,
        /// The last ones one by one, oldest first, as `isolation::status::report::ViolationReport`
        /// writes them; none of a module that is not isolated.
        reports: serde_json::Value,
        /// The same for people.
        texts: Vec<String>,
    },
    /// Calls are being recorded.
    TraceBegun {
        /// Number of the trace.
        id: u64,
    },
    /// Some of what was recorded.
    Trace(Box<TraceTaken>),
    /// Instructions of a function.
    Instructions {
        /// By offset.
        instructions: Vec<InstructionAt>,
    },
    /// The bytes of a function.
    FunctionText(FunctionBytes),
    /// What became of faults.
    Faults(FaultsState),
    /// What became of an injected fault.
    FaultCount(FaultCount),
    /// What goes wrong from now on.
    Disturbed(Disturbance),
    /// What goes wrong, or went wrong until now.
    Disturbances {
        /// By NIC, in the order in which they were ordered.
        disturbances: Vec<Disturbance>,
    },
    /// Something that the guest printed on its console.
    Console(ConsoleOutput),
    /// What became of what the mouse saw.
    Mouse(MouseCounts),
    /// What the gateway saw.
    Probe(ProbeReading),
}

#[cfg(test)]
mod tests;
