//! What calls in the domain are told about this guest: its functions, its memory, its device.

use std::collections::BTreeSet;
use std::sync::Arc;

use devices::dma::GuestMemory;
use iced_x86::{Formatter, GasFormatter};

use crate::dispatch::platform::Platform;
use crate::domain::Domain;
use crate::domain::journal::{Published, Stays};
use crate::domain::monitor::ExceptionFrame;
use crate::domain::supervisor::{KernelExceptionVerdict, Supervisor};
use crate::domain::transaction::AbortPhases;
use crate::domain::undo_log::Restorable;
use crate::domain::violation::Violation;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::fault_tables::FaultTables;
use crate::guest::modules::ModuleLayout;
use crate::guest::stack::InterruptStack;
use crate::guest::symbols::SymbolTable;
use crate::policy::call::{CallMemory, DriverPolicy};
use crate::status::report::{Told, ViolationReport};
use devices::hold::{Access, DeviceAddress, DeviceLost, DeviceState, HeldDevice};

/// Start of the kernel image's mapping (`__START_KERNEL_map`).
const KERNEL_IMAGE: u64 = 0xffff_ffff_8000_0000;
/// End of the area that holds the image and all modules (`MODULES_END`).
const MODULES_END: u64 = 0xffff_ffff_ff00_0000;
/// Addresses below belong to user space.
const USER_END: u64 = 0x0000_8000_0000_0000;
const PAGE_SIZE: u64 = 4096;
const VECTOR_BREAKPOINT: u8 = 3;
const VECTOR_INVALID_OPCODE: u8 = 6;
/// Port of the first serial line, where the kernel's console may go.
const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;

/// What is known of the guest for one module, fixed while it is isolated.
pub struct Knowledge {
    symbols: Arc<SymbolTable>,
    module: String,
    text: Vec<GvaRange>,
    data: Vec<GvaRange>,
    faults: FaultTables,
    interrupt_stack: InterruptStack,
}

impl Knowledge {
    /// Collects what calls will be asked about.
    pub fn new(layout: &ModuleLayout, symbols: Arc<SymbolTable>, faults: FaultTables) -> Self {
        Self {
            module: layout.name.clone(),
            text: layout.text().map(|section| section.range).collect(),
            data: layout.data().map(|section| section.range).collect(),
            interrupt_stack: InterruptStack::new(&symbols),
            symbols,
            faults,
        }
    }

    /// Whether a function begins at `va` that is the module's own, or anybody else's.
    fn is_function(&self, va: u64, own: bool) -> bool {
        let mut there = self.symbols.at(Gva(va));
        there.any(|symbol| symbol.is_code() && (symbol.module == Some(self.module.as_str())) == own)
    }

    /// Address of a function of the module.
    pub fn driver_function(&self, name: &str) -> Option<u64> {
        let mut found = self
            .symbols
            .named(name)
            .filter(|symbol| symbol.is_code() && symbol.module == Some(self.module.as_str()));
        found.next().map(|symbol| symbol.at.0)
    }

    /// Whether the `bytes` bytes at `va` are the module's text.
    pub fn in_text(&self, va: u64, bytes: u64) -> bool {
        GvaRange::new(Gva(va), bytes)
            .is_some_and(|range| self.text.iter().any(|t| t.covers(&range)))
    }

    /// Bytes from `start`, a function of the module, to the next symbol or the end of its section.
    pub fn extent(&self, start: u64) -> u64 {
        let within = self.text.iter().find(|range| range.contains(Gva(start)));
        let extent = within.and_then(|range| self.symbols.extent(Gva(start), *range));
        extent.map_or(0, |range| range.len_bytes())
    }

    /// All names of each of the functions that begin at `targets`, each function once.
    pub fn names_of(&self, targets: impl Iterator<Item = Gva>) -> Vec<Vec<String>> {
        let targets: BTreeSet<u64> = targets.map(|target| target.0).collect();
        let names = |va: u64| -> Vec<String> {
            let code = self.symbols.at(Gva(va)).filter(|symbol| symbol.is_code());
            code.map(|symbol| symbol.name.to_owned()).collect()
        };
        targets.into_iter().map(names).collect()
    }

