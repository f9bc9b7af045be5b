//! Packages by name, with the system's own `apt-get`; kept in a directory, so that it is asked once.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::Error;

/// Where packages come from.
pub struct Packages<'a> {
    /// Package files that are there already, and where new ones go.
    directory: PathBuf,
    progress: &'a dyn Fn(&str),
    apt_get: PathBuf,
    apt_cache: PathBuf,
}

impl<'a> Packages<'a> {
    /// Packages kept in `directory`, which is made.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(directory: &Path, progress: &'a dyn Fn(&str)) -> Result<Self, Error> {
        std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
        Ok(Self {
            directory: directory.into(),
            progress,
            apt_get: "apt-get".into(),
            apt_cache: "apt-cache".into(),
        })
    }

    /// Asks the archive for its current list, and forgets the package files that are here.
    ///
    /// # Errors
    /// When `apt-get update` fails (then everything stays) or a file cannot be removed.
    pub fn refresh(&self) -> Result<(), Error> {
        self.update()?;
        for file in self.files()? {
            std::fs::remove_file(&file).map_err(Error::io(&file))?;
        }
        Ok(())
    }

    /// The newest kernel package of a series such as `6.1.0`, by name and file.
    ///
    /// # Errors
    /// [`Error::Fetch`] when there is none or it cannot be downloaded.
    pub fn kernel(&self, series: &str) -> Result<(String, PathBuf), Error> {
        let name = self.newest_kernel(series)?;
        let (name, mut files) = match self.fetch(&[&name]) {
            Ok(files) => (name, files),
            // The list was old and has been renewed: the archive may have another kernel by now.
            Err(error) => match self.newest_kernel(series)? {
                newer if newer != name => {
                    let files = self.fetch(&[&newer])?;
                    (newer, files)
                }
                _ => return Err(error),
            },
        };
        Ok((name, files.remove(0)))
    }

    /// Name of the newest kernel package of a series such as `6.1.0`: one that is here already, else the
    /// newest that apt knows.
    ///
    /// # Errors
    /// [`Error::Fetch`] when there is none.
    fn newest_kernel(&self, series: &str) -> Result<String, Error> {
        let here = self
            .files()?
            .into_iter()
            .filter_map(|f| Some(file_package(&f)?.to_string()));
        if let Some(name) = newest_kernel(series, here) {
            return Ok(name);
        }
        let prefix = format!("linux-image-{series}-");
        for attempt in 0..2 {
            let output = run(Command::new(&self.apt_cache).args(["pkgnames", &prefix]))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if let Some(name) = newest_kernel(series, text.lines().map(str::to_string)) {
                return Ok(name);
            }
            if attempt == 0 {
                self.update()?;
            }
        }
        Err(Error::Fetch {
            name: format!("{prefix}*-amd64"),
            reason: "apt knows none, even after apt-get update: is this Debian 12 with its main archive in sources.list?"
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
            // On a fresh machine the lists are missing; on an old one they name files that are gone.
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
        command.args(["-q", "update"]);
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

/// `NAME` of a file `NAME_VERSION_ARCHITECTURE.deb`.
fn file_package(path: &Path) -> Option<&str> {
    Some(path.file_name()?.to_str()?.split_once('_')?.0)
}

fn newest_kernel(series: &str, names: impl Iterator<Item = String>) -> Option<String> {
    names
        .filter_map(|name| {
            let number = name
                .strip_prefix("linux-image-")?
                .strip_prefix(series)?
                .strip_prefix('-')?;
            let number: u32 = number.strip_suffix("-amd64")?.parse().ok()?;
            Some((number, name))
        })
        .max()
        .map(|(_, name)| name)
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
mod tests {
    use super::*;

    #[test]
    fn newest_kernel_is_by_number_and_neither_cloud_nor_debug() {
        let names = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-57-cloud-amd64",
            "linux-image-6.1.0-58-amd64-dbg",
            "linux-image-6.1.0-59-amd64-unsigned",
            "linux-image-6.10.0-60-amd64",
        ];
        let newest = newest_kernel("6.1.0", names.iter().map(|n| n.to_string()));
        assert_eq!(newest.as_deref(), Some("linux-image-6.1.0-56-amd64"));
    }

    #[test]
    fn packages_that_are_here_need_no_apt() {
        let directory = tempfile::tempdir().unwrap();
        for file in [
            "linux-image-6.1.0-1-amd64_6.1.2_amd64.deb",
            "libc6_2.36-9_amd64.deb",
        ] {
            std::fs::write(directory.path().join(file), "").unwrap();
        }
        let said = std::cell::RefCell::new(Vec::new());
        let progress = |line: &str| said.borrow_mut().push(line.to_string());
        let packages = Packages::open(directory.path(), &progress).unwrap();
        assert_eq!(
            packages.newest_kernel("6.1.0").unwrap(),
            "linux-image-6.1.0-1-amd64"
        );
        assert_eq!(
            packages.fetch(&["libc6"]).unwrap(),
            [directory.path().join("libc6_2.36-9_amd64.deb")]
        );
        assert_eq!(said.borrow().len(), 0);
    }

    /// Programs in place of apt's: each writes its name and arguments to `log`, then runs `script`.
    fn with_apt<'a>(directory: &Path, script: &str, progress: &'a dyn Fn(&str)) -> Packages<'a> {
        use std::os::unix::fs::PermissionsExt;
        let apt = directory.join("apt");
        let log = directory.join("log");
        std::fs::write(
            &apt,
            format!("#!/bin/sh\necho \"$*\" >>{}\n{script}\n", log.display()),
        )
        .unwrap();
        std::fs::set_permissions(&apt, std::fs::Permissions::from_mode(0o755)).unwrap();
        let packages = Packages::open(&directory.join("packages"), progress).unwrap();
        Packages {
            apt_get: apt.clone(),
            apt_cache: apt,
            ..packages
        }
    }

    fn log(directory: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(directory.join("log")).unwrap();
        text.lines().map(str::to_string).collect()
    }

    #[test]
    fn unknown_package_is_asked_for_again_after_an_update_and_then_named() {
        let directory = tempfile::tempdir().unwrap();
        let script = r#"case "$*" in *download*) echo "E: Unable to locate package nosuch" >&2; exit 100;; esac"#;
        let packages = with_apt(directory.path(), script, &|_| ());
        let failed = packages.fetch(&["nosuch"]).unwrap_err().to_string();
        assert_eq!(
            failed,
            "package nosuch cannot be fetched: Unable to locate package nosuch"
        );
        let download = "-q -o APT::Sandbox::User=root download nosuch";
        assert_eq!(log(directory.path()), [download, "-q update", download]);
    }

    #[test]
    fn downloaded_package_is_kept_and_asked_for_once() {
        let directory = tempfile::tempdir().unwrap();
        let script = r#"case "$*" in *download*) echo deb >libx1_2.0_amd64.deb;; esac"#;
        let packages = with_apt(directory.path(), script, &|_| ());
        for _ in 0..2 {
            let file = packages.fetch(&["libx1"]).unwrap().remove(0);
            assert_eq!(std::fs::read(file).unwrap(), b"deb\n");
        }
        assert_eq!(log(directory.path()).len(), 1);
    }

    #[test]
    fn machine_without_kernels_or_without_apt_is_told_what_it_lacks() {
        let directory = tempfile::tempdir().unwrap();
        let packages = with_apt(directory.path(), "true", &|_| ());
        let failed = packages.newest_kernel("6.1.0").unwrap_err().to_string();
        assert!(failed.contains("is this Debian 12"), "{failed}");
        let packages = Packages {
            apt_cache: "/no/such/program".into(),
            ..packages
        };
        let failed = packages.newest_kernel("6.1.0").unwrap_err().to_string();
        assert!(failed.contains("apt-get"), "{failed}");
    }

    #[test]
    fn failed_update_says_what_it_needs() {
        let directory = tempfile::tempdir().unwrap();
        let packages = with_apt(
            directory.path(),
            "echo 'E: Permission denied' >&2; exit 100",
            &|_| (),
        );
        let failed = packages.fetch(&["x"]).unwrap_err().to_string();
        assert!(
            failed.contains("Permission denied (it needs root and the network)"),
            "{failed}"
        );
    }

    #[test]
    fn kernel_that_left_the_archive_is_replaced_by_its_successor() {
        let directory = tempfile::tempdir().unwrap();
        let updated = directory.path().join("updated");
        let script = format!(
            r#"case "$*" in
            *update*) touch {0} ;;
            pkgnames*) test -e {0} && echo linux-image-6.1.0-2-amd64 || echo linux-image-6.1.0-1-amd64 ;;
            *6.1.0-2-amd64*) echo deb >linux-image-6.1.0-2-amd64_6.1.2_amd64.deb ;;
            *) echo "E: 404  Not Found" >&2; exit 100 ;;
            esac"#,
            updated.display()
        );
        let packages = with_apt(directory.path(), &script, &|_| ());
        let (name, file) = packages.kernel("6.1.0").unwrap();
        assert_eq!(name, "linux-image-6.1.0-2-amd64");
        assert!(file.exists());
    }

    #[test]
    fn failed_refresh_keeps_the_packages() {
        let directory = tempfile::tempdir().unwrap();
        let packages = with_apt(directory.path(), "exit 100", &|_| ());
        let file = directory.path().join("packages/libx1_2.0_amd64.deb");
        std::fs::write(&file, "").unwrap();
        assert!(packages.refresh().is_err());
        assert!(file.exists());
    }
}
