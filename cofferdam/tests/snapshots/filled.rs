//! A guest that fills its memory, so that work on it takes its time.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use crate::common::place::{LIMIT, Place};
use crate::common::{EM_X86_64, elf};

/// MiB that it fills, and those that it has.
pub const FILLED_MIB: u32 = 192;
pub const MEMORY: &str = "--memory 256M";

/// Writes a word to each page from 32 MiB on, prints an F, and does nothing more, or reads them for
/// ever.
fn code(touches: bool) -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc7]; // mov rdi, 32 MiB
    code.extend((32u32 << 20).to_le_bytes());
    code.push(0xb9); // mov ecx, pages
    code.extend((FILLED_MIB << 8).to_le_bytes());
    code.extend([0x48, 0x89, 0x3f]); // mov [rdi], rdi
    code.extend([0x48, 0x81, 0xc7, 0, 0x10, 0, 0]); // add rdi, 4096
    code.extend([0xff, 0xc9, 0x75, 0xf2]); // dec ecx; jnz to the store
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'F', 0xee]); // out to 0x3f8
    if touches {
        code.extend([0x48, 0xc7, 0xc7]); // mov rdi, 32 MiB
        code.extend((32u32 << 20).to_le_bytes());
        code.push(0xb9); // mov ecx, pages
        code.extend((FILLED_MIB << 8).to_le_bytes());
        code.extend([0x48, 0x8b, 0x07]); // mov rax, [rdi]
        code.extend([0x48, 0x81, 0xc7, 0, 0x10, 0, 0]); // add rdi, 4096
        code.extend([0xff, 0xc9, 0x75, 0xf2]); // dec ecx; jnz to the load
        code.extend([0xeb, 0xe4]); // jmp to the first of these
    }
    code.extend([0xf4, 0xeb, 0xfd]); // hlt, jmp to it
    code
}

/// A VM of that name, whose memory is full.
pub fn start(place: &Place, name: &str) -> Child {
    start_with(place, name, &code(false))
}

/// The same, and it reads all of that for ever.
pub fn start_touching(place: &Place, name: &str) -> Child {
    start_with(place, name, &code(true))
}

fn start_with(place: &Place, name: &str, code: &[u8]) -> Child {
    let kernel = place.file("fills", &elf(EM_X86_64, code));
    let log = place.path(&format!("{name}.log"));
    let _ = std::fs::remove_file(&log);
    let words = format!("{MEMORY} --serial file={}", log.display());
    let vm = place.start(name, &kernel, &words);
    wait_until("the guest fills its memory", || {
        std::fs::read(&log).is_ok_and(|text| text == b"F")
    });
    vm
}

#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "not so: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Directories that `dir` is being written as, or was.
pub fn partial(dir: &Path) -> Vec<PathBuf> {
    let start = format!("{}.partial-", dir.file_name().unwrap().to_str().unwrap());
    let entries = dir.parent().unwrap().read_dir().unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(&start)
        })
        .collect()
}

/// Waits until so much of the image of `dir` is written, not counting what is at `old` paths; false
/// if all of it was meanwhile.
#[track_caller]
pub fn is_under_way(dir: &Path, mib: u64, old: &[PathBuf]) -> bool {
    let written = |path: PathBuf| {
        path.join("memory.image")
            .metadata()
            .map(|image| image.blocks())
    };
    let mut whole = false;
    wait_until("the image is being written", || {
        whole = dir.join("manifest.json").exists();
        whole
            || partial(dir)
                .into_iter()
                .filter(|path| !old.contains(path))
                .any(|path| written(path).is_ok_and(|blocks| blocks >= mib << 11))
    });
    !whole
}
