//! What the guest's kernel has of itself in its memory: its symbols, and the types in it.
//!
//! Asked for over the agent, the guest would have to print and pass on both, which are 8 MiB and
//! took half of all the time of isolating in a lab. They are found from the end of the kernel's
//! read-only data on, so that little else of a guest's memory is looked at: one that goes on from
//! a snapshot then has no more of it in memory than it needs.
//!
//! What is found is believed as far as the guest's own word would be: symbols are hints about
//! names, and addresses and bytes are checked before anything is changed.

use std::sync::Arc;

use devices::dma::GuestMemory;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use vm_memory::{Address, GuestAddress};

use super::arm::text_of;
use super::{AttachError, Isolator, live, physical_bits};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::Btf;
use crate::guest::paging::{AddressSpace, VirtMemory};
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::image::{
    DIGITS_BYTES, MOST_TRIED, TableSymbols, find_digits, symbols_in_image,
};
use crate::guest::symbols::{SymbolTable, symbols_of_modules};

/// Where a kernel can be: from `__START_KERNEL_map` on, `KERNEL_IMAGE_SIZE` bytes
/// (arch/x86/include/asm/page_64_types.h).
const KERNEL: (u64, u64) = (0xffff_ffff_8000_0000, 1 << 30);
/// Page tables for that, all in pages of 4 KiB, with those above.
const MAX_TABLES: usize = 512 + 4;
/// Most read-only data of a kernel that is looked at, in bytes.
const MAX_DATA: u64 = 64 << 20;
/// How much is looked through at a time, in bytes.
const PIECE: u64 = 64 << 10;
/// How much before the tokens has the names and, in some kernels, the addresses: as much as is
/// needed of these, in bytes.
const BEFORE: [u64; 4] = [2 << 20, 4 << 20, 8 << 20, 24 << 20];
/// How much behind the first token's text has the tokens' index and, in some kernels, the
/// addresses, in bytes.
const BEHIND: [u64; 2] = [1 << 20, 10 << 20];
/// Most bytes of types.
const MAX_TYPES: u64 = 16 << 20;
/// Most places that are looked at for the tables.
const MAX_PLACES: usize = 16;

/// What `linux_banner` begins with (init/version-timestamp.c).
const BANNER: &[u8] = b"Linux version ";
/// How much of it is kept: more than a version and the time at which it was built, in bytes.
const BANNER_BYTES: usize = 256;

/// A kernel's account of itself.
#[derive(Debug)]
pub struct KernelImage {
    /// Which kernel it is.
    pub identity: KernelIdentity,
    /// Its symbols, none of a module.
    pub symbols: Arc<SymbolTable>,
    /// BTF of the kernel, if it has any.
    pub types: Option<Vec<u8>>,
}

/// Which kernel it is and where: its banner, which has its version and the time at which it was
/// built, and what follows that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelIdentity {
    at: Gva,
    banner: Vec<u8>,
}

impl Isolator {
    /// Reads symbols and types of the kernel in the guest's memory while the guest runs. `module`
    /// is loaded, with these sections.
    ///
    /// # Errors
    /// The guest's tables or the kernel's are not found, or are not what they should be.
    pub fn kernel_image(
        &self,
        module: &str,
        sections: &[(String, u64)],
    ) -> Result<KernelImage, AttachError> {
        let parts = self.with_kernel_tables(module, sections, |space, _, memory| {
            read_only_data(&space, memory).map_err(AttachError::NoKernelImage)
        })?;
        let kernel = Kernel {
            memory: self.vm.ram().memory(),
            parts,
        };
        kernel.image().map_err(AttachError::NoKernelImage)
    }

    /// Whether the guest runs the kernel that it ran when this was read. `module` is loaded, with
    /// these sections.
    ///
    /// # Errors
    /// The guest's tables are not found.
    pub fn runs_kernel(
        &self,
        identity: &KernelIdentity,
        module: &str,
        sections: &[(String, u64)],
    ) -> Result<bool, AttachError> {
        self.with_kernel_tables(module, sections, |space, _, memory| {
            let virt = VirtMemory { memory, space };
            let banner = virt.read_vec(identity.at, identity.banner.len());
            Ok(banner.is_ok_and(|banner| banner == identity.banner))
        })
    }

    /// The symbols of all modules that are loaded, read in the guest's memory while the guest runs,
    /// above the `kernel`'s. `module` is one of them, with these sections; `types` are the kernel's
    /// or the module's.
    ///
    /// # Errors
    /// The guest's tables or its modules are not found, or are not what they should be.
    pub fn symbols_of_modules(
        &self,
        module: &str,
        sections: &[(String, u64)],
        kernel: &Arc<SymbolTable>,
        types: &Btf,
    ) -> Result<SymbolTable, AttachError> {
        let boot_tables = live::boot_tables_at(kernel).ok_or(AttachError::NoKernelTables)?;
        // What maps modules stays in the kernel's own tables, whatever process ends meanwhile.
        let space = self.with_kernel_tables(module, sections, |space, text, memory| {
            let own = live::boot_tables(boot_tables, space, text, memory);
            own.ok_or(AttachError::NoKernelTables)
        })?;
        let memory: &GuestMemory = self.vm.ram().memory();
        let virt = VirtMemory { memory, space };
        symbols_of_modules(&virt, types, kernel).map_err(AttachError::NoKernelImage)
    }

