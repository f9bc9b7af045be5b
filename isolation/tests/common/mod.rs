//! A hand-made guest: page tables, a driver, a kernel and data, in a few dozen pages. It never runs
//! itself; what runs is the domain's private VM over its memory.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use devices::dma::GuestMemory;
use devices::hold::{Access, DeviceAddress, DeviceState};
use iced_x86::code_asm::CodeAssembler;
use isolation::domain::error::DomainError;
use isolation::domain::host_memory::HostMemory;
use isolation::domain::monitor::{ExceptionFrame, MonitorError};
use isolation::domain::supervisor::{KernelExceptionVerdict, Supervisor};
use isolation::domain::transaction::{CallEnd, CallRequest, CallResult};
use isolation::domain::undo_log::Restorable;
use isolation::domain::violation::{Violation, ViolationKind};
use isolation::domain::{Domain, DomainConfig};
use isolation::guest::addr::{Gva, GvaRange};
use isolation::guest::paging::{AddressSpace, VirtMemory};
use isolation::guest::stack::stack_around;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_sregs};
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, FileOffset, GuestAddress};

mod kernel;
pub use kernel::*;

/// vCPUs that the guest has, as far as domains know.
pub const VCPUS: u8 = 2;
pub const PAGE: u64 = 4096;
pub const MEMORY_PAGES: u64 = 1024;
pub const DRIVER_TEXT: u64 = 0xffff_ffff_c000_1000;
pub const DRIVER_DATA: u64 = 0xffff_ffff_c000_3000;
pub const KERNEL_TEXT: u64 = 0xffff_ffff_8100_0000;
pub const THUNKS: u64 = 0xffff_ffff_8100_2000;
pub const KERNEL_DATA: u64 = 0xffff_ffff_8200_0000;
pub const STACK: u64 = 0xffff_c900_0000_4000;
pub const STACK_TOP: u64 = STACK + 4 * PAGE;
/// A stack that is not aligned to its size, and what is behind its guard page.
pub const OTHER_STACK: u64 = 0xffff_c900_0002_1000;
pub const OTHER_STACK_TOP: u64 = OTHER_STACK + 4 * PAGE;
pub const BEHIND: u64 = OTHER_STACK_TOP + PAGE;
/// Large page of the direct map: the first 2 MiB of guest memory.
pub const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// The isolated device's registers and another device's.
pub const DEVICE: u64 = 0xffff_c900_0010_0000;
pub const DEVICE_GPA: u64 = 0xfeb0_0000;
pub const OTHER_DEVICE: u64 = 0xffff_c900_0011_0000;
pub const OTHER_DEVICE_GPA: u64 = 0xfec0_0000;
/// The isolated device's I/O ports.
pub const DEVICE_PORTS: std::ops::Range<u16> = 0xc000..0xc008;
/// Where an isolated function returns to.
pub const CALLER: u64 = KERNEL_TEXT + 0xf00;

const PML4: u64 = 0x1000;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const LARGE: u64 = 0x80;
const NX: u64 = 1 << 63;

pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub kvm: Kvm,
    pub sregs: kvm_sregs,
    pub host_memory: HostMemory,
    /// Domains look at each store.
    pub each_store: bool,
    /// Kernel addresses of memory that somebody else writes while calls run.
    pub moving: Option<GvaRange>,
    next_table: u64,
}

pub fn gpa_of(va: u64) -> u64 {
    match va {
        DRIVER_TEXT..0xffff_ffff_c000_3000 => 0x20_0000 + (va - DRIVER_TEXT),
        DRIVER_DATA..0xffff_ffff_c000_4000 => 0x21_0000 + (va - DRIVER_DATA),
        KERNEL_TEXT..0xffff_ffff_8100_3000 => 0x22_0000 + (va - KERNEL_TEXT),
        KERNEL_DATA..0xffff_ffff_8200_2000 => 0x23_0000 + (va - KERNEL_DATA),
        STACK..STACK_TOP => 0x24_0000 + (va - STACK),
        OTHER_STACK..=OTHER_STACK_TOP => 0x25_0000 + (va - OTHER_STACK),
        BEHIND..=0xffff_c900_0002_6fff => 0x26_0000 + (va - BEHIND),
        DIRECT_MAP..0xffff_8880_0020_0000 => va - DIRECT_MAP,
        _ => panic!("{va:#x} is not mapped"),
    }
}

