use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("foreign", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

fn byte(mapping: &ForeignMapping, at: usize) -> u8 {
    assert!(at < mapping.len);
    // SAFETY: within the mapping, by the line above.
    unsafe { mapping.as_ptr().add(at).read_volatile() }
}

fn set_byte(mapping: &ForeignMapping, at: usize, value: u8) {
    assert!(at < mapping.len);
    // SAFETY: within the mapping, by the line above.
    unsafe { mapping.as_ptr().add(at).write_volatile(value) }
}

#[test]
fn a_file_that_is_cut_reads_as_zeros_from_there_on() {
    let file = memfd(16 << 12);
    let mapping = ForeignMapping::new(&file, 0, 16 << 12).unwrap();
    for page in 0..16 {
        set_byte(&mapping, page << 12, 7);
    }
    assert!(!mapping.has_shrunk());
    file.set_len(3 << 12).unwrap();
    assert_eq!(byte(&mapping, 2 << 12), 7);
    assert!(!mapping.has_shrunk(), "what is there was read");
    assert_eq!(byte(&mapping, 9 << 12), 0);
    assert!(mapping.has_shrunk());
    assert_eq!(byte(&mapping, 3 << 12), 0);
    set_byte(&mapping, (15 << 12) + 4095, 1);
    assert_eq!(byte(&mapping, (15 << 12) + 4095), 1);
    // The part that is there is still the file's.
    set_byte(&mapping, 5, 9);
    let mut first = [0; 6];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
    assert_eq!(first, [7, 0, 0, 0, 0, 9]);
}

#[test]
fn many_cuts_of_many_mappings_are_survived() {
    for _ in 0..200 {
        let file = memfd(64 << 12);
        let mapping = ForeignMapping::new(&file, 0, 64 << 12).unwrap();
        for left in (0..64_u64).rev() {
            file.set_len(left << 12).unwrap();
            assert_eq!(byte(&mapping, (left as usize) << 12), 0);
        }
    }
}

#[test]
fn only_what_is_all_there_and_in_memory_is_mapped() {
    let file = memfd(4 << 12);
    for (offset, len) in [
        (0, 5 << 12),
        (1 << 12, 4 << 12),
        (8, 4096),
        (0, 100),
        (0, 0),
    ] {
        assert!(
            ForeignMapping::new(&file, offset, len).is_err(),
            "{offset} {len}"
        );
    }
    assert!(ForeignMapping::new(&file, u64::MAX - 4095, 4096).is_err());
    let on_disk = File::open("/proc/self/exe").unwrap();
    assert!(ForeignMapping::new(&on_disk, 0, 4096).is_err());
    let (_, pipe) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(ForeignMapping::new(&pipe, 0, 4096).is_err());
    assert!(ForeignMapping::new(&file, 1 << 12, 3 << 12).is_ok());
}

/// Run by the next test in a process of its own.
#[test]
fn a_sigbus_elsewhere() {
    if std::env::var_os("FOREIGN_SIGBUS").is_none() {
        return;
    }
    let ours = memfd(4096);
    let _ours = ForeignMapping::new(&ours, 0, 4096).unwrap();
    let file = memfd(8192);
    let fd = file.as_raw_fd();
    let (prot, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a mapping of its own; the read is the crash that is wanted.
    unsafe {
        let at = libc::mmap(ptr::null_mut(), 8192, prot, shared, fd, 0);
        file.set_len(4096).unwrap();
        let value = at.cast::<u8>().add(4096).read_volatile();
        let _ = writeln!(std::io::stdout(), "survived with {value}");
    }
}

#[test]
fn any_other_sigbus_ends_the_process_as_before() {
    let status = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "dma::foreign::tests::a_sigbus_elsewhere",
            "--nocapture",
        ])
        .env("FOREIGN_SIGBUS", "1")
        .output()
        .unwrap()
        .status;
    assert_eq!(status.signal(), Some(libc::SIGBUS));
}
