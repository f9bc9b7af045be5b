//! Programs out of packages, with the libraries they need.
//!
//! Which libraries: `DT_NEEDED` of every program and library, followed to the end. Which package
//! has one: among the dependencies of the packages at hand, the one named like the library first
//! (`libmnl.so.0` is in `libmnl0`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::apt::Packages;
use crate::spec::Program;
use crate::{Error, deb, elf};

/// Where the loader looks without being told, and where libraries are put.
pub const LIBRARY_DIRECTORY: &str = "/lib/x86_64-linux-gnu";

/// Where Debian's packages have their libraries.
const PACKAGE_DIRECTORIES: [&str; 2] = [LIBRARY_DIRECTORY, "/usr/lib/x86_64-linux-gnu"];

/// What of a whole package is for people only, and would make images larger.
const DOCUMENTATION: [&str; 7] = [
    "/usr/share/doc/",
    "/usr/share/doc-base/",
    "/usr/share/man/",
    "/usr/share/info/",
    "/usr/share/locale/",
    "/usr/share/lintian/",
    "/usr/share/bug/",
];

/// A file to go into an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramFile {
    /// Path in the image.
    pub path: String,
    /// What is there.
    pub content: Content,
    /// Whether it can be run.
    pub runs: bool,
}

/// What a path in an image holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file.
    File(Vec<u8>),
    /// A symbolic link, and where it leads.
    Link(String),
}

/// Files of packages, unpacked on demand.
pub struct Userland<'a> {
    packages: &'a Packages<'a>,
    /// All packages are unpacked into one tree, as on a system.
    root: PathBuf,
    unpacked: BTreeSet<String>,
    /// Dependencies of the unpacked packages that are not unpacked themselves.
    candidates: BTreeSet<String>,
    /// What was used, for the manifest: package files.
    pub used: Vec<PathBuf>,
}

impl<'a> Userland<'a> {
    /// Nothing yet; works in the empty directory `root`.
    pub fn new(packages: &'a Packages<'a>, root: &Path) -> Self {
        Self {
            packages,
            root: root.into(),
            unpacked: BTreeSet::new(),
            candidates: BTreeSet::new(),
            used: vec![],
        }
    }

    /// The programs, their libraries and the loader.
    ///
    /// # Errors
    /// When a package, a program or a library cannot be had.
    pub fn programs(&mut self, programs: &[Program]) -> Result<Vec<ProgramFile>, Error> {
        let names: BTreeSet<&str> = programs.iter().map(|p| p.package.as_str()).collect();
        self.unpack(&names.into_iter().collect::<Vec<_>>())?;
        let mut todo = Vec::new();
        for program in programs {
            let content = self
                .read(&program.path)?
                .ok_or_else(|| Error::NoFile(program.path.clone()))?;
            todo.push((program.path.clone(), content));
        }
        let files = self.with_libraries(todo)?.into_iter();
        Ok(files.map(|(path, content)| runs(path, content)).collect())
    }

    /// All files of whole packages but their documentation, and the libraries and loaders that
    /// programs among them need.
    ///
    /// # Errors
    /// When a package or a library cannot be had.
    pub fn packages(&mut self, names: &[String]) -> Result<Vec<ProgramFile>, Error> {
        let mut files = BTreeMap::new();
        let mut programs = Vec::new();
        for name in names {
            self.unpack(&[name])?;
            for file in self.packages.fetch(&[name])? {
                let wanted =
                    |path: &str| !DOCUMENTATION.iter().any(|under| path.starts_with(under));
                for path in deb::unpack(&file, &self.root, &wanted, &mut |_, _| ())? {
                    let path = path.to_string_lossy().into_owned();
                    let file = self.file_of_package(&path)?;
                    if let Content::File(content) = &file.content
                        && content.starts_with(b"\x7fELF")
                    {
                        programs.push((path.clone(), content.clone()));
                    }
                    files.insert(path, file);
                }
            }
        }
        for (path, content) in self.with_libraries(programs)? {
            files
                .entry(path.clone())
                .or_insert_with(|| runs(path, content));
        }
        Ok(files.into_values().collect())
    }

    /// A file or link that was unpacked, as it is to be in the image.
    fn file_of_package(&self, path: &str) -> Result<ProgramFile, Error> {
        use std::os::unix::fs::PermissionsExt;
        let outside = self.root.join(path.trim_start_matches('/'));
        let data = std::fs::symlink_metadata(&outside).map_err(Error::io(&outside))?;
        let content = match data.is_symlink() {
            true => {
                let target = std::fs::read_link(&outside).map_err(Error::io(&outside))?;
                Content::Link(target.to_string_lossy().into_owned())
            }
            false => Content::File(std::fs::read(&outside).map_err(Error::io(&outside))?),
        };
        Ok(ProgramFile {
            path: path.to_owned(),
            content,
            runs: data.permissions().mode() & 0o111 != 0,
        })
    }

    /// These programs and libraries, and the libraries and loaders that they need.
    fn with_libraries(
        &mut self,
        mut todo: Vec<(String, Vec<u8>)>,
    ) -> Result<BTreeMap<String, Vec<u8>>, Error> {
        let mut files = BTreeMap::new();
        while let Some((path, content)) = todo.pop() {
            let needs = elf::needs(&content).map_err(|reason| Error::BadElf {
                path: PathBuf::from(&path),
                reason,
            })?;
            files.insert(path.clone(), content);
            // The loader is there as a program's interpreter, and counts as loaded.
            for library in needs
                .libraries
                .iter()
                .filter(|l| !l.starts_with("ld-linux"))
            {
                let to = format!("{LIBRARY_DIRECTORY}/{library}");
                if !files.contains_key(&to) && !todo.iter().any(|(p, _)| *p == to) {
                    todo.push((to, self.library(library, &path)?));
                }
            }
            if let Some(loader) = needs.interpreter
                && !files.contains_key(&loader)
                && let Some(name) = Path::new(&loader).file_name().and_then(|n| n.to_str())
            {
                let content = self.library(name, &path)?;
                files.insert(loader, content);
            }
        }
        Ok(files)
    }

