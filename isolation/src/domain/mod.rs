//! The driver domain: a private VM in which isolated calls run.
//!
//! | file | what it is |
//! | --- | --- |
//! | `view` | copy-on-write view of guest memory |
//! | `places` | where pages are in its two mappings |
//! | `bases` | pages that a device writes while they are read |
//! | `moving` | pages that devices write while calls run |
//! | `monitor` | the pages only P has: stubs, trampolines, tables |
//! | `roots` | driver root and kernel root |
//! | `private_vm` | the KVM side |
//! | `console` | what calls print is written to the console after them |
//! | `overlay` | pages of code that P has differently |
//! | `warm` | private pages kept from call to call |
//! | `stale` | private pages that failed calls left behind |
//! | `transaction` | one call from entry to commit or abort |
//! | `failing` | a call at its fault, for who wants to look at it |
//! | `effects` | what kernel functions do that outlasts a call |
//! | `journal`, `lasting`, `undo_log` | what a call left in the guest before its end, and what takes it back |
//! | `list_links` | lists that a failed call has changed with its own instructions |
//! | `host_memory` | the account of what calls make the host keep |
//! | `kernel_functions` | which of the kernel's functions wait, run with the driver's rights, or are the guest's |
//! | `strike` | a fault on purpose that waits for a call |
//! | `kept` | what has to be put back when the guest is rewound |
//! | `supervisor` | what a call asks of the layer above |
//! | `recorder` | what happens in a call, with times, where that was asked for |
//! | `watchdog` | interrupts runs that last, so that calls that hang are noticed |

pub(crate) mod attempt;
mod bases;
pub mod console;
pub mod effects;
pub mod error;
pub mod failing;
pub mod host_memory;
pub mod journal;
pub mod kept;
mod kernel_functions;
mod lasting;
pub mod list_links;
pub mod monitor;
mod moving;
pub mod overlay;
mod page;
mod places;
pub mod private_vm;
pub mod recorder;
pub mod roots;
mod stale;
mod strike;
pub mod supervisor;
pub mod transaction;
pub mod undo_log;
pub mod view;
pub mod violation;
pub mod waiting;
pub mod warm;
pub mod watchdog;
pub mod written;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use devices::dma::GuestMemory;
use iced_x86::{Decoder, DecoderOptions, Instruction};
use kvm_bindings::{CpuId, kvm_sregs};
use kvm_ioctls::Kvm;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use error::DomainError;
use host_memory::HostMemory;
use monitor::{AREA_PAGES, Monitor};
use overlay::Overlays;
use private_vm::PrivateVm;
use recorder::Recorder;
use roots::{FixedPages, ROOT_OFFSETS, Root, Roots};
use stale::StalePages;
use transaction::room::Room;
use transaction::{Refusals, WrittenByKernel};
use view::{PAGE_SIZE, Pfn, PrivateView};
use warm::WarmPages;
use watchdog::Watchdog;

use crate::guest::addr::GvaRange;

/// Longest instruction, in bytes (Intel SDM volume 2, section 2.3.11).
pub(crate) const MAX_INSTRUCTION: usize = 15;

/// Highest place tried for the monitor area: the end of Linux's module mapping space
/// (Documentation/x86/x86_64/mm.rst, `MODULES_END`), less 2 MiB.
const HIGHEST_MONITOR_VA: u64 = 0xffff_ffff_fee0_0000;
/// Lowest: `MODULES_VADDR` of a kernel without KASLR of modules, plus room for them.
const LOWEST_MONITOR_VA: u64 = 0xffff_ffff_d000_0000;
const LARGE_PAGE: u64 = 2 << 20;

/// What a domain is made from.
pub struct DomainConfig<'a> {
    /// The host's KVM.
    pub kvm: &'a Kvm,
    /// The guest's memory, with files behind its regions.
    pub memory: Arc<GuestMemory>,
    /// CPUID of the guest's vCPUs.
    pub cpuid: &'a CpuId,
    /// How many they are.
    pub vcpus: u8,
    /// Control registers of a vCPU of the guest in kernel mode.
    pub sregs: &'a kvm_sregs,
    /// Guest physical address for the monitor area, which no memory and no device of the guest has.
    pub monitor_gpa: u64,
    /// Pages of the isolated driver's text, by virtual address.
    pub driver_text: Vec<u64>,
    /// Pages of kernel code that runs with the rights of whoever calls it, by virtual address:
    /// return and indirect-branch thunks, functions that only copy or fill, and others that need no
    /// more.
    pub common: Vec<u64>,
    /// Each store to a page that holds objects of others, too, is looked at; only the first to each
    /// page otherwise.
    pub each_store: bool,
    /// Kernel addresses of memory that devices write while calls run, because they cannot be held:
    /// what calls do not write of it is not written back by them. `None` if all devices can.
    pub moving: Option<GvaRange>,
    /// Where memory of the host is charged that calls make it keep: one account for all domains of
    /// a guest.
    pub host_memory: HostMemory,
    /// Signal that interrupts a vCPU thread; the process has a handler for it.
    pub kick_signal: i32,
}

