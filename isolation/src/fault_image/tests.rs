//! Reading images, whole and damaged.

use std::path::Path;

use vm_memory::GuestAddress;
use vmm::snapshot::{ImageWriter, PageSums, StoredFile};

use super::manifest::{Control, Files, Region, Registers, ReturnPoint};
use super::*;
use crate::domain::roots::Root;
use crate::domain::view::PAGE_SIZE;
use crate::guest::phys::GuestPhys;

const PAGE: usize = PAGE_SIZE as usize;
/// Eight pages at the beginning, four behind a gap.
const REGIONS: [Region; 2] = [
    Region {
        gpa: 0,
        bytes: 8 * PAGE_SIZE,
    },
    Region {
        gpa: 1 << 32,
        bytes: 4 * PAGE_SIZE,
    },
];
const CODE: u64 = 0xffff_ffff_8100_0000;
const STACK: u64 = 0xffff_ffff_8100_1000;

fn store(dir: &Path, name: &str, bytes: &[u8]) -> StoredFile {
    std::fs::write(dir.join(name), bytes).unwrap();
    StoredFile {
        bytes: bytes.len() as u64,
        crc32: Some(crc32fast::hash(bytes)),
    }
}

fn page_of(fill: u8) -> [u8; PAGE] {
    [fill; PAGE]
}

/// A page of a table with these entries.
fn table(entries: &[(usize, u64)]) -> [u8; PAGE] {
    let mut page = page_of(0);
    for (index, entry) in entries {
        page[index * 8..index * 8 + 8].copy_from_slice(&(entry | 3).to_le_bytes());
    }
    page
}

/// An image whose tables, at page 1, map [`CODE`] to page 5 and [`STACK`] to the second region.
fn image(dir: &Path) -> Manifest {
    let mut private = Vec::new();
    for (gpa, fill) in [(6 * PAGE_SIZE, 0x66), ((1 << 32) + 2 * PAGE_SIZE, 0x77)] {
        private.extend(u64::to_le_bytes(gpa));
        private.extend(page_of(fill));
    }
    let symbols = format!("{CODE:x} T f\n{STACK:x} d stack\n");
    let memory = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join(MEMORY_FILE))
        .unwrap();
    let mut memory = ImageWriter::new(memory, 12 * PAGE_SIZE, PageSums::Crc32).unwrap();
    memory.put(1, &table(&[(511, 2 * PAGE_SIZE)])).unwrap();
    memory.put(2, &table(&[(510, 3 * PAGE_SIZE)])).unwrap();
    memory.put(3, &table(&[(8, 4 * PAGE_SIZE)])).unwrap();
    let entries = [(0, 5 * PAGE_SIZE), (1, 1 << 32)];
    memory.put(4, &table(&entries)).unwrap();
    memory.put(5, &page_of(0x55)).unwrap();
    memory.put(6, &page_of(0x16)).unwrap();
    memory.put(8, &page_of(0x88)).unwrap();
    let (_, map) = memory.finish_unsynced(false).unwrap();
    let manifest = Manifest {
        version: FORMAT_VERSION,
        created_unix_s: 1,
        program: "cofferdam".to_owned(),
        kernel: "6.1.0".to_owned(),
        module: "m".to_owned(),
        sections: Vec::new(),
        entry: "f".to_owned(),
        text: "f: what it did".to_owned(),
        report: serde_json::Value::Null,
        at: CODE,
        root: Root::Driver,
        registers: Registers {
            rip: CODE,
            rsp: STACK + 0x100,
            ..Registers::default()
        },
        returned: false,
        control: Control {
            cr3: PAGE_SIZE,
            cr4: 0x20,
            efer: 0xd01,
            ..Control::default()
        },
        physical_bits: 40,
        called_with: Registers::default(),
        returns_to: ReturnPoint {
            address: CODE + 9,
            rsp: STACK + 0x200,
        },
        crossings: Vec::new(),
        callbacks: Vec::new(),
        regions: REGIONS.to_vec(),
        files: Files {
            private: store(dir, PRIVATE_FILE, &private),
            symbols: store(dir, SYMBOLS_FILE, symbols.as_bytes()),
            kernel_types: None,
            module_types: None,
            map: store(dir, MAP_FILE, &map.to_bytes().unwrap()),
            memory: StoredFile {
                bytes: 12 * PAGE_SIZE,
                crc32: None,
            },
        },
    };
    write_manifest(dir, &manifest);
    manifest
}

