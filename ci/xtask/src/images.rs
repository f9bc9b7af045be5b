//! `cargo xtask images`: guest kernels and initramfs images, and the lab's.

use std::process::ExitCode;

use anyhow::{Context, anyhow};
use guest_images::kernels::DEFAULT;
use guest_images::{BuildOptions, KernelSource, agent, images_of};

use crate::steps::{Progress, cargo};
use crate::workspace::Workspace;

/// Which images to build
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Ask the archive for newer packages
    #[arg(long)]
    refresh: bool,
    /// Build those of another kernel, in a folder of its name beside the default's; may be given
    /// again
    #[arg(long, value_name = "NAME", value_parser = by_name)]
    kernel: Vec<&'static KernelSource>,
}

/// A kernel by its name; an unknown one is told which there are.
pub fn by_name(name: &str) -> anyhow::Result<&'static KernelSource> {
    KernelSource::by_name(name).map_err(|reason| anyhow!(reason))
}

/// Builds the images that were asked for.
pub fn main(workspace: &Workspace, args: &Args) -> anyhow::Result<String> {
    let kernels = match args.kernel.as_slice() {
        [] => &[DEFAULT][..],
        some => some,
    };
    run(workspace, kernels, args.refresh)
}

/// Builds the images that are not up to date; says what there is.
pub fn run(
    workspace: &Workspace,
    kernels: &[&'static KernelSource],
    refresh: bool,
) -> anyhow::Result<String> {
    let progress = Progress::new("guest agent");
    let agent = agent::build_agent(workspace.root(), &workspace.path("target/agent"), &[])
        .context("cannot build the guest agent")?;
    let say = |line: &str| progress.say(line);
    let mut built = Vec::new();
    for kernel in kernels {
        let options = BuildOptions {
            out: workspace.images_of(kernel),
            packages: workspace.images().join("packages"),
            agent: agent.clone(),
            refresh,
            progress: &say,
        };
        let manifest = guest_images::build(&images_of(kernel), &options)
            .with_context(|| format!("images of {}", kernel.name))?;
        let sizes = manifest.artefacts.iter().map(|artefact| artefact.size);
        built.push(format!(
            "Linux {}, {} files, {} MiB in {}",
            manifest.kernel_release,
            manifest.artefacts.len(),
            sizes.sum::<u64>() >> 20,
            options.out.strip_prefix(workspace.root())?.display()
        ));
    }
    drop(progress);
    Ok(built.join("; "))
}

/// What isolation lacks of a kernel; the exit status is 1 if it lacks something.
pub fn facts(workspace: &Workspace, kernel: &'static KernelSource) -> anyhow::Result<ExitCode> {
    run(workspace, &[kernel], false)?;
    let words = [
        "run",
        "--quiet",
        "-p",
        "isolation",
        "--example",
        "kernel_facts",
        "--",
    ];
    let status = cargo()
        .args(words)
        .arg(workspace.images_of(kernel).join("vmlinux"))
        .current_dir(workspace.root())
        .status()
        .context("cannot start cargo")?;
    Ok(ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(2),
    ))
}
