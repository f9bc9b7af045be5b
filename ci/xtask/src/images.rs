//! `cargo xtask images`: guest kernels and initramfs images, and the lab's.

use anyhow::Context;
use guest_images::{BuildOptions, agent, default_images};

use crate::steps::Progress;
use crate::workspace::Workspace;

/// Builds the images that are not up to date; says what there is.
pub fn run(workspace: &Workspace, refresh: bool) -> anyhow::Result<String> {
    let progress = Progress::new("guest agent");
    let agent = agent::build_agent(workspace.root(), &workspace.path("target/agent"))
        .context("cannot build the guest agent")?;
    let say = |line: &str| progress.say(line);
    let options = BuildOptions {
        out: workspace.images(),
        agent,
        refresh,
        progress: &say,
    };
    let manifest = guest_images::build(&default_images(), &options)?;
    drop(progress);
    let bytes: u64 = manifest
        .artefacts
        .iter()
        .map(|artefact| artefact.size)
        .sum();
    Ok(format!(
        "Linux {}, {} files, {} MiB in {}",
        manifest.kernel_release,
        manifest.artefacts.len(),
        bytes >> 20,
        workspace.images().strip_prefix(workspace.root())?.display()
    ))
}
