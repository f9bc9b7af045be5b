//! Builds the guest agent: one static program, in a target directory of its own so that it does not
//! disturb the workspace's other builds. And finds one that is there.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where the agent is from the folder of the `cofferdam` program: as a package installs them, and
/// as `cargo xtask` builds them in `target/`.
const BESIDE: [&str; 2] = [
    "../lib/cofferdam/guest-agent",
    "../agent/x86_64-unknown-linux-gnu/agent/guest-agent",
];

/// The agent that belongs to the program `program`, if it is where it should be.
pub fn find_agent(program: &Path) -> Option<PathBuf> {
    let folder = program.parent()?;
    let mut places = BESIDE.iter().map(|place| folder.join(place));
    places.find(|place| place.is_file())
}

/// Builds the agent of the workspace at `workspace` and returns the program's path.
///
/// # Errors
/// When cargo cannot be run or the build fails; cargo's own messages are on standard error.
pub fn build_agent(workspace: &Path, target_dir: &Path) -> Result<PathBuf, Error> {
    let arguments = [
        "build",
        "--quiet",
        "--package",
        "guest-agent",
        "--profile",
        "agent",
        "--target",
        TARGET,
    ];
    let failed = |reason: String| Error::Command {
        command: format!("cargo {}", arguments.join(" ")),
        reason,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(arguments)
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(workspace)
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C relocation-model=static",
        )
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("{status}, see the messages above")));
    }
    Ok(target_dir.join(TARGET).join("agent").join("guest-agent"))
}
