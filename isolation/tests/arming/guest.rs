//! A hand-made guest that really runs: two modules, a kernel of a few functions, and two sets of
//! page tables. Its one vCPU waits for orders: a function to call, and the tables to call it from.
//!
//! ```text
//!   wait ─► CR3 = the order's tables ─► call the order's function ─► CR3 = the kernel's tables ─► report ─► wait
//! ```

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::dma::GuestMemory;
use devices::serial::SerialBackend;
use iced_x86::code_asm::*;
use isolation::attach::plan::Wanted;
use isolation::attach::request::{Contain, IsolateRequest, Isolated};
use isolation::attach::{AttachError, Isolator};
use isolation::dispatch::after_fault::ReturnErrors;
use isolation::guest::symbols::{SymbolTable, read_kallsyms};
use isolation::status::{EntryStatus, ModuleStatus};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::MemorySource;
use vmm::{ExitReason, OnGuestReset, Payload, Vm, VmConfig, VmHandle};

pub const PAGE: u64 = 4096;
/// Text and data of the two modules.
pub const FIRST: u64 = 0xffff_ffff_c000_1000;
pub const FIRST_DATA: u64 = 0xffff_ffff_c000_3000;
pub const SECOND: u64 = 0xffff_ffff_c001_1000;
pub const SECOND_DATA: u64 = 0xffff_ffff_c001_3000;
/// A function of the first module that calls one of the second.
pub const CALLS_SECOND: u64 = FIRST + 0x100;
/// A function of the first module that waits in the kernel, and then fails if [`FAILS`] says so.
pub const WAITS: u64 = FIRST + 0x200;
/// A function of the first module that calls another one of it, which has no room for a gate.
pub const CALLS_OWN: u64 = FIRST + 0x300;
const HELPS: u64 = FIRST + 0x380;
/// A function of the first module that puts an entry of its own stack into [`QUEUE`], waits in the
/// kernel, and then takes it out again, or fails if [`FAILS`] says so. If [`LASTS`] says so it has
/// done something before that nothing takes back.
pub const JOINS: u64 = FIRST + 0x480;
/// A function of the first module that counts a register of a device up and returns what it is then.
pub const TELLS: u64 = FIRST + 0x400;
/// Where that register is in the guest's memory, in the 32-bit PCI window.
pub const DEVICE_GPA: u64 = 0xc000_1000;
const DEVICE: u64 = 0xffff_c900_1000_0000;
/// How often that ran to its end.
pub const RUNS: u64 = FIRST_DATA + 8;
pub const FAILS: u64 = FIRST_DATA + 16;
pub const LASTS: u64 = FIRST_DATA + 24;
const KERNEL_TEXT: u64 = 0xffff_ffff_8100_0000;
const KERNEL_WAITS: u64 = KERNEL_TEXT + 0x100;
const SCHEDULE: u64 = KERNEL_TEXT + 0x200;
const UNDOES: u64 = KERNEL_TEXT + 0x300;
const LOOP: u64 = KERNEL_TEXT + 0x400;
const KERNEL_JOINS: u64 = KERNEL_TEXT + 0x500;
const KERNEL_LEAVES: u64 = KERNEL_TEXT + 0x600;
const KERNEL_LASTS: u64 = KERNEL_TEXT + 0x700;
const KERNEL_DATA: u64 = 0xffff_ffff_8200_0000;
const ORDER: u64 = KERNEL_DATA;
const TABLES: u64 = KERNEL_DATA + 8;
const RESULT: u64 = KERNEL_DATA + 16;
/// How often the scheduler was called, and whether it stays in there.
pub const SCHEDULED: u64 = KERNEL_DATA + 24;
pub const STAYS: u64 = KERNEL_DATA + 32;
/// How often the function that takes `kernel_waits` back was called, and whether it stays in there.
pub const UNDONE: u64 = KERNEL_DATA + 40;
pub const UNDO_STAYS: u64 = KERNEL_DATA + 48;
/// The first entry of a queue.
pub const QUEUE: u64 = KERNEL_DATA + 56;
const GDT: u64 = KERNEL_DATA + 0x800;
pub const STACK_TOP: u64 = 0xffff_c900_0000_4000;
/// Top-level tables: the kernel's own, and those of a process.
pub const KERNEL_TABLES: u64 = 0x20_0000;
pub const PROCESS_TABLES: u64 = 0x2f_0000;