    /// Stops the guest and looks at a process's page tables that map the text of `module`, which is
    /// given with them. The process may go as soon as the guest runs again.
    fn with_kernel_tables<R>(
        &self,
        module: &str,
        sections: &[(String, u64)],
        look: impl FnOnce(AddressSpace, Gva, &GuestMemory) -> Result<R, AttachError>,
    ) -> Result<R, AttachError> {
        let memory = self.vm.ram().memory();
        let text = text_of(module, sections)?;
        self.vm.with_paused(|vcpus| {
            let vcpu = vcpus.get(0).ok_or(AttachError::NoKernelTables)?;
            let cpuid = vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| AttachError::Kvm("KVM_GET_CPUID2", error))?;
            let (_, space) = live::kernel_tables(vcpus, physical_bits(&cpuid), text, memory)?;
            look(space, text, memory)
        })?
    }
}

/// Read-only data that lies together, in memory as at addresses.
#[derive(Debug, Clone, Copy)]
struct Part {
    first: u64,
    at: GuestAddress,
    len: u64,
}

impl Part {
    fn end(&self) -> u64 {
        self.first + self.len
    }
}

/// What is neither written nor executed, in the order of addresses.
fn read_only_data(space: &AddressSpace, memory: &GuestMemory) -> Result<Vec<Part>, &'static str> {
    let whole = GvaRange::new(Gva(KERNEL.0), KERNEL.1).ok_or("it has no place")?;
    let mut parts: Vec<Part> = Vec::new();
    let mut total: u64 = 0;
    let visited = space.visit_pages(memory, whole, MAX_TABLES, |leaf| {
        if leaf.rights.write || leaf.rights.execute {
            return;
        }
        let len = leaf.size.bytes();
        total += len;
        match parts.last_mut() {
            Some(last)
                if last.end() == leaf.at.0 && last.at.checked_add(last.len) == Some(leaf.gpa) =>
            {
                last.len += len;
            }
            _ => parts.push(Part {
                first: leaf.at.0,
                at: leaf.gpa,
                len,
            }),
        }
    });
    visited.map_err(|_| "it has more page tables than there is room for")?;
    match total {
        ..=MAX_DATA => Ok(parts),
        _ => Err("it has an absurd amount of read-only data"),
    }
}

/// A kernel's read-only data in the memory of its guest.
struct Kernel<'a> {
    memory: &'a GuestMemory,
    parts: Vec<Part>,
}

impl Kernel<'_> {
    fn image(&self) -> Result<KernelImage, &'static str> {
        let mut left = (MAX_PLACES, MOST_TRIED);
        let symbols = self
            .parts
            .iter()
            .rev()
            .find_map(|part| self.symbols_in(*part, &mut left))
            .ok_or("its symbols are not found in its memory")?;
        let symbols = SymbolTable::from(symbols);
        let address = |name| Some(symbols.named(name).next()?.at);
        // The addresses are those of the kernel as it runs if what is there is what should be.
        let at = address("linux_banner").ok_or("it has no banner")?;
        let end = at.0.checked_add(BANNER_BYTES as u64);
        let banner = end.and_then(|end| self.bytes(at.0, end));
        let banner = banner.filter(|banner| banner.starts_with(BANNER));
        let banner = banner.ok_or("its symbols are not where its tables say")?;
        let types = address("__start_BTF").zip(address("__stop_BTF"));
        let types = types.filter(|(first, end)| end.0.saturating_sub(first.0) <= MAX_TYPES);
        let types = types.and_then(|(first, end)| self.bytes(first.0, end.0));
        Ok(KernelImage {
            identity: KernelIdentity { at, banner },
            symbols: Arc::new(symbols),
            types,
        })
    }

    /// The symbols whose tables are in `part`, looked for from its end on, at no more than so many
    /// places and names.
    fn symbols_in(&self, part: Part, left: &mut (usize, usize)) -> Option<TableSymbols> {
        let mut end = part.end();
        while end > part.first {
            let from = end.saturating_sub(PIECE).max(part.first);
            // What is looked for may lie across the end.
            let behind = part.end().min(end + DIGITS_BYTES as u64);
            let piece = self.bytes(from, behind)?;
            if let Some(at) = find_digits(&piece) {
                left.0 = left.0.checked_sub(1)?;
                let symbols = self.symbols_around(part, from + at as u64, &mut left.1);
                if symbols.is_some() {
                    return symbols;
                }
            }
            end = from;
        }
        None
    }

    /// The symbols whose tokens have their digits at `digits`.
    fn symbols_around(&self, part: Part, digits: u64, left: &mut usize) -> Option<TableSymbols> {
        let around = BEHIND.iter().zip([1, BEFORE.len()]);
        let mut around = around.flat_map(|(behind, tries)| {
            let end = digits.saturating_add(*behind).min(part.end());
            BEFORE.iter().take(tries).map(move |before| (*before, end))
        });
        around.find_map(|(before, end)| {
            // Tables begin at multiples of eight bytes.
            let from = digits.saturating_sub(before).max(part.first) & !0xfff;
            symbols_in_image(&self.bytes(from, end)?, left).ok()
        })
    }

    /// What is at the addresses from `from` to `end`, which is bounded by what there is.
    fn bytes(&self, from: u64, end: u64) -> Option<Vec<u8>> {
        let len = end.checked_sub(from)?;
        let holds = |part: &&Part| part.first <= from && end <= part.end();
        let part = self.parts.iter().find(holds)?;
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        let at = part.at.checked_add(from - part.first)?;
        GuestPhys::read(self.memory, at, &mut bytes).ok()?;
        Some(bytes)
    }
}
