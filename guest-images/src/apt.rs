//! Packages by name, with the system's own `apt-get`; kept in a directory, so that it is asked
//! once.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use crate::Error;
use crate::kernels::KernelSource;

/// Where packages come from.
pub struct Packages<'a> {
    /// Package files that are there already, and where new ones go.
    directory: PathBuf,
    progress: &'a dyn Fn(&str),
    apt_get: PathBuf,
    apt_cache: PathBuf,
    /// Options of apt: which lists it knows, if not the system's.
    options: Vec<String>,
    /// Held as long as this is: one at a time changes the directory.
    lock: Arc<File>,
}

/// A kernel's packages.
#[derive(Debug)]
pub struct KernelPackages {
    /// Its release, such as `6.12.117+deb12-amd64`.
    pub release: String,
    /// The package with the image's name first; where that is empty, those that it is split into
    /// come after it.
    pub files: Vec<PathBuf>,
}

impl<'a> Packages<'a> {
    /// Packages kept in `directory`, which is made; waits until no other process changes it.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(directory: &Path, progress: &'a dyn Fn(&str)) -> Result<Self, Error> {
        std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
        let path = directory.join("lock");
        let lock = File::create(&path).map_err(Error::io(&path))?;
        if lock.try_lock().is_err() {
            progress("waiting for another build of images to end");
            lock.lock().map_err(Error::io(&path))?;
        }
        Ok(Self {
            directory: directory.into(),
            progress,
            apt_get: "apt-get".into(),
            apt_cache: "apt-cache".into(),
            options: vec![],
            lock: Arc::new(lock),
        })
    }

    /// The same directory, with the lists of another suite of Debian's archive: what is there and
    /// not here yet comes out of that one. The archive is the one that the system's own lists are
    /// from.
    ///
    /// # Errors
    /// [`Error::Fetch`] when apt knows no archive of Debian's, or a file cannot be written.
    fn of_suite(&self, suite: &str) -> Result<Self, Error> {
        let archive = self.archive()?.ok_or_else(|| Error::Fetch {
            name: format!("of {suite}"),
            reason: "apt knows no archive of Debian's: is there one in sources.list?".into(),
        })?;
        let home = self.directory.join("suites").join(suite);
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = home.join(part);
            std::fs::create_dir_all(&path).map_err(Error::io(&path))?;
        }
        let sources = home.join("sources.list");
        std::fs::write(&sources, format!("deb {archive} {suite} main\n"))
            .map_err(Error::io(&sources))?;
        let places = [
            ("Dir::Etc::SourceList", sources),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            ("Dir::State::Lists", home.join("lists")),
            ("Dir::Cache", home.join("cache")),
        ];
        let options = places.iter().flat_map(|(name, path)| {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            ["-o".to_string(), format!("{name}={}", absolute.display())]
        });
        let sandbox = ["-o".to_string(), "APT::Sandbox::User=root".to_string()];
        Ok(Self {
            directory: self.directory.clone(),
            progress: self.progress,
            apt_get: self.apt_get.clone(),
            apt_cache: self.apt_cache.clone(),
            options: options.chain(sandbox).collect(),
            lock: self.lock.clone(),
        })
    }

    /// Where Debian's archive is, by the system's own lists.
    fn archive(&self) -> Result<Option<String>, Error> {
        for attempt in 0..2 {
            let output = run(Command::new(&self.apt_get).args([
                "indextargets",
                "--format",
                "$(REPO_URI)",
                "Created-By: Packages",
                "Label: Debian",
            ]))?;
            let text = String::from_utf8_lossy(&output.stdout);
            if let Some(line) = text.lines().find(|line| line.contains("://")) {
                return Ok(Some(line.trim().to_string()));
            }
            if attempt == 0 {
                self.update()?;
            }
        }
        Ok(None)
    }

    /// Asks the archive for its current list, and forgets the package files that are here, but for
    /// those of other kernels than this one.
    ///
    /// # Errors
    /// When `apt-get update` fails (then everything stays) or a file cannot be removed.
    pub fn refresh(&self, kernel: &KernelSource) -> Result<(), Error> {
        match kernel.suite {
            Some(suite) => self.of_suite(suite)?.update()?,
            None => self.update()?,
        }
        for file in self.files()? {
            let others = file_package(&file)
                .and_then(|name| name.strip_prefix("linux-"))
                .and_then(|name| name.split_once('-'))
                .is_some_and(|(_, release)| !kernel.has_release(release));
            if !others {
                std::fs::remove_file(&file).map_err(Error::io(&file))?;
            }
        }
        Ok(())
    }

    /// The packages of a kernel: those of a release, if one is named, or else the newest.
    ///
    /// # Errors
    /// [`Error::Fetch`] when there is none or it cannot be downloaded.
    pub fn kernel(
        &self,
        kernel: &KernelSource,
        release: Option<&str>,
    ) -> Result<KernelPackages, Error> {
        match release {
            Some(release) => self.kernel_release(kernel, release),
            None => self.newest(kernel),
        }
    }

    /// The packages of one release of a kernel.
    fn kernel_release(
        &self,
        kernel: &KernelSource,
        release: &str,
    ) -> Result<KernelPackages, Error> {
        let name = format!("linux-image-{release}");
        if let Some(packages) = self.here(&name)? {
            return Ok(packages);
        }
        match kernel.suite {
            Some(suite) => self.of_suite(suite)?.with_parts(&name),
            None => self.with_parts(&name),
        }
    }

    /// The newest packages of a kernel.
    fn newest(&self, kernel: &KernelSource) -> Result<KernelPackages, Error> {
        let here = self
            .files()?
            .into_iter()
            .filter_map(|f| Some(file_package(&f)?.to_string()));
        if let Some(name) = kernel.newest(here)
            && let Some(packages) = self.here(&name)?
        {
            return Ok(packages);
        }
        match kernel.suite {
            Some(suite) => self.of_suite(suite)?.kernel_of_lists(kernel),
            None => self.kernel_of_lists(kernel),
        }
    }

    /// The newest packages of a kernel that apt knows.
    fn kernel_of_lists(&self, kernel: &KernelSource) -> Result<KernelPackages, Error> {
        let name = self.newest_kernel(kernel)?;
        match self.with_parts(&name) {
            Ok(packages) => Ok(packages),
            // The list was old and has been renewed: the archive may have another kernel by now.
            Err(error) => match self.newest_kernel(kernel)? {
                newer if newer != name => self.with_parts(&newer),
                _ => Err(error),
            },
        }
    }

    /// The kernel package `name` and its parts, if all of them are here.
    fn here(&self, name: &str) -> Result<Option<KernelPackages>, Error> {
        let Some(file) = self.find(name)? else {
            return Ok(None);
        };
        let parts = parts(name, &file)?;
        let found: Vec<Option<PathBuf>> = parts
            .iter()
            .map(|part| self.find(part))
            .collect::<Result<_, _>>()?;
        let found: Option<Vec<PathBuf>> = [Some(file)].into_iter().chain(found).collect();
        Ok(found.map(|files| KernelPackages {
            release: release(name),
            files,
        }))
    }

    /// The kernel package `name` and its parts; downloads those that are not here.
    fn with_parts(&self, name: &str) -> Result<KernelPackages, Error> {
        let mut files = self.fetch(&[name])?;
        let parts = parts(name, &files[0])?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        files.extend(self.fetch(&parts)?);
        Ok(KernelPackages {
            release: release(name),
            files,
        })
    }

    /// Name of the newest package of a kernel that apt knows.
    ///
    /// # Errors
    /// [`Error::Fetch`] when there is none.
    fn newest_kernel(&self, kernel: &KernelSource) -> Result<String, Error> {
        let prefix = kernel.package_prefix();
        for attempt in 0..2 {
            let output = run(Command::new(&self.apt_cache)
                .args(&self.options)
                .args(["pkgnames", &prefix]))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if let Some(name) = kernel.newest(text.lines().map(str::to_string)) {
                return Ok(name);
            }
            if attempt == 0 {
                self.update()?;
            }
        }
        Err(Error::Fetch {
            name: format!("{prefix}*-{}", kernel.flavour),
            reason: "apt knows none, even after apt-get update: is this Debian 12 with its main and security archives in sources.list?"
                .into(),
        })
    }

    /// The files of these packages, in the same order; downloads those that are not here.
    ///
    /// # Errors
    /// [`Error::Fetch`] when apt has no such package or cannot download it.
    pub fn fetch(&self, names: &[&str]) -> Result<Vec<PathBuf>, Error> {
        let missing: Vec<&str> = names
            .iter()
            .copied()
            .filter(|n| matches!(self.find(n), Ok(None)))
            .collect();
        if !missing.is_empty() {
            self.download(&missing)?;
        }
        names
            .iter()
            .map(|name| {
                self.find(name)?.ok_or_else(|| Error::Fetch {
                    name: name.to_string(),
                    reason: "apt-get download said it worked but left no file".into(),
                })
            })
            .collect()
    }

    fn download(&self, names: &[&str]) -> Result<(), Error> {
        if let Err(first) = self.try_download(names) {
            // On a fresh machine the lists are missing; on an old one they name files that are
            // gone.
            self.update()?;
            self.try_download(names).map_err(|second| match second {
                Error::Fetch { .. } => second,
                _ => first,
            })?;
        }
        Ok(())
    }

    fn try_download(&self, names: &[&str]) -> Result<(), Error> {
        (self.progress)(&format!("fetching {}", names.join(", ")));
        let partial = self.directory.join("partial");
        let _absent = std::fs::remove_dir_all(&partial);
        std::fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
        let mut command = Command::new(&self.apt_get);
        // apt's own user could not write here.
        command
            .args(&self.options)
            .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
            .args(names)
            .current_dir(&partial);
        let output = run(&mut command)?;
        if !output.status.success() {
            return Err(Error::Fetch {
                name: names.join(", "),
                reason: last_words(&output),
            });
        }
        for entry in std::fs::read_dir(&partial).map_err(Error::io(&partial))? {
            let from = entry.map_err(Error::io(&partial))?.path();
            if let Some(name) = from.file_name() {
                let to = self.directory.join(name);
                std::fs::rename(&from, &to).map_err(Error::io(&to))?;
            }
        }
        std::fs::remove_dir_all(&partial).map_err(Error::io(&partial))
    }

    fn update(&self) -> Result<(), Error> {
        (self.progress)("asking for the archive's package lists (apt-get update)");
        let mut command = Command::new(&self.apt_get);
        command.args(&self.options).args(["-q", "update"]);
        let output = run(&mut command)?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Command {
            command: "apt-get update".into(),
            reason: format!("{} (it needs root and the network)", last_words(&output)),
        })
    }

    fn find(&self, package: &str) -> Result<Option<PathBuf>, Error> {
        Ok(self
            .files()?
            .into_iter()
            .find(|f| file_package(f) == Some(package)))
    }

    fn files(&self) -> Result<Vec<PathBuf>, Error> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.directory).map_err(Error::io(&self.directory))? {
            let path = entry.map_err(Error::io(&self.directory))?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }
}