    /// Name of the function that begins at `va`.
    pub fn function_name(&self, va: u64) -> String {
        let symbol = self.symbols.at(Gva(va)).find(|symbol| symbol.is_code());
        symbol.map_or_else(|| format!("{va:#x}"), |symbol| symbol.name.to_owned())
    }

    /// Why a part of a failed call stays in the guest, for people.
    pub fn why_it_stays(&self, stays: &Stays) -> String {
        let named = |function: &u64| self.function_name(*function);
        match stays {
            Stays::NoModel => "nothing is known of the kernel's functions".to_owned(),
            Stays::TooMuchMemory => "it changed more memory than can be put back".to_owned(),
            Stays::TooManyCalls => "it called more kernel functions than can be undone".to_owned(),
            Stays::Irrevocable { function } => {
                format!("nothing takes {} back", named(function))
            }
            Stays::Unknown { function } => format!(
                "{} is not in the model of kernel functions",
                named(function)
            ),
            Stays::KernelFunctionOpen => {
                "a kernel function that had called the driver back was under way".to_owned()
            }
            Stays::Device { reason } => format!("the device cannot be put back: {reason}"),
            Stays::Hangs { function } => format!(
                "{}, called to take it back, does not return",
                named(function)
            ),
            Stays::StackGone => {
                "the stack that it was to be taken back on is not there any more".to_owned()
            }
        }
    }

    /// Gives a violation names.
    pub fn report(&self, entry: &str, violation: Violation, domain: &Domain) -> ViolationReport {
        let touched = violation.touched().and_then(|address| self.name(address));
        let stays = match &violation.published {
            Some(Published::Stays(stays)) => Some(self.why_it_stays(stays)),
            _ => None,
        };
        ViolationReport {
            stays,
            entry: entry.to_owned(),
            at: self.place(violation.rip),
            instruction: disassemble(domain, violation.rip),
            touched,
            call_chain: violation
                .crossings
                .iter()
                .filter_map(|return_address| self.name(return_address.wrapping_sub(1)))
                .collect(),
            violation,
            at_ns: 0,
            phases: AbortPhases::default(),
            device_lost: None,
            told: Told::Error,
        }
    }

    /// An address in the kernel image or a module with its symbol, any other as a number.
    pub fn place(&self, va: u64) -> String {
        self.name(va).unwrap_or_else(|| format!("{va:#x}"))
    }

    /// `symbol+offset [module]` for addresses of the kernel image and of modules.
    fn name(&self, va: u64) -> Option<String> {
        if !(KERNEL_IMAGE..MODULES_END).contains(&va) {
            return None;
        }
        let (symbol, offset) = self.symbols.lookup(Gva(va))?;
        let module = symbol
            .module
            .map(|module| format!(" [{module}]"))
            .unwrap_or_default();
        Some(format!("{}+{offset:#x}{module}", symbol.name))
    }

    /// Whether the driver may write at `va`. Memory that is not the kernel image's or a module's
    /// (heap, stacks, per-CPU data) is not told apart.
    fn writable(&self, va: u64) -> bool {
        if (KERNEL_IMAGE..MODULES_END).contains(&va) {
            return self
                .data
                .iter()
                .any(|range| range.to_pages().contains(Gva(va)));
        }
        va >= USER_END
    }

    fn changeable(&self, va: u64, bytes: u64) -> bool {
        if (KERNEL_IMAGE..MODULES_END).contains(&va) {
            return GvaRange::new(Gva(va), bytes)
                .is_some_and(|range| self.data.iter().any(|data| data.covers(&range)));
        }
        va >= USER_END
    }
}

/// The instruction at `va` as the domain has it; empty where there is none.
fn disassemble(domain: &Domain, va: u64) -> String {
    let Some(instruction) = domain.instruction(va) else {
        return String::new();
    };
    if instruction.is_invalid() {
        return "(bad)".into();
    }
    let mut text = String::new();
    GasFormatter::new().format(&instruction, &mut text);
    text
}

/// What one call may write.
pub struct CallPolicy<'a> {
    /// The driver's policy, in which the call has begun.
    pub policy: &'a mut DriverPolicy,
    /// Memory as the call has it.
    pub memory: CallMemory<'a, GuestMemory>,
}

/// The supervisor of one call.
pub struct CallSupervisor<'a> {
    knowledge: &'a Knowledge,
    policy: Option<CallPolicy<'a>>,
    device: Option<&'a mut dyn HeldDevice>,
    device_lost: Option<DeviceLost>,
    platform: Platform<'a>,
}