/// What does not come by then does not come.
const NEVER: Duration = Duration::from_secs(60);

pub fn gpa_of(va: u64) -> u64 {
    match va {
        FIRST..0xffff_ffff_c000_2000 => 0x30_0000 + (va - FIRST),
        FIRST_DATA..0xffff_ffff_c000_4000 => 0x31_0000 + (va - FIRST_DATA),
        SECOND..0xffff_ffff_c001_2000 => 0x32_0000 + (va - SECOND),
        SECOND_DATA..0xffff_ffff_c001_4000 => 0x33_0000 + (va - SECOND_DATA),
        KERNEL_TEXT..0xffff_ffff_8100_1000 => 0x34_0000 + (va - KERNEL_TEXT),
        KERNEL_DATA..0xffff_ffff_8200_1000 => 0x35_0000 + (va - KERNEL_DATA),
        0xffff_c900_0000_0000..STACK_TOP => 0x36_0000 + (va & 0xffff),
        _ => panic!("{va:#x} is not mapped"),
    }
}

struct PageTables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl PageTables<'_> {
    fn map(&mut self, va: u64, gpa: u64, flags: u64) {
        let mut table = KERNEL_TABLES;
        for shift in [39, 30, 21] {
            let at = GuestAddress(table + (va >> shift & 511) * 8);
            let entry: u64 = self.memory.read_obj(at).unwrap();
            table = match entry {
                0 => {
                    let new = self.next;
                    self.next += PAGE;
                    self.memory.write_obj(new | 3, at).unwrap();
                    new
                }
                entry => entry & 0x000f_ffff_ffff_f000,
            };
        }
        let at = GuestAddress(table + (va >> 12 & 511) * 8);
        self.memory.write_obj(gpa | 1 | flags, at).unwrap();
    }
}

/// A driver's function: begins with a NOP for a gate, adds 1 to its data and returns what is there
/// then.
fn counts(a: &mut CodeAssembler, data: u64) -> Result<(), IcedError> {
    a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
    adds(a, data)
}

/// What it does then.
fn adds(a: &mut CodeAssembler, data: u64) -> Result<(), IcedError> {
    a.mov(rcx, data)?;
    a.inc(qword_ptr(rcx))?;
    a.mov(rax, qword_ptr(rcx))?;
    a.ret()
}

/// A kernel function that counts its calls and does not return while `stays` is not 0.
fn counts_and_stays(a: &mut CodeAssembler, count: u64, stays: u64) -> Result<(), IcedError> {
    let (mut top, mut goes) = (a.create_label(), a.create_label());
    a.mov(rcx, count)?;
    a.inc(qword_ptr(rcx))?;
    a.mov(rcx, stays)?;
    a.set_label(&mut top)?;
    a.cmp(qword_ptr(rcx), 0)?;
    a.je(goes)?;
    a.pause()?;
    a.jmp(top)?;
    a.set_label(&mut goes)?;
    a.ret()
}

/// See [`JOINS`].
fn joins(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut lasts, mut well) = (a.create_label(), a.create_label());
    a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
    a.push(rbx)?;
    a.sub(rsp, 0x10)?;
    a.mov(rbx, FIRST_DATA)?;
    a.cmp(qword_ptr(rbx + (LASTS - FIRST_DATA)), 0)?;
    a.je(lasts)?;
    a.call(KERNEL_LASTS)?;
    a.set_label(&mut lasts)?;
    a.mov(rdi, QUEUE)?;
    a.mov(rsi, rsp)?;
    a.call(KERNEL_JOINS)?;
    a.call(KERNEL_WAITS)?;
    a.cmp(qword_ptr(rbx + (FAILS - FIRST_DATA)), 0)?;
    a.je(well)?;
    a.ud2()?;
    a.set_label(&mut well)?;
    a.mov(rdi, QUEUE)?;
    a.mov(rsi, rsp)?;
    a.call(KERNEL_LEAVES)?;
    a.mov(eax, 7)?;
    a.add(rsp, 0x10)?;
    a.pop(rbx)?;
    a.ret()
}

