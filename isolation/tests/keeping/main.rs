//! Faults of hand-made guests that are kept, on the host's real KVM, and read again.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../arming/guest.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod running;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use iced_x86::code_asm::*;
use isolation::attach::request::IsolateRequest;
use isolation::domain::roots::Root;
use isolation::domain::transaction::CallEnd;
use isolation::domain::violation::ViolationKind;
use isolation::fault_image::{
    FaultImage, FrameKind, KeepFaults, Keeper, Kept, ReturnPoint, Subject, images_in,
};
use isolation::guest::addr::Gva;
use isolation::guest::paging::VirtMemory;
use isolation::guest::symbols::read_kallsyms;

const OUTER: u64 = KERNEL_TEXT + 0x100;
const INNER: u64 = KERNEL_TEXT + 0x200;
/// Where the driver calls [`OUTER`].
const SITE: u64 = DRIVER_TEXT + 4 + 7 + 5;

fn keeper(keep: KeepFaults) -> Keeper {
    keep.prepare().unwrap();
    let symbols = format!(
        "{KERNEL_TEXT:x} T kernel_start\n{OUTER:x} T kernel_outer\n{INNER:x} t kernel_inner\n{:x} T kernel_caller\n\
         {THUNKS:x} T thunks\n{DRIVER_TEXT:x} t driver_entry\t[driver]\n",
        CALLER - 0x10
    );
    let subject = Subject {
        module: "driver".to_owned(),
        sections: vec![(".text".to_owned(), DRIVER_TEXT)],
        kernel: "6.1.0".to_owned(),
        symbols: Arc::new(read_kallsyms(symbols.as_bytes(), |_| true).unwrap()),
        types: None,
        physical_bits: 46,
    };
    Keeper::new(keep, subject)
}

/// A driver that writes its data and calls a kernel function, which calls another one that faults.
fn guest_that_faults_in_the_kernel() -> Guest {
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.sub(rsp, 8).unwrap();
        a.mov(qword_ptr(rdi), 0x1234).unwrap();
        a.mov(edi, 0x40).unwrap();
        a.call(OUTER).unwrap();
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    guest.code(OUTER, |a| {
        a.push(rbx).unwrap();
        a.mov(ebx, 7).unwrap();
        a.call(INNER).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
    });
    guest.code(INNER, |a| {
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.ret().unwrap();
    });
    // So that it is seen what a call leads to.
    guest.code(CALLER - 5, |a| a.call(DRIVER_TEXT).unwrap());
    guest
}

fn path_of(kernel: &Kernel) -> PathBuf {
    match &kernel.kept {
        Some(Kept::In(path)) => path.clone(),
        other => panic!("{other:?}"),
    }
}

fn word(image: &FaultImage, va: u64) -> u64 {
    image.virt().read_u64(Gva(va)).unwrap()
}

