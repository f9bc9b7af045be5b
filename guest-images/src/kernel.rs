//! A kernel image's own ELF file out of a `bzImage`.
//!
//! The header is described in the kernel's `Documentation/arch/x86/boot.rst` ("The Real-Mode Kernel
//! Header"). The payload is a compressed `vmlinux`, for XZ, zstd and LZ4 followed by the unpacked
//! size as `u32` little endian. After the ELF file itself come the relocations for address
//! randomisation; they are cut off.
//!
//! Nearly half of what a Debian kernel's segments have in the file is zeros (`.bss` and what comes
//! after it, gaps between sections). A loader would read and write them all, so the segments are
//! split: what is zero is in a segment's memory size and not in its file size. The memory that
//! results is the same.

use std::io::Read;

use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{LittleEndian, elf};

use crate::unzstd;

/// Offsets of header fields in the file.
pub(crate) mod header {
    pub const SETUP_SECTS: usize = 0x1F1;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const PAYLOAD_OFFSET: usize = 0x248;
    pub const PAYLOAD_LENGTH: usize = 0x24C;
}

/// Protocol 2.08 brought the payload fields.
const FIRST_VERSION_WITH_PAYLOAD: u16 = 0x0208;

/// No kernel comes near it.
const MAX_UNPACKED: u64 = 512 << 20;

/// An unpacked kernel.
#[derive(Debug)]
pub struct Vmlinux {
    /// The ELF file.
    pub elf: Vec<u8>,
    /// Size of its `.BTF` section in bytes, 0 when it has none.
    pub btf_size: u64,
}

/// Unpacks the ELF file out of a `bzImage`.
///
/// # Errors
/// A line that says what is wrong with the image.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vmlinux, String> {
    let payload = payload(image)?;
    let (packed, size) = payload
        .split_last_chunk::<4>()
        .ok_or("its payload is empty")?;
    let size = u64::from(u32::from_le_bytes(*size));
    let mut unpacked = Vec::new();
    let read = match packed {
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => liblzma::read::XzDecoder::new(packed)
            .take(MAX_UNPACKED + 1)
            .read_to_end(&mut unpacked),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => unzstd::Decoder::new(packed)
            .take(MAX_UNPACKED + 1)
            .read_to_end(&mut unpacked),
        // LZ4's older format, which the kernel's build makes: blocks of 8 MiB to the end.
        [0x02, 0x21, 0x4C, 0x18, ..] => lz4_flex::frame::FrameDecoder::new(packed)
            .take(MAX_UNPACKED + 1)
            .read_to_end(&mut unpacked),
        _ => return Err("its payload is neither XZ nor zstd nor LZ4".into()),
    };
    read.map_err(|error| format!("its payload cannot be unpacked: {error}"))?;
    if unpacked.len() as u64 != size {
        return Err(format!(
            "its payload unpacks to {} bytes instead of {size}",
            unpacked.len()
        ));
    }
    let (end, btf_size) = elf_end(&unpacked)?;
    unpacked.truncate(end);
    leave_out_zeros(&mut unpacked)?;
    Ok(Vmlinux {
        elf: unpacked,
        btf_size,
    })
}

fn payload(image: &[u8]) -> Result<&[u8], String> {
    let u32_at = |at: usize| {
        image
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes)
    };
    if image.get(header::MAGIC..header::MAGIC + 4) != Some(b"HdrS") {
        return Err("it is no bzImage (no HdrS)".into());
    }
    let version = image
        .get(header::VERSION..header::VERSION + 2)
        .and_then(|b| b.try_into().ok());
    let version = u16::from_le_bytes(version.ok_or("it is cut short")?);
    if version < FIRST_VERSION_WITH_PAYLOAD {
        return Err(format!("its boot protocol {version:#06x} is too old"));
    }
    // 0 means 4, for backwards compatibility.
    let setup_sectors = match image[header::SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let offset = u32_at(header::PAYLOAD_OFFSET).ok_or("it is cut short")? as usize;
    let length = u32_at(header::PAYLOAD_LENGTH).ok_or("it is cut short")? as usize;
    let start = (setup_sectors + 1) * 512 + offset;
    image
        .get(start..start.saturating_add(length))
        .ok_or_else(|| "it is cut short".into())
}

