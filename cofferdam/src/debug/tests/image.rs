//! An image by hand.

use std::path::Path;

use isolation::domain::roots::Root;
use isolation::fault_image::{
    Control, FORMAT_VERSION, FaultImage, Files, KERNEL_TYPES_FILE, MANIFEST_FILE, MAP_FILE,
    MEMORY_FILE, Manifest, PRIVATE_FILE, Region, Registers, ReturnPoint, SYMBOLS_FILE, Section,
};
use serde_json::{Value, json};
use vmm::snapshot::{ImageWriter, PageSums, StoredFile};

const PAGE: usize = 4096;
pub const CODE: u64 = 0xffff_ffff_8100_0000;
pub const STACK: u64 = 0xffff_ffff_8100_1000;
pub const DATA: u64 = 0xffff_ffff_8100_2000;
/// Mapped to where there is no memory.
pub const NOWHERE: u64 = 0xffff_ffff_8100_3000;

fn store(dir: &Path, name: &str, bytes: &[u8]) -> StoredFile {
    std::fs::write(dir.join(name), bytes).unwrap();
    StoredFile {
        bytes: bytes.len() as u64,
        crc32: Some(crc32fast::hash(bytes)),
    }
}

fn table(entries: &[(usize, u64)]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (index, gpa) in entries {
        page[index * 8..index * 8 + 8].copy_from_slice(&(gpa | 3).to_le_bytes());
    }
    page
}

/// `struct thing { int count; }` and `int driver_entry(struct thing *dev)` as BTF
/// (Documentation/bpf/btf.rst).
fn types() -> Vec<u8> {
    let strings = b"\0int\0thing\0count\0driver_entry\0dev\0";
    let words: [u32; 22] = [
        // 1: int; 2: struct thing; 3: a pointer to it; 4: the prototype; 5: the function.
        1,
        1 << 24,
        4,
        1 << 24 | 32, //
        5,
        4 << 24 | 1,
        4,
        11,
        1,
        0, //
        0,
        2 << 24,
        2, //
        0,
        13 << 24 | 1,
        1,
        30,
        3, //
        17,
        12 << 24,
        4, //
        0,
    ];
    let types = &words[..21];
    let length = (types.len() * 4) as u32;
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, length, length, strings.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(types.iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend(strings);
    bytes
}

/// Writes an image into `dir` and opens it: a driver's function that has called the kernel's, which
/// faults.
#[expect(
    clippy::too_many_lines,
    reason = "one image's parts, one after the other"
)]
pub fn image(dir: &Path) -> FaultImage {
    let mut private = (7 * PAGE as u64).to_le_bytes().to_vec();
    private.extend([0x77; PAGE]);
    let symbols = format!(
        "{CODE:x} T _text\n{CODE:x} T kernel_function\n{:x} t driver_entry\t[driver]\n{STACK:x} d evil\u{1b}[31m\n",
        CODE + 0x100
    );
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join(MEMORY_FILE))
        .unwrap();
    let mut memory = ImageWriter::new(file, 16 * PAGE as u64, PageSums::Crc32).unwrap();
    let page = |number: u64| number * PAGE as u64;
    memory.put(1, &table(&[(511, page(2))])).unwrap();
    memory.put(2, &table(&[(510, page(3))])).unwrap();
    memory.put(3, &table(&[(8, page(4))])).unwrap();
    let leaves = [(0, page(5)), (1, page(6)), (2, page(7)), (3, 1 << 38)];
    memory.put(4, &table(&leaves)).unwrap();
    // A call that ends at 0x110, in the driver.
    let mut code = [0x90; PAGE];
    code[0x10b] = 0xe8;
    memory.put(5, &code).unwrap();
    memory.put(6, &[0x11; PAGE]).unwrap();
    memory.put(7, &[0x16; PAGE]).unwrap();
    let (_, map) = memory.finish_unsynced(false).unwrap();
    let manifest = Manifest {
        version: FORMAT_VERSION,
        created_unix_s: 1,
        program: "cofferdam".to_owned(),
        kernel: "6.1.0".to_owned(),
        module: "driver".to_owned(),
        sections: vec![Section {
            name: ".text".to_owned(),
            address: CODE + 0x100,
        }],
        entry: "driver_entry".to_owned(),
        text: "driver_entry: stray\u{1b}[31m write".to_owned(),
        report: Value::Null,
        at: CODE + 8,
        root: Root::Kernel,
        registers: Registers {
            rax: 0x0102_0304_0506_0708,
            rip: CODE + 8,
            rsp: STACK + 0x100,
            ..Registers::default()
        },
        returned: false,
        control: Control {
            cr2: 0x40,
            cr3: page(1),
            cr4: 0x20,
            efer: 0xd01,
            ..Control::default()
        },
        physical_bits: 40,
        called_with: Registers {
            rdi: DATA,
            ..Registers::default()
        },
        returns_to: ReturnPoint {
            address: CODE + 0x40,
            rsp: STACK + 0x200,
        },
        crossings: vec![ReturnPoint {
            address: CODE + 0x110,
            rsp: STACK + 0x108,
        }],
        callbacks: Vec::new(),
        regions: vec![Region {
            gpa: 0,
            bytes: page(16),
        }],
        files: Files {
            private: store(dir, PRIVATE_FILE, &private),
            symbols: store(dir, SYMBOLS_FILE, symbols.as_bytes()),
            kernel_types: Some(store(dir, KERNEL_TYPES_FILE, &types())),
            module_types: None,
            map: store(dir, MAP_FILE, &map.to_bytes().unwrap()),
            memory: StoredFile {
                bytes: page(16),
                crc32: None,
            },
        },
    };
    let manifest = serde_json::to_value(&manifest).unwrap();
    let enveloped = json!({
        "format": "cofferdam-fault-image",
        "crc32": crc32fast::hash(manifest.to_string().as_bytes()),
        "manifest": manifest,
    });
    std::fs::write(dir.join(MANIFEST_FILE), enveloped.to_string()).unwrap();
    FaultImage::open(dir).unwrap()
}
