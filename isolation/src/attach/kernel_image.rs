//! What the guest's kernel has of itself in its memory: its symbols, and the types in it.
//!
//! Asked for over the agent, the guest would have to print and pass on both, which are 8 MiB and
//! take a thousand times as long as to read them. They are found from the end of the kernel's
//! read-only data on, so that little else of a guest's memory is looked at: one that goes on from
//! a snapshot then has no more of it in memory than it needs.
//!
//! What is found is believed as far as the guest's own word would be: symbols are hints about
//! names, and addresses and bytes are checked before anything is changed.

use devices::dma::GuestMemory;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

use super::arm::text_of;
use super::{AttachError, Isolator, live, physical_bits};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::paging::{AddressSpace, VirtMemory};
use crate::guest::symbols::image::{DIGITS_BYTES, TableSymbols, find_digits, symbols_in_image};

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
const MAX_TYPES: u64 = 64 << 20;

/// What `linux_banner` begins with (init/version-timestamp.c).
const BANNER: &[u8] = b"Linux version ";

/// A kernel's account of itself.
#[derive(Debug)]
pub struct KernelImage {
    /// Its symbols, none of a module, in its own order.
    pub symbols: TableSymbols,
    /// BTF of the kernel, if it has any.
    pub types: Option<Vec<u8>>,
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
        let memory = self.vm.ram().memory().clone();
        let text = text_of(module, sections)?;
        let space = self.vm.with_paused(|vcpus| {
            let vcpu = vcpus.get(0).ok_or(AttachError::NoKernelTables)?;
            let cpuid = vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| AttachError::Kvm("KVM_GET_CPUID2", error))?;
            let tables = live::kernel_tables(vcpus, physical_bits(&cpuid), text, &memory)?;
            Ok::<_, AttachError>(tables.1)
        })??;
        Kernel::new(space, &memory)
            .image()
            .map_err(AttachError::NoKernelImage)
    }
}

/// A kernel in the memory of its guest.
struct Kernel<'a> {
    virt: VirtMemory<'a, GuestMemory>,
}

impl<'a> Kernel<'a> {
    fn new(space: AddressSpace, memory: &'a GuestMemory) -> Self {
        Self {
            virt: VirtMemory { space, memory },
        }
    }

    fn image(&self) -> Result<KernelImage, &'static str> {
        let data = self.read_only_data()?;
        let symbols = data
            .iter()
            .rev()
            .find_map(|part| self.symbols_in(*part))
            .ok_or("its symbols are not found in its memory")?;
        let names = ["linux_banner", "__start_BTF", "__stop_BTF"];
        let [banner, first_type, last_type] = symbols.addresses(names).map(|at| at.map(Gva));
        // The addresses are those of the kernel as it runs if what is there is what should be.
        let banner = banner.ok_or("it has no banner")?;
        let words = self.virt.read_vec(banner, BANNER.len());
        if words.ok().as_deref() != Some(BANNER) {
            return Err("its symbols are not where its tables say");
        }
        let types = first_type.zip(last_type);
        let types = types.and_then(|(first, end)| self.types(first, end));
        Ok(KernelImage { symbols, types })
    }

    /// What is neither written nor executed, in the order of addresses.
    fn read_only_data(&self) -> Result<Vec<GvaRange>, &'static str> {
        let whole = GvaRange::new(Gva(KERNEL.0), KERNEL.1).ok_or("it has no place")?;
        let mut parts: Vec<(u64, u64)> = Vec::new();
        let mut total = 0;
        let visited = self
            .virt
            .space
            .visit_pages(self.virt.memory, whole, MAX_TABLES, |leaf| {
                if leaf.rights.write || leaf.rights.execute {
                    return;
                }
                total += leaf.size.bytes();
                match parts.last_mut() {
                    Some((first, len)) if *first + *len == leaf.at.0 => {
                        *len += leaf.size.bytes();
                    }
                    _ => parts.push((leaf.at.0, leaf.size.bytes())),
                }
            });
        visited.map_err(|_| "it has more page tables than there is room for")?;
        if total > MAX_DATA {
            return Err("it has an absurd amount of read-only data");
        }
        let ranges = parts
            .into_iter()
            .filter_map(|(first, len)| GvaRange::new(Gva(first), len));
        Ok(ranges.collect())
    }

    /// The symbols whose tables are in `part`, looked for from its end on.
    fn symbols_in(&self, part: GvaRange) -> Option<TableSymbols> {
        let (first, mut end) = (part.first().0, part.last().0);
        while end > first {
            let from = end.saturating_sub(PIECE).max(first);
            // What is looked for may lie across the end.
            let behind = part.last().0.min(end + DIGITS_BYTES as u64);
            let piece = self.bytes(from, behind)?;
            if let Some(at) = find_digits(&piece)
                && let Some(symbols) = self.symbols_around(part, from + at as u64)
            {
                return Some(symbols);
            }
            end = from;
        }
        None
    }

    /// The symbols whose tokens have their digits at `digits`.
    fn symbols_around(&self, part: GvaRange, digits: u64) -> Option<TableSymbols> {
        BEHIND
            .iter()
            .zip([1, BEFORE.len()])
            .find_map(|(behind, tries)| {
                let end = digits.saturating_add(*behind).min(part.last().0);
                BEFORE.iter().take(tries).find_map(|before| {
                    // Tables begin at multiples of eight bytes.
                    let from = digits.saturating_sub(*before).max(part.first().0) & !0xfff;
                    let bytes = self.bytes(from, end)?;
                    symbols_in_image(&bytes).ok()
                })
            })
    }

    fn types(&self, first: Gva, end: Gva) -> Option<Vec<u8>> {
        let len = end.0.checked_sub(first.0)?;
        if len > MAX_TYPES {
            return None;
        }
        let end = first.0.checked_add(len)?;
        self.bytes(first.0, end)
    }

    /// What is in memory from `from` to `end`, which is bounded by the caller.
    fn bytes(&self, from: u64, end: u64) -> Option<Vec<u8>> {
        let len = usize::try_from(end.checked_sub(from)?).ok()?;
        self.virt.read_vec(Gva(from), len).ok()
    }
}