/// Where the ELF file ends, and the size of its BTF.
fn elf_end(data: &[u8]) -> Result<(usize, u64), String> {
    let bad = |error: object::Error| format!("its payload is no usable ELF file: {error}");
    let header = elf::FileHeader64::<LittleEndian>::parse(data).map_err(bad)?;
    let endian = header.endian().map_err(bad)?;
    if header.e_machine(endian) != elf::EM_X86_64 {
        return Err("it is for another machine than x86-64".into());
    }
    let mut end = u64::from(header.e_ehsize(endian));
    let mut grow = |offset: u64, size: u64| end = end.max(offset.saturating_add(size));
    grow(
        header.e_phoff(endian),
        u64::from(header.e_phentsize(endian)) * u64::from(header.e_phnum(endian)),
    );
    grow(
        header.e_shoff(endian),
        u64::from(header.e_shentsize(endian)) * u64::from(header.e_shnum(endian)),
    );
    for segment in header.program_headers(endian, data).map_err(bad)? {
        grow(segment.p_offset(endian), segment.p_filesz(endian));
    }
    let sections = header.sections(endian, data).map_err(bad)?;
    let mut btf_size = 0;
    for section in sections.iter() {
        if section.sh_type(endian) != elf::SHT_NOBITS {
            grow(section.sh_offset(endian), section.sh_size(endian));
        }
        if sections
            .section_name(endian, section)
            .is_ok_and(|n| n == b".BTF")
        {
            btf_size = section.sh_size(endian);
        }
    }
    let end = usize::try_from(end).unwrap_or(usize::MAX);
    if end > data.len() {
        return Err("its payload is an ELF file cut short".into());
    }
    Ok((end, btf_size))
}

/// Shorter runs of zeros are not worth a segment of their own.
const ZERO_RUN: usize = 16;
const PAGE: usize = 4096;

type Segment = elf::ProgramHeader64<LittleEndian>;

