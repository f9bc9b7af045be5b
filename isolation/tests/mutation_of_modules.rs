//! Changes of single instructions in Debian's modules, as the guest images hold them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use iced_x86::{Decoder, DecoderOptions};
use isolation::analysis::image::{Applied, Ko, Place};
use isolation::mutation::{Function, Kind, mutate, sites};

/// The modules that faults are put into.
const MODULES: [&str; 5] = ["e1000", "8139too", "r8169", "dummy", "null_blk"];
/// Where the images of the kernels are in the folder of all.
const KERNELS: [&str; 2] = ["", "6.12-amd64"];
/// Kinds of which there is a place in each of the drivers of a device.
const EVERYWHERE: [Kind; 22] = [
    Kind::OffByOne,
    Kind::MissingAssignment,
    Kind::MissingCall,
    Kind::CorruptedParameter,
    Kind::FlippedCondition,
    Kind::TextBitFlip,
    Kind::WrongSource,
    Kind::WrongDestination,
    Kind::Pointer,
    Kind::Initialisation,
    Kind::Branch,
    Kind::Nop,
    Kind::StackFlip,
    Kind::UnbalancedLock,
    Kind::ErrorReturn,
    Kind::EndlessLoop,
    Kind::WildJump,
    Kind::DeepRecursion,
    Kind::NullDereference,
    Kind::UndefinedInstruction,
    Kind::DivisionByZero,
    Kind::Halt,
];

/// Where the first section of a module is loaded, and what lies between two of them.
const MODULE: u64 = 0xffff_ffff_c000_0000;
const SECTION: u64 = 1 << 20;
/// Where the functions of the kernel are, and what lies between two of them.
const KERNEL: u64 = 0xffff_ffff_9000_0000;
const SYMBOL: u64 = 16;

/// Where something of the module or of the kernel is.
fn address(place: Place) -> u64 {
    match place {
        Place::Here { section, offset } => MODULE + SECTION * section as u64 + offset,
        Place::Import(symbol) => KERNEL + SYMBOL * symbol as u64,
    }
}

/// The name of the function that begins at an address.
fn callee(ko: &Ko<'_>, va: u64) -> Option<String> {
    let name = if let Some(offset) = va.checked_sub(MODULE) {
        let section = usize::try_from(offset / SECTION).ok()?;
        let function = ko.function_at(section, offset % SECTION)?;
        ko.functions.get(function)?.name
    } else {
        let offset = va.checked_sub(KERNEL)?;
        let symbol = usize::try_from(offset / SYMBOL).ok()?;
        ko.imports.get(symbol).copied()?
    };
    Some(name.to_owned())
}

/// The function's bytes with its calls and branches as the loader leaves them.
fn loaded(ko: &Ko<'_>, function: &isolation::analysis::image::Function<'_>) -> Vec<u8> {
    let mut code = ko.code(function).to_vec();
    for relocation in ko.relocations_in(function.section, function.start, function.len) {
        if relocation.applied != Applied::Relative {
            continue;
        }
        let at = Place::Here {
            section: function.section,
            offset: relocation.at,
        };
        let far = address(relocation.to)
            .wrapping_add_signed(relocation.addend)
            .wrapping_sub(address(at));
        let offset = (relocation.at - function.start) as usize;
        if let Some(field) = code.get_mut(offset..offset + 4) {
            field.copy_from_slice(&(far as u32).to_le_bytes());
        }
    }
    code
}

/// How often each kind fits in a module. Of every instruction and kind a few changes are made, and
/// looked at.
fn fits(file: &Path) -> BTreeMap<Kind, usize> {
    let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let ko = Ko::parse(&bytes).unwrap();
    let mut fits = BTreeMap::new();
    for function in &ko.functions {
        let code = loaded(&ko, function);
        let start = address(Place::Here {
            section: function.section,
            offset: function.start,
        });
        let function = Function {
            name: function.name,
            start,
            code: &code,
            callee: &|va| callee(&ko, va),
        };
        for (number, site) in sites(&function).into_iter().enumerate() {
            for kind in site.kinds {
                *fits.entry(kind).or_default() += 1;
                // A function is decoded for each change: of long ones some instructions do.
                if number % (1 + code.len() / 512) != 0 {
                    continue;
                }
                let change = mutate(&function, kind, site.offset, number as u64).unwrap();
                let at = site.offset as usize;
                assert_eq!(change.old, code[at..at + change.old.len()]);
                assert_eq!(change.new.len(), change.old.len(), "{change:?}");
                assert_ne!(change.new, change.old, "{change:?}");
                let mut decoder = Decoder::with_ip(64, &change.new, 0, DecoderOptions::NONE);
                assert!(decoder.iter().all(|i| !i.is_invalid()), "{change:?}");
            }
        }
    }
    fits
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn faults_fit_the_modules_that_are_isolated() {
    let folder = std::env::var_os("COFFERDAM_KERNELS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/images"),
        PathBuf::from,
    );
    for kernel in KERNELS {
        let modules = folder.join(kernel).join("modules");
        let mut anywhere: BTreeMap<Kind, usize> = BTreeMap::new();
        for module in MODULES {
            let fits = fits(&modules.join(format!("{module}.ko")));
            println!("{kernel} {module}: {fits:?}");
            let device = !matches!(module, "dummy" | "null_blk");
            let missing = EVERYWHERE
                .iter()
                .find(|kind| device && !fits.contains_key(kind));
            assert_eq!(missing, None, "{kernel} {module}: {fits:?}");
            for (kind, times) in fits {
                *anywhere.entry(kind).or_default() += times;
            }
        }
        let rare = [Kind::MissingReference];
        let missing = Kind::ALL
            .iter()
            .find(|kind| !rare.contains(kind) && !anywhere.contains_key(kind));
        assert_eq!(missing, None, "{kernel}: {anywhere:?}");
    }
}