impl Guest {
    pub fn new() -> Self {
        Self::with_memory(MEMORY_PAGES)
    }

    /// A guest with `pages` pages of memory, at least [`MEMORY_PAGES`], of which it uses the first.
    pub fn with_memory(pages: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE).unwrap();
        let range = (
            GuestAddress(0),
            (pages * PAGE) as usize,
            Some(FileOffset::new(file, 0)),
        );
        let memory = Arc::new(GuestMemory::from_ranges_with_files([range]).unwrap());
        let kvm = Kvm::new().expect("tests of the domain need a usable /dev/kvm");
        let vm = kvm.create_vm().unwrap();
        let mut sregs = vm.create_vcpu(0).unwrap().get_sregs().unwrap();
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = PML4;
        // PAE, PGE, OSFXSR, OSXMMEXCPT.
        sregs.cr4 = 0x6a0;
        // SCE, LME, LMA, NXE.
        sregs.efer = 0xd01;
        let mut guest = Self {
            memory,
            kvm,
            sregs,
            host_memory: HostMemory::default(),
            each_store: false,
            moving: None,
            next_table: 0x2000,
        };
        for page in 0..2 {
            guest.map(
                DRIVER_TEXT + page * PAGE,
                gpa_of(DRIVER_TEXT + page * PAGE),
                0,
            );
        }
        guest.map(DRIVER_DATA, gpa_of(DRIVER_DATA), WRITE | NX);
        for page in 0..3 {
            guest.map(
                KERNEL_TEXT + page * PAGE,
                gpa_of(KERNEL_TEXT + page * PAGE),
                0,
            );
        }
        for page in 0..2 {
            let va = KERNEL_DATA + page * PAGE;
            guest.map(va, gpa_of(va), WRITE | NX);
        }
        for page in 0..4 {
            guest.map(STACK + page * PAGE, gpa_of(STACK + page * PAGE), WRITE | NX);
        }
        for va in (0..4).map(|page| OTHER_STACK + page * PAGE).chain([BEHIND]) {
            guest.map(va, gpa_of(va), WRITE | NX);
        }
        guest.map(DEVICE, DEVICE_GPA, WRITE | NX);
        guest.map(OTHER_DEVICE, OTHER_DEVICE_GPA, WRITE | NX);
        guest.map_large(DIRECT_MAP, 0);
        guest
    }

    pub fn map(&mut self, va: u64, gpa: u64, flags: u64) {
        let table = self.table(va, 1);
        self.put(table, va >> 12, gpa | PRESENT | flags);
    }

    pub fn unmap(&mut self, va: u64) {
        let table = self.table(va, 1);
        self.put(table, va >> 12, 0);
    }

    /// Maps 2 MiB.
    pub fn map_large(&mut self, va: u64, gpa: u64) {
        let table = self.table(va, 2);
        self.put(table, va >> 21, gpa | PRESENT | WRITE | LARGE | NX);
    }

    fn table(&mut self, va: u64, level: u32) -> u64 {
        let mut table = PML4;
        for upper in ((level + 1)..=4).rev() {
            let index = (va >> (12 + 9 * (upper - 1))) & 511;
            let entry: u64 = self
                .memory
                .read_obj(GuestAddress(table + index * 8))
                .unwrap();
            if entry & PRESENT == 0 {
                self.put(table, index, self.next_table | PRESENT | WRITE);
                table = self.next_table;
                self.next_table += PAGE;
            } else {
                table = entry & 0x000f_ffff_ffff_f000;
            }
        }
        table
    }

    fn put(&self, table: u64, index: u64, entry: u64) {
        self.memory
            .write_obj(entry, GuestAddress(table + (index & 511) * 8))
            .unwrap();
    }

    /// Assembles code at `va`.
    pub fn code(&self, va: u64, build: impl FnOnce(&mut CodeAssembler)) {
        let mut assembler = CodeAssembler::new(64).unwrap();
        build(&mut assembler);
        let bytes = assembler.assemble(va).unwrap();
        self.memory
            .write_slice(&bytes, GuestAddress(gpa_of(va)))
            .unwrap();
    }

    pub fn read(&self, va: u64) -> u64 {
        self.memory.read_obj(GuestAddress(gpa_of(va))).unwrap()
    }

    pub fn write(&self, va: u64, value: u64) {
        self.memory
            .write_obj(value, GuestAddress(gpa_of(va)))
            .unwrap();
    }

    /// Every byte of guest memory that the guest uses.
    pub fn all(&self) -> Vec<u8> {
        all_of(&self.memory)
    }

    pub fn domain(&self) -> Domain {
        self.domain_with(1 << 33).unwrap()
    }

    /// A domain with the monitor area at this guest physical address.
    pub fn domain_with(&self, monitor_gpa: u64) -> Result<Domain, DomainError> {
        register_kick();
        Domain::new(DomainConfig {
            kvm: &self.kvm,
            memory: self.memory.clone(),
            cpuid: &self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap(),
            vcpus: VCPUS,
            sregs: &self.sregs,
            monitor_gpa,
            moving: self.moving,
            host_memory: self.host_memory.clone(),
            driver_text: vec![DRIVER_TEXT, DRIVER_TEXT + PAGE],
            common: vec![THUNKS],
            each_store: self.each_store,
            kick_signal: libc::SIGUSR1,
        })
    }

    /// Registers of a call: the return address is on the stack, callee-saved registers hold marks.
    pub fn entry_regs(&self) -> kvm_regs {
        let rsp = STACK_TOP - 0x108;
        self.write(rsp, CALLER);
        kvm_regs {
            rsp,
            rflags: 0x202,
            rbx: 0xb0b0,
            rbp: 0xb1b1,
            r12: 12,
            r13: 13,
            r14: 14,
            r15: 15,
            ..Default::default()
        }
    }

    /// The stack that this stack pointer is on.
    pub fn stack_around(&self, rsp: u64) -> GvaRange {
        let (cr3, cr4, efer) = (self.sregs.cr3, self.sregs.cr4, self.sregs.efer);
        let virt = VirtMemory {
            space: AddressSpace::from_registers(cr3, cr4, efer, 46),
            memory: &*self.memory,
        };
        stack_around(virt, Gva(rsp))
    }

    pub fn call(&self, domain: &mut Domain, kernel: &mut Kernel) -> CallResult {
        self.call_with(domain, kernel, self.entry_regs())
    }

    pub fn call_with(
        &self,
        domain: &mut Domain,
        kernel: &mut Kernel,
        regs: kvm_regs,
    ) -> CallResult {
        self.try_call(domain, kernel, regs).unwrap()
    }

    /// A call in which the domain may fail.
    pub fn try_call(
        &self,
        domain: &mut Domain,
        kernel: &mut Kernel,
        regs: kvm_regs,
    ) -> Result<CallResult, DomainError> {
        kernel.memory = Some(self.memory.clone());
        domain.call(&self.request(regs), kernel)
    }

    /// A call by the first vCPU.
    pub fn request(&self, regs: kvm_regs) -> CallRequest<'_> {
        CallRequest {
            regs,
            sregs: &self.sregs,
            stack: self.stack_around(regs.rsp),
            clock: None,
            vcpu: 0,
            function: DRIVER_TEXT,
            return_gate: None,
            effects: None,
            budget: Duration::from_secs(300),
            sleep_limit: Duration::from_millis(20),
        }
    }
}

pub fn all_of(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; (MEMORY_PAGES * PAGE) as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn register_kick() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(libc::SIGUSR1, nothing).unwrap();
}

/// Uses up all room for trampolines, so that the domain fails at the next kernel function that is
/// called.
pub fn use_up_trampolines(domain: &mut Domain) {
    let site = DRIVER_TEXT + 0x1f00;
    for function in 0.. {
        match domain.redirect(site, KERNEL_TEXT + 0x2000 + function) {
            Ok(()) => {}
            Err(DomainError::Monitor(MonitorError::TooManyImports)) => return,
            Err(other) => panic!("{other}"),
        }
    }
}

pub fn violation(result: &CallResult) -> &Violation {
    match &result.end {
        CallEnd::Aborted(violation) => violation,
        other => panic!("expected a violation, got {other:?}"),
    }
}

pub fn violation_kind(result: &CallResult) -> ViolationKind {
    violation(result).kind
}

/// A driver with this code, called once; the kernel lets it write its data.
pub fn one_call(build: impl FnOnce(&mut CodeAssembler)) -> (Guest, CallResult) {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, build);
    let mut domain = guest.domain();
    let result = guest.call(&mut domain, &mut Kernel::with_data());
    (guest, result)
}
