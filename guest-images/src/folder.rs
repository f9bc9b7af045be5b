//! A folder with images that were built: which there are, and which of them fits a module.
//!
//! ```text
//!   FOLDER/NAME/manifest.json, vmlinux, initrd.cpio, modules/...     an image called NAME
//!   FOLDER/manifest.json, ...                                        one in the folder itself, as `cargo xtask images` has it
//! ```
//!
//! A folder without a manifest, or with one that cannot be read, holds no image: it is being built,
//! or is something else.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::kernels::KERNELS;
use crate::modules::normal_name;
use crate::user::INITRD;
use crate::{Error, Manifest};

/// Largest manifest that is read, in bytes; those of all modules of a kernel stay below it.
const MAX_MANIFEST: u64 = 16 << 20;

/// An image that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltImage {
    /// What it is called.
    pub name: String,
    /// Where it is.
    pub directory: PathBuf,
    /// What it was made of.
    pub manifest: Manifest,
}

impl BuiltImage {
    /// The image in `directory`, if there is one with its kernel and its initramfs.
    fn open(name: &str, directory: &Path) -> Option<Self> {
        let mut text = Vec::new();
        let file = File::open(directory.join("manifest.json")).ok()?;
        file.take(MAX_MANIFEST).read_to_end(&mut text).ok()?;
        let image = Self {
            name: name.to_owned(),
            directory: directory.to_owned(),
            manifest: serde_json::from_slice(&text).ok()?,
        };
        (image.kernel().is_file() && image.initrd().is_file()).then_some(image)
    }

    /// Its kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// Its initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.directory.join(INITRD)
    }

    /// Release of its kernel.
    pub fn release(&self) -> &str {
        &self.manifest.kernel_release
    }

    /// Names of the modules that it has.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        let paths = self
            .manifest
            .artefacts
            .iter()
            .map(|made| made.path.as_str());
        paths.filter_map(|path| path.strip_prefix("modules/")?.strip_suffix(".ko"))
    }

    /// Which of these modules it has not.
    pub fn lacks<'a>(&self, modules: &'a [String]) -> Vec<&'a str> {
        let has = |name: &str| self.modules().any(|module| module == normal_name(name));
        let names = modules.iter().map(String::as_str);
        names.filter(|name| !has(name)).collect()
    }

    /// Size of its files, in bytes.
    pub fn size(&self) -> u64 {
        self.manifest.artefacts.iter().map(|made| made.size).sum()
    }
}