/// A kernel function that takes the entry at `rsi` out of the queue at `rdi`, having used some of
/// the stack.
fn leaves(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, -1i64)?;
    for _ in 0..16 {
        a.push(rax)?;
    }
    a.add(rsp, 16 * 8)?;
    a.mov(rax, qword_ptr(rsi))?;
    a.mov(qword_ptr(rdi), rax)?;
    a.ret()
}

#[expect(
    clippy::too_many_lines,
    reason = "one table of what is where in the guest"
)]
fn write(memory: &GuestMemory) {
    let mut tables = PageTables {
        memory,
        next: KERNEL_TABLES + PAGE,
    };
    const WRITE: u64 = 2;
    const NX: u64 = 1 << 63;
    for (va, pages, flags) in [
        (FIRST, 1, 0),
        (FIRST_DATA, 1, WRITE | NX),
        (SECOND, 1, 0),
        (SECOND_DATA, 1, WRITE | NX),
        (KERNEL_TEXT, 1, 0),
        (KERNEL_DATA, 1, WRITE | NX),
        (STACK_TOP - 4 * PAGE, 4, WRITE | NX),
    ] {
        for va in (0..pages).map(|page| va + page * PAGE) {
            tables.map(va, gpa_of(va), flags);
        }
    }
    // Not cached.
    tables.map(DEVICE, DEVICE_GPA, WRITE | NX | 1 << 4);
    let mut top = [0; PAGE as usize];
    memory
        .read_slice(&mut top, GuestAddress(KERNEL_TABLES))
        .unwrap();
    memory
        .write_slice(&top, GuestAddress(PROCESS_TABLES))
        .unwrap();
    let put = |va: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(gpa_of(va))).unwrap();
    };
    let code = |va: u64, build: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let mut assembler = CodeAssembler::new(64).unwrap();
        build(&mut assembler).unwrap();
        put(va, &assembler.assemble(va).unwrap());
    };
    for text in [FIRST, SECOND] {
        put(text, &[0xcc; PAGE as usize]);
    }
    code(FIRST, &|a| counts(a, FIRST_DATA));
    code(SECOND, &|a| counts(a, SECOND_DATA));
    code(CALLS_SECOND, &|a| {
        a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        a.push(rbx)?;
        a.mov(rbx, FIRST_DATA)?;
        a.add(qword_ptr(rbx), 100)?;
        a.call(SECOND)?;
        a.add(rax, qword_ptr(rbx))?;
        a.pop(rbx)?;
        a.ret()
    });
    code(WAITS, &|a| {
        let mut well = a.create_label();
        a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        a.push(rbx)?;
        a.mov(rbx, FIRST_DATA)?;
        a.call(KERNEL_WAITS)?;
        a.cmp(qword_ptr(rbx + (FAILS - FIRST_DATA)), 0)?;
        a.je(well)?;
        a.ud2()?;
        a.set_label(&mut well)?;
        a.inc(qword_ptr(rbx + (RUNS - FIRST_DATA)))?;
        a.mov(eax, 7)?;
        a.pop(rbx)?;
        a.ret()
    });
    code(CALLS_OWN, &|a| {
        a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        a.call(HELPS)?;
        a.ret()
    });
    code(HELPS, &|a| adds(a, FIRST_DATA));
    code(JOINS, &joins);
    code(KERNEL_LEAVES, &leaves);
    code(KERNEL_LASTS, &|a| a.ret());
    code(KERNEL_JOINS, &|a| {
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(qword_ptr(rsi), rax)?;
        a.mov(qword_ptr(rdi), rsi)?;
        a.ret()
    });
    code(TELLS, &|a| {
        a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        a.mov(rcx, DEVICE)?;
        a.mov(eax, dword_ptr(rcx))?;
        a.inc(eax)?;
        a.mov(dword_ptr(rcx), eax)?;
        a.ret()
    });
    code(KERNEL_WAITS, &|a| {
        a.call(SCHEDULE)?;
        a.ret()
    });
    code(SCHEDULE, &|a| counts_and_stays(a, SCHEDULED, STAYS));
    code(UNDOES, &|a| counts_and_stays(a, UNDONE, UNDO_STAYS));
    code(LOOP, &|a| {
        let (mut top, mut wait) = (a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.mov(rbx, ORDER)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.mov(rax, qword_ptr(rbx))?;
        a.test(rax, rax)?;
        a.jz(wait)?;
        a.mov(rcx, qword_ptr(rbx + (TABLES - ORDER)))?;
        a.mov(cr3, rcx)?;
        a.call(rax)?;
        a.mov(qword_ptr(rbx + (RESULT - ORDER)), rax)?;
        a.mov(rcx, KERNEL_TABLES)?;
        a.mov(cr3, rcx)?;
        a.mov(qword_ptr(rbx), 0)?;
        a.jmp(top)
    });
    put(GDT + 0x10, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(GDT + 0x18, &0x00cf_9300_0000_ffffu64.to_le_bytes());
}

fn registers(boot: &kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let mut sregs = *boot;
    sregs.cr3 = KERNEL_TABLES;
    // PAE, PGE, OSFXSR, OSXMMEXCPT; SCE, LME, LMA, NXE.
    (sregs.cr4, sregs.efer) = (0x6a0, 0xd01);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x1f);
    let regs = kvm_regs {
        rip: LOOP,
        rsp: STACK_TOP - 0x100,
        rflags: 2,
        ..Default::default()
    };
    (regs, sregs)
}