#[test]
fn a_fault_in_a_kernel_function_is_kept_with_registers_private_pages_and_the_way_across_the_crossing()
 {
    let dir = tempfile::tempdir().unwrap();
    let guest = guest_that_faults_in_the_kernel();
    let mut domain = guest.domain();
    domain.redirect(SITE, OUTER).unwrap();
    let mut kernel = Kernel {
        keeper: Some(keeper(KeepFaults::in_dir(dir.path().to_owned()))),
        ..Kernel::with_data()
    };
    let mut regs = guest.entry_regs();
    regs.rdi = DRIVER_DATA;
    let before = guest.all();
    let result = guest.call_with(&mut domain, &mut kernel, regs);
    assert!(matches!(result.end, CallEnd::Aborted(_)), "{result:?}");
    assert!(result.phases.keep_ns > 0);
    assert!(guest.all() == before, "the call was taken back as any");

    let image = FaultImage::open(&path_of(&kernel)).unwrap();
    image.check().unwrap();
    let manifest = image.manifest();
    let now = manifest.registers;
    assert_eq!((now.rip, now.rdi, now.rbx), (INNER, 0x40, 7));
    assert_eq!((now.r12, now.r15), (12, 15));
    // sub, the call's return address, push, the inner call's return address.
    assert_eq!(now.rsp, regs.rsp - 32);
    assert_eq!(now.rflags & 0x200, 0x200);
    assert_eq!((manifest.at, manifest.root), (INNER, Root::Kernel));
    assert!(!manifest.returned);
    assert_eq!(manifest.control.cr2, 0x40);
    assert_eq!(manifest.control.cr3, guest.sregs.cr3);
    assert_eq!(manifest.called_with.rdi, DRIVER_DATA);
    let crossing = ReturnPoint {
        address: SITE + 5,
        rsp: regs.rsp - 8,
    };
    assert_eq!(manifest.crossings, [crossing]);
    assert_eq!(manifest.returns_to.address, CALLER);

    // What the call wrote is in the image, and what the guest has beside it.
    assert_eq!(word(&image, DRIVER_DATA), 0x1234);
    let guests = VirtMemory {
        space: image.space(),
        memory: &image.guests(),
    };
    assert_eq!(guests.read_u64(Gva(DRIVER_DATA)).unwrap(), 0);
    assert!(image.private_pages().any(|gpa| gpa == gpa_of(DRIVER_DATA)));
    // A debugger finds its way: the stack and the text have the driver's own addresses.
    assert_eq!(word(&image, regs.rsp - 16), SITE + 5);
    assert_eq!(word(&image, regs.rsp), CALLER);
    let mut call = [0; 5];
    image.virt().read(Gva(SITE), &mut call).unwrap();
    let displacement = OUTER.wrapping_sub(SITE + 5) as u32;
    assert_eq!(call[0], 0xe8);
    assert_eq!(call[1..], displacement.to_le_bytes());

    let trace: Vec<_> = image.trace();
    let places: Vec<_> = trace.iter().map(|f| (f.place.as_str(), f.kind)).collect();
    assert_eq!(
        places,
        [
            ("kernel_inner+0x0", FrameKind::Fault),
            ("kernel_outer+0xb", FrameKind::Found),
            ("driver_entry+0x15 [driver]", FrameKind::Crossing),
            ("kernel_caller+0x10", FrameKind::Caller),
        ]
    );
    assert!(manifest.text.starts_with("driver_entry: exception 14"));
}

#[test]
fn of_a_function_that_has_returned_the_registers_are_those_of_its_caller() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new();
    guest.code(DRIVER_TEXT, |a| {
        a.mov(qword_ptr(rsp + 0x20), 1).unwrap();
        a.mov(eax, 77).unwrap();
        a.ret().unwrap();
    });
    let mut kernel = Kernel {
        keeper: Some(keeper(KeepFaults::in_dir(dir.path().to_owned()))),
        ..Kernel::with_data()
    };
    let regs = guest.entry_regs();
    let result = guest.call(&mut guest.domain(), &mut kernel);
    let address = regs.rsp + 0x20;
    assert_eq!(
        violation_kind(&result),
        ViolationKind::StackSmash { address }
    );
    let image = FaultImage::open(&path_of(&kernel)).unwrap();
    let manifest = image.manifest();
    assert!(manifest.returned);
    assert_eq!(manifest.registers.rip, CALLER);
    assert_eq!(manifest.registers.rsp, regs.rsp + 8);
    assert_eq!((manifest.registers.rax, manifest.at), (77, DRIVER_TEXT));
    assert_eq!(word(&image, address), 1, "what it smashed");
}

