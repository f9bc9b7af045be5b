//! A fault that cannot be kept, because nothing more can be written: alone in its process, whose
//! limit of files it sets.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::sync::Arc;

use common::*;
use iced_x86::code_asm::*;
use isolation::domain::transaction::CallEnd;
use isolation::fault_image::{KeepFaults, Keeper, Kept, Subject};
use isolation::guest::symbols::SymbolTable;

/// Has writes beyond `bytes` of a file fail from now on (setrlimit(2)), as they do on a disk that
/// is full.
fn limit_files(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the limit is valid memory; a signal that is ignored calls nothing.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
}

#[test]
fn an_image_that_cannot_be_written_leaves_nothing_and_the_call_is_taken_back_as_any() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(qword_ptr(rdi), 1).unwrap();
        a.ud2().unwrap();
    });
    let keep = KeepFaults::in_dir(dir.path().to_owned());
    let subject = Subject {
        module: "driver".to_owned(),
        sections: Vec::new(),
        kernel: String::new(),
        symbols: Arc::new(SymbolTable::default()),
        types: None,
        physical_bits: 46,
    };
    let mut kernel = Kernel {
        keeper: Some(Keeper::new(keep, subject)),
        ..Kernel::with_data()
    };
    let mut domain = guest.domain();
    let mut regs = guest.entry_regs();
    regs.rdi = DRIVER_DATA;
    let before = guest.all();
    // Pages of the call have room, the guest's memory has not.
    limit_files(MEMORY_PAGES * PAGE / 2);
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    limit_files(libc::RLIM_INFINITY);
    assert!(matches!(result.end, CallEnd::Aborted(_)), "{result:?}");
    assert!(guest.all() == before);
    let Some(Kept::Failed(why)) = &kernel.kept else {
        panic!("{:?}", kernel.kept)
    };
    assert!(why.contains("memory.image"), "{why}");
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    // When there is room again the next one is kept.
    guest.call_with(&mut domain, &mut kernel, regs);
    assert!(
        matches!(kernel.kept, Some(Kept::In(_))),
        "{:?}",
        kernel.kept
    );
}
