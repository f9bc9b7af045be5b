//! Hand-made modules with and without what the analysis is to see.

use std::collections::HashMap;
use std::sync::Arc;

use iced_x86::code_asm::*;

use super::entries::Isolation;
use super::image::Ko;
use super::kernel::{Class, Kernel, Modelled, Sleeps};
use super::reached::Atomic;
use super::testing::Module;
use super::{Report, analyze};
use crate::guest::btf::Btf;
use crate::guest::btf::encode::Encoder;

/// A kernel with `struct net_device`, `struct net_device_ops`, `struct pci_driver` with its
/// `dev_pm_ops`, and a few functions.
pub(super) fn kernel() -> Kernel {
    let types = Arc::new(Btf::parse(&kernel_types(), None).unwrap());
    let known = |class, sleeps| Modelled { class, sleeps };
    let model = [
        ("pure", known(Class::Pure, false)),
        ("wait", known(Class::Revocable, true)),
        ("gone", known(Class::Irrevocable, false)),
        ("__kmalloc", known(Class::Memory, true)),
    ];
    let model = model.map(|(name, known)| (name.to_owned(), known));
    let sleeps = HashMap::from([
        ("never".to_owned(), Sleeps::No),
        ("sometimes".to_owned(), Sleeps::May),
    ]);
    Kernel::from_parts(types, HashMap::from(model), sleeps)
}

/// Its types.
fn kernel_types() -> Vec<u8> {
    let mut e = Encoder::new(None);
    let int = e.int("int", 4, 1);
    let word = e.int("long unsigned int", 8, 0);
    let device = e.structure("device", 64, &[("driver_data", word, 8)]);
    let device = e.pointer(device);
    let byte = e.int("unsigned char", 1, 0);
    let bytes = e.pointer(byte);
    let net = e.structure("net_device", 256, &[("base", bytes, 0)]);
    let net = e.pointer(net);
    let of_net = e.raw("", 13 << 24 | 1, int.0, &[0, net.0]);
    let of_net = e.pointer(of_net);
    let of_device = e.raw("", 13 << 24 | 1, int.0, &[0, device.0]);
    let of_device = e.pointer(of_device);
    e.structure(
        "net_device_ops",
        96,
        &[
            ("ndo_open", of_net, 0),
            ("ndo_stop", of_net, 8),
            ("ndo_poll", of_net, 80),
        ],
    );
    let pm = e.structure(
        "dev_pm_ops",
        184,
        &[("suspend", of_device, 16), ("resume", of_device, 24)],
    );
    let pm = e.pointer(pm);
    let driver = e.structure("device_driver", 144, &[("name", word, 0), ("pm", pm, 120)]);
    e.structure(
        "pci_driver",
        200,
        &[
            ("probe", of_device, 8),
            ("remove", of_device, 16),
            ("driver", driver, 48),
        ],
    );
    // As large as `net_device_ops`, for functions of another type.
    e.structure(
        "other_ops",
        96,
        &[("call", of_device, 0), ("end", of_device, 8)],
    );
    e.bytes()
}

/// Types of a module with functions of these names, of the operations' type.
pub(super) fn types_of(kernel: &Kernel, of_net: &[&str], of_device: &[&str]) -> Vec<u8> {
    let base = &kernel.types;
    let mut e = Encoder::new(Some(base));
    let find = |name: &str| base.ids().find(|id| base.name(*id) == name).unwrap();
    let int = find("int");
    for (names, structure) in [(of_net, "net_device"), (of_device, "device")] {
        let pointer = e.pointer(find(structure));
        for name in names {
            e.function(name, int, &[("p", pointer)]);
        }
    }
    e.bytes()
}

pub(super) fn end(a: &mut CodeAssembler) {
    a.ret().unwrap();
}

/// Calls these in turn and returns.
fn calling(module: &mut Module, name: &str, names: &[&str]) {
    module.function(name, |module, a| {
        for name in names {
            let symbol = module.symbol(name);
            a.call(symbol).unwrap();
        }
        end(a);
    });
}

fn report(module: &Module, kernel: &Kernel) -> Report {
    analyze(&module.bytes(), kernel).unwrap()
}

fn atomic(report: &Report, function: &str) -> Atomic {
    report
        .entries
        .iter()
        .find(|entry| entry.function == function)
        .unwrap()
        .atomic
        .clone()
}