/// One driver domain: a private VM for the functions of one driver.
#[derive(Debug)]
pub struct Domain {
    // The VM comes first: it is gone before the memory under its slots.
    vm: PrivateVm,
    host_memory: HostMemory,
    monitor: Monitor,
    roots: Roots,
    view: PrivateView,
    warm: WarmPages,
    stale: StalePages,
    fixed: FixedPages,
    common: BTreeSet<u64>,
    /// Stores to pages with objects of others are looked at one by one.
    each_store: bool,
    text: BTreeSet<u64>,
    overlays: Overlays,
    /// Pages that were patched, by virtual address.
    patched: HashMap<u64, Pfn>,
    /// Kernel functions that the driver's calls are for which lead to trampolines, by the calls'
    /// addresses.
    redirects: HashMap<u64, u64>,
    /// Virtual address by which the driver writes a page.
    opened: HashMap<Pfn, u64>,
    /// Kernel addresses of memory that devices write while calls run.
    moving: Option<GvaRange>,
    copied: moving::Copied,
    slot_bases: Vec<Pfn>,
    watchdog: Watchdog,
    /// Crossings, and calls with the driver's rights, when the call began.
    crossings_at_entry: (u64, u64),
    /// Functions that only the guest may run.
    trapped: HashMap<u64, u64>,
    /// Functions that wait, with the unit of their first argument.
    sleeps: HashMap<u64, Duration>,
    strike: Option<strike::Strike>,
    /// Of the call that is under way, where that was asked for.
    pub recorder: Recorder,
    /// How often functions could not wait for calls of a function.
    refusals: HashMap<u64, Refusals>,
    /// Where on the stacks of calls' callers kernel functions write.
    written_by_kernel: WrittenByKernel,
    /// What calls leave each other of the memory that they take.
    room: Room,
    /// A call ended with an error of the domain's own since the guest was last put back.
    has_failed: bool,
}

impl Domain {
    /// Makes a domain. The guest must not run meanwhile.
    pub fn new(config: DomainConfig<'_>) -> Result<Self, DomainError> {
        let mut view = PrivateView::new(config.memory)?;
        if config.moving.is_some() {
            view.keep_bases();
        }
        let cr3 = config.sregs.cr3;
        let va = free_va(&view, cr3)?;
        let (driver, kernel) = ROOT_OFFSETS;
        let gpa = config.monitor_gpa;
        let end = gpa.checked_add(AREA_PAGES * PAGE_SIZE);
        let is_free = end.is_some_and(|end| {
            let ranges = view.shared().iter();
            let mut ranges = ranges.map(|range| (range.start_addr().0, range.len()));
            ranges.all(|(start, bytes)| end <= start || gpa >= start.saturating_add(bytes))
        });
        if !is_free {
            return Err(DomainError::MonitorPlace(gpa));
        }
        let monitor = Monitor::new(gpa, va, gpa + driver, gpa + kernel)?;
        let vm = PrivateVm::new(config.kvm, &view, &monitor, (config.vcpus, config.cpuid))?;
        let roots = Roots::new(cr3, config.moving);
        let mut domain = Self {
            slot_bases: private_vm::slot_bases(&view),
            vm,
            host_memory: config.host_memory,
            monitor,
            roots,
            view,
            warm: WarmPages::default(),
            stale: StalePages::default(),
            each_store: config.each_store,
            common: config.common.iter().copied().collect(),
            text: config.driver_text.iter().copied().collect(),
            fixed: FixedPages {
                driver_text: config.driver_text,
                common: config.common,
            },
            overlays: Overlays::default(),
            patched: HashMap::new(),
            redirects: HashMap::new(),
            opened: HashMap::new(),
            moving: config.moving,
            copied: moving::Copied::default(),
            refusals: HashMap::new(),
            written_by_kernel: WrittenByKernel::default(),
            watchdog: Watchdog::start(config.kick_signal).map_err(DomainError::Watchdog)?,
            crossings_at_entry: (0, 0),
            trapped: HashMap::new(),
            sleeps: HashMap::new(),
            strike: None,
            recorder: Recorder::default(),
            room: Room::default(),
            has_failed: false,
        };
        domain.adopt(config.sregs)?;
        domain.build_roots(cr3)?;
        Ok(domain)
    }

