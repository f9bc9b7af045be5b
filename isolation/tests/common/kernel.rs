//! The tests' supervisor: what it knows of the hand-made guest, and what it records.

use super::*;
use devices::dma::GuestMemory;
use isolation::domain::effects::KernelCall;
use isolation::domain::failing::Failing;
use isolation::domain::monitor::Asked;
use isolation::domain::supervisor::{Answer, Behind, HandOver};
use isolation::domain::transaction::AbortPhases;
use isolation::fault_image::{Keeper, Kept};
use isolation::status::report::{Told, ViolationReport};

/// An I/O port at which the machine has no device.
pub const NOBODYS_PORT: u16 = 0x5658;
/// What is stored to the device to change its transmitter.
pub const TRANSMITTER: u64 = 0x7c71;

/// What the tests' supervisor knows and records.
#[derive(Default)]
pub struct Kernel {
    /// Writable ranges: address and length.
    pub writable: Vec<(u64, u64)>,
    /// Whether what is writable is the driver's beyond a call.
    pub passes: bool,
    /// Where calls are expected to store.
    pub expected: Vec<u64>,
    /// Where they did, in what is not the driver's beyond them, and it was not expected.
    pub stored: Vec<u64>,
    pub kernel_functions: HashSet<u64>,
    pub driver_functions: HashSet<u64>,
    /// Code without a name, with the second argument that it is called with.
    pub programs: Vec<(u64, u64)>,
    pub kernel_exception_expected: bool,
    /// The stack for interrupts.
    pub interrupt_stack: Option<GvaRange>,
    /// Stores that reached the device.
    pub device_writes: Vec<(u64, u64, usize)>,
    pub device_value: u64,
    /// How long the host works for each device load.
    pub device_works: std::time::Duration,
    /// What the device writes by itself each time that it is reached: guest physical addresses and
    /// bytes.
    pub dma: Vec<(u64, u8)>,
    /// It does so where a test puts it back, so that memory is not as it was at its checkpoint.
    pub moves_data: bool,
    /// Offsets of registers whose loads have no effect, and to which stores change nothing of what
    /// those show.
    pub flushes: Vec<u64>,
    pub flushes_past: Vec<u64>,
    pub checkpoints: u32,
    pub restores: u32,
    /// The guest's memory: a device that is put back looks at it, so that has to be as it was at
    /// the checkpoint by then.
    pub memory: Option<Arc<GuestMemory>>,
    pub at_checkpoint: Vec<u8>,
    /// Among what is writable, what kernel functions keep: address and length.
    pub kernels: Vec<(u64, u64)>,
    /// Further bytes that would have to be put back, from guest physical address 0.
    pub more_restorable: u64,
    /// Offsets of the device's registers whose stores do not have it use memory; loads do not
    /// either if there are some.
    pub registers_alone: Vec<u64>,
    /// The device cannot be put back.
    pub device_is_lost: bool,
    /// The device cannot be put back in parts.
    pub device_is_in_use: bool,
    /// Stores that had reached the device before and after each part that was taken back, oldest
    /// first.
    pub undone_parts: Vec<(usize, usize)>,
    /// Guest physical addresses and first words of pages that a call that went on put something
    /// into.
    pub published: Vec<(u64, u64)>,
    /// What calls held when they went on in the guest.
    pub held: Vec<u64>,
    /// What kernel functions that went on in the guest returned.
    pub returned: Vec<u64>,
    /// The guest's interrupt controller is at [`OTHER_DEVICE`].
    pub platform: bool,
    pub platform_waiting: Vec<(u64, u64)>,
    /// Registers of interrupt controller and timer that were written at commit.
    pub platform_written: Vec<(u64, u64)>,
    /// Kernel functions may wait for the end of calls; these do not.
    pub may_hand_over: bool,
    pub refused: HashSet<u64>,
    /// Stores to the device wait for this one.
    pub stores_wait_for: Option<u64>,
    /// How often a call was begun again.
    pub begun_again: u32,
    /// What calls asked for.
    pub asked: Vec<Asked>,
    /// Bytes of the slots in which that is handed out, zeroed; 0 if that is not known.
    pub slot_bytes: u64,
    /// What is behind it there is the kernel's red zone.
    pub slots_are_red: bool,
    /// What kernel functions have answered with: what they returned, or their second argument if
    /// that was 0.
    pub answers: Vec<Answer>,
    /// What calls that came back had been answered with.
    pub was_answered: Vec<Answer>,
    /// Keeps faults.
    pub keeper: Option<Keeper>,
    /// What became of the last one.
    pub kept: Option<Kept>,
}

