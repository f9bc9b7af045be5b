//! The plots of a report as files.

use std::collections::BTreeMap;
use std::path::Path;

use super::plot::{end_boxes, recovery_bars, recovery_boxes};
use super::{Method, Phase, Recovery, Report};

/// Writes the plots of recovery into `folder`.
pub fn write(report: &Report, folder: &Path) -> anyhow::Result<()> {
    for (name, svg) in plots(&report.recovery)? {
        super::merge::write_whole(&folder.join(name), svg.as_bytes())?;
    }
    Ok(())
}

/// The plots by file name.
fn plots(recoveries: &[Recovery]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut plots = BTreeMap::new();
    for phase in [Phase::Returned, Phase::FirstRx] {
        if let Some(svg) = end_boxes(recoveries, phase)? {
            plots.insert(format!("recovery-{}.svg", phase.name()), svg);
        }
    }
    for recovery in recoveries {
        match &recovery.entry {
            Some(entry) => {
                let place = recovery.fault.as_deref().and_then(place).unwrap_or("fault");
                let name = format!("recovery-{}-{place}.svg", file_name(entry));
                plots.insert(name, recovery_boxes(recovery)?);
            }
            None => {
                let name = format!("recovery-{}.svg", recovery.method.name());
                plots.insert(name, recovery_boxes(recovery)?);
            }
        }
    }
    let baselines: Vec<Recovery> = recoveries
        .iter()
        .filter(|recovery| recovery.method != Method::Rollback)
        .cloned()
        .collect();
    if !baselines.is_empty() {
        plots.insert(
            "recovery-baselines.svg".to_owned(),
            recovery_bars(&baselines)?,
        );
    }
    Ok(plots)
}

/// What stands in brackets at the end of a fault's name.
fn place(fault: &str) -> Option<&str> {
    let (_, place) = fault.strip_suffix(')')?.rsplit_once('(')?;
    place
        .bytes()
        .all(|b| b.is_ascii_alphanumeric())
        .then_some(place)
}

/// A name as a part of a file's name: what is in a report may have come from a guest.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    name.chars().take(64).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::RecoveryRun;

    #[test]
    fn each_entry_has_its_plot_and_no_name_leaves_the_folder() {
        let run = RecoveryRun {
            at_us: [(Phase::Returned, 500.0), (Phase::FirstRx, 2500.0)].into(),
            ..RecoveryRun::default()
        };
        let of = |method, entry: Option<&str>| Recovery {
            entry: entry.map(str::to_owned),
            fault: Some("ud2 at +0x5 (first)".to_owned()),
            ..Recovery::from_runs("e1000", method, vec![run.clone()]).unwrap()
        };
        let plots = plots(&[
            of(Method::Rollback, Some("../../etc/x")),
            of(Method::Restart, None),
        ])
        .unwrap();
        let names: Vec<&str> = plots.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "recovery-______etc_x-first.svg",
                "recovery-baselines.svg",
                "recovery-first_rx.svg",
                "recovery-restart.svg",
                "recovery-returned.svg",
            ]
        );
        assert!(plots.values().all(|svg| svg.starts_with("<svg")));
    }
}
