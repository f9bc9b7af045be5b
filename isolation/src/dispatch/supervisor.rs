//! What calls in the domain are told about this guest: its functions, its memory, its device.

use devices::clock::monotonic_ns;
use devices::dma::GuestMemory;

use crate::dispatch::knowledge::USER_END;
use crate::dispatch::platform::Platform;
use crate::domain::effects::KernelCall;
use crate::domain::failing::Failing;
use crate::domain::list_links::LINKS_BYTES;
use crate::domain::monitor::{Asked, ExceptionFrame};
use crate::domain::supervisor::{Answer, Behind, HandOver, KernelExceptionVerdict, Supervisor};
use crate::domain::undo_log::Restorable;
use crate::fault_image::{Keeper, Kept};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::symbols::{KERNEL_IMAGE, MODULES_END};
use crate::policy::call::{CallMemory, DriverPolicy};
use devices::hold::{Access, DeviceAddress, DeviceLost, DeviceState, HeldDevice};

pub use crate::dispatch::knowledge::Knowledge;

const PAGE_SIZE: u64 = 4096;
const VECTOR_BREAKPOINT: u8 = 3;
const VECTOR_INVALID_OPCODE: u8 = 6;
/// Port of the first serial line, where the kernel's console may go.
const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;

/// What one call may write.
pub struct CallPolicy<'a> {
    /// The driver's policy, in which the call has begun.
    pub policy: &'a mut DriverPolicy,
    /// Memory as the call has it.
    pub memory: CallMemory<'a, GuestMemory>,
}

/// Who keeps the calls of an isolated function that fail.
#[derive(Clone, Copy)]
pub struct KeepsFaults<'a> {
    /// Keeps them.
    pub keeper: &'a Keeper,
    /// Name of the function.
    pub entry: &'a str,
}

/// The supervisor of one call.
pub struct CallSupervisor<'a> {
    knowledge: &'a Knowledge,
    policy: Option<CallPolicy<'a>>,
    device: Option<&'a mut dyn HeldDevice>,
    device_lost: Option<DeviceLost>,
    platform: Platform<'a>,
    keeps: Option<KeepsFaults<'a>>,
    kept: Option<Kept>,
}

impl<'a> CallSupervisor<'a> {
    /// For a call of a module with this knowledge, whose device is in hand.
    pub fn new(
        knowledge: &'a Knowledge,
        policy: Option<CallPolicy<'a>>,
        device: Option<&'a mut dyn HeldDevice>,
        platform: Platform<'a>,
        keeps: Option<KeepsFaults<'a>>,
    ) -> Self {
        Self {
            knowledge,
            policy,
            device,
            device_lost: None,
            platform,
            keeps,
            kept: None,
        }
    }

