//! Small packages, kernels and modules for tests, made on the spot.

use std::io::{Read, Write};

use crate::kernel::header;

/// A tar archive with these files.
pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        // Not set_path, which refuses what a hostile package may hold.
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// An ar archive with these members.
pub fn deb_of(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = ar::Builder::new(Vec::new());
    for (name, data) in members {
        let header = ar::Header::new(name.as_bytes().to_vec(), data.len() as u64);
        builder.append(&header, data.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Packed by Zstandard.
pub fn zst(content: impl Read) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
}

/// A package with this `control` file and these files.
pub fn deb(control: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let control = tar_of(&[("./control", control.as_bytes())]);
    deb_of(&[
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.zst", zst(control.as_slice())),
        ("data.tar.xz", xz(&tar_of(files))),
    ])
}

/// A package called `small`.
pub fn small_deb(files: &[(&str, &[u8])]) -> Vec<u8> {
    deb(
        "Package: small\nVersion: 1:2-3\nDepends: a (>= 1) | b, c:any\nDescription: x\n",
        files,
    )
}

/// A program that is nothing but an ELF header.
pub fn small_elf(machine: u16) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    elf[16] = 2;
    elf[18..20].copy_from_slice(&machine.to_le_bytes());
    elf[20] = 1;
    elf[52] = 64;
    elf
}

/// A bzImage with this payload.
pub fn bz_image(packed: &[u8], size: usize) -> Vec<u8> {
    let mut image = vec![0u8; 512 * 3];
    image[header::SETUP_SECTS] = 1;
    image[header::MAGIC..header::MAGIC + 4].copy_from_slice(b"HdrS");
    image[header::VERSION..header::VERSION + 2].copy_from_slice(&0x020Fu16.to_le_bytes());
    image[header::PAYLOAD_OFFSET..header::PAYLOAD_OFFSET + 4]
        .copy_from_slice(&512u32.to_le_bytes());
    let length = packed.len() as u32 + 4;
    image[header::PAYLOAD_LENGTH..header::PAYLOAD_LENGTH + 4]
        .copy_from_slice(&length.to_le_bytes());
    image.extend_from_slice(packed);
    image.extend_from_slice(&(size as u32).to_le_bytes());
    image.extend_from_slice(&[0xAA; 100]);
    image
}

/// XZ.
pub fn xz(data: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A relocatable ELF file with nothing but a `.modinfo` section.
pub fn module_file(modinfo: &[u8]) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[16] = 1;
    file[18] = 62;
    file[20] = 1;
    file[52] = 64;
    file[58] = 64;
    file[60] = 3;
    file[62] = 2;
    let modinfo_at = file.len() as u64;
    file.extend_from_slice(modinfo);
    let names_at = file.len() as u64;
    file.extend_from_slice(names);
    let headers_at = file.len() as u64;
    file[40..48].copy_from_slice(&headers_at.to_le_bytes());
    let mut section = |name: u32, kind: u32, at: u64, size: u64| {
        let mut header = [0u8; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        header[24..32].copy_from_slice(&at.to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        file.extend_from_slice(&header);
    };
    section(0, 0, 0, 0);
    section(1, 1, modinfo_at, modinfo.len() as u64);
    section(10, 3, names_at, names.len() as u64);
    file
}
