//! `cargo xtask package`: the Debian package, of the program in a profile of its own.
//!
//! The same commit is meant to give the same package where the same compiler builds it: paths of this machine
//! are mapped to others, and the date of all is the commit's, or `SOURCE_DATE_EPOCH`.

mod reproducible;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use debian_package::{Completions, Contents, build, file_name};
use guest_images::agent::build_agent;

use crate::bench::commit;
use crate::licences;
use crate::steps::{Progress, capture, cargo, run as run_command};
use crate::workspace::Workspace;

/// Makes the Debian package, in target/deb
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Make it of the last commit in two folders, in place of target/deb, and compare every byte
    #[arg(long)]
    check_reproducible: bool,
    /// With it: build all libraries of others in both folders, too; it takes several times as long
    #[arg(long, requires = "check_reproducible")]
    from_nothing: bool,
}

/// Builds the package and says where it is, or whether it comes out the same twice.
pub fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<String> {
    if args.check_reproducible {
        return reproducible::check(workspace, args.from_nothing);
    }
    let made = make(workspace, &[workspace.root()])?;
    let folder = workspace.path("target/deb");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(&made.name);
    std::fs::write(&path, &made.package).with_context(|| path.display().to_string())?;
    let shown = path.strip_prefix(workspace.root()).unwrap_or(&path);
    let kib = made.package.len() >> 10;
    Ok(format!("{}, {kib} KiB", shown.display()))
}

/// A package that was made, with what is built for it.
struct Made {
    /// The name of its file.
    name: String,
    package: Vec<u8>,
    program: Vec<u8>,
    agent: Vec<u8>,
}

/// Builds the package of `workspace`, with the paths of all `roots` taken out of it.
fn make(workspace: &Workspace, roots: &[&Path]) -> anyhow::Result<Made> {
    let date = date(workspace)?;
    let flags = without_paths(roots)?;
    let program = build_program(workspace, &flags)?;
    let progress = Progress::new("guest agent");
    let agent = build_agent(
        workspace.root(),
        &workspace.path("target/packaged-agent"),
        &flags,
    )
    .context("cannot build the guest agent")?;
    progress.say("manual pages and completions");
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let contents = Contents {
        program: read(&program)?,
        agent: read(&agent)?,
        pages: pages(&program)?,
        completions: Completions {
            bash: completions(&program, "bash")?,
            zsh: completions(&program, "zsh")?,
            fish: completions(&program, "fish")?,
        },
        documents: documents(workspace)?,
        version,
    };
    progress.say("packing");
    Ok(Made {
        name: file_name(&contents.version),
        package: build(&contents, date)?,
        program: contents.program,
        agent: contents.agent,
    })
}

/// The date of everything in the package, in seconds since 1970.
fn date(workspace: &Workspace) -> anyhow::Result<u64> {
    let text = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => capture(
            Command::new("git")
                .args(["log", "-1", "--format=%ct"])
                .current_dir(workspace.root()),
        )
        .context("there is no commit to take the date of: set SOURCE_DATE_EPOCH")?,
    };
    let date = text.trim().parse();
    date.with_context(|| format!("{:?} is no date in seconds since 1970", text.trim()))
}

fn build_program(workspace: &Workspace, flags: &[String]) -> anyhow::Result<std::path::PathBuf> {
    let words = [
        "build",
        "--profile",
        "packaged",
        "--locked",
        "-p",
        "cofferdam",
    ];
    run_command(
        cargo()
            .args(words)
            // Words are parted by this character, as paths may have blanks.
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("COFFERDAM_COMMIT", commit(workspace))
            .current_dir(workspace.root()),
    )?;
    Ok(workspace.path("target/packaged/cofferdam"))
}

/// What tells the compiler to name files as they would be called elsewhere, in whichever of `roots`
/// they are.
fn without_paths(roots: &[&Path]) -> anyhow::Result<Vec<String>> {
    let home = std::env::var("CARGO_HOME").or_else(|_| {
        let home = std::env::var("HOME").context("there is no home folder")?;
        anyhow::Ok(format!("{home}/.cargo"))
    })?;
    let flag = |from: &str, to| format!("--remap-path-prefix={from}={to}");
    let roots = roots.iter().map(|root| root.display().to_string());
    let mut flags: Vec<_> = roots.map(|root| flag(&root, "/cofferdam")).collect();
    flags.push(flag(&home, "/cargo"));
    Ok(flags)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

/// All files of a folder, by name.
fn files(folder: &Path) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in folder
        .read_dir()
        .with_context(|| folder.display().to_string())?
    {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            files.push((name, read(&entry.path())?));
        }
    }
    files.sort();
    Ok(files)
}

fn pages(program: &Path) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    capture(Command::new(program).arg("man").arg(folder.path()))?;
    let pages = files(folder.path())?;
    ensure!(!pages.is_empty(), "the program wrote no manual pages");
    Ok(pages)
}

fn completions(program: &Path, shell: &str) -> anyhow::Result<Vec<u8>> {
    let text = capture(Command::new(program).args(["completions", shell]))?;
    Ok(text.into_bytes())
}

fn documents(workspace: &Workspace) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut documents = files(&workspace.path("docs"))?;
    documents.push(("README.md".to_owned(), read(&workspace.path("README.md"))?));
    let licences = licences::text(workspace, &["cofferdam", "guest-agent"])?;
    documents.push(("third-party-licences.txt".to_owned(), licences.into_bytes()));
    Ok(documents)
}