/// The images in `folder`, by name. None of a folder that is not there.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be read.
pub fn images_in(folder: &Path) -> Result<Vec<BuiltImage>, Error> {
    let mut images = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(images),
        other => other.map_err(Error::io(folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(Error::io(folder))?;
        if let Some(name) = entry.file_name().to_str()
            && !name.starts_with('.')
        {
            images.extend(BuiltImage::open(name, &entry.path()));
        }
    }
    if let Some(mut own) = BuiltImage::open("", folder) {
        let kernel = KERNELS
            .iter()
            .find(|kernel| kernel.has_release(own.release()));
        own.name = kernel
            .map_or(own.release(), |kernel| kernel.name)
            .to_owned();
        images.push(own);
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(images)
}

/// The first image of a kernel's release that has all of these modules.
///
/// # Errors
/// A line that says what there is, and what to do.
pub fn fitting<'a>(
    images: &'a [BuiltImage],
    release: &str,
    modules: &[String],
) -> Result<&'a BuiltImage, String> {
    let of_release: Vec<&BuiltImage> = images
        .iter()
        .filter(|image| image.release() == release)
        .collect();
    if let Some(image) = of_release
        .iter()
        .find(|image| image.lacks(modules).is_empty())
    {
        return Ok(image);
    }
    if let Some(image) = of_release.first() {
        let lacks = image.lacks(modules);
        let options: String = lacks
            .iter()
            .map(|name| format!(" --module {name}"))
            .collect();
        return Err(format!(
            "it needs {}, which no image of Linux {release} has: make one with `cofferdam image build --kernel {release}{options}`",
            lacks.join(", ")
        ));
    }
    let mut there: Vec<&str> = images.iter().map(BuiltImage::release).collect();
    there.sort_unstable();
    there.dedup();
    let there = match there.as_slice() {
        [] => "no images at all".to_owned(),
        some => format!("images of {}", some.join(", ")),
    };
    let known = KERNELS.iter().any(|kernel| kernel.has_release(release));
    Err(match known {
        true => format!(
            "it was built for Linux {release}, and there are {there}: make one with `cofferdam image build --kernel {release}`"
        ),
        false => format!(
            "it was built for Linux {release}, which is no kernel that images are made of, and there are {there}: build it \
             for one of Debian's (`cofferdam image build --help` names them)"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Artefact;

    fn image(folder: &Path, name: &str, release: &str, modules: &[&str]) {
        let directory = folder.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let artefact = |path: String| Artefact {
            path,
            size: 10,
            sha256: String::new(),
            modified_ns: 0,
        };
        let manifest = Manifest {
            inputs: String::new(),
            kernel_release: release.into(),
            packages: vec![],
            artefacts: modules
                .iter()
                .map(|name| artefact(format!("modules/{name}.ko")))
                .collect(),
        };
        for file in ["vmlinux", INITRD] {
            std::fs::write(directory.join(file), "x").unwrap();
        }
        let text = serde_json::to_vec(&manifest).unwrap();
        std::fs::write(directory.join("manifest.json"), text).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let images = images_in(folder).unwrap().into_iter();
        images.map(|image| image.name).collect()
    }

    #[test]
    fn images_are_found_and_what_is_none_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        assert!(names(&folder.path().join("absent")).is_empty());
        assert!(names(folder.path()).is_empty());
        image(folder.path(), "mine", "6.12.9+deb12-amd64", &["a"]);
        image(folder.path(), "", "6.1.0-7-amd64", &[]);
        std::fs::create_dir(folder.path().join("packages")).unwrap();
        std::fs::write(folder.path().join("file"), "x").unwrap();
        image(folder.path(), "damaged", "6.1.0-7-amd64", &[]);
        std::fs::write(folder.path().join("damaged/manifest.json"), "{").unwrap();
        image(folder.path(), "half", "6.1.0-7-amd64", &[]);
        std::fs::remove_file(folder.path().join("half/vmlinux")).unwrap();
        assert_eq!(names(folder.path()), ["6.1-amd64", "mine"]);
    }

    #[test]
    fn the_image_of_the_modules_kernel_with_what_it_needs_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        image(folder.path(), "a", "6.1.0-7-amd64", &["mii"]);
        image(folder.path(), "b", "6.1.0-7-amd64", &["mii", "snd_pcm"]);
        image(folder.path(), "c", "6.12.9+deb12-amd64", &[]);
        let images = images_in(folder.path()).unwrap();
        let fit = |release: &str, needs: &[&str]| {
            let needs: Vec<String> = needs.iter().map(|name| (*name).to_owned()).collect();
            fitting(&images, release, &needs).map(|image| image.name.clone())
        };
        assert_eq!(fit("6.1.0-7-amd64", &["mii"]).unwrap(), "a");
        assert_eq!(fit("6.1.0-7-amd64", &["snd-pcm"]).unwrap(), "b");
        let lacks = fit("6.1.0-7-amd64", &["libphy"]).unwrap_err();
        assert!(
            lacks.contains("--kernel 6.1.0-7-amd64 --module libphy"),
            "{lacks}"
        );
        let other = fit("6.1.0-8-amd64", &[]).unwrap_err();
        assert!(
            other.contains("images of 6.1.0-7-amd64, 6.12.9+deb12-amd64"),
            "{other}"
        );
        assert!(other.contains("--kernel 6.1.0-8-amd64`"), "{other}");
        let own = fit("6.5.0-custom", &[]).unwrap_err();
        assert!(own.contains("no kernel that images are made of"), "{own}");
        let none = fitting(&[], "6.1.0-8-amd64", &[]).unwrap_err();
        assert!(none.contains("no images at all"), "{none}");
    }
}