    /// The guest's memory as P has it, and as the guest has it.
    pub fn memories(&self) -> (GuestMemory, GuestMemory) {
        (self.view.private().clone(), self.view.shared().clone())
    }

    /// Makes P's pages equal to the guest's and has addresses translated through the guest's tables
    /// at `cr3` from now on, which have to be ones that the guest uses: between two calls those of
    /// the last call may be gone, and their memory be somebody else's. The guest must not run
    /// meanwhile, but for a domain in which no call was yet: that keeps no pages which would have
    /// to be copied whole.
    pub fn follow_tables(&mut self, cr3: u64) -> Result<(), DomainError> {
        self.drop_stale()?;
        self.warm.refresh(&mut self.view)?;
        self.roots.enter(cr3, &mut self.monitor);
        Ok(())
    }

    /// Whether the guest has the same code under all that was patched as when it was patched, seen
    /// through the tables at `cr3`. What changed beside the patches on their pages is taken over.
    /// If so, and the guest does not run, the domain is ready for a call from these tables. Before
    /// there was a call the guest may run: then it may be otherwise when the answer comes, and what
    /// was taken over is of account only when this was asked again with the guest held.
    pub fn is_current(&mut self, cr3: u64) -> Result<bool, DomainError> {
        self.follow_tables(cr3)?;
        for (va, pfn) in &self.patched {
            let now = self.roots.translate(*va, &self.view)?;
            if now.map(|now| Pfn::of(now.gpa)) != Some(*pfn) {
                return Ok(false);
            }
        }
        self.overlays.follow_all(&mut self.view)?;
        if !self.roots.fresh(cr3, &self.view) {
            self.build_roots(cr3)?;
        }
        Ok(true)
    }

    /// Gives P other bytes than the guest at `va`: the original ones where the guest's entry is
    /// patched, or a redirected call.
    pub fn patch(&mut self, va: u64, bytes: &[u8]) -> Result<(), DomainError> {
        self.drop_stale()?;
        for (at, byte) in (va..).zip(bytes) {
            let (pfn, offset) = self.text_at(at)?;
            self.patched.insert(at & !(PAGE_SIZE - 1), pfn);
            self.overlays.patch(pfn, offset, *byte, &mut self.view)?;
        }
        Ok(())
    }

    /// What P has at `va` in the place of the guest's byte, if that was patched.
    fn patched(&self, va: u64) -> Result<Option<u8>, DomainError> {
        let (pfn, offset) = self.text_at(va)?;
        Ok(self.overlays.patched(pfn, offset))
    }

    /// P has the guest's byte at `va` again, and follows it.
    fn unpatch(&mut self, va: u64) -> Result<(), DomainError> {
        let (pfn, offset) = self.text_at(va)?;
        Ok(self.overlays.unpatch(pfn, offset, &mut self.view)?)
    }

    /// Page, and offset in it, of code at `va`.
    fn text_at(&self, va: u64) -> Result<(Pfn, usize), DomainError> {
        let translation = self.roots.translate(va, &self.view)?;
        let gpa = translation.ok_or(DomainError::TextNotMapped(va))?.gpa;
        Ok((Pfn::of(gpa), (gpa % PAGE_SIZE) as usize))
    }

    /// Redirects P's copy of the direct call or jump at `site` (5 bytes, E8 or E9 first) to a
    /// trampoline for the kernel function `target`.
    pub fn redirect(&mut self, site: u64, target: u64) -> Result<(), DomainError> {
        let trampoline = self.monitor.trampoline(target)?;
        let displacement = trampoline.wrapping_sub(site.wrapping_add(5)) as u32;
        self.patch(site.wrapping_add(1), &displacement.to_le_bytes())?;
        self.redirects.insert(site, target);
        Ok(())
    }

