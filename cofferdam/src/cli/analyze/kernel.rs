//! What is known of the kernel that modules are for.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context;
use isolation::analysis::image::Ko;
use isolation::analysis::kernel::{Class, Kernel, Modelled};
use recovery::model::{Effect, Known, Model, Resource};

/// The kernel in `file` (`vmlinux`, or a `bzImage` to be unpacked), with the model for modules such
/// as this one.
pub fn read(file: &Path, module: &[u8]) -> anyhow::Result<Kernel> {
    let image = std::fs::read(file)
        .with_context(|| format!("cannot read the kernel {}", file.display()))?;
    let image = match image.starts_with(b"\x7fELF") {
        true => image,
        false => {
            let unpacked = guest_images::kernel::extract_vmlinux(&image);
            unpacked
                .map_err(|why| anyhow::anyhow!("{}: {why}", file.display()))?
                .elf
        }
    };
    let ko = Ko::parse(module)?;
    let release = ko
        .info_values("vermagic")
        .next()
        .and_then(|magic| magic.split_whitespace().next());
    let model = release.and_then(Model::for_release).transpose()?;
    let known = model.as_ref().map(of_model).unwrap_or_default();
    Kernel::new(&image, known).with_context(|| file.display().to_string())
}

fn of_model(model: &Model) -> HashMap<String, Modelled> {
    let lasting = model
        .lasting()
        .map(|(name, effect)| (name.to_owned(), modelled(Known::Lasting(effect))));
    let others = model
        .others()
        .map(|(name, known)| (name.to_owned(), modelled(known)));
    lasting.chain(others).collect()
}

fn modelled(known: Known<'_>) -> Modelled {
    match known {
        Known::Data => Modelled {
            class: Class::Variable,
            sleeps: false,
        },
        Known::Transient => Modelled {
            class: Class::Pure,
            sleeps: false,
        },
        Known::Lasting(effect) => Modelled {
            class: class_of(effect),
            sleeps: effect.sleeps,
        },
    }
}

fn class_of(effect: &Effect) -> Class {
    if effect.irrevocable {
        return Class::Irrevocable;
    }
    match effect.allocates.or(effect.frees) {
        Some(Resource::Memory | Resource::Page | Resource::Packet) => Class::Memory,
        Some(Resource::Dma | Resource::Interrupt | Resource::Region | Resource::Mapping) => {
            Class::Hardware
        }
        Some(Resource::Device | Resource::Number | Resource::Reference) | None => Class::Revocable,
    }
}
