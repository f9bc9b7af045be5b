//! The model against Debian's kernel and modules, as the guest images hold them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use isolation::guest::btf::Btf;
use isolation::guest::symbols::image::names_in_image;
use isolation::guest::symbols::{Line, SymbolTableBuilder};
use object::{Object, ObjectSymbol};
use recovery::model::Model;

/// The modules whose every import has an entry.
const MODULES: [&str; 6] = ["e1000", "8139too", "r8169", "dummy", "null_blk", "psmouse"];
/// The kernels that there is a model of: where their images are in the folder of all.
const KERNELS: [&str; 2] = ["", "6.12-amd64"];

/// A kernel's images and the model of its series.
struct Kernel {
    images: PathBuf,
    model: Model,
}

impl Kernel {
    fn all() -> Vec<Self> {
        let folder = std::env::var_os("COFFERDAM_KERNELS").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/images"),
            PathBuf::from,
        );
        KERNELS
            .map(|name| Self::of(folder.join(name)))
            .into_iter()
            .collect()
    }

    fn of(images: PathBuf) -> Self {
        let manifest = std::fs::read(images.join("manifest.json")).unwrap_or_else(|error| {
            panic!("{}: {error}: cargo xtask images --kernel", images.display())
        });
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let release = manifest["kernel_release"].as_str().unwrap();
        let model = Model::for_release(release)
            .unwrap_or_else(|| panic!("there is no model for {release}"))
            .unwrap();
        Self { images, model }
    }

    /// Symbols that the modules do not have themselves.
    fn imports(&self) -> BTreeSet<String> {
        MODULES
            .iter()
            .flat_map(|module| self.imports_of(module))
            .collect()
    }

    fn imports_of(&self, module: &str) -> BTreeSet<String> {
        let path = self.images.join("modules").join(format!("{module}.ko"));
        symbols(&path, |symbol| symbol.is_undefined())
    }

    /// Symbols that any module has, for others.
    fn exports(&self) -> BTreeSet<String> {
        let modules = std::fs::read_dir(self.images.join("modules")).unwrap();
        let paths = modules.map(|module| module.unwrap().path());
        let global = |symbol: &object::Symbol<'_, '_>| symbol.is_definition() && symbol.is_global();
        paths.flat_map(|path| symbols(&path, global)).collect()
    }

    /// Symbols that any module of the images does not have itself.
    fn undefined(&self) -> BTreeSet<String> {
        let modules = std::fs::read_dir(self.images.join("modules")).unwrap();
        let paths = modules.map(|module| module.unwrap().path());
        paths
            .flat_map(|path| symbols(&path, |symbol| symbol.is_undefined()))
            .collect()
    }

    fn types(&self) -> Btf {
        let kernel = std::fs::read(self.images.join("vmlinux")).unwrap();
        Btf::from_elf(&kernel, None).unwrap()
    }
}

/// Those of the symbols of a module that are `wanted`.
fn symbols(path: &Path, wanted: impl Fn(&object::Symbol<'_, '_>) -> bool) -> BTreeSet<String> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = object::File::parse(&*bytes).unwrap();
    let names = file.symbols().filter(|symbol| wanted(symbol));
    let names = names.map(|symbol| symbol.name().unwrap().to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn every_import_of_the_drivers_has_an_entry_and_no_entry_is_for_nothing() {
    let kernels = Kernel::all();
    // A model has entries for what is imported in the kernel that it is based on, and is in its own
    // too.
    let anywhere: BTreeSet<String> = kernels.iter().flat_map(Kernel::imports).collect();
    for kernel in &kernels {
        let (model, series) = (&kernel.model, kernel.model.kernel());
        let (all, types, exports) = (kernel.imports(), kernel.types(), kernel.exports());
        let by_others = kernel.undefined();
        assert!(all.len() > 300, "{} imports", all.len());
        let missing: Vec<_> = all
            .iter()
            .filter(|name| model.get(name).is_none())
            .collect();
        assert!(
            missing.is_empty(),
            "{series}, without an entry: {missing:?}"
        );
        let is_used = |name: &str| {
            all.contains(name)
                || by_others.contains(name)
                || anywhere.contains(name)
                    && (types.find_function(name).is_some() || exports.contains(name))
        };
        // Locks and waits are for any module: they are ended whatever else of a call is known.
        let opposites: BTreeSet<&str> = model
            .lasting()
            .filter(|(_, effect)| effect.pair.is_some())
            .filter_map(|(_, effect)| Some(effect.undo.as_ref()?.function.as_str()))
            .collect();
        let unused: Vec<_> = model
            .lasting()
            .filter(|(name, effect)| effect.pair.is_none() && !opposites.contains(name))
            .map(|(name, _)| name)
            .filter(|name| !is_used(name))
            .collect();
        assert!(unused.is_empty(), "{series}: nobody imports {unused:?}");
    }
}

#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn every_opposite_is_a_function_of_the_kernel() {
    for kernel in Kernel::all() {
        let (all, types) = (kernel.imports(), kernel.types());
        for (name, effect) in kernel.model.lasting() {
            // Locks and waits that no driver here imports are the kernel's as well.
            let is_there = effect.pair.is_none() || types.find_function(name).is_some();
            assert!(is_there, "{}: there is no {name}", kernel.model.kernel());
            if let Some(undo) = &effect.undo {
                let opposite = undo.function.as_str();
                // Functions of other modules (PHYs) have their types there; the drivers import
                // them.
                assert!(
                    types.find_function(opposite).is_some() || all.contains(opposite),
                    "{}, {name}: there is no {opposite}",
                    kernel.model.kernel()
                );
            }
        }
    }
}

/// Each thing that a function keeps is found in each kernel, with what it has to be.
#[test]
#[ignore = "needs target/images (cargo xtask images)"]
fn what_functions_keep_is_known_of_each_kernel() {
    for kernel in Kernel::all() {
        let image = std::fs::read(kernel.images.join("vmlinux")).unwrap();
        let types = Btf::from_elf(&image, None).unwrap();
        let mut symbols = SymbolTableBuilder::default();
        for (address, name) in (0xffff_ffff_8100_0000..)
            .step_by(16)
            .zip(names_in_image(&image).unwrap())
        {
            let line = Line {
                address,
                kind: 'T',
                name: &name,
                module: None,
            };
            symbols.add(&line).unwrap();
        }
        let effects = kernel
            .model
            .for_isolation()
            .resolve(&symbols.finish(), &types);
        let in_the_model = kernel
            .model
            .lasting()
            .map(|(_, effect)| effect.keeps.len())
            .sum::<usize>();
        assert!(in_the_model >= 4);
        let found = effects.keeps.values().map(Vec::len).sum::<usize>();
        assert_eq!(found, in_the_model, "{}", kernel.model.kernel());
    }
}