impl Kernel {
    pub fn with_data() -> Self {
        Self {
            writable: vec![(DRIVER_DATA, PAGE)],
            ..Default::default()
        }
    }

    fn move_data(&self) {
        let memory = self.memory.iter();
        for (memory, (gpa, byte)) in
            memory.flat_map(|memory| self.dma.iter().map(move |one| (memory, one)))
        {
            memory.write_obj(*byte, GuestAddress(*gpa)).unwrap();
        }
    }
}

impl Supervisor for Kernel {
    fn may_write(&mut self, va: u64) -> bool {
        let page = va & !(PAGE - 1);
        self.writable
            .iter()
            .any(|(start, length)| *start < page + PAGE && start + length > page)
    }
    fn lasts(&self, _: u64) -> bool {
        !self.passes
    }
    fn expected(&mut self) -> Vec<u64> {
        self.expected.clone()
    }
    fn may_hand_over(&mut self) -> bool {
        self.may_hand_over
    }
    fn hands_over(&mut self, calls: &[KernelCall]) -> HandOver {
        if calls
            .iter()
            .any(|call| self.refused.contains(&call.function))
        {
            return HandOver::Refused;
        }
        let waited_for = self.stores_wait_for;
        HandOver::Accepted {
            stores_wait_for: calls
                .iter()
                .position(|call| Some(call.function) == waited_for),
        }
    }
    fn begin_again(&mut self) {
        self.begun_again += 1;
        self.forget_platform();
    }
    fn asked_for(&mut self, asked: &[Asked]) {
        self.asked.extend(asked);
    }
    fn behind_asked(&self) -> Vec<Behind> {
        let all = self.asked.iter().filter(|_| self.slot_bytes > 0);
        let known = all.filter(|asked| {
            let mut same = self.asked.iter().filter(|other| other.at == asked.at);
            same.all(|asked| asked.bytes.is_some())
        });
        let behind = known.filter_map(|asked| {
            let bytes = asked.bytes?;
            Some(Behind {
                range: GvaRange::new(Gva(asked.at + bytes), self.slot_bytes - bytes)?,
                is_red_zone: self.slots_are_red,
            })
        });
        behind.collect()
    }
    fn stored(&mut self, va: u64) {
        self.stored.push(va);
    }
    fn owns(&self, va: u64, bytes: u64) -> bool {
        let mut all = self.writable.iter();
        all.any(|(start, length)| *start <= va && va + bytes <= start + length)
    }
    fn may_change(&mut self, va: u64, bytes: u64) -> bool {
        self.writable
            .iter()
            .any(|(start, length)| *start <= va && va + bytes <= start + length)
    }
    fn interrupt_stack(&mut self, rsp: u64) -> Option<GvaRange> {
        self.interrupt_stack
            .filter(|stack| stack.contains(Gva(rsp)))
    }
    fn publishing(&mut self, gpa: u64, old: &[u8; 4096]) {
        let word = u64::from_le_bytes(old[..8].try_into().unwrap());
        self.published.push((gpa, word));
    }
    fn leaves(&mut self, values: &[u64]) {
        self.held.extend(values);
    }
    fn returned(&mut self, value: u64) {
        self.returned.push(value);
    }
    fn answered(&mut self, call: &KernelCall, result: u64) -> Option<Answer> {
        let answer = Answer {
            function: call.function,
            at: if result == 0 {
                call.arguments[1]
            } else {
                result
            },
        };
        self.answers.push(answer);
        Some(answer)
    }
    fn was_answered(&mut self, answers: &[Answer]) {
        self.was_answered.extend(answers);
    }
    fn is_kernel_function(&self, va: u64) -> bool {
        self.kernel_functions.contains(&va)
    }
    fn is_made_by_kernel(&self, va: u64, second: u64) -> bool {
        self.programs.contains(&(va, second))
    }
    fn is_driver_function(&self, va: u64) -> bool {
        self.driver_functions.contains(&va)
    }
    fn kernel_exception(&self, _: &ExceptionFrame, _: u64) -> KernelExceptionVerdict {
        if self.kernel_exception_expected {
            KernelExceptionVerdict::Expected
        } else {
            KernelExceptionVerdict::DriversFault
        }
    }
    fn owns_mmio(&self, gpa: u64) -> bool {
        (DEVICE_GPA..DEVICE_GPA + PAGE).contains(&gpa)
    }
    fn owns_port(&self, port: u16) -> bool {
        DEVICE_PORTS.contains(&port)
    }
    fn device_read(&mut self, _: DeviceAddress, _: usize) -> u64 {
        self.move_data();
        let start = std::time::Instant::now();
        while start.elapsed() < self.device_works {
            std::hint::spin_loop();
        }
        self.device_value
    }
    fn device_read_past(
        &mut self,
        at: DeviceAddress,
        _: usize,
        waiting: &mut dyn Iterator<Item = DeviceAddress>,
    ) -> Option<u64> {
        let is_of = |all: &[u64], at| {
            all.iter()
                .any(|offset| at == DeviceAddress::Memory(DEVICE_GPA + offset))
        };
        let waiting: Vec<_> = waiting.collect();
        self.move_data();
        let may =
            is_of(&self.flushes, at) && waiting.into_iter().all(|at| is_of(&self.flushes_past, at));
        may.then_some(self.device_value)
    }
    fn device_write(&mut self, at: DeviceAddress, value: u64, bytes: usize) {
        let at = match at {
            DeviceAddress::Memory(gpa) => gpa,
            DeviceAddress::Port(port) => port.into(),
        };
        self.device_writes.push((at, value, bytes));
    }
    fn device_uses_memory(&self, at: DeviceAddress, _: usize, access: Access) -> bool {
        if access == Access::Store {
            self.move_data();
        }
        let is_alone = |offset: &u64| at == DeviceAddress::Memory(DEVICE_GPA + offset);
        match access {
            Access::Load => self.registers_alone.is_empty(),
            Access::Store => !self.registers_alone.iter().any(is_alone),
        }
    }
    fn checkpoint_device(&mut self) {
        self.checkpoints += 1;
        self.at_checkpoint = self.memory.as_deref().map(all_of).unwrap_or_default();
    }
    fn restore_device(&mut self) -> bool {
        self.restores += 1;
        let now = self.memory.as_deref().map(all_of).unwrap_or_default();
        assert!(
            self.moves_data || now == self.at_checkpoint,
            "the device is put back before the memory that it looks at"
        );
        self.device_writes.clear();
        !self.device_is_lost
    }
    fn restorable(&mut self) -> Restorable {
        let mut restorable = Restorable::default();
        for (va, bytes) in &self.writable {
            restorable.include(gpa_of(*va), *bytes);
        }
        restorable.include(0, self.more_restorable);
        for (va, bytes) in &self.kernels {
            restorable.exclude(gpa_of(*va), *bytes);
        }
        restorable
    }
    fn device_state(&mut self) -> Option<DeviceState> {
        Some(DeviceState(Arc::new(self.device_writes.len())))
    }
    fn undo_device(&mut self, parts: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        if self.device_is_in_use {
            return Err("somebody uses it".to_owned());
        }
        let writes = |state: &DeviceState| *state.0.downcast_ref::<usize>().unwrap();
        let parts = parts
            .iter()
            .map(|(before, after)| (writes(before), writes(after)));
        self.undone_parts = parts.collect();
        Ok(())
    }
    fn requests_changed(&self, before: &DeviceState, after: &DeviceState) -> bool {
        let writes = |state: &DeviceState| *state.0.downcast_ref::<usize>().unwrap();
        let part = self.device_writes.get(writes(before)..writes(after));
        part.is_some_and(|part| part.iter().any(|(_, value, _)| *value == TRANSMITTER))
    }
    fn platform_read(&mut self, gpa: u64, _: usize) -> Option<u64> {
        let written = self.platform_waiting.iter().rev();
        let value = written.clone().find(|(at, _)| *at == gpa);
        self.platform.then(|| value.map_or(0, |(_, value)| *value))
    }
    fn forget_platform(&mut self) {
        self.platform_waiting.clear();
    }
    fn platform_write(&mut self, gpa: u64, value: u64, _: usize) -> bool {
        self.platform_waiting.push((gpa, value));
        self.platform
    }
    fn platform_msr_write(&mut self, index: u32, value: u64) -> bool {
        self.platform_write(index.into(), value, 8)
    }
    fn commit_platform(&mut self) {
        self.platform_written.append(&mut self.platform_waiting);
    }
    fn watches_faults(&self) -> bool {
        self.keeper.is_some()
    }
    fn failing(&mut self, failing: &Failing<'_>) {
        let report = ViolationReport {
            entry: "driver_entry".to_owned(),
            violation: failing.violation.clone(),
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
        };
        let keeper = self.keeper.as_ref().unwrap();
        self.kept = Some(keeper.keep("driver_entry", &report, failing));
    }
    fn is_nobodys_port(&self, port: u16, _: usize) -> bool {
        port == NOBODYS_PORT
    }
    fn harmless_port_write(&mut self, port: u16, _: u32, _: usize) -> bool {
        port == 0x3f8
    }
}