fn write_manifest(dir: &Path, manifest: &Manifest) {
    store(dir, MANIFEST_FILE, manifest.to_text().unwrap().as_bytes());
}

fn opened(dir: &Path) -> Result<(), FaultImageError> {
    FaultImage::open(dir).map(drop)
}

/// The error of an image with this changed.
fn error_with(change: impl FnOnce(&Path, &mut Manifest)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut manifest = image(dir.path());
    change(dir.path(), &mut manifest);
    write_manifest(dir.path(), &manifest);
    opened(dir.path()).unwrap_err().to_string()
}

#[test]
fn memory_is_that_of_the_call_over_that_of_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let image = FaultImage::open(dir.path()).unwrap();
    image.check().unwrap();
    let byte = |gpa: u64| {
        let mut byte = [0];
        GuestPhys::read(&image, GuestAddress(gpa), &mut byte).map(|()| byte[0])
    };
    assert_eq!(byte(5 * PAGE_SIZE), Ok(0x55));
    assert_eq!(byte(6 * PAGE_SIZE), Ok(0x66), "the call's");
    assert_eq!(byte(7 * PAGE_SIZE), Ok(0), "not stored");
    assert_eq!(byte(1 << 32), Ok(0x88), "behind the gap");
    assert_eq!(byte((1 << 32) + 2 * PAGE_SIZE), Ok(0x77));
    for outside in [8 * PAGE_SIZE, (1 << 32) + 4 * PAGE_SIZE, u64::MAX] {
        assert!(byte(outside).is_err(), "{outside:#x}");
    }
    let mut guests = [0];
    let read = image
        .guests()
        .read(GuestAddress(6 * PAGE_SIZE), &mut guests);
    assert_eq!((read, guests), (Ok(()), [0x16]));
    // By virtual addresses, as far as there is something.
    let mut bytes = vec![0; 3 * PAGE];
    assert_eq!(image.read(CODE, &mut bytes), Ok(2 * PAGE));
    assert_eq!((bytes[0], bytes[PAGE]), (0x55, 0x88));
    assert!(image.read(u64::MAX - 3, &mut bytes).is_err());
    assert!(image.read(0, &mut bytes).is_err());
    assert_eq!(image.name(CODE + 3).as_deref(), Some("f+0x3"));
    assert_eq!(image.name(5), None);
}

#[test]
fn what_is_cut_or_changed_is_told_by_its_file() {
    for name in [
        MANIFEST_FILE,
        PRIVATE_FILE,
        SYMBOLS_FILE,
        MAP_FILE,
        MEMORY_FILE,
    ] {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let path = dir.path().join(name);
        let bytes = std::fs::read(&path).unwrap();
        // The last byte of the manifest ends its line.
        for cut in [0, bytes.len() / 2, bytes.len() - 2] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let error = opened(dir.path()).unwrap_err().to_string();
            assert!(
                error.contains(name) && error.contains("damaged"),
                "{cut}: {error}"
            );
        }
        std::fs::remove_file(&path).unwrap();
        opened(dir.path()).unwrap_err();
        std::fs::create_dir(&path).unwrap();
        opened(dir.path()).unwrap_err();
    }
}

#[test]
fn every_changed_byte_of_the_small_files_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    for name in [SYMBOLS_FILE, MAP_FILE] {
        let path = dir.path().join(name);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            std::fs::write(&path, changed).unwrap();
            opened(dir.path()).unwrap_err();
        }
        std::fs::write(&path, bytes).unwrap();
    }
    FaultImage::open(dir.path()).unwrap();
}