#[test]
fn operations_are_known_by_size_and_by_the_types_of_their_functions() {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    for name in ["my_open", "my_stop", "my_call"] {
        calling(&mut module, name, &["pure"]);
    }
    module.table(
        "my_table",
        96,
        &[(0, "my_open"), (8, "my_stop"), (80, "my_open")],
    );
    module.table("others", 96, &[(0, "my_call")]);
    // Fits nothing: a function where no structure has a pointer.
    module.table("strange", 96, &[(24, "my_stop")]);
    module.types(&types_of(&kernel, &["my_open", "my_stop"], &["my_call"]));
    let report = report(&module, &kernel);
    assert_eq!(report.name, "hand_made");
    let from = |function: &str| -> Vec<String> {
        let entry = report
            .entries
            .iter()
            .find(|entry| entry.function == function)
            .unwrap();
        entry
            .from
            .iter()
            .map(|from| format!("{} {}", from.as_what, from.place))
            .collect()
    };
    assert_eq!(
        from("my_open"),
        [
            "net_device_ops.ndo_open my_table",
            "net_device_ops.ndo_poll my_table"
        ]
    );
    assert_eq!(
        from("my_stop"),
        [
            "net_device_ops.ndo_stop my_table",
            "unknown structure strange"
        ]
    );
    assert_eq!(from("my_call"), ["other_ops.call others"]);
    assert_eq!(report.suspends_and_resumes(), None);
}

#[test]
fn suspend_and_resume_are_found_where_the_driver_points() {
    let kernel = kernel();
    for (pointers, both) in [
        (&[(16, "my_suspend"), (24, "my_resume")][..], true),
        (&[(16, "my_suspend")][..], false),
    ] {
        let mut module = Module::new("hand_made");
        for name in ["my_probe", "my_suspend", "my_resume"] {
            calling(&mut module, name, &[]);
        }
        module.table("my_pm", 184, pointers);
        module.table("my_pci_driver", 200, &[(8, "my_probe"), (168, "my_pm")]);
        module.types(&types_of(
            &kernel,
            &[],
            &["my_probe", "my_suspend", "my_resume"],
        ));
        let report = report(&module, &kernel);
        assert_eq!(report.suspends_and_resumes(), Some(both));
        let driver = &report.drivers[0];
        assert_eq!(
            driver.suspend.as_deref(),
            Some("my_suspend (dev_pm_ops.suspend)")
        );
        assert_eq!(driver.resume.is_some(), both);
    }
}

#[test]
fn an_entry_is_atomic_if_nothing_on_its_way_waits() {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    calling(&mut module, "inner", &["wait"]);
    calling(&mut module, "middle", &["pure", "inner"]);
    calling(&mut module, "waits", &["middle"]);
    calling(&mut module, "stays", &["pure", "never"]);
    calling(&mut module, "may", &["sometimes"]);
    calling(&mut module, "foreign", &["of_another_module"]);
    calling(&mut module, "indirect", &["__x86_indirect_thunk_rax"]);
    calling(&mut module, "says", &["__SCT__might_resched"]);
    let names = ["waits", "stays", "may", "foreign", "indirect", "says"];
    for name in names {
        module.table(&format!("table_{name}"), 96, &[(0, name)]);
    }
    module.types(&types_of(&kernel, &names, &[]));
    let report = report(&module, &kernel);
    let way = ["waits", "middle", "inner"].map(str::to_owned).to_vec();
    assert_eq!(
        atomic(&report, "waits"),
        Atomic::No {
            way,
            calls: "wait".to_owned()
        }
    );
    assert_eq!(atomic(&report, "stays"), Atomic::Yes);
    let unclear = |indirect, may: &[&str], unknown: &[&str]| Atomic::Unclear {
        indirect,
        may: may.iter().map(|name| (*name).to_owned()).collect(),
        unknown: unknown.iter().map(|name| (*name).to_owned()).collect(),
    };
    assert_eq!(atomic(&report, "may"), unclear(0, &["sometimes"], &[]));
    assert_eq!(
        atomic(&report, "foreign"),
        unclear(0, &[], &["of_another_module"])
    );
    assert_eq!(atomic(&report, "indirect"), unclear(1, &[], &[]));
    assert!(matches!(atomic(&report, "says"), Atomic::No { .. }));
}

#[test]
fn an_allocation_waits_only_if_its_flags_let_it() {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    // GFP_KERNEL and GFP_ATOMIC.
    for (name, flags) in [("patient", 0xcc0), ("hasty", 0xa20)] {
        module.function(name, |module, a| {
            let allocate = module.symbol("__kmalloc");
            a.mov(edi, 64).unwrap();
            a.mov(esi, flags).unwrap();
            a.call(allocate).unwrap();
            end(a);
        });
        module.table(&format!("table_{name}"), 96, &[(0, name)]);
    }
    module.types(&types_of(&kernel, &["patient", "hasty"], &[]));
    let report = report(&module, &kernel);
    assert!(matches!(atomic(&report, "patient"), Atomic::No { .. }));
    assert_eq!(atomic(&report, "hasty"), Atomic::Yes);
}