    /// Why the device's state could not be put back, if it could not, and what became of the image
    /// of its fault.
    pub fn ended(self) -> (Option<DeviceLost>, Option<Kept>) {
        (self.device_lost, self.kept)
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

    fn expected(&mut self) -> Vec<u64> {
        let Some(CallPolicy { policy, memory }) = &mut self.policy else {
            return Vec::new();
        };
        policy.expected(memory).into_iter().map(|at| at.0).collect()
    }

    fn stored(&mut self, va: u64) {
        if let Some(CallPolicy { policy, .. }) = &mut self.policy {
            policy.stored(Gva(va));
        }
    }

    fn may_hand_over(&mut self) -> bool {
        let policy = self.policy.as_ref();
        policy.is_some_and(|CallPolicy { policy, memory }| policy.may_hand_over(memory))
    }

    fn hands_over(&mut self, calls: &[KernelCall]) -> HandOver {
        let looked = self.policy.as_mut();
        let looked =
            looked.and_then(|CallPolicy { policy, memory }| policy.hands_over(memory, calls));
        looked.map_or(HandOver::Refused, |stores_wait_for| HandOver::Accepted {
            stores_wait_for,
        })
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

    fn may_write_in(&mut self, va: u64, values: &[u64]) -> bool {
        let policy = self.policy.as_mut();
        policy.is_some_and(|CallPolicy { policy, memory }| {
            va >= USER_END && policy.may_write_in(memory, Gva(va), values)
        })
    }

    fn holds(&mut self, values: &[u64]) {
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            policy.hold(memory, values);
        }
    }

    fn asked_for(&mut self, asked: &[Asked]) {
        if let Some(CallPolicy { policy, memory }) = &mut self.policy {
            policy.asked_for(memory, asked);
        }
    }

    fn behind_asked(&self) -> Vec<Behind> {
        let policy = self.policy.as_ref();
        policy.map_or_else(Vec::new, |CallPolicy { policy, .. }| {
            policy.behind_asked().collect()
        })
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

    fn answered(&mut self, call: &KernelCall, result: u64) -> Option<Answer> {
        let CallPolicy { policy, memory } = self.policy.as_mut()?;
        policy.answered(memory, call, result)
    }

    fn was_answered(&mut self, answers: &[Answer]) {
        if let Some(CallPolicy { policy, .. }) = &mut self.policy {
            policy.was_answered(answers);
        }
    }

    fn is_kernel_function(&self, va: u64) -> bool {
        self.knowledge.is_function(va, false)
    }

    fn is_made_by_kernel(&self, va: u64, second: u64) -> bool {
        let policy = self.policy.as_ref();
        policy.is_some_and(|CallPolicy { policy, memory }| policy.is_program(memory, va, second))
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

    fn is_nobodys_port(&self, port: u16, bytes: usize) -> bool {
        self.platform.is_nobodys_port(port, bytes)
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

    fn stand_still(&mut self) {
        if let Some(device) = &mut self.device {
            device.stand_still();
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
            let drivers = policy.restorable(memory);
            let pieces = |range: &GvaRange| {
                let range = *range;
                let space = memory.private;
                range.pages().filter_map(move |page| {
                    let piece = range.intersection(&GvaRange::aligned(page, PAGE_SIZE))?;
                    let at = space.space.walk(space.memory, piece.first()).ok()?;
                    Some((at.gpa.0, piece))
                })
            };
            for (gpa, piece) in drivers.own.iter().flat_map(pieces) {
                restorable.include(gpa, piece.len_bytes());
            }
            for (gpa, piece) in drivers.kernels.iter().flat_map(pieces) {
                restorable.exclude(gpa, piece.len_bytes());
            }
            for (gpa, piece) in drivers.links.iter().flat_map(pieces) {
                if piece.len_bytes() == LINKS_BYTES {
                    restorable.links(gpa, piece.first().0);
                }
            }
        }
        for (gpa, bytes) in self.device.iter_mut().flat_map(|device| device.memory()) {
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

    fn watches_faults(&self) -> bool {
        self.keeps.is_some()
    }

    fn failing(&mut self, failing: &Failing<'_>) {
        let Some(KeepsFaults { keeper, entry }) = self.keeps else {
            return;
        };
        let violation = failing.violation.clone();
        let mut failed = self.knowledge.failed(entry, violation, failing.domain);
        failed.at_ns = monotonic_ns();
        if let (None, Some(CallPolicy { policy, memory })) = (&failed.touched, &self.policy) {
            let touched = failed.violation.touched();
            failed.touched = touched.and_then(|at| policy.whose(memory.private, Gva(at)));
        }
        let report = failed.named(&self.knowledge.symbols);
        self.kept = Some(keeper.keep(entry, &report, failing));
    }

    fn harmless_port_write(&mut self, port: u16, _value: u32, _bytes: usize) -> bool {
        // What a call of the driver prints on the console is in the kernel's log as well if the
        // call commits; the line itself is left out rather than printed for calls that are taken
        // back.
        SERIAL_PORTS.contains(&port)
    }
}