/// Splits the segments so that zeros are not in the file. Does nothing where the program header
/// table has no room to grow.
fn leave_out_zeros(data: &mut [u8]) -> Result<(), String> {
    let bad = |error: object::Error| format!("its payload is no usable ELF file: {error}");
    let header = elf::FileHeader64::<LittleEndian>::parse(&*data).map_err(bad)?;
    let old = header.program_headers(LittleEndian, &*data).map_err(bad)?;
    let table = header.e_phoff(LittleEndian);
    let new: Vec<Segment> = old
        .iter()
        .flat_map(|segment| split(segment, data))
        .collect();
    let used = old.iter().map(|s| s.p_offset.get(LittleEndian));
    let sections = header.sections(LittleEndian, &*data).map_err(bad)?;
    let used = used.chain(sections.iter().map(|s| s.sh_offset.get(LittleEndian)));
    let room = used.filter(|offset| *offset > table).min().unwrap_or(table);
    let bytes = object::pod::bytes_of_slice(&new).to_vec();
    let (Ok(count), Ok(start)) = (u16::try_from(new.len()), usize::try_from(table)) else {
        return Ok(());
    };
    if new.len() == old.len() || table.saturating_add(bytes.len() as u64) > room {
        return Ok(());
    }
    let count_at = std::mem::offset_of!(elf::FileHeader64<LittleEndian>, e_phnum);
    for (at, bytes) in [(start, bytes.as_slice()), (count_at, &count.to_le_bytes())] {
        if let Some(place) = data.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    Ok(())
}

/// The parts of a segment: each begins with what is not zero, and its memory goes on to the next
/// part.
fn split(segment: &Segment, data: &[u8]) -> Vec<Segment> {
    let endian = LittleEndian;
    let Ok(content) = segment.data(endian, data) else {
        return vec![*segment];
    };
    if segment.p_type(endian) != elf::PT_LOAD || content.is_empty() {
        return vec![*segment];
    }
    // Beginnings and ends of the parts, in bytes from the segment's start. The first one stays
    // where the segment is, whatever it begins with.
    let mut parts: Vec<(usize, usize)> = vec![(0, 0)];
    let mut zeros = 0;
    for (number, page) in content.chunks(PAGE).enumerate() {
        if page.iter().all(|byte| *byte == 0) {
            zeros += 1;
            continue;
        }
        let begin = number * PAGE;
        if zeros >= ZERO_RUN {
            parts.push((begin, begin));
        }
        if let Some(last) = parts.last_mut() {
            last.1 = begin + page.len();
        }
        zeros = 0;
    }
    if zeros < ZERO_RUN
        && let Some(last) = parts.last_mut()
    {
        last.1 = content.len();
    }
    let memory = segment.p_memsz(endian);
    let ends = parts
        .iter()
        .skip(1)
        .map(|(begin, _)| *begin as u64)
        .chain([memory]);
    let part = |((begin, end), memory_end): (&(usize, usize), u64)| {
        let (begin, size) = (*begin as u64, (end - begin) as u64);
        let mut part = *segment;
        part.p_offset.set(endian, segment.p_offset(endian) + begin);
        part.p_vaddr
            .set(endian, segment.p_vaddr(endian).wrapping_add(begin));
        part.p_paddr
            .set(endian, segment.p_paddr(endian).wrapping_add(begin));
        part.p_filesz.set(endian, size);
        part.p_memsz.set(endian, memory_end.saturating_sub(begin));
        part
    };
    parts.iter().zip(ends).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::*;

    #[test]
    fn payload_of_each_packing_is_found_and_relocations_are_cut_off() {
        let elf = small_elf(62);
        let mut data = elf.clone();
        data.extend_from_slice(b"relocations");
        // LZ4's older format: a size, and a block of nothing but literals (15 and what the next
        // byte adds).
        let mut lz4 = vec![0x02, 0x21, 0x4C, 0x18];
        lz4.extend((data.len() as u32 + 2).to_le_bytes());
        lz4.extend([0xF0, data.len() as u8 - 15]);
        lz4.extend(&data);
        let zstd = zst(data.as_slice());
        for packed in [xz(&data), zstd, lz4] {
            let vmlinux = extract_vmlinux(&bz_image(&packed, data.len())).unwrap();
            assert_eq!(vmlinux.elf, elf);
            assert_eq!(vmlinux.btf_size, 0);
        }
    }

    /// What a loader makes of the segments: (physical address, byte) of all that is not zero.
    fn memory(elf: &[u8]) -> Vec<(u64, u8)> {
        let header = elf::FileHeader64::<LittleEndian>::parse(elf).unwrap();
        let mut memory = Vec::new();
        for segment in header.program_headers(LittleEndian, elf).unwrap() {
            let data = segment.data(LittleEndian, elf).unwrap();
            assert!(segment.p_memsz(LittleEndian) >= data.len() as u64);
            let start = segment.p_paddr(LittleEndian);
            memory.extend(
                (start..)
                    .zip(data)
                    .filter(|(_, b)| **b != 0)
                    .map(|(a, b)| (a, *b)),
            );
        }
        memory
    }

    fn load_segment(offset: u64, address: u64, size: u64, memory: u64) -> Segment {
        let mut segment = *object::pod::from_bytes::<Segment>(&[0; 56]).unwrap().0;
        segment.p_type.set(LittleEndian, elf::PT_LOAD);
        segment.p_offset.set(LittleEndian, offset);
        segment.p_vaddr.set(LittleEndian, address);
        segment.p_paddr.set(LittleEndian, address);
        segment.p_filesz.set(LittleEndian, size);
        segment.p_memsz.set(LittleEndian, memory);
        segment
    }

    #[test]
    fn zeros_are_left_out_and_memory_stays_the_same() {
        let page = PAGE as u64;
        let mut elf = small_elf(62);
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 2;
        elf.resize(4096, 0);
        // Data, a long gap, data, a short gap, data, zeros to the end.
        let mut content = vec![0u8; PAGE * 200];
        for (at, byte) in [(10, 1), (40 * PAGE + 5, 2), (45 * PAGE, 3)] {
            content[at] = byte;
        }
        // All zero.
        let segments = [
            load_segment(page, 0x100_0000, 200 * page, 300 * page),
            load_segment(page * 201, 0x300_0000, 50 * page, 50 * page),
        ];
        elf[64..64 + 112].copy_from_slice(object::pod::bytes_of_slice(&segments));
        elf.extend_from_slice(&content);
        elf.extend_from_slice(&vec![0; PAGE * 50]);
        let before = memory(&elf);
        leave_out_zeros(&mut elf).unwrap();
        assert_eq!(memory(&elf), before);
        let header = elf::FileHeader64::<LittleEndian>::parse(elf.as_slice()).unwrap();
        let found: Vec<_> = header
            .program_headers(LittleEndian, elf.as_slice())
            .unwrap()
            .iter()
            .map(|s| {
                (
                    s.p_paddr(LittleEndian),
                    s.p_filesz(LittleEndian) / page,
                    s.p_memsz(LittleEndian) / page,
                )
            })
            .collect();
        let second = 0x100_0000 + 40 * page;
        assert_eq!(
            found,
            [(0x100_0000, 1, 40), (second, 6, 260), (0x300_0000, 0, 50)]
        );
    }

    #[test]
    fn image_cut_at_any_byte_is_refused() {
        let data = small_elf(62);
        let whole = bz_image(&xz(&data), data.len());
        let end = whole.len() - 100;
        assert!(extract_vmlinux(&whole[..end]).is_ok());
        for length in 0..end {
            assert!(extract_vmlinux(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn wrong_machine_wrong_size_and_unknown_packing_are_told_apart() {
        let says = |image: Vec<u8>| extract_vmlinux(&image).unwrap_err();
        let arm = small_elf(183);
        assert!(says(bz_image(&xz(&arm), arm.len())).contains("another machine"));
        assert!(says(bz_image(&xz(&arm), 5)).contains("instead of 5"));
        assert!(says(bz_image(b"\x1f\x8b\x08", 5)).contains("neither XZ nor zstd"));
        assert!(says(vec![0; 4096]).contains("no bzImage"));
    }
}