#[test]
fn what_could_be_isolated_is_said_and_proposed() {
    let kernel = kernel();
    let mut module = Module::new("hand_made");
    calling(&mut module, "whole", &["pure"]);
    calling(&mut module, "compensated", &["wait"]);
    calling(&mut module, "lasting", &["wait", "gone"]);
    calling(&mut module, "untyped", &["pure"]);
    let names = ["whole", "compensated", "lasting", "untyped"];
    for name in names {
        module.table(&format!("table_{name}"), 96, &[(0, name)]);
    }
    module.types(&types_of(&kernel, &names[..3], &[]));
    let report = report(&module, &kernel);
    let isolation = |function: &str| {
        let entry = report
            .entries
            .iter()
            .find(|entry| entry.function == function);
        entry.unwrap().isolation.clone()
    };
    assert_eq!(isolation("whole"), Isolation::Whole);
    assert_eq!(isolation("compensated"), Isolation::Compensated);
    assert_eq!(
        isolation("lasting"),
        Isolation::Irrevocable {
            calls: vec!["gone".to_owned()],
            count: 1
        }
    );
    assert!(matches!(isolation("untyped"), Isolation::Refused { .. }));
    let command = report.isolate.unwrap();
    assert!(
        command.starts_with("cofferdam isolate VM hand_made --entry "),
        "{command}"
    );
    assert!(
        command.contains("--entry whole") && command.contains("--entry compensated"),
        "{command}"
    );
    assert!(
        !command.contains("lasting") && !command.contains("untyped"),
        "{command}"
    );
}

/// A module with a bit of everything.
pub(super) fn full(kernel: &Kernel) -> Vec<u8> {
    let mut module = Module::new("hand_made");
    calling(&mut module, "inner", &["wait"]);
    calling(
        &mut module,
        "my_open",
        &["pure", "inner", "__x86_indirect_thunk_rax"],
    );
    super::findings_tests::everything(&mut module);
    module.table("my_table", 96, &[(0, "my_open"), (8, "my_open")]);
    module.table("my_pci_driver", 200, &[(8, "my_open"), (168, "my_table")]);
    module.types(&types_of(kernel, &["my_open"], &["inner"]));
    module.bytes()
}

#[test]
fn whatever_is_cut_off_or_changed_in_a_module_it_is_read_or_refused() {
    let kernel = kernel();
    let whole = full(&kernel);
    assert!(analyze(&whole, &kernel).is_ok());
    for len in 0..whole.len() {
        let _either = analyze(&whole[..len], &kernel);
    }
    let mut read = 0;
    for at in 0..whole.len() {
        for bit in [0, 3, 7] {
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            read += usize::from(analyze(&changed, &kernel).is_ok());
        }
    }
    assert!(
        read > whole.len(),
        "most changes leave a module that is still read"
    );
}

#[test]
fn other_files_are_refused_with_a_reason() {
    let kernel = kernel();
    let refused = |bytes: &[u8]| analyze(bytes, &kernel).unwrap_err().to_string();
    assert!(refused(b"").contains("cannot be read as ELF"));
    assert!(refused(b"\x7fELF").contains("cannot be read as ELF"));
    let mut executable = full(&kernel);
    // `e_type`: ET_EXEC.
    executable[16] = 2;
    assert!(refused(&executable).contains("no kernel module"));
    let empty = Module::new("empty").bytes();
    assert!(refused(&empty).contains("no functions"));
    assert!(Ko::parse(&empty).is_err());
}

/// The fuzz target begins with these files, since it cannot make them.
#[test]
fn the_fuzz_target_begins_with_this_module() {
    let kernel = kernel();
    let folder = std::path::Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../fuzz/seeds/ko_reader"
    ));
    let files = [("module.ko", full(&kernel)), ("kernel.btf", kernel_types())];
    for (name, bytes) in files {
        if std::env::var_os("COFFERDAM_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(folder.join(name), &bytes).unwrap();
        }
        let kept = std::fs::read(folder.join(name)).unwrap();
        assert!(
            kept == bytes,
            "{name}: run this test with COFFERDAM_WRITE_SEEDS=1"
        );
    }
}
