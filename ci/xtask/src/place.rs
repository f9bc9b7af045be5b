//! Where Linux guests run: on this host's KVM if that is fast enough, else in the lab.
//! `cofferdam doctor` finds out.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// Where Linux guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// This host.
    Host,
    /// The lab.
    Lab,
}

/// What we need of the doctor's findings.
#[derive(Deserialize)]
struct Findings {
    linux_guests: String,
}

impl Place {
    /// Asks `cofferdam`, the program just built.
    pub fn find(cofferdam: &Path) -> anyhow::Result<Self> {
        let output = Command::new(cofferdam)
            .args(["doctor", "--json"])
            .output()
            .with_context(|| format!("cannot start {}", cofferdam.display()))?;
        Self::read(&output.stdout)
    }

    fn read(json: &[u8]) -> anyhow::Result<Self> {
        let findings: Findings = serde_json::from_slice(json)
            .context("`cofferdam doctor --json` did not say what it found")?;
        match findings.linux_guests.as_str() {
            "host" => Ok(Self::Host),
            "lab" => Ok(Self::Lab),
            other => bail!("Linux guests run {other} here: `cofferdam doctor` says what to do"),
        }
    }

    /// The word for reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Lab => "lab",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_name_a_place_or_an_error() {
        let read = |json: &str| Place::read(json.as_bytes());
        assert_eq!(
            read(r#"{"schema":1,"linux_guests":"host"}"#).unwrap(),
            Place::Host
        );
        assert_eq!(
            read(r#"{"linux_guests":"lab","checks":[]}"#).unwrap(),
            Place::Lab
        );
        assert!(
            read(r#"{"linux_guests":"nowhere"}"#)
                .unwrap_err()
                .to_string()
                .contains("doctor")
        );
        assert!(read("").is_err());
    }
}
