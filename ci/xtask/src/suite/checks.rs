//! What is checked without running anything.

use std::process::Command;

use anyhow::bail;

use crate::steps::{Steps, capture, cargo, run};
use crate::workspace::Workspace;

/// Those that take seconds.
pub fn quick(workspace: &Workspace, steps: &Steps) {
    steps.may("style", || {
        run(&mut at_root(workspace, &["fmt", "--all", "--check"])).map(|()| String::new())
    });
    steps.may("duplicates", || {
        let words = [
            "tree",
            "--workspace",
            "--locked",
            "-e",
            "normal",
            "-d",
            "--depth",
            "0",
            "--prefix",
            "none",
        ];
        duplicates(&mut at_root(workspace, &words))
    });
}

/// The compiler's warnings and clippy's, in all that is built.
pub fn lints(workspace: &Workspace) -> anyhow::Result<String> {
    let words = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ];
    run(&mut at_root(workspace, &words)).map(|()| String::new())
}

fn at_root(workspace: &Workspace, words: &[&str]) -> Command {
    let mut command = cargo();
    command.args(words).current_dir(workspace.root());
    command
}

/// Crates of which two copies do not work together: types of one are not those of the other.
const ONCE: &[&str] = &[
    "kvm-bindings",
    "kvm-ioctls",
    "vm-memory",
    "vmm-sys-util",
    "vfio-bindings",
    "vfio-ioctls",
    "virtio-bindings",
    "virtio-queue",
    "linux-loader",
    "event-manager",
    "vm-superio",
    "vm-allocator",
    "acpi_tables",
    "iommufd-bindings",
    "iommufd-ioctls",
    "seccompiler",
];

fn duplicates(tree: &mut Command) -> anyhow::Result<String> {
    let tree = capture(tree)?;
    let found = duplicates_in(&tree);
    match found.is_empty() {
        true => Ok("no rust-vmm crate twice".into()),
        false => bail!(
            "more than one version of a rust-vmm crate: {}",
            found.join(", ")
        ),
    }
}

fn duplicates_in(tree: &str) -> Vec<&str> {
    let mut found: Vec<&str> = tree
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| {
            line.split_whitespace()
                .next()
                .is_some_and(|name| ONCE.contains(&name))
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rust_vmm_crates_count_as_duplicates() {
        let tree =
            "bitflags v1.3.2\n\nbitflags v2.13.2\n\nvm-memory v0.17.1\n\nvm-memory v0.18.0 (*)\n";
        assert_eq!(
            duplicates_in(tree),
            ["vm-memory v0.17.1", "vm-memory v0.18.0"]
        );
        assert!(duplicates_in("syn v1.0.0\n\nsyn v2.0.0\n").is_empty());
    }
}
