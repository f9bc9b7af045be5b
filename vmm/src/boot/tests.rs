use std::io::Write;

use tempfile::NamedTempFile;
use vm_memory::GuestAddress;

use super::*;

/// An ELF executable with one segment at `address`, entered at its start.
fn elf(address: u64, content: &[u8], memory_bytes: u64) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for field in [address, 64, 0] {
        file.extend(field.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, RWX
    for field in [
        120,
        address,
        address,
        content.len() as u64,
        memory_bytes,
        0x1000,
    ] {
        file.extend(field.to_le_bytes());
    }
    assert_eq!(file.len(), 120);
    file.extend(content);
    file
}

/// A bzImage with a protected-mode part of `payload` bytes of 0xB2.
fn bzimage(payload: usize, init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    file[0x1f4..0x1f8].copy_from_slice(&(payload as u32 / 16).to_le_bytes());
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x211] = 1;
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x234] = 1;
    file[0x236] = 1;
    file[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
    file.resize(1024 + payload, 0xb2);
    file
}

fn file(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

fn linux(kernel: &NamedTempFile, initrd: Option<&NamedTempFile>) -> Payload {
    Payload::Linux {
        kernel: kernel.path().into(),
        initrd: initrd.map(|file| file.path().into()),
        cmdline: "console=ttyS0".into(),
    }
}

fn open_error(content: &[u8]) -> BootError {
    OpenPayload::open(linux(&file(content), None)).unwrap_err()
}

fn load(payload: Payload, memory: u64) -> Result<(GuestRam, EntryPoint), BootError> {
    let ram = GuestRam::new(memory).unwrap();
    let entry = OpenPayload::open(payload)?.load(&ram)?;
    Ok((ram, entry))
}

fn read<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut data = [0; N];
    ram.memory()
        .read_slice(&mut data, GuestAddress(address))
        .unwrap();
    data
}

#[test]
fn an_elf_kernel_is_put_at_its_physical_address_and_entered_there() {
    let kernel = file(&elf(0x20_0000, b"kernel code", 0x4000));
    let (ram, entry) = load(linux(&kernel, None), 8 << 20).unwrap();
    assert_eq!(
        entry,
        EntryPoint {
            rip: 0x20_0000,
            rsi: 0x7000
        }
    );
    assert_eq!(&read::<11>(&ram, 0x20_0000), b"kernel code");
    assert_eq!(&read::<14>(&ram, 0x2_0000), b"console=ttyS0\0");
}

#[test]
fn a_bzimage_is_put_at_its_preferred_address_and_entered_in_long_mode() {
    let kernel = file(&bzimage(0x1000, 0x10_0000));
    let (ram, entry) = load(linux(&kernel, None), 8 << 20).unwrap();
    assert_eq!(
        entry,
        EntryPoint {
            rip: 0x20_0200,
            rsi: 0x7000
        }
    );
    assert_eq!(read::<4>(&ram, 0x20_0000), [0xb2; 4]);
    assert_eq!(read::<4>(&ram, 0x7000 + 0x202), *b"HdrS");
    assert_eq!(
        read::<4>(&ram, 0x7000 + 0x260),
        0x10_0000u32.to_le_bytes(),
        "header is passed on"
    );
}

#[test]
fn the_zero_page_tells_of_memory_initramfs_and_acpi() {
    let kernel = file(&elf(0x20_0000, b"k", 0x1000));
    let initrd = file(&[0x1d; 5000]);
    let (ram, _) = load(linux(&kernel, Some(&initrd)), 8 << 20).unwrap();
    let page: [u8; 4096] = read(&ram, 0x7000);
    let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    assert_eq!(u64_at(0x70), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(
        (u32_at(0x218), u32_at(0x21c)),
        ((8 << 20) - 0x2000, 5000),
        "ramdisk"
    );
    assert_eq!(read::<3>(&ram, u64::from(u32_at(0x218)) + 4997), [0x1d; 3]);
    assert_eq!(u32_at(0x228), 0x2_0000, "cmd_line_ptr");
    let map: Vec<(u64, u64, u32)> = (0..usize::from(page[0x1e8]))
        .map(|i| 0x2d0 + 20 * i)
        .map(|at| (u64_at(at), u64_at(at + 8), u32_at(at + 16)))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 7 << 20, 1),
            (0xf000_0000, 0x10_0000, 2)
        ]
    );
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    assert!(matches!(open_error(b""), BootError::NotAKernel(_)));
    assert!(matches!(open_error(&[0; 5000]), BootError::NotAKernel(_)));
    assert!(matches!(
        open_error(b"\x1f\x8b\x08 gzip"),
        BootError::Compressed(_)
    ));
    let mut arm = elf(0x20_0000, b"k", 1);
    arm[18] = 183;
    assert!(open_error(&arm).to_string().contains("AArch64"));
    let mut image = vec![0; 64];
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert!(matches!(open_error(&image), BootError::OtherMachine { .. }));
    let mut old = bzimage(16, 0);
    old[0x236] = 0;
    assert!(matches!(open_error(&old), BootError::OtherMachine { .. }));
}

