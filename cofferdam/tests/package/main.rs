//! The Debian package, put into a fresh root by dpkg and taken out again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

#[path = "../common/mod.rs"]
mod common;

mod system;
mod units;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use debian_package::{Completions, Contents, build, file_name};

const DATE: u64 = 1_700_000_000;

fn cofferdam(words: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// What `cargo xtask package` packs, with a script in the program's place: that one takes minutes
/// to build and pack.
fn contents() -> Contents {
    let folder = tempfile::tempdir().unwrap();
    cofferdam(&["man", folder.path().to_str().unwrap()]);
    let mut pages: Vec<(String, Vec<u8>)> = folder
        .path()
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect();
    pages.sort();
    Contents {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        program: b"#!/bin/sh\necho cofferdam\n".to_vec(),
        agent: b"agent".to_vec(),
        pages,
        completions: Completions {
            bash: cofferdam(&["completions", "bash"]),
            zsh: cofferdam(&["completions", "zsh"]),
            fish: cofferdam(&["completions", "fish"]),
        },
        documents: vec![("README.md".to_owned(), b"read".to_vec())],
    }
}

fn is_there(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// A root with an empty database of packages.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["info", "updates", "triggers"] {
            std::fs::create_dir_all(root.path().join("var/lib/dpkg").join(folder)).unwrap();
        }
        for file in ["status", "available"] {
            std::fs::write(root.path().join("var/lib/dpkg").join(file), "").unwrap();
        }
        Self(root)
    }

    fn dpkg(&self, words: &[&str]) -> Output {
        let mut root = std::ffi::OsString::from("--root=");
        root.push(self.0.path());
        Command::new("dpkg")
            .arg(root)
            .args([
                "--force-not-root",
                "--force-depends",
                "--force-script-chrootless",
            ])
            .args(words)
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            // dpkg looks for these by their names.
            .env(
                "PATH",
                "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin",
            )
            .output()
            .unwrap()
    }

    #[track_caller]
    fn does(&self, words: &[&str]) {
        let output = self.dpkg(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    /// Paths with their permission bits, but for dpkg's own database.
    fn tree(&self) -> BTreeMap<PathBuf, u32> {
        let mut tree = BTreeMap::new();
        let mut todo = vec![self.0.path().to_owned()];
        while let Some(folder) = todo.pop() {
            for entry in folder.read_dir().unwrap() {
                let path = entry.unwrap().path();
                let inside = path.strip_prefix(self.0.path()).unwrap().to_owned();
                if inside.starts_with("var/lib/dpkg") {
                    continue;
                }
                let data = path.symlink_metadata().unwrap();
                tree.insert(inside, data.permissions().mode());
                if data.is_dir() {
                    todo.push(path);
                }
            }
        }
        tree
    }
}

/// Whether dpkg is there; says so otherwise.
fn has_dpkg(test: &str) -> bool {
    let there = is_there("dpkg") && is_there("dpkg-deb");
    if !there {
        skipped::skip(&format!("{}::{test}", module_path!()), "there is no dpkg");
    }
    there
}

#[test]
fn the_package_is_put_in_and_taken_out_and_leaves_nothing() {
    if !has_dpkg("the_package_is_put_in_and_taken_out_and_leaves_nothing") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let contents = contents();
    let file = folder.path().join(file_name(&contents.version));
    std::fs::write(&file, build(&contents, DATE).unwrap()).unwrap();
    let file = file.to_str().unwrap();
    let root = Root::new();
    let before = root.tree();

    root.does(&["-i", file]);
    for (path, mode) in [
        ("usr/bin/cofferdam", 0o755),
        ("usr/lib/cofferdam/guest-agent", 0o755),
        ("usr/share/man/man1/cofferdam-try.1.gz", 0o644),
        ("usr/share/bash-completion/completions/cofferdam", 0o644),
        ("lib/systemd/system/cofferdam@.service", 0o644),
        ("etc/cofferdam/guests/example.toml", 0o644),
        ("usr/share/cofferdam/dashboard.json", 0o644),
    ] {
        let data = root
            .path(path)
            .metadata()
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(data.permissions().mode() & 0o7777, mode, "{path}");
    }
    if is_there("systemd-tmpfiles") {
        let data = root.path("run/cofferdam").metadata().unwrap();
        assert_eq!(data.permissions().mode() & 0o7777, 0o700);
    }
    let listed = root.dpkg(&["-s", "cofferdam"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("Status: install ok installed"), "{listed}");
    // Again, as an upgrade would.
    root.does(&["-i", file]);

    // What the administrator changed stays until it is purged.
    let config = root.path("etc/cofferdam/guests/example.toml");
    std::fs::write(&config, "kernel = \"/vmlinux\"\n").unwrap();
    root.does(&["-r", "cofferdam"]);
    assert!(config.is_file() && !root.path("usr/bin/cofferdam").exists());
    root.does(&["-P", "cofferdam"]);
    let mut after = root.tree();
    // Folders that dpkg and systemd-tmpfiles leave, which are not the package's alone.
    let of_the_system = |path: &Path| {
        ["etc", "lib", "usr", "run", "var"]
            .iter()
            .any(|top| path.starts_with(top))
            && root.0.path().join(path).is_dir()
            && !path
                .components()
                .any(|part| part.as_os_str().to_string_lossy().contains("cofferdam"))
    };
    after.retain(|path, _| before.contains_key(path) || !of_the_system(path));
    assert_eq!(after, before);
}

#[test]
fn the_package_is_the_same_each_time_and_dpkg_reads_it() {
    if !has_dpkg("the_package_is_the_same_each_time_and_dpkg_reads_it") {
        return;
    }
    let first = build(&contents(), DATE).unwrap();
    assert!(
        first == build(&contents(), DATE).unwrap(),
        "two builds differ"
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.deb");
    std::fs::write(&file, first).unwrap();
    let ask = |word: &str| {
        let output = Command::new("dpkg-deb")
            .arg(word)
            .arg(&file)
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let said = ask("--info");
    for word in [
        "Architecture: amd64",
        "Depends: libc6",
        "postinst",
        "conffiles",
    ] {
        assert!(said.contains(word), "{said}");
    }
    let listed = ask("--contents");
    for line in listed.lines() {
        assert!(
            line.contains("root/root") && line.contains("2023-11-14 22:13"),
            "{line}"
        );
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let test = format!(
        "{}::systemd_finds_nothing_wrong_with_the_units",
        module_path!()
    );
    if !is_there("systemd-analyze") {
        skipped::skip(&test, "there is no systemd-analyze");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/package/assets");
    let mut units = Vec::new();
    for name in ["cofferdam.service", "cofferdam@.service"] {
        let unit = std::fs::read_to_string(assets.join(name)).unwrap();
        // It looks whether the program is there.
        let unit = unit.replace("/usr/bin/cofferdam", env!("CARGO_BIN_EXE_cofferdam"));
        let path = folder.path().join(name);
        std::fs::write(&path, unit).unwrap();
        units.push(path);
    }
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&units)
        .env("SYSTEMD_COLORS", "0")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("cofferdam"))
        .collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}

#[test]
fn the_example_of_a_guests_file_is_one_when_its_comments_are_taken_away() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/package/assets");
    let example = std::fs::read_to_string(assets.join("example.toml")).unwrap();
    let keys: Vec<&str> = example
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect();
    assert!(keys.len() > 5, "{keys:?}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("example.toml");
    let text = keys
        .join("\n")
        .replace("/boot/", "/absent/")
        .replace("/var/lib/", "/absent/");
    std::fs::write(&file, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .env("COFFERDAM_RUNTIME_DIR", folder.path().join("run"))
        .args(["run", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    // All options are right: the first file that is not there is what it ends with.
    assert!(
        said.contains("/absent/") && !said.contains("line "),
        "{said}"
    );
}
