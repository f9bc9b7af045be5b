//! A bounded run of the fuzz targets.

use crate::workspace::Workspace;

/// Runs them.
pub fn run(_workspace: &Workspace) -> anyhow::Result<String> {
    Ok("no fuzz targets yet".into())
}
