//! Which modules an image holds, and in what order they can be loaded.
//!
//! A kernel package has no `modules.dep` (it is made at installation), so the graph is read from
//! the modules themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, elf, unzstd};

/// Largest module, unpacked, in bytes. Debian's largest has 8 MiB.
pub const MAX_MODULE: u64 = 128 << 20;

/// A module's name with `_` for `-`, as the kernel uses it.
pub fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

/// Name of the module in a file, or none when it is no module's.
fn file_module(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst"]
        .iter()
        .find_map(|end| name.strip_suffix(end))?;
    Some(normal_name(stem))
}

/// A module of a kernel package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Path under `/lib/modules/RELEASE`, without a packing's suffix.
    pub path: String,
    /// Everything that has to be loaded before it, in order.
    pub needs: Vec<String>,
}

/// All modules of an unpacked kernel package.
pub struct ModuleTree {
    directory: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// The modules under `directory` (`lib/modules/RELEASE` of an unpacked package).
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        let mut todo = vec![directory.to_path_buf()];
        while let Some(current) = todo.pop() {
            for entry in std::fs::read_dir(&current).map_err(Error::io(&current))? {
                let entry = entry.map_err(Error::io(&current))?;
                let path = entry.path();
                if entry.file_type().map_err(Error::io(&path))?.is_dir() {
                    todo.push(path);
                } else if let Some(name) = file_module(&path) {
                    files.insert(name, path);
                }
            }
        }
        // Without the list nothing is known to be built in, and a name that is not found is an
        // error.
        let list = std::fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        let builtin = list
            .lines()
            .filter_map(|l| file_module(Path::new(l)))
            .collect();
        Ok(Self {
            directory: directory.into(),
            files,
            builtin,
        })
    }

    /// The modules that have files, by name.
    pub fn files(&self) -> impl Iterator<Item = (&str, &Path)> {
        let files = self.files.iter();
        files.map(|(name, path)| (name.as_str(), path.as_path()))
    }

    /// Whether there is a module of this name, in a file or built in.
    pub fn has(&self, name: &str) -> bool {
        let name = normal_name(name);
        self.files.contains_key(&name) || self.builtin.contains(&name)
    }

    /// These modules and all they need, each after what it needs, with their files. What is built
    /// into the kernel is left out.
    ///
    /// # Errors
    /// [`Error::NoModule`] for a name that the kernel does not have.
    pub fn closure<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<(Module, Vec<u8>)>, Error> {
        let mut order = Vec::new();
        let mut seen = BTreeMap::new();
        for name in names {
            self.visit(&normal_name(name), true, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    /// Puts the module after what it needs, and returns what has to be loaded for it, itself last.
    fn visit(
        &self,
        name: &str,
        must: bool,
        seen: &mut BTreeMap<String, Vec<String>>,
        order: &mut Vec<(Module, Vec<u8>)>,
    ) -> Result<Vec<String>, Error> {
        if let Some(chain) = seen.get(name) {
            return Ok(chain.clone());
        }
        if self.builtin.contains(name) {
            return Ok(vec![]);
        }
        let Some(file) = self.files.get(name) else {
            return if must {
                Err(Error::NoModule(name.into()))
            } else {
                Ok(vec![])
            };
        };
        // Ends a circle of soft dependencies; hard ones have none.
        seen.insert(name.into(), vec![]);
        let content = read_module(file)?;
        let info = elf::modinfo(&content).map_err(|reason| Error::BadElf {
            path: file.clone(),
            reason,
        })?;
        let mut needs: Vec<String> = Vec::new();
        let soft = info.soft_pre.iter().map(|n| (n, false));
        for (needed, must) in soft.chain(info.depends.iter().map(|n| (n, true))) {
            for one in self.visit(&normal_name(needed), must, seen, order)? {
                if !needs.contains(&one) {
                    needs.push(one);
                }
            }
        }
        let path = file
            .strip_prefix(&self.directory)
            .unwrap_or(file)
            .to_string_lossy();
        let path = path
            .trim_end_matches(".xz")
            .trim_end_matches(".zst")
            .to_string();
        let chain: Vec<String> = needs.iter().cloned().chain([name.to_string()]).collect();
        order.push((
            Module {
                name: name.into(),
                path,
                needs,
            },
            content,
        ));
        seen.insert(name.into(), chain.clone());
        Ok(chain)
    }
}

/// The ELF file of a module, unpacked if its file is (`.xz`, `.zst`).
///
/// # Errors
/// When the file cannot be read or unpacked, or holds more than [`MAX_MODULE`] bytes.
pub fn read_module(file: &Path) -> Result<Vec<u8>, Error> {
    let packed = std::fs::File::open(file).map_err(Error::io(file))?;
    match file.extension().and_then(|e| e.to_str()) {
        Some("xz") => read_bounded(liblzma::read::XzDecoder::new(packed)),
        Some("zst") => read_bounded(unzstd::Decoder::new(BufReader::new(packed))),
        _ => read_bounded(packed),
    }
    .map_err(Error::io(file))
}

fn read_bounded(from: impl Read) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    from.take(MAX_MODULE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_MODULE {
        let why = format!("it holds more than {MAX_MODULE} bytes, which no module has");
        return Err(std::io::Error::other(why));
    }
    Ok(content)
}

/// `modules.dep` as `depmod` writes it: after the colon comes what the module needs, the last to be
/// loaded first.
pub fn modules_dep(modules: &[Module]) -> String {
    let paths: BTreeMap<&str, &str> = modules
        .iter()
        .map(|m| (m.name.as_str(), m.path.as_str()))
        .collect();
    let mut text = String::new();
    for module in modules {
        text.push_str(&module.path);
        text.push(':');
        for needed in module.needs.iter().rev() {
            if let Some(path) = paths.get(needed.as_str()) {
                text.push(' ');
                text.push_str(path);
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{module_file, zst};

    fn tree() -> (tempfile::TempDir, ModuleTree) {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, info: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mut content = module_file(info.as_bytes());
            if path.extension().unwrap() == "zst" {
                content = zst(content.as_slice());
            }
            std::fs::write(path, content).unwrap();
        };
        write("kernel/a/top-one.ko", "depends=left,right\0");
        write("kernel/a/left.ko", "depends=base\0");
        write(
            "kernel/b/right.ko.zst",
            "depends=base,core\0softdep=pre: wish gone loop_b\0",
        );
        write("kernel/b/base.ko", "depends=\0");
        write("kernel/b/wish.ko", "depends=\0");
        write("kernel/c/loop_b.ko", "softdep=pre: right\0depends=\0");
        write("kernel/c/broken.ko", "depends=nowhere\0");
        std::fs::write(root.path().join("modules.builtin"), "kernel/core/core.ko\n").unwrap();
        let tree = ModuleTree::open(root.path()).unwrap();
        (root, tree)
    }

    #[test]
    fn every_module_comes_after_what_it_needs() {
        let (_root, tree) = tree();
        let modules = tree.closure(["top-one", "core", "left"]).unwrap();
        let names: Vec<&str> = modules.iter().map(|(m, _)| m.name.as_str()).collect();
        assert_eq!(
            names,
            ["base", "left", "wish", "loop_b", "right", "top_one"]
        );
        let (top, _) = modules.last().unwrap();
        assert_eq!(top.needs, ["base", "left", "wish", "loop_b", "right"]);
        assert_eq!(top.path, "kernel/a/top-one.ko");
        let (right, content) = modules.iter().find(|(m, _)| m.name == "right").unwrap();
        assert_eq!(right.path, "kernel/b/right.ko");
        assert!(content.starts_with(b"\x7fELF"));
    }

    #[test]
    fn modules_dep_lists_needs_in_reverse() {
        let (_root, tree) = tree();
        let modules = tree.closure(["left", "wish"]).unwrap();
        let text = modules_dep(&modules.into_iter().map(|(m, _)| m).collect::<Vec<_>>());
        assert_eq!(
            text,
            "kernel/b/base.ko:\nkernel/a/left.ko: kernel/b/base.ko\nkernel/b/wish.ko:\n"
        );
    }

    #[test]
    fn a_module_that_unpacks_to_more_than_any_has_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("bomb.ko.zst");
        let packed = zst(std::io::repeat(0).take(MAX_MODULE + 1));
        assert!(packed.len() < 1 << 20);
        std::fs::write(&file, packed).unwrap();
        let error = read_module(&file).unwrap_err().to_string();
        assert!(error.contains("bomb.ko.zst"), "{error}");
        let whole = root.path().join("whole.ko.zst");
        std::fs::write(&whole, zst(&b"content"[..])).unwrap();
        assert_eq!(read_module(&whole).unwrap(), b"content");
    }

    #[test]
    fn missing_modules_are_named() {
        let (_root, tree) = tree();
        assert!(tree.has("top_one") && tree.has("core") && !tree.has("absent"));
        for (asked, missing) in [("absent", "absent"), ("broken", "nowhere")] {
            let Err(Error::NoModule(name)) = tree.closure([asked]) else {
                panic!("{asked} was found")
            };
            assert_eq!(name, missing);
        }
    }
}