#[test]
fn kernels_cut_short_anywhere_are_refused() {
    for whole in [elf(0x20_0000, &[7; 300], 300), bzimage(0x1000, 0x2000)] {
        OpenPayload::open(linux(&file(&whole), None)).unwrap();
        for len in (0..whole.len()).step_by(13) {
            let error = open_error(&whole[..len]);
            let refused = matches!(error, BootError::CutShort { .. } | BootError::NotAKernel(_));
            assert!(refused, "{len} of {} bytes: {error}", whole.len());
        }
    }
}

#[test]
fn damaged_headers_are_refused() {
    let good = elf(0x20_0000, b"kernel", 6);
    let damage = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        open_error(&bad)
    };
    assert!(
        matches!(damage(24, &[0xff; 8]), BootError::Damaged { .. }),
        "entry"
    );
    assert!(
        matches!(damage(54, &[1, 0]), BootError::Damaged { .. }),
        "size of headers"
    );
    assert!(
        matches!(damage(32, &[0xff; 8]), BootError::Damaged { .. }),
        "offset of headers"
    );
    assert!(
        matches!(damage(64 + 24, &[0; 8]), BootError::Damaged { .. }),
        "below 1 MiB"
    );
    assert!(
        matches!(damage(64 + 40, &[0xff; 8]), BootError::Damaged { .. }),
        "length in memory"
    );
    assert!(
        matches!(damage(64 + 8, &[0xff; 8]), BootError::Damaged { .. }),
        "offset in file"
    );
}

#[test]
fn what_does_not_fit_into_memory_is_refused() {
    let kernel = file(&elf(0x20_0000, b"k", 7 << 20));
    let error = load(linux(&kernel, None), 8 << 20).unwrap_err();
    assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error}");
    let kernel = file(&bzimage(16, 7 << 20));
    let error = load(linux(&kernel, None), 8 << 20).unwrap_err();
    assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error}");

    let kernel = file(&elf(0x20_0000, b"k", 5 << 20));
    let initrd = file(&vec![0; (1 << 20) + 1]);
    let error = load(linux(&kernel, Some(&initrd)), 8 << 20).unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    let initrd = file(&vec![0; 1 << 20]);
    load(linux(&kernel, Some(&initrd)), 8 << 20).unwrap();
}

#[test]
fn other_bad_input_is_refused() {
    let kernel = file(&elf(0x20_0000, b"k", 1));
    let error = OpenPayload::open(linux(&kernel, Some(&file(b"")))).unwrap_err();
    assert!(matches!(error, BootError::InitrdEmpty(_)));
    let with_cmdline = |cmdline: String| {
        OpenPayload::open(Payload::Linux {
            kernel: kernel.path().into(),
            initrd: None,
            cmdline,
        })
    };
    with_cmdline("a".repeat(2047)).unwrap();
    let error = with_cmdline("a".repeat(2048)).unwrap_err();
    assert!(matches!(error, BootError::CommandLineTooLong(2048)));
    assert!(matches!(
        with_cmdline("a\0b".into()).unwrap_err(),
        BootError::CommandLineZero
    ));
    for path in ["/", "/nonexistent/vmlinux"] {
        let payload = Payload::Linux {
            kernel: path.into(),
            initrd: None,
            cmdline: String::new(),
        };
        let error = OpenPayload::open(payload).unwrap_err();
        assert!(matches!(error, BootError::Read { .. }), "{error}");
    }
    let code = Payload::Code {
        code: vec![0; 0x2000],
        address: GuestAddress((8 << 20) - 0x1000),
    };
    assert!(matches!(
        load(code, 8 << 20).unwrap_err(),
        BootError::CodeOutside { .. }
    ));
}
