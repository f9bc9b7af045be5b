//! Licences of the crates that are linked into what is packaged, as they say themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::steps::{capture, cargo};
use crate::workspace::Workspace;

/// What files are called that hold licences and notices, at their beginning.
const NAMES: &[&str] = &[
    "license",
    "licence",
    "copying",
    "copyright",
    "notice",
    "unlicense",
];

/// Longest file that is taken over, in bytes.
const MAX_BYTES: u64 = 256 << 10;

/// What `cargo metadata` says, as far as it is of interest.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// `None` of a member of the workspace.
    source: Option<String>,
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Target {
    kind: Vec<String>,
}

impl Package {
    /// It runs in the compiler only.
    fn is_macro(&self) -> bool {
        let mut kinds = self.targets.iter().flat_map(|target| &target.kind);
        kinds.any(|kind| kind == "proc-macro")
    }
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Debug, Deserialize)]
struct DependencyKind {
    /// `dev` or `build`; `None` of one that is linked.
    kind: Option<String>,
}

/// All licences of what `programs`, packages of the workspace, are linked with, as one text.
pub fn text(workspace: &Workspace, programs: &[&str]) -> anyhow::Result<String> {
    let words = [
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ];
    let metadata = capture(cargo().args(words).current_dir(workspace.root()))?;
    let metadata = serde_json::from_str(&metadata).context("cargo metadata cannot be read")?;
    let linked = linked(&metadata, programs)?;
    let mut files = Vec::new();
    for package in &linked {
        let folder = package.manifest_path.parent().unwrap_or(Path::new("/"));
        files.push(files_of(folder).with_context(|| folder.display().to_string())?);
    }
    Ok(written(&linked, &files))
}

/// The packages from elsewhere that are linked into `programs`, by name and version.
fn linked<'a>(metadata: &'a Metadata, programs: &[&str]) -> anyhow::Result<Vec<&'a Package>> {
    let packages: BTreeMap<&str, &Package> = metadata
        .packages
        .iter()
        .map(|package| (package.id.as_str(), package))
        .collect();
    let nodes: BTreeMap<&str, &Node> = metadata
        .resolve
        .nodes
        .iter()
        .map(|node| (node.id.as_str(), node))
        .collect();
    let mut left = Vec::new();
    for program in programs {
        let found = metadata
            .packages
            .iter()
            .find(|package| package.name == *program && package.source.is_none());
        let Some(package) = found else {
            bail!("there is no package {program} in the workspace");
        };
        left.push(package.id.as_str());
    }
    let mut seen = BTreeSet::new();
    let mut linked = Vec::new();
    while let Some(id) = left.pop() {
        let Some(package) = packages.get(id).filter(|_| seen.insert(id)) else {
            continue;
        };
        if package.is_macro() {
            continue;
        }
        if package.source.is_some() {
            linked.push(*package);
        }
        let dependencies = nodes.get(id).into_iter().flat_map(|node| &node.deps);
        let dependencies = dependencies.filter(|dependency| {
            let mut kinds = dependency.dep_kinds.iter();
            kinds.any(|kind| kind.kind.is_none())
        });
        left.extend(dependencies.map(|dependency| dependency.pkg.as_str()));
    }
    linked.sort_by_key(|package| (&package.name, &package.version));
    Ok(linked)
}

/// Licences and notices in a folder, by name.
fn files_of(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut found = BTreeMap::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_lowercase();
        let is_one = NAMES.iter().any(|wanted| name.starts_with(wanted));
        let metadata = entry.metadata()?;
        if is_one && metadata.is_file() && metadata.len() <= MAX_BYTES {
            let text = std::fs::read(entry.path())?;
            found.insert(name, String::from_utf8_lossy(&text).trim().to_owned());
        }
    }
    Ok(found.into_values().collect())
}

/// One text of a table and each file once, with who has it.
fn written(linked: &[&Package], files: &[Vec<String>]) -> String {
    let mut text = String::from(
        "Cofferdam is linked with these crates, each under its own licence. Their licences and notices follow.\n\n",
    );
    let named = |package: &Package| format!("{} {}", package.name, package.version);
    for package in linked {
        let license = package
            .license
            .as_deref()
            .unwrap_or("see its licence below");
        let _ = writeln!(text, "{}: {license}", named(package));
    }
    let mut of: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut order = Vec::new();
    for (package, files) in linked.iter().zip(files) {
        for file in files {
            let all = of.entry(file).or_default();
            if all.is_empty() {
                order.push(file.as_str());
            }
            all.push(named(package));
        }
    }
    for file in order {
        let who = of.get(file).map(|all| all.join(", ")).unwrap_or_default();
        let _ = write!(text, "\n{}\n{who}\n\n{file}\n", "-".repeat(78));
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn metadata() -> Metadata {
        let package = |name: &str, source: bool, kind: &str| {
            serde_json::json!({
                "id": name, "name": name, "version": "1.0.0", "license": "MIT",
                "source": source.then_some("registry"), "manifest_path": format!("/{name}/Cargo.toml"),
                "targets": [{"kind": [kind]}],
            })
        };
        let dependency = |name: &str, kind: Option<&str>| serde_json::json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        serde_json::from_value(serde_json::json!({
            "packages": [
                package("program", false, "bin"), package("ours", false, "lib"),
                package("linked", true, "lib"), package("deep", true, "lib"),
                package("macros", true, "proc-macro"), package("quote", true, "lib"),
                package("tests", true, "lib"), package("cc", true, "lib"), package("other", true, "lib"),
            ],
            "resolve": {"nodes": [
                {"id": "program", "deps": [dependency("ours", None), dependency("tests", Some("dev"))]},
                {"id": "ours", "deps": [dependency("linked", None), dependency("macros", None), dependency("cc", Some("build"))]},
                {"id": "linked", "deps": [dependency("deep", None)]},
                {"id": "deep", "deps": [dependency("linked", None)]},
                {"id": "macros", "deps": [dependency("quote", None)]},
            ]},
        }))
        .unwrap()
    }

    #[test]
    fn what_is_linked_is_named_and_what_only_builds_or_tests_is_not() {
        let metadata = metadata();
        let linked = linked(&metadata, &["program"]).unwrap();
        let names: Vec<_> = linked.iter().map(|package| &package.name).collect();
        assert_eq!(names, ["deep", "linked"]);
        assert!(super::linked(&metadata, &["nobody"]).is_err());
    }

    #[test]
    fn each_licence_is_there_once_with_all_who_have_it() {
        let metadata = metadata();
        let linked = linked(&metadata, &["program"]).unwrap();
        let both = "The licence of both.".to_owned();
        let text = written(
            &linked,
            &[vec![both.clone()], vec![both, "A notice.".into()]],
        );
        assert!(text.contains("deep 1.0.0: MIT\nlinked 1.0.0: MIT\n"));
        assert_eq!(text.matches("The licence of both.").count(), 1);
        assert!(text.contains("deep 1.0.0, linked 1.0.0\n\nThe licence of both."));
        assert!(text.contains("linked 1.0.0\n\nA notice."));
    }

    #[test]
    fn licences_are_told_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "LICENSE-MIT",
            "Copying",
            "NOTICE.txt",
            "README.md",
            "lib.rs",
        ] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::fs::create_dir(folder.path().join("licenses")).unwrap();
        let files = files_of(folder.path()).unwrap();
        assert_eq!(files, ["Copying", "LICENSE-MIT", "NOTICE.txt"]);
    }
}
