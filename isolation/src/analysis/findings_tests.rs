//! Code with and without what is wrong or doubtful.

use iced_x86::code_asm::*;

use super::analyze;
use super::findings::{Finding, FindingKind};
use super::testing::Module;
use super::tests::{end, kernel, types_of};

type Body = fn(&mut Module, &mut CodeAssembler);

/// Maps the device's registers and keeps their address in a variable.
fn maps(module: &mut Module) {
    module.function("maps", |module, a| {
        let (map, kept) = (module.symbol("pci_ioremap_bar"), module.symbol("kept"));
        a.call(map).unwrap();
        a.mov(rcx, rax).unwrap();
        a.mov(qword_ptr(kept), rcx).unwrap();
        end(a);
    });
    module.table("kept", 8, &[]);
}

/// `rbx` is the address of the registers.
fn registers(module: &mut Module, a: &mut CodeAssembler) {
    let kept = module.symbol("kept");
    a.mov(rbx, qword_ptr(kept)).unwrap();
}

fn findings_of(body: Body) -> Vec<Finding> {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    maps(&mut module);
    module.function("tested", body);
    module.table("table", 64, &[]);
    module.types(&types_of(&kernel, &["tested"], &[]));
    analyze(&module.bytes(), &kernel).unwrap().findings
}

fn finds(kind: FindingKind, body: Body) {
    let found = findings_of(body);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        (found[0].kind, found[0].function.as_str()),
        (kind, "tested"),
        "{found:?}"
    );
}

fn finds_nothing(body: Body) {
    let found = findings_of(body);
    assert!(found.is_empty(), "{found:?}");
}

/// Waits until a bit is set.
fn endless(module: &mut Module, a: &mut CodeAssembler) {
    registers(module, a);
    let delay = module.symbol("pure");
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.call(delay).unwrap();
    a.mov(eax, dword_ptr(rbx + 8)).unwrap();
    a.test(eax, 0x10).unwrap();
    a.je(again).unwrap();
    end(a);
}

#[test]
fn a_loop_that_only_a_register_ends_is_found() {
    finds(FindingKind::WaitsForDevice, endless);
    // The register compared in memory, and read by a function of the kernel.
    finds(FindingKind::WaitsForDevice, |module, a| {
        registers(module, a);
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.test(dword_ptr(rbx + 8), 0x10).unwrap();
        a.jne(again).unwrap();
        end(a);
    });
    finds(FindingKind::WaitsForDevice, |module, a| {
        let read = module.symbol("ioread32");
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.call(read).unwrap();
        a.and(eax, 1).unwrap();
        a.cmp(eax, 1).unwrap();
        a.jne(again).unwrap();
        end(a);
    });
}

#[test]
fn a_loop_with_a_bound_is_not() {
    // A counter.
    finds_nothing(|module, a| {
        registers(module, a);
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.mov(edx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.test(eax, 0x10).unwrap();
        a.jne(done).unwrap();
        a.sub(edx, 1).unwrap();
        a.jne(again).unwrap();
        a.set_label(&mut done).unwrap();
        end(a);
    });
    // The time, by what a function returns.
    finds_nothing(|module, a| {
        registers(module, a);
        let late = module.symbol("pure");
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.set_label(&mut again).unwrap();
        a.mov(ebp, dword_ptr(rbx + 8)).unwrap();
        a.test(ebp, 0x10).unwrap();
        a.jne(done).unwrap();
        a.call(late).unwrap();
        a.test(eax, eax).unwrap();
        a.je(again).unwrap();
        a.set_label(&mut done).unwrap();
        end(a);
    });
    // Memory that is nobody's registers.
    finds_nothing(|_, a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(eax, dword_ptr(rdi + 8)).unwrap();
        a.test(eax, 0x10).unwrap();
        a.je(again).unwrap();
        end(a);
    });
    // What is compared with changes in the loop.
    finds_nothing(|module, a| {
        registers(module, a);
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.add(edx, 1).unwrap();
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.cmp(eax, edx).unwrap();
        a.ja(again).unwrap();
        end(a);
    });
    // It was read before, once.
    finds_nothing(|module, a| {
        registers(module, a);
        let mut again = a.create_label();
        a.mov(ebp, dword_ptr(rbx + 8)).unwrap();
        a.set_label(&mut again).unwrap();
        a.test(ebp, 0x10).unwrap();
        a.je(again).unwrap();
        end(a);
    });
}

/// A register's value as an index into a table of 16.
fn index(module: &mut Module, a: &mut CodeAssembler) {
    registers(module, a);
    let table = module.symbol("table");
    a.mov(eax, dword_ptr(rbx + 8)).unwrap();
    a.mov(edx, dword_ptr(rax * 4 + table)).unwrap();
    end(a);
}

#[test]
fn a_devices_value_as_an_index_is_found_where_it_may_be_too_large() {
    finds(FindingKind::DeviceIndex, index);
    // A mask that lets too much through.
    finds(FindingKind::DeviceIndex, |module, a| {
        registers(module, a);
        let table = module.symbol("table");
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.and(eax, 31).unwrap();
        a.mov(edx, dword_ptr(rax * 4 + table)).unwrap();
        end(a);
    });
    // Compared with zero only.
    finds(FindingKind::DeviceIndex, |module, a| {
        registers(module, a);
        let table = module.symbol("table");
        let mut none = a.create_label();
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.cmp(eax, 0).unwrap();
        a.je(none).unwrap();
        a.mov(edx, dword_ptr(rax * 4 + table)).unwrap();
        a.set_label(&mut none).unwrap();
        end(a);
    });
}

