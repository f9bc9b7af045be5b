//! The module's file that is to be tried, and what it says of itself.
//!
//! It may be anything: it is bounded, and what is wrong with it is said before a guest is booted
//! for it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use guest_images::BuiltImage;
use guest_images::modules::{normal_name, read_module};
use isolation::analysis::image::Ko;
use recovery::module_file::ModuleFile;

/// Most modules that one needs directly; Debian's need 23 at most.
const MAX_DEPENDS: usize = 256;

/// A module's file.
#[derive(Debug)]
pub struct Candidate {
    /// Where it is.
    pub path: PathBuf,
    /// The ELF file, unpacked.
    pub content: Vec<u8>,
    /// Name, kernel and build.
    pub file: ModuleFile,
    /// Names of the modules that have to be loaded before it, as the kernel has them.
    pub depends: Vec<String>,
}

impl Candidate {
    /// Reads a module's file; it may be packed (`.ko.xz`, `.ko.zst`).
    ///
    /// # Errors
    /// A line that says what is wrong with it, and what to do.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let data = path
            .metadata()
            .with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(
            data.is_file(),
            "{} is no file: give a module's, NAME.ko",
            path.display()
        );
        let content = read_module(path)?;
        Self::parse(path, content).with_context(|| format!("cannot use {}", path.display()))
    }

    fn parse(path: &Path, content: Vec<u8>) -> anyhow::Result<Self> {
        let file = ModuleFile::parse(&content)?;
        let ko = Ko::parse(&content)?;
        let mut depends: Vec<String> = Vec::new();
        for name in ko.info_values("depends").flat_map(|names| names.split(',')) {
            if name.is_empty() {
                continue;
            }
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
            ensure!(
                name.len() < 56 && name.bytes().all(plain),
                "it is no kernel module: it depends on something that is no module's name"
            );
            ensure!(
                depends.len() < MAX_DEPENDS,
                "it depends on more modules than any does"
            );
            let name = normal_name(name);
            if !depends.contains(&name) {
                depends.push(name);
            }
        }
        ensure!(
            file.vermagic.split_whitespace().next().is_some(),
            "it is no kernel module: it does not say which kernel it was built for"
        );
        Ok(Self {
            path: path.to_owned(),
            content,
            file,
            depends,
        })
    }

    /// The release of the kernel that it was built for.
    pub fn release(&self) -> &str {
        let mut words = self.file.vermagic.split_whitespace();
        words.next().unwrap_or_default()
    }

    /// Whether the kernel of `image` takes it, as far as that can be told from the image's own
    /// modules.
    ///
    /// # Errors
    /// It was built for a kernel with other properties, or an own module of the image cannot be
    /// read.
    pub fn fits(&self, image: &BuiltImage) -> anyhow::Result<()> {
        let Some(name) = image.modules().next() else {
            return Ok(());
        };
        let own = image.directory.join("modules").join(format!("{name}.ko"));
        let own_file = ModuleFile::parse(&read_module(&own)?)
            .with_context(|| format!("cannot use {}", own.display()))?;
        if own_file.vermagic.trim() != self.file.vermagic.trim() {
            bail!(
                "{} was built for `{}`, and the kernel of the image {} is `{}`: build it with that kernel's own headers \
                 (package linux-headers-{})",
                self.path.display(),
                self.file.vermagic.trim(),
                image.name,
                own_file.vermagic.trim(),
                image.release()
            );
        }
        Ok(())
    }
}

/// `modules.dep` with the module `name` in it, at `path`, before any other of its name: what it
/// depends on is loaded with it.
///
/// # Errors
/// The names of those that are not there.
pub fn with_module(list: &str, path: &str, depends: &[String]) -> Result<String, Vec<String>> {
    let mut order: Vec<&str> = Vec::new();
    let mut missing = Vec::new();
    for name in depends {
        let Some((file, needs)) = list.lines().find_map(|line| {
            let (file, needs) = line.split_once(':')?;
            let stem = file.rsplit('/').next()?.strip_suffix(".ko")?;
            (normal_name(stem) == *name).then_some((file, needs))
        }) else {
            missing.push(name.clone());
            continue;
        };
        // In the file the last to be loaded comes first.
        for one in needs.split_whitespace().rev().chain([file]) {
            if !order.contains(&one) {
                order.push(one);
            }
        }
    }
    if !missing.is_empty() {
        return Err(missing);
    }
    let needs: String = order.iter().rev().map(|file| format!(" {file}")).collect();
    Ok(format!("{path}:{needs}\n{list}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_is_loaded_before_it_and_once() {
        let list = "kernel/a/left.ko: kernel/b/base.ko\nkernel/a/right-one.ko: kernel/b/more.ko kernel/b/base.ko\n\
                    kernel/b/base.ko:\nkernel/b/more.ko: kernel/b/base.ko\n";
        let names = |words: &[&str]| -> Vec<String> {
            words.iter().map(|word| (*word).to_owned()).collect()
        };
        let whole = with_module(list, "updates/mine.ko", &names(&["left", "right_one"])).unwrap();
        assert_eq!(
            whole.lines().next(),
            Some(
                "updates/mine.ko: kernel/a/right-one.ko kernel/b/more.ko kernel/a/left.ko kernel/b/base.ko"
            )
        );
        assert!(whole.ends_with(list));
        let alone = with_module(list, "updates/mine.ko", &[]).unwrap();
        assert!(alone.starts_with("updates/mine.ko:\n"), "{alone}");
        let missing = with_module(list, "x.ko", &names(&["left", "gone", "lost"])).unwrap_err();
        assert_eq!(missing, ["gone", "lost"]);
    }

    #[test]
    fn what_is_no_module_is_refused_in_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let says = |path: &Path| format!("{:#}", Candidate::read(path).unwrap_err());
        let file = folder.path().join("mine.ko");
        assert!(says(&file).contains("cannot read"), "{}", says(&file));
        assert!(says(folder.path()).contains("is no file"));
        assert!(says(Path::new("/dev/zero")).contains("is no file"));
        for content in [&b""[..], b"#!/bin/sh\n", b"\x7fELF", &[0x7f; 4096]] {
            std::fs::write(&file, content).unwrap();
            let said = says(&file);
            assert!(said.contains("no kernel module"), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
        let packed = folder.path().join("mine.ko.xz");
        std::fs::write(&packed, "no xz").unwrap();
        assert!(says(&packed).contains("mine.ko.xz"));
    }
}