/// A guest that runs.
pub struct Guest {
    pub handle: VmHandle,
    pub isolator: Arc<Isolator>,
    machine: Option<JoinHandle<Result<ExitReason, vmm::Error>>>,
}

impl Guest {
    pub fn start() -> Self {
        Self::start_with(MemorySource::default())
    }

    /// With memory from `source`, which is written over.
    pub fn start_with(source: MemorySource) -> Self {
        let mut vm = Vm::new(VmConfig {
            memory_bytes: 8 << 20,
            memory: source,
            vcpus: 1,
            payload: Payload::Code {
                code: vec![0xeb, 0xfe],
                address: GuestAddress(0x10_0000),
            },
            console: SerialBackend::None,
            on_guest_reset: OnGuestReset::Exit,
        })
        .expect("this host has no usable KVM");
        let handle = vm.handle();
        write(handle.ram().memory());
        let isolator = Isolator::attach(handle.clone()).unwrap();
        let machine = std::thread::spawn(move || vm.run());
        while handle.status().first_entry_ns.is_none() {
            std::thread::yield_now();
        }
        handle
            .with_paused(|vcpus| {
                let vcpu = vcpus.get(0).unwrap();
                let (regs, sregs) = registers(&vcpu.get_sregs().unwrap());
                vcpu.set_sregs(&sregs).unwrap();
                vcpu.set_regs(&regs).unwrap();
            })
            .unwrap();
        Self {
            handle,
            isolator,
            machine: Some(machine),
        }
    }

    pub fn read(&self, va: u64) -> u64 {
        let at = GuestAddress(gpa_of(va));
        self.handle.ram().memory().read_obj(at).unwrap()
    }

    pub fn write(&self, va: u64, value: u64) {
        let at = GuestAddress(gpa_of(va));
        self.handle.ram().memory().write_obj(value, at).unwrap();
    }

    /// Has the guest call `function`, and does not wait.
    pub fn order(&self, function: u64) {
        self.write(TABLES, KERNEL_TABLES);
        self.write(ORDER, function);
    }

