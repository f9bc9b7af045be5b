//! From packages to images.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::Error;
use crate::apt::Packages;
use crate::assemble::assemble;
use crate::manifest::{Artefact, BUILDER, BuildOptions, Manifest, read, to_json};
use crate::spec::ImageSet;
use crate::stage::{Store, hash_file, hash_of, write_whole};
use crate::stages::{kernel_stage, userland_stage};

/// Builds what is not up to date. Safe to interrupt, and to run twice at the same time.
///
/// # Errors
/// See [`Error`].
pub fn build(set: &ImageSet, options: &BuildOptions<'_>) -> Result<Manifest, Error> {
    let mut store = Store::open(&options.out.join(".stages"), options.progress)?;
    let inputs = hash_of(&(BUILDER, set, hash_file(&options.agent)?));
    let manifest_path = options.out.join("manifest.json");
    let old = read_manifest(&manifest_path);
    if !options.refresh
        && let Some(old) = &old
        && old.inputs == inputs
        && old.artefacts.iter().all(|a| untouched(&options.out, a))
    {
        return Ok(old.clone());
    }

    let packages = Packages::open(&options.packages, options.progress)?;
    if options.refresh {
        packages.refresh(set.kernel)?;
    }
    let kernel = kernel_stage(set, &packages, &mut store, options)?;
    let userland = userland_stage(set, &packages, &mut store, options)?;

    // From here on files change: until the new manifest is written there is none.
    match fs::remove_file(&manifest_path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io(&manifest_path)(error));
        }
        _ => {}
    }
    let mut artefacts = Vec::new();
    let place = |path: &str, content: &[u8], artefacts: &mut Vec<Artefact>| -> Result<(), Error> {
        artefacts.push(place(&options.out, path, content)?);
        Ok(())
    };
    for file in ["vmlinux", "vmlinuz", "config"] {
        place(file, &read(&kernel.directory.join(file))?, &mut artefacts)?;
    }
    for module in &kernel.modules {
        place(
            &format!("modules/{}.ko", module.name),
            &kernel.module_content(module)?,
            &mut artefacts,
        )?;
    }
    let mut directories = BTreeSet::new();
    for (image, programs) in set.images.iter().zip(&userland.images) {
        (options.progress)(&format!("writing {}", image.file));
        let mut archive = Vec::new();
        let content = assemble(image, &kernel, &userland, programs, &options.agent)?;
        content
            .write_to(&mut archive)
            .map_err(Error::io(Path::new(&image.file)))?;
        place(&image.file, &archive, &mut artefacts)?;
        // Each directory of images also has the kernel that goes with them.
        if let Some((directory, _)) = image.file.rsplit_once('/')
            && directories.insert(directory)
        {
            place(
                &format!("{directory}/vmlinuz"),
                &read(&kernel.directory.join("vmlinuz"))?,
                &mut artefacts,
            )?;
        }
    }
    remove_stale(&options.out, old.as_ref(), &artefacts)?;

    let mut used = userland.packages;
    used.extend(kernel.packages);
    used.sort_by(|a, b| a.name.cmp(&b.name));
    used.dedup();
    let manifest = Manifest {
        inputs,
        kernel_release: kernel.release,
        packages: used,
        artefacts,
    };
    let text = to_json(&manifest)?;
    write_whole(&manifest_path, |out| out.write_all(&text))?;
    store.sweep()?;
    Ok(manifest)
}

fn read_manifest(path: &Path) -> Option<Manifest> {
    // No manifest, or one that cannot be read: everything is made again.
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn modified_ns(data: &fs::Metadata) -> u128 {
    let since = data
        .modified()
        .ok()
        .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    since.map_or(0, |d| d.as_nanos())
}

fn untouched(out: &Path, artefact: &Artefact) -> bool {
    fs::metadata(out.join(&artefact.path))
        .is_ok_and(|data| data.len() == artefact.size && modified_ns(&data) == artefact.modified_ns)
}

/// Puts a file into place, unless the same bytes are there.
fn place(out: &Path, path: &str, content: &[u8]) -> Result<Artefact, Error> {
    let to = out.join(path);
    if !fs::read(&to).is_ok_and(|there| there == content) {
        write_whole(&to, |file| file.write_all(content))?;
    }
    let data = fs::metadata(&to).map_err(Error::io(&to))?;
    let sha256 = hash_file(&to)?;
    Ok(Artefact {
        path: path.into(),
        size: data.len(),
        sha256,
        modified_ns: modified_ns(&data),
    })
}

fn remove_stale(out: &Path, old: Option<&Manifest>, new: &[Artefact]) -> Result<(), Error> {
    for artefact in old.iter().flat_map(|m| &m.artefacts) {
        let path = out.join(&artefact.path);
        if !new.iter().any(|n| n.path == artefact.path) && path.exists() {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "build_test.rs"]
mod tests;