/// The release of the kernel in a package.
fn release(package: &str) -> String {
    package.trim_start_matches("linux-image-").to_string()
}

/// The packages of the same release that a kernel's depends on: its parts, where it is empty
/// itself.
fn parts(package: &str, file: &Path) -> Result<Vec<String>, Error> {
    let end = format!("-{}", release(package));
    let mut parts = crate::deb::control(file)?.depends;
    parts.retain(|part| part.starts_with("linux-") && part.ends_with(&end));
    Ok(parts)
}

/// `NAME` of a file `NAME_VERSION_ARCHITECTURE.deb`.
fn file_package(path: &Path) -> Option<&str> {
    Some(path.file_name()?.to_str()?.split_once('_')?.0)
}

fn run(command: &mut Command) -> Result<Output, Error> {
    command
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|error| Error::Command {
            command: command.get_program().to_string_lossy().into_owned(),
            reason: format!("{error}: the images are built on Debian, with its apt-get"),
        })
}

fn last_words(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text
        .lines()
        .rev()
        .find(|l| l.starts_with("E:"))
        .or_else(|| text.lines().next_back());
    line.map_or_else(
        || output.status.to_string(),
        |l| l.trim_start_matches("E: ").to_string(),
    )
}

#[cfg(test)]
#[path = "apt_tests.rs"]
mod tests;