impl<'a> CallSupervisor<'a> {
    /// For a call of a module with this knowledge, whose device is in hand.
    pub fn new(
        knowledge: &'a Knowledge,
        policy: Option<CallPolicy<'a>>,
        device: Option<&'a mut dyn HeldDevice>,
        platform: Platform<'a>,
    ) -> Self {
        Self {
            knowledge,
            policy,
            device,
            device_lost: None,
            platform,
        }
    }

    /// Why the device's state could not be put back, if it could not.
    pub fn device_lost(self) -> Option<DeviceLost> {
        self.device_lost
    }

    /// Whether the call may write the `bytes` bytes at `va`; `None` if there is no policy.
    fn permits(&mut self, va: u64, bytes: u64) -> Option<bool> {
        let CallPolicy { policy, memory } = self.policy.as_mut()?;
        let range = GvaRange::new(Gva(va), bytes);
        Some(range.is_some_and(|range| va >= USER_END && policy.may_write(memory, range)))
    }
}

impl Supervisor for CallSupervisor<'_> {
    fn may_write(&mut self, va: u64) -> bool {
        self.permits(va, 1)
            .unwrap_or_else(|| self.knowledge.writable(va))
    }

    fn lasts(&self, va: u64) -> bool {
        let policy = self.policy.as_ref();
        policy.is_none_or(|CallPolicy { policy, .. }| policy.lasts(Gva(va)))
    }

    fn owns(&self, va: u64, bytes: u64) -> bool {
        match &self.policy {
            Some(CallPolicy { policy, .. }) => {
                GvaRange::new(Gva(va), bytes).is_some_and(|range| policy.table().may_write(range))
            }
            None => true,
        }
    }

    fn may_change(&mut self, va: u64, bytes: u64) -> bool {
        self.permits(va, bytes)
            .unwrap_or_else(|| self.knowledge.changeable(va, bytes))
    }

    fn holds(&mut self, values: &[u64]) {
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            policy.hold(memory, values);
        }
    }

    fn called_back(&mut self, function: u64, arguments: [u64; 6]) {
        let symbol = self.knowledge.symbols.at(Gva(function)).next();
        if let (Some(CallPolicy { policy, .. }), Some(symbol)) = (&mut self.policy, symbol) {
            policy.begin(symbol.name, arguments);
        }
    }

    fn interrupt_stack(&mut self, rsp: u64) -> Option<GvaRange> {
        let CallPolicy { memory, .. } = self.policy.as_ref()?;
        let stack = self.knowledge.interrupt_stack;
        stack.around(memory.private, memory.per_cpu_base, Gva(rsp))
    }

    fn publishing(&mut self, gpa: u64, old: &[u8; 4096]) {
        if let Some(CallPolicy { memory, .. }) = &mut self.policy {
            memory.before.keep(gpa, old);
        }
    }

    fn committing(&mut self, va: u64, bytes: u64) {
        if let (Some(CallPolicy { policy, memory }), Some(range)) =
            (&mut self.policy, GvaRange::new(Gva(va), bytes))
        {
            policy.committing(memory, range);
        }
    }

    fn leaves(&mut self, values: &[u64]) {
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            policy.leave(memory, values);
        }
    }

    fn returned(&mut self, value: u64) {
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            policy.hand_out(memory, Gva(value));
        }
    }

    fn is_kernel_function(&self, va: u64) -> bool {
        self.knowledge.is_function(va, false)
    }

    fn is_driver_function(&self, va: u64) -> bool {
        self.knowledge.is_function(va, true)
    }

    fn kernel_exception(&self, frame: &ExceptionFrame, _address: u64) -> KernelExceptionVerdict {
        let expected = if frame.vector == VECTOR_BREAKPOINT {
            // The kernel changes its code: others wait at a breakpoint meanwhile (`text_poke_bp`).
            let at = frame.rip.wrapping_sub(1);
            (KERNEL_IMAGE..MODULES_END).contains(&at)
        } else if frame.vector == VECTOR_INVALID_OPCODE {
            self.knowledge
                .faults
                .bug_at(Gva(frame.rip))
                .is_some_and(|bug| bug.is_warning())
        } else {
            self.knowledge.faults.exception_at(Gva(frame.rip)).is_some()
        };
        if expected {
            KernelExceptionVerdict::Expected
        } else {
            KernelExceptionVerdict::DriversFault
        }
    }

    fn owns_mmio(&self, gpa: u64) -> bool {
        self.device.as_ref().is_some_and(|device| device.owns(gpa))
    }

    fn owns_port(&self, port: u16) -> bool {
        let device = self.device.as_ref();
        device.is_some_and(|device| device.owns_port(port))
    }

    fn device_read(&mut self, at: DeviceAddress, bytes: usize) -> u64 {
        let mut data = [0xff; 8];
        if let Some(device) = &mut self.device {
            device.read(at, &mut data[..bytes.min(8)]);
        }
        data[bytes.min(8)..].fill(0);
        u64::from_le_bytes(data)
    }

    fn device_read_past(
        &mut self,
        at: DeviceAddress,
        bytes: usize,
        waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        let device = self.device.as_mut()?;
        device.read_past(at, bytes, waiting)
    }

    fn device_write(&mut self, at: DeviceAddress, value: u64, bytes: usize) {
        if let Some(device) = &mut self.device {
            device.write(at, &value.to_le_bytes()[..bytes.min(8)]);
        }
    }

    fn device_uses_memory(&self, at: DeviceAddress, bytes: usize, access: Access) -> bool {
        let device = self.device.as_ref();
        device.is_some_and(|device| device.uses_memory(at, bytes, access))
    }

    fn checkpoint_device(&mut self) {
        if let Some(device) = &mut self.device {
            device.checkpoint();
        }
    }

    fn restore_device(&mut self) -> bool {
        if let Some(device) = &mut self.device {
            self.device_lost = device.restore().err().or(self.device_lost.take());
        }
        self.device_lost.is_none()
    }

    fn restorable(&mut self) -> Restorable {
        let mut restorable = Restorable::default();
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            let (drivers, kernels) = policy.restorable(memory);
            let pieces = |range: &GvaRange| {
                let range = *range;
                let space = memory.private;
                range.pages().filter_map(move |page| {
                    let piece = range.intersection(&GvaRange::aligned(page, PAGE_SIZE))?;
                    let at = space.space.walk(space.memory, piece.first()).ok()?;
                    Some((at.gpa.0, piece.len_bytes()))
                })
            };
            for (gpa, bytes) in drivers.iter().flat_map(pieces) {
                restorable.include(gpa, bytes);
            }
            for (gpa, bytes) in kernels.iter().flat_map(pieces) {
                restorable.exclude(gpa, bytes);
            }
        }
        for (gpa, bytes) in self.device.iter().flat_map(|device| device.memory()) {
            restorable.include(gpa, bytes);
        }
        restorable
    }

    fn device_state(&mut self) -> Option<DeviceState> {
        self.device.as_ref().and_then(|device| device.state())
    }

    fn undo_device(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        if let Some(lost) = &self.device_lost {
            return Err(lost.to_string());
        }
        match &mut self.device {
            Some(device) => device.undo(parts),
            None => Ok(()),
        }
    }

    fn requests_changed(&self, before: &DeviceState, after: &DeviceState) -> bool {
        let device = self.device.as_ref();
        device.is_some_and(|device| device.requests_changed(before, after))
    }

    fn platform_read(&mut self, gpa: u64, bytes: usize) -> Option<u64> {
        self.platform.read(gpa, bytes)
    }

    fn platform_write(&mut self, gpa: u64, value: u64, bytes: usize) -> bool {
        self.platform.write(gpa, value, bytes)
    }

    fn platform_msr_write(&mut self, index: u32, value: u64) -> bool {
        self.platform.write_msr(index, value)
    }

    fn commit_platform(&mut self) {
        self.platform.commit();
    }

    fn forget_platform(&mut self) {
        self.platform.forget();
    }

    fn begin_again(&mut self) {
        self.forget_platform();
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            policy.begin_again(memory);
        }
    }

    fn harmless_port_write(&mut self, port: u16, _value: u32, _bytes: usize) -> bool {
        // What a call of the driver prints on the console is in the kernel's log as well if the call
        // commits; the line itself is left out rather than printed for calls that are taken back.
        SERIAL_PORTS.contains(&port)
    }
}