#[test]
fn an_index_that_was_checked_or_masked_is_not() {
    finds_nothing(|module, a| {
        registers(module, a);
        let table = module.symbol("table");
        let mut large = a.create_label();
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.cmp(eax, 15).unwrap();
        a.ja(large).unwrap();
        a.mov(edx, dword_ptr(rax * 4 + table)).unwrap();
        a.set_label(&mut large).unwrap();
        end(a);
    });
    finds_nothing(|module, a| {
        registers(module, a);
        let table = module.symbol("table");
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.and(eax, 15).unwrap();
        a.mov(edx, dword_ptr(rax * 4 + table)).unwrap();
        end(a);
    });
    // No device's value.
    finds_nothing(|module, a| {
        let table = module.symbol("table");
        a.mov(eax, dword_ptr(rdi + 8)).unwrap();
        a.mov(edx, dword_ptr(rax * 4 + table)).unwrap();
        end(a);
    });
}

/// What the device wrote into memory as a length.
fn length(module: &mut Module, a: &mut CodeAssembler) {
    let (shares, copy) = (module.symbol("dma_alloc_attrs"), module.symbol("memcpy"));
    a.call(shares).unwrap();
    a.movzx(edx, word_ptr(rax + 4)).unwrap();
    a.call(copy).unwrap();
    end(a);
}

#[test]
fn a_devices_value_as_a_length_is_found_unless_it_was_compared() {
    finds(FindingKind::DeviceLength, length);
    finds_nothing(|module, a| {
        let (shares, copy) = (module.symbol("dma_alloc_attrs"), module.symbol("memcpy"));
        let mut large = a.create_label();
        a.call(shares).unwrap();
        a.movzx(edx, word_ptr(rax + 4)).unwrap();
        a.cmp(edx, 1518).unwrap();
        a.ja(large).unwrap();
        a.call(copy).unwrap();
        a.set_label(&mut large).unwrap();
        end(a);
    });
}

/// Calls what can fail, and returns 0.
fn ignoring(module: &mut Module, a: &mut CodeAssembler) {
    let enable = module.symbol("pci_enable_device");
    a.call(enable).unwrap();
    a.xor(eax, eax).unwrap();
    end(a);
}

#[test]
fn an_error_that_is_not_looked_at_is_found() {
    finds(FindingKind::ErrorIgnored, ignoring);
    // Overwritten on both ways.
    finds(FindingKind::ErrorIgnored, |module, a| {
        let (enable, other) = (module.symbol("pci_enable_device"), module.symbol("pure"));
        let (mut one, mut done) = (a.create_label(), a.create_label());
        a.call(enable).unwrap();
        a.test(edi, edi).unwrap();
        a.je(one).unwrap();
        a.mov(eax, 1).unwrap();
        a.jmp(done).unwrap();
        a.set_label(&mut one).unwrap();
        a.call(other).unwrap();
        a.set_label(&mut done).unwrap();
        end(a);
    });
}

#[test]
fn an_error_that_is_tested_kept_or_returned_is_not() {
    finds_nothing(|module, a| {
        let enable = module.symbol("pci_enable_device");
        a.call(enable).unwrap();
        end(a);
    });
    finds_nothing(|module, a| {
        let enable = module.symbol("pci_enable_device");
        let mut well = a.create_label();
        a.call(enable).unwrap();
        a.test(eax, eax).unwrap();
        a.je(well).unwrap();
        a.set_label(&mut well).unwrap();
        a.xor(eax, eax).unwrap();
        end(a);
    });
    // On one way only.
    finds_nothing(|module, a| {
        let enable = module.symbol("pci_enable_device");
        let mut keep = a.create_label();
        a.call(enable).unwrap();
        a.test(edi, edi).unwrap();
        a.je(keep).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut keep).unwrap();
        end(a);
    });
}

#[test]
fn where_registers_are_is_learnt_from_what_is_stored_in_members() {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    // `net_device.base` of the argument.
    module.function("my_open", |module, a| {
        let map = module.symbol("pci_ioremap_bar");
        a.mov(rbx, rdi).unwrap();
        a.call(map).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        end(a);
    });
    module.function("my_stop", |module, a| {
        let inner = module.symbol("reads");
        let mut again = a.create_label();
        a.mov(rbx, rdi).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rdi, rbx).unwrap();
        a.call(inner).unwrap();
        a.test(eax, 1).unwrap();
        a.je(again).unwrap();
        end(a);
    });
    // Without a type: what it is handed is known by its caller.
    module.function("reads", |_, a| {
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.mov(eax, dword_ptr(rcx + 4)).unwrap();
        end(a);
    });
    module.types(&types_of(&kernel, &["my_open", "my_stop"], &[]));
    let found = analyze(&module.bytes(), &kernel).unwrap().findings;
    let found: Vec<_> = found
        .iter()
        .map(|finding| (finding.function.as_str(), finding.kind))
        .collect();
    assert_eq!(found, [("my_stop", FindingKind::WaitsForDevice)]);
}

#[test]
fn entries_with_findings_come_first() {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    maps(&mut module);
    module.function("a_sound_one", |_, a| end(a));
    module.function("endless", endless);
    let names = ["a_sound_one", "endless"];
    for name in names {
        module.table(&format!("table_{name}"), 96, &[(0, name)]);
    }
    module.types(&types_of(&kernel, &names, &[]));
    let report = analyze(&module.bytes(), &kernel).unwrap();
    assert_eq!(report.entries[0].function, "endless");
    assert!(
        report
            .isolate
            .unwrap()
            .contains("--entry endless --entry a_sound_one")
    );
}

/// All of it in one module.
pub(super) fn everything(module: &mut Module) {
    maps(module);
    let bodies: [(&str, Body); 4] = [
        ("endless", endless),
        ("index", index),
        ("length", length),
        ("ignoring", ignoring),
    ];
    for (name, body) in bodies {
        module.function(name, body);
    }
    module.table("table", 64, &[]);
}
