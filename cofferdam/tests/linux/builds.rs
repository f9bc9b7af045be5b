//! Other builds of the stock driver: its file with a few bytes changed.

use object::{Object, ObjectSection};
use recovery::module_file::ModuleFile;

use super::options;
use super::victim::DRIVER;

/// The stock driver.
pub fn stock(module: &str) -> Vec<u8> {
    let path = options()
        .images
        .join("modules")
        .join(format!("{module}.ko"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Replaces what is found once.
#[track_caller]
fn patch(file: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..file.len() - from.len())
        .filter(|at| file[*at..].starts_with(from))
        .collect();
    let [at] = places[..] else {
        panic!("found {} times", places.len());
    };
    file[at..at + to.len()].copy_from_slice(to);
}

pub fn build_of(file: &[u8]) -> Vec<u8> {
    ModuleFile::parse(file).unwrap().build_id.unwrap()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The same driver with another build id, and without the signature, which would not fit any more.
pub fn another_build(number: u8) -> Vec<u8> {
    let mut file = stock(DRIVER);
    // At the end: signature, its description of 12 bytes that ends with its length, a magic line.
    let magic = b"~Module signature appended~\n";
    if let Some(signed) = file.strip_suffix(magic) {
        let (rest, length) = signed.split_last_chunk::<4>().unwrap();
        let signature = usize::try_from(u32::from_be_bytes(*length)).unwrap();
        let length = rest.len() - 8 - signature;
        file.truncate(length);
    }
    let old = build_of(&file);
    let new = vec![number; old.len()];
    patch(&mut file, &old, &new);
    file
}

/// One whose init function returns an input/output error.
pub fn with_failing_init() -> Vec<u8> {
    let mut file = another_build(0xf1);
    // call __fentry__; push %rbx; mov $..,%rsi; mov $..,%rdi; call _printk; mov
    let head = [0xe8, 0, 0, 0, 0];
    let rest = [
        0, 0, 0, 0, 0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe8, 0, 0, 0, 0, 0x48, 0xc7, 0xc6,
    ];
    let with = |code: [u8; 4]| [&head[..], &code[..], &rest[..]].concat();
    // push $-5; pop %rax; ret
    patch(
        &mut file,
        &with([0x53, 0x48, 0xc7, 0xc6]),
        &with([0x6a, 0xfb, 0x58, 0xc3]),
    );
    file
}

/// One that does not know the device, so that no interface comes back.
pub fn without_the_device() -> Vec<u8> {
    let mut file = another_build(0xf2);
    patch(
        &mut file,
        &[0x86, 0x80, 0, 0, 0x0e, 0x10, 0, 0],
        &[0x86, 0x80, 0, 0, 0xfe, 0xff, 0, 0],
    );
    file
}

/// The same file, but the kernel finds no exit function in it, and refuses to remove it.
pub fn that_stays(mut file: Vec<u8>) -> Vec<u8> {
    /// `Elf64_Rela`: where, type and symbol, addend.
    const RELOCATION_BYTES: usize = 24;
    // `struct module` names its init function first and its exit function behind it.
    let (at, length) = {
        let object = object::File::parse(&*file).unwrap();
        let section = object.section_by_name(".rela.gnu.linkonce.this_module");
        section.unwrap().file_range().unwrap()
    };
    let (at, length) = (
        usize::try_from(at).unwrap(),
        usize::try_from(length).unwrap(),
    );
    assert_eq!(length, 2 * RELOCATION_BYTES);
    let (init, exit) = file[at..at + length].split_at_mut(RELOCATION_BYTES);
    let offset = |entry: &[u8]| u64::from_le_bytes(entry[..8].try_into().unwrap());
    assert!(offset(init) < offset(exit));
    // R_X86_64_NONE
    exit[8..12].fill(0);
    file
}
