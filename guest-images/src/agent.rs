//! Builds the guest agent: one static program, in a target directory of its own so that it does not
//! disturb the workspace's other builds.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

const TARGET: &str = "x86_64-unknown-linux-gnu";

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