    /// Has the guest call `function` with the top-level table at `tables`, and waits for what it
    /// returns.
    pub fn call_from(&self, tables: u64, function: u64) -> u64 {
        self.write(TABLES, tables);
        self.write(ORDER, function);
        let start = Instant::now();
        while self.read(ORDER) != 0 {
            if start.elapsed() > NEVER {
                let regs = self
                    .handle
                    .with_paused(|vcpus| vcpus.get(0).unwrap().get_regs());
                panic!("no return: {regs:x?}\n{:?}", self.isolator.status());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        self.read(RESULT)
    }

    pub fn call(&self, function: u64) -> u64 {
        self.call_from(KERNEL_TABLES, function)
    }

    /// What there is to know of a module, and all of its functions wanted.
    pub fn request(module: &str) -> IsolateRequest {
        let (text, data) = match module {
            "first" => (FIRST, FIRST_DATA),
            _ => (SECOND, SECOND_DATA),
        };
        IsolateRequest {
            module: module.to_owned(),
            sections: vec![(".text".into(), text), (".data".into(), data)],
            symbols: Arc::new(symbols()),
            types: None,
            kernel: "6.1.0".to_owned(),
            contain: Contain::None,
            wanted: Wanted::All,
            model: None,
            guest_only: Vec::new(),
            device: None,
            device_slots: Vec::new(),
            memory_moves: false,
            budget: Duration::from_secs(10),
            policy: Box::new(ReturnErrors),
            sleep_limit: Duration::ZERO,
            keep_faults: None,
        }
    }

    /// Changes the last entry of the kernel's tables for `va`.
    pub fn remap(&self, va: u64, how: impl Fn(u64) -> u64) {
        let memory = self.handle.ram().memory();
        let mut table = KERNEL_TABLES;
        for shift in [39, 30, 21] {
            let at = GuestAddress(table + (va >> shift & 511) * 8);
            table = memory.read_obj::<u64>(at).unwrap() & 0x000f_ffff_ffff_f000;
        }
        let at = GuestAddress(table + (va >> 12 & 511) * 8);
        let entry = how(memory.read_obj(at).unwrap());
        memory.write_obj(entry, at).unwrap();
    }

    pub fn isolate(&self, module: &str) -> Result<Isolated, AttachError> {
        self.isolator.isolate(Self::request(module))
    }

    /// Counters of one function of the first module.
    pub fn entry(&self, name: &str) -> EntryStatus {
        let entries = self.status("first").entries;
        entries.into_iter().find(|one| one.name == name).unwrap()
    }

    pub fn status(&self, module: &str) -> ModuleStatus {
        let all = self.isolator.status();
        all.into_iter()
            .find(|status| status.module == module)
            .unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let stopped = self.handle.power_off().is_ok();
        if let Some(machine) = self.machine.take()
            && stopped
        {
            let _ = machine.join();
        }
    }
}

pub fn symbols() -> SymbolTable {
    let text = format!(
        "{FIRST:x} t first_counts\t[first]\n{CALLS_SECOND:x} t first_calls_second\t[first]\n\
         {CALLS_OWN:x} t first_calls_own\t[first]\n{HELPS:x} t first_helps\t[first]\n{TELLS:x} t first_tells\t[first]\n\
         {WAITS:x} t first_waits\t[first]\n{FIRST_DATA:x} d data\t[first]\n{SECOND:x} t second_counts\t[second]\n{SECOND_DATA:x} d data\t[second]\n\
         {JOINS:x} t first_joins\t[first]\n{KERNEL_JOINS:x} T kernel_joins\n{KERNEL_LEAVES:x} T kernel_leaves\n{KERNEL_LASTS:x} T kernel_lasts\n\
         {KERNEL_WAITS:x} T kernel_waits\n{SCHEDULE:x} T kernel_schedule\n{UNDOES:x} T kernel_undoes\n{LOOP:x} T kernel_loop\n"
    );
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}