#[test]
fn a_fault_in_a_function_that_the_kernel_called_back_has_both_ways_in_its_trace() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new();
    let callback = DRIVER_TEXT + 0x100;
    guest.code(DRIVER_TEXT, |a| {
        a.sub(rsp, 8).unwrap();
        a.mov(rdi, callback).unwrap();
        a.call(OUTER).unwrap();
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    guest.code(OUTER, |a| {
        a.sub(rsp, 8).unwrap();
        a.call(rdi).unwrap();
        a.add(rsp, 8).unwrap();
        a.ret().unwrap();
    });
    guest.code(callback, |a| {
        a.mov(eax, 0x51).unwrap();
        a.ud2().unwrap();
    });
    let mut domain = guest.domain();
    domain.redirect(DRIVER_TEXT + 14, OUTER).unwrap();
    let mut kernel = Kernel {
        keeper: Some(keeper(KeepFaults::in_dir(dir.path().to_owned()))),
        ..Kernel::with_data()
    };
    kernel.driver_functions.insert(callback);
    let result = guest.call(&mut domain, &mut kernel);
    assert!(matches!(result.end, CallEnd::Aborted(_)), "{result:?}");
    let image = FaultImage::open(&path_of(&kernel)).unwrap();
    let now = image.manifest().registers;
    assert_eq!((now.rip, now.rax), (callback + 5, 0x51));
    assert_eq!(image.manifest().root, Root::Driver);
    // Where it would have returned to is on the stack.
    assert_eq!(word(&image, now.rsp), OUTER + 6);
    let trace = image.trace();
    let places: Vec<_> = trace.iter().map(|f| (f.place.as_str(), f.kind)).collect();
    assert_eq!(
        places,
        [
            ("driver_entry+0x105 [driver]", FrameKind::Fault),
            ("kernel_outer+0x6", FrameKind::Callback),
            ("driver_entry+0x13 [driver]", FrameKind::Crossing),
            ("kernel_caller+0x10", FrameKind::Caller),
        ]
    );
}

#[test]
fn no_more_images_are_written_than_may_be_and_each_has_a_name_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let guest = guest_that_faults_in_the_kernel();
    let mut domain = guest.domain();
    domain.redirect(SITE, OUTER).unwrap();
    let keep = KeepFaults {
        dir: dir.path().join("faults"),
        at_most: 2,
    };
    let mut kernel = Kernel {
        keeper: Some(keeper(keep.clone())),
        ..Kernel::with_data()
    };
    let mut regs = guest.entry_regs();
    regs.rdi = DRIVER_DATA;
    let names = |dir: &Path| -> Vec<String> {
        let images = images_in(dir).into_iter();
        images
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect()
    };
    for _ in 0..4 {
        guest.call_with(&mut domain, &mut kernel, regs);
    }
    assert_eq!(kernel.kept, Some(Kept::Enough(2)));
    assert_eq!(
        names(&keep.dir),
        ["driver-driver_entry-0001", "driver-driver_entry-0002"]
    );
    // Somebody has looked at one, and needs it no more.
    std::fs::remove_dir_all(keep.dir.join("driver-driver_entry-0001")).unwrap();
    guest.call_with(&mut domain, &mut kernel, regs);
    assert_eq!(
        names(&keep.dir),
        ["driver-driver_entry-0002", "driver-driver_entry-0003"]
    );
    assert_eq!(keep.dir.read_dir().unwrap().count(), 2, "nothing else");
}

#[test]
fn faults_of_a_guest_that_runs_are_kept_and_the_report_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let guest = running::Guest::start();
    let request = IsolateRequest {
        keep_faults: Some(KeepFaults::in_dir(dir.path().join("new"))),
        ..running::Guest::request("first")
    };
    guest.isolator.isolate(request).unwrap();
    guest.write(running::FAILS, 1);
    guest.call(running::WAITS);
    let reports = guest.isolator.reports("first").unwrap();
    let path = reports[0].image.as_ref().and_then(Kept::path).unwrap();
    assert!(
        reports[0]
            .to_string()
            .contains("the guest at the fault is in")
    );
    let image = FaultImage::open(path).unwrap();
    let manifest = image.manifest();
    assert_eq!(manifest.entry, "first_waits");
    assert_eq!(manifest.at, manifest.registers.rip);
    let name = image.name(manifest.at).unwrap();
    assert!(name.starts_with("first_waits+"), "{name}");
    let trace = image.trace();
    let caller = trace.iter().find(|frame| frame.kind == FrameKind::Caller);
    assert!(caller.unwrap().place.starts_with("kernel_loop+"));
    // The function's text is as it was built, without a gate.
    let mut gate = [0; 5];
    image.virt().read(Gva(running::WAITS), &mut gate).unwrap();
    assert_eq!(gate, [0x0f, 0x1f, 0x44, 0x00, 0x00]);
    guest.write(running::FAILS, 0);
    assert_eq!(guest.call(running::WAITS), 7);
}

#[test]
fn a_place_that_faults_cannot_be_kept_in_is_refused_and_nothing_is_isolated() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let guest = running::Guest::start();
    let request = IsolateRequest {
        keep_faults: Some(KeepFaults::in_dir(file)),
        ..running::Guest::request("first")
    };
    let error = guest.isolator.isolate(request).unwrap_err().to_string();
    assert!(error.contains("faults cannot be kept"), "{error}");
    assert!(guest.isolator.status().is_empty());
}