    /// The bytes that P has at `va`.
    pub fn code(&self, va: u64, bytes: &mut [u8]) -> Result<(), DomainError> {
        for (at, byte) in (va..).zip(bytes) {
            let translation = self.roots.translate(at, &self.view)?;
            let gpa = translation.ok_or(DomainError::TextNotMapped(at))?.gpa;
            self.view.read_private(gpa, std::slice::from_mut(byte))?;
        }
        Ok(())
    }

    /// The instruction that P has at `va`, which may be none that there is; `None` where nothing is
    /// mapped.
    pub fn instruction(&self, va: u64) -> Option<Instruction> {
        let mut code = [0; MAX_INSTRUCTION];
        // One near the end of the last page may have fewer bytes behind it.
        let mut lengths = (1..=MAX_INSTRUCTION).rev();
        let bytes = lengths.find(|n| self.code(va, &mut code[..*n]).is_ok())?;
        Some(Decoder::with_ip(64, &code[..bytes], va, DecoderOptions::NONE).decode())
    }

    /// The private view, to look at.
    pub fn view(&self) -> &PrivateView {
        &self.view
    }

    /// Remembers from now on where calls write to the guest's memory, since the last rewind.
    pub fn remember_written(&mut self) {
        self.view.remember_written();
    }

    /// Pages kept from call to call.
    pub fn warm_pages(&self) -> usize {
        self.warm.len()
    }

    /// Drops the copies that calls that failed left behind; returns the number of system calls
    /// made.
    fn drop_stale(&mut self) -> Result<u32, DomainError> {
        let mut stale = std::mem::take(&mut self.stale);
        let dropped = stale.drop_by(|pages| self.drop_copies(pages));
        // What could not be dropped.
        self.stale = stale;
        dropped
    }

    /// Takes over K's control registers if they changed; says whether they did.
    fn adopt(&mut self, sregs: &kvm_sregs) -> Result<bool, DomainError> {
        self.crossings_at_entry = self.monitor.kernel_calls();
        let kernel_root = self.monitor.gpa() + ROOT_OFFSETS.1;
        Ok(self.vm.adopt(sregs, &self.monitor, kernel_root)?)
    }

    fn build_roots(&mut self, cr3: u64) -> Result<(), DomainError> {
        self.copied.clear();
        Ok(self
            .roots
            .build(cr3, &self.fixed, &self.view, &mut self.monitor)?)
    }

    fn root_of(&self, cr3: u64) -> Root {
        if cr3 == self.monitor.gpa() + ROOT_OFFSETS.0 {
            Root::Driver
        } else {
            Root::Kernel
        }
    }

    fn is_driver_text(&self, va: u64) -> bool {
        self.text.contains(&(va & !(PAGE_SIZE - 1)))
    }

    fn is_common(&self, va: u64) -> bool {
        self.common.contains(&(va & !(PAGE_SIZE - 1)))
    }

    fn is_overlay(&self, pfn: Pfn) -> bool {
        self.overlays.contains(pfn)
    }

    fn note_open(&mut self, va: u64, gpa: u64) {
        self.opened.insert(Pfn::of(gpa), va & !(PAGE_SIZE - 1));
    }

    /// The driver may not write these pages any more.
    fn close(&mut self, pages: &[(Pfn, u64)]) {
        for (pfn, page) in pages {
            self.roots.close(Root::Driver, *page, &mut self.monitor);
            self.opened.remove(pfn);
        }
    }

    fn opened_va(&self, pfn: Pfn) -> Option<u64> {
        self.opened.get(&pfn).copied()
    }
}

/// A place for the monitor area within reach of a direct call from a module.
fn free_va(view: &PrivateView, cr3: u64) -> Result<u64, DomainError> {
    let mut va = HIGHEST_MONITOR_VA;
    while va >= LOWEST_MONITOR_VA {
        if roots::is_free(view, cr3, va)? {
            return Ok(va);
        }
        va -= LARGE_PAGE;
    }
    Err(DomainError::NoRoom)
}

#[cfg(test)]
pub(crate) fn test_memory(pages: u64) -> std::sync::Arc<GuestMemory> {
    use vm_memory::{FileOffset, GuestAddress};
    let file = tempfile::tempfile().unwrap();
    let bytes = pages * PAGE_SIZE;
    file.set_len(bytes).unwrap();
    let range = (
        GuestAddress(0),
        bytes as usize,
        Some(FileOffset::new(file, 0)),
    );
    std::sync::Arc::new(GuestMemory::from_ranges_with_files([range]).unwrap())
}
