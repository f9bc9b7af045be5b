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

/// Builds the agent of the workspace at `workspace`, with these `flags` of the compiler besides its
/// own, and returns the program's path.
///
/// # Errors
/// When cargo cannot be run or the build fails; cargo's own messages are on standard error.
pub fn build_agent(
    workspace: &Path,
    target_dir: &Path,
    flags: &[String],
) -> Result<PathBuf, Error> {
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
    let own = [
        "-C",
        "target-feature=+crt-static",
        "-C",
        "relocation-model=static",
    ];
    let flags: Vec<&str> = own
        .into_iter()
        .chain(flags.iter().map(String::as_str))
        .collect();
    let status = Command::new(cargo)
        .args(arguments)
        .arg("--target-dir")
        .arg(target_dir)
        .current_dir(workspace)
        // Words are parted by this character, as paths may have blanks.
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .status()
        .map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("{status}, see the messages above")));
    }
    Ok(target_dir.join(TARGET).join("agent").join("guest-agent"))
}
