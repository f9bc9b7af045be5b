//! The zero page: what a boot loader tells Linux.

use devices::dma::GuestMemory;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};

use super::{BootError, LoadedInitrd};
use crate::layout;
use crate::memory::GuestRam;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `boot_flag` of a boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page. `header` is the bzImage's, or all zero for an ELF kernel.
pub(super) fn write(
    ram: &GuestRam,
    header: &setup_header,
    initrd: Option<LoadedInitrd>,
    cmdline_bytes: u32,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: *header,
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE.0 as u32;
    params.hdr.cmdline_size = cmdline_bytes;
    if params.hdr.kernel_alignment == 0 {
        params.hdr.kernel_alignment = 1 << 24;
    }
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address;
        params.hdr.ramdisk_size = initrd.size;
    }
    params.acpi_rsdp_addr = layout::ACPI_TABLES.0;
    for (entry, (start, end, type_)) in params.e820_table.iter_mut().zip(memory_map(ram)) {
        *entry = boot_e820_entry {
            addr: start,
            size: end - start,
            r#type: type_,
        };
        params.e820_entries += 1;
    }
    let params = BootParams::new(&params, layout::ZERO_PAGE);
    LinuxBootConfigurator::write_bootparams::<GuestMemory>(&params, ram.memory()).map_err(|_| {
        BootError::CodeOutside {
            address: layout::ZERO_PAGE.0,
            len: 4096,
        }
    })
}

/// Ranges `[start, end)` with their E820 types.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let ecam_end = layout::ECAM + devices::pci::bus::ECAM_BUS_BYTES;
    let mut map = vec![
        (0, layout::CONVENTIONAL_END, E820_RAM),
        (
            layout::CONVENTIONAL_END,
            layout::HIGH_MEMORY.0,
            E820_RESERVED,
        ),
        (layout::HIGH_MEMORY.0, ram.low_end(), E820_RAM),
        (layout::ECAM, ecam_end, E820_RESERVED),
    ];
    if ram.end().0 > layout::MEMORY_ABOVE_4G {
        map.push((layout::MEMORY_ABOVE_4G, ram.end().0, E820_RAM));
    }
    map
}
