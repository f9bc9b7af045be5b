//! The model against Debian's kernel and modules, as the guest images hold them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

use std::collections::BTreeSet;
use std::path::PathBuf;

use isolation::guest::btf::Btf;
use object::{Object, ObjectSymbol};
use recovery::model::Model;

/// The modules whose every import has an entry.
const MODULES: [&str; 5] = ["e1000", "8139too", "r8169", "dummy", "null_blk"];

fn images() -> PathBuf {
    std::env::var_os("COFFERDAM_IMAGES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/images"),
        PathBuf::from,
    )
}

/// Symbols that a module does not have itself.
fn imports(module: &str) -> BTreeSet<String> {
    let path = images().join("modules").join(format!("{module}.ko"));
    let bytes = std::fs::read(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; run `cargo xtask images`", path.display()));
    let file = object::File::parse(&*bytes).unwrap();
    let undefined = file.symbols().filter(|symbol| symbol.is_undefined());
    let names = undefined.map(|symbol| symbol.name().unwrap().to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn every_import_of_the_drivers_has_an_entry_and_no_entry_is_for_nothing() {
    let model = Model::for_release("6.1.0").unwrap().unwrap();
    let all: BTreeSet<String> = MODULES.iter().flat_map(|module| imports(module)).collect();
    assert!(all.len() > 300, "{} imports", all.len());
    let missing: Vec<_> = all
        .iter()
        .filter(|name| model.get(name).is_none())
        .collect();
    assert!(missing.is_empty(), "without an entry: {missing:?}");
    let unused: Vec<_> = model
        .lasting()
        .map(|(name, _)| name)
        .filter(|name| !all.contains(*name))
        .collect();
    assert!(unused.is_empty(), "nobody imports {unused:?}");
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn every_opposite_is_a_function_of_the_kernel() {
    let kernel = std::fs::read(images().join("vmlinux")).expect("run `cargo xtask images`");
    let types = Btf::from_elf(&kernel, None).unwrap();
    // Functions of other modules (PHYs) have their types there; the drivers import them.
    let all: BTreeSet<String> = MODULES.iter().flat_map(|module| imports(module)).collect();
    for (name, effect) in Model::for_release("6.1.0").unwrap().unwrap().lasting() {
        if let Some(undo) = &effect.undo {
            let opposite = undo.function.as_str();
            assert!(
                types.find_function(opposite).is_some() || all.contains(opposite),
                "{name}: there is no {opposite}"
            );
        }
    }
}
