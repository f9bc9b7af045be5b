//! Whether two builds of one commit, in two folders, are the same bytes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;

use super::{Made, make};
use crate::steps::{capture, cargo};
use crate::workspace::Workspace;

/// Folders below `target/reproducible` that it is built in: what depends on the length of a path
/// is to be seen, too.
const FOLDERS: [&str; 2] = ["a", "another/of-another-length"];

/// Bytes of a difference that are told.
const SHOWN: usize = 48;

/// Makes the package of the last commit in two folders and compares. Libraries of others, which are
/// in the same place for both, are built in the first alone, but for the guest agent's; with
/// `from_nothing` in both.
///
/// # Errors
/// They differ, and where; or one could not be made.
pub fn check(workspace: &Workspace, from_nothing: bool) -> anyhow::Result<String> {
    let all = workspace.path("target/reproducible");
    let folders = FOLDERS.map(|name| all.join(name));
    // The second is of the first: there may be another commit meanwhile.
    let mut from = workspace.root();
    for folder in &folders {
        clone(from, folder)?;
        from = folder;
    }
    // Both are built with the same flags, which libraries that were built remember.
    let roots = folders.each_ref().map(PathBuf::as_path);
    let mut made = Vec::new();
    for (number, folder) in folders.iter().enumerate() {
        if number > 0 && !from_nothing {
            take_libraries(&folders[0], folder)?;
        }
        eprintln!("      in {}", folder.display());
        made.push(make(&Workspace::at(folder.clone()), &roots)?);
    }
    let [one, other] = made.as_slice() else {
        bail!("there are not two builds");
    };
    let differences = differences(one, other);
    if !differences.is_empty() {
        bail!(
            "two builds of one commit differ (they are in {}): {}",
            all.display(),
            differences.join("; ")
        );
    }
    std::fs::remove_dir_all(&all).with_context(|| all.display().to_string())?;
    let kib = |bytes: &[u8]| bytes.len() >> 10;
    let of = match from_nothing {
        true => "",
        false => " (libraries of others in the program were built once)",
    };
    Ok(format!(
        "two builds of one commit are the same{of}: program {} KiB, guest agent {} KiB, package {} KiB",
        kib(&one.program),
        kib(&one.agent),
        kib(&one.package)
    ))
}

/// Has `other` begin with what was built in `one`, without what is of this workspace.
fn take_libraries(one: &Path, other: &Path) -> anyhow::Result<()> {
    let mut copy = Command::new("cp");
    copy.args(["--archive", "--reflink=auto"]);
    copy.arg(one.join("target/packaged"));
    let target = other.join("target");
    std::fs::create_dir_all(&target).with_context(|| target.display().to_string())?;
    capture(copy.arg(&target))?;
    let packages = capture(
        cargo()
            .args(["metadata", "--no-deps", "--locked", "--format-version", "1"])
            .current_dir(other),
    )?;
    let packages: Metadata = serde_json::from_str(&packages).context("cargo's metadata")?;
    let mut clean = cargo();
    clean.args(["clean", "--quiet", "--locked", "--profile", "packaged"]);
    for package in &packages.packages {
        clean.args(["--package", &package.name]);
    }
    capture(clean.current_dir(other)).map(drop)
}

/// What cargo says of a workspace, as far as it is needed.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

/// A member of it.
#[derive(Deserialize)]
struct Package {
    name: String,
}

/// A checkout of `root`'s last commit at `folder`, and nothing that was built there before.
fn clone(root: &Path, folder: &Path) -> anyhow::Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut git = Command::new("git");
    git.args(["clone", "--quiet"]).arg(root).arg(folder);
    capture(&mut git).map(drop)
}

fn differences(one: &Made, other: &Made) -> Vec<String> {
    let parts = [
        ("the program", &one.program, &other.program),
        ("the guest agent", &one.agent, &other.agent),
        ("the package", &one.package, &other.package),
    ];
    let different = |(what, a, b): (&str, &Vec<u8>, &Vec<u8>)| {
        difference(a, b).map(|where_| format!("{what} {where_}"))
    };
    parts.into_iter().filter_map(different).collect()
}

/// Where two files differ first, and what is there.
fn difference(a: &[u8], b: &[u8]) -> Option<String> {
    let first = a.iter().zip(b).position(|(x, y)| x != y);
    let first = match first {
        Some(first) => first,
        None if a.len() == b.len() => return None,
        None => a.len().min(b.len()),
    };
    let shown = |bytes: &[u8]| {
        let from = first.saturating_sub(SHOWN / 2).min(bytes.len());
        let to = first.saturating_add(SHOWN / 2).min(bytes.len());
        bytes[from..to].escape_ascii().to_string()
    };
    let lengths = (a.len(), b.len());
    Some(format!(
        "({} and {} bytes) from byte {first} on: {} and {}",
        lengths.0,
        lengths.1,
        shown(a),
        shown(b)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_told_wherever_it_is() {
        assert_eq!(difference(b"same", b"same"), None);
        assert_eq!(difference(b"", b""), None);
        let text = difference(b"/home/a/x", b"/home/b/x").unwrap();
        assert!(
            text.contains("from byte 6 on: /home/a/x and /home/b/x"),
            "{text}"
        );
        let text = difference(b"short", b"shorter").unwrap();
        assert!(text.contains("(5 and 7 bytes) from byte 5"), "{text}");
        assert!(difference(&[0; 4096], &[0; 4095]).is_some());
    }

    #[test]
    fn what_is_built_in_is_the_last_commit_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (root, copy) = (folder.path().join("root"), folder.path().join("deep/copy"));
        let git = |words: &[&str]| {
            let mut git = Command::new("git");
            git.args(["-c", "user.name=x", "-c", "user.email=x@x"]);
            git.arg("-C").arg(&root).args(words);
            capture(&mut git).unwrap();
        };
        std::fs::create_dir(&root).unwrap();
        git(&["init", "--quiet"]);
        std::fs::write(root.join("file"), "committed").unwrap();
        git(&["add", "file"]);
        git(&["commit", "--quiet", "-m", "x"]);
        std::fs::write(root.join("file"), "changed since").unwrap();
        std::fs::create_dir_all(copy.join("target")).unwrap();
        clone(&root, &copy).unwrap();
        assert_eq!(std::fs::read(copy.join("file")).unwrap(), b"committed");
        assert!(!copy.join("target").exists());
    }
}