#[test]
fn a_changed_page_cannot_be_read_and_the_others_can() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path());
    let path = dir.path().join(MEMORY_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8 * PAGE + 17] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let image = FaultImage::open(dir.path()).unwrap();
    let error = image.check().unwrap_err().to_string();
    assert!(error.contains(MEMORY_FILE), "{error}");
    let mut bytes = vec![0; 2 * PAGE];
    assert_eq!(image.read(CODE, &mut bytes), Ok(PAGE), "up to it");
    // A trace ends where the stack cannot be read.
    let trace = image.trace();
    assert_eq!(trace.len(), 2, "{trace:?}");
}

#[test]
fn other_versions_programs_and_snapshots_are_refused_by_name() {
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let path = dir.path().join(MANIFEST_FILE);
        let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(&path, value.to_string()).unwrap();
        opened(dir.path()).unwrap_err().to_string()
    };
    let error = with(&|value| value["manifest"]["version"] = 99.into());
    assert!(error.contains("version 99"), "{error}");
    let error = with(&|value| value["format"] = "cofferdam-snapshot".into());
    assert!(error.contains("is a snapshot"), "{error}");
    let error = with(&|value| value["format"] = "other".into());
    assert!(error.contains("another program"), "{error}");
    let error = with(&|value| value["manifest"]["entry"] = "g".into());
    assert!(error.contains("checksum"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let error = opened(dir.path()).unwrap_err().to_string();
    assert!(error.contains("is no image of a fault"), "{error}");
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_made_for_them() {
    let absurd = error_with(|_, manifest| {
        manifest.regions = vec![Region {
            gpa: 0,
            bytes: 1 << 50,
        }];
        manifest.files.memory.bytes = 1 << 50;
    });
    assert!(absurd.contains("bytes of memory"), "{absurd}");
    let wraps = error_with(|_, manifest| {
        manifest.regions[1].gpa = u64::MAX - 4095;
        manifest.regions[1].bytes = 1 << 20;
    });
    assert!(wraps.contains("is none"), "{wraps}");
    let overlap = error_with(|_, manifest| manifest.regions[1].gpa = 4 * PAGE_SIZE);
    assert!(overlap.contains("is none"), "{overlap}");
    let odd = error_with(|_, manifest| manifest.regions[1].bytes = 100);
    assert!(odd.contains("is none"), "{odd}");
    let long = error_with(|_, manifest| {
        let point = manifest.returns_to;
        manifest.crossings = vec![point; 5000];
    });
    assert!(long.contains("absurdly long"), "{long}");
    let other_length = error_with(|_, manifest| manifest.files.memory.bytes = 4096);
    assert!(
        other_length.contains("not as long as its memory"),
        "{other_length}"
    );
    let beyond = error_with(|_, manifest| {
        manifest.regions[1].bytes -= PAGE_SIZE;
        manifest.regions[0].bytes -= 4 * PAGE_SIZE;
        manifest.files.memory.bytes = 7 * PAGE_SIZE;
    });
    assert!(beyond.contains(MAP_FILE), "{beyond}");
}

#[test]
fn private_pages_out_of_order_or_no_pages_are_refused() {
    for gpas in [[PAGE_SIZE, PAGE_SIZE], [2 * PAGE_SIZE, PAGE_SIZE], [1, 2]] {
        let error = error_with(|dir, manifest| {
            let mut bytes = Vec::new();
            for gpa in gpas {
                bytes.extend(u64::to_le_bytes(gpa));
                bytes.extend(page_of(1));
            }
            manifest.files.private = store(dir, PRIVATE_FILE, &bytes);
        });
        assert!(error.contains(PRIVATE_FILE), "{error}");
    }
}

#[test]
fn a_trace_with_wild_registers_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut manifest = image(dir.path());
    for rsp in [0, 7, STACK + 3, u64::MAX, u64::MAX - 7, 1 << 63] {
        manifest.registers.rsp = rsp;
        manifest.returns_to.rsp = rsp.wrapping_sub(1);
        let point = ReturnPoint {
            address: u64::MAX,
            rsp: rsp.wrapping_add(16),
        };
        manifest.crossings = vec![point; 3];
        write_manifest(dir.path(), &manifest);
        let trace = FaultImage::open(dir.path()).unwrap().trace();
        assert!((1..6).contains(&trace.len()), "{trace:?}");
    }
}