    fn library(&mut self, library: &str, by: &str) -> Result<Vec<u8>, Error> {
        loop {
            for directory in PACKAGE_DIRECTORIES {
                if let Some(content) = self.read(&format!("{directory}/{library}"))? {
                    return Ok(content);
                }
            }
            let Some(next) = best_candidate(&self.candidates, library) else {
                return Err(Error::NoLibrary {
                    library: library.into(),
                    by: by.into(),
                });
            };
            self.unpack(&[&next])?;
        }
    }

    fn unpack(&mut self, names: &[&str]) -> Result<(), Error> {
        for file in self.packages.fetch(names)? {
            let wanted = |path: &str| {
                PACKAGE_DIRECTORIES.iter().any(|d| path.starts_with(d))
                    || path.split('/').any(|part| part == "bin" || part == "sbin")
            };
            deb::unpack(&file, &self.root, &wanted, &mut |_, _| ())?;
            self.candidates.extend(deb::control(&file)?.depends);
            self.used.push(file);
        }
        self.unpacked.extend(names.iter().map(|n| n.to_string()));
        self.candidates.retain(|c| !self.unpacked.contains(c));
        Ok(())
    }

    /// A file of the tree; links are followed inside the tree.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        let mut inside = PathBuf::from(path);
        for _ in 0..40 {
            let outside = self.root.join(inside.strip_prefix("/").unwrap_or(&inside));
            match std::fs::symlink_metadata(&outside) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io(&outside)(error)),
                Ok(data) if data.is_symlink() => {
                    let target = std::fs::read_link(&outside).map_err(Error::io(&outside))?;
                    inside = join_inside(&inside, &target);
                }
                Ok(_) => {
                    return std::fs::read(&outside)
                        .map(Some)
                        .map_err(Error::io(&outside));
                }
            }
        }
        Ok(None)
    }
}

/// A program or library at `path`.
fn runs(path: String, content: Vec<u8>) -> ProgramFile {
    ProgramFile {
        path,
        content: Content::File(content),
        runs: true,
    }
}

/// Where a link at `link` leads, with `..` taken out so that it stays inside.
fn join_inside(link: &Path, target: &Path) -> PathBuf {
    let mut result = PathBuf::from("/");
    let whole = link.parent().unwrap_or(Path::new("/")).join(target);
    for component in whole.components() {
        match component {
            std::path::Component::ParentDir => {
                result.pop();
            }
            std::path::Component::Normal(name) => result.push(name),
            _ => {}
        }
    }
    result
}

/// The package that most likely has the library.
fn best_candidate(candidates: &BTreeSet<String>, library: &str) -> Option<String> {
    let plain = |text: &str| {
        text.chars()
            .filter(char::is_ascii_alphanumeric)
            .collect::<String>()
    };
    let (stem, version) = library.split_once(".so").unwrap_or((library, ""));
    let wanted = plain(&format!("{stem}{version}"));
    let (stem, letters) = (plain(stem), stem.trim_start_matches("lib"));
    let rank = |name: &str| {
        let name = plain(name);
        if name == wanted {
            0
        } else if name
            .strip_prefix(&stem)
            .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphabetic()))
        {
            1
        } else if name.starts_with("libc6") {
            // The loader, the mathematical library, and others of the C library's own.
            2
        } else if name.contains(letters) {
            3
        } else if name.starts_with("lib") || name.starts_with("zlib") {
            4
        } else {
            5
        }
    };
    candidates
        .iter()
        .filter(|c| rank(c) < 5)
        .min_by_key(|c| rank(c))
        .cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_named_like_the_library_comes_first() {
        let candidates: BTreeSet<String> = [
            "libc6", "libmnl0", "libelf1", "zlib1g", "libdb5.3", "debconf", "libbpf1", "libcap2",
        ]
        .map(str::to_string)
        .into();
        for (library, package) in [
            ("libmnl.so.0", "libmnl0"),
            ("libdb-5.3.so", "libdb5.3"),
            ("libc.so.6", "libc6"),
            ("libm.so.6", "libc6"),
            ("ld-linux-x86-64.so.2", "libc6"),
            ("libcap.so.2", "libcap2"),
        ] {
            assert_eq!(
                best_candidate(&candidates, library).as_deref(),
                Some(package),
                "{library}"
            );
        }
        assert_eq!(
            best_candidate(&["debconf".to_string()].into(), "libx.so.1"),
            None
        );
    }

    #[test]
    fn links_cannot_leave_the_tree() {
        let at = |link: &str, target: &str| join_inside(Path::new(link), Path::new(target));
        assert_eq!(
            at("/bin/ip", "../../../etc/passwd"),
            Path::new("/etc/passwd")
        );
        assert_eq!(at("/lib/a.so", "a.so.1"), Path::new("/lib/a.so.1"));
        assert_eq!(at("/lib/a.so", "/usr/lib/b"), Path::new("/usr/lib/b"));
    }
}
