//! Several parts made into one report.

use std::path::Path;

use anyhow::{Context, bail, ensure};

use super::ratio::ratios;
use super::{Boot, BootRun, OtherBoot, Report, SCHEMA, Stat};

/// Largest report that is read, in bytes.
const MAX_REPORT_BYTES: u64 = 64 << 20;

/// Reads a report.
pub fn read(path: &Path) -> anyhow::Result<Report> {
    let length = std::fs::metadata(path)
        .with_context(|| format!("cannot read report {}", path.display()))?
        .len();
    ensure!(
        length <= MAX_REPORT_BYTES,
        "{} is {length} bytes long: a report has at most {MAX_REPORT_BYTES}",
        path.display()
    );
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read report {}", path.display()))?;
    let report: Report = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a report of `cofferdam bench`", path.display()))?;
    ensure!(
        report.schema == SCHEMA,
        "{} has schema {}, this cofferdam reads {SCHEMA}: make the report again",
        path.display(),
        report.schema
    );
    Ok(report)
}

/// Writes a report, whole or not at all.
pub fn write(report: &Report, path: &Path) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    write_whole(path, text.as_bytes())
}

/// Writes `bytes` to `path` through a temporary file beside it, so that a reader never sees half.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let Some(name) = path.file_name() else {
        bail!("{} is not a file name", path.display())
    };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create folder {}", dir.display()))?;
    }
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(temporary);
    std::fs::write(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .inspect_err(|_| {
            // The error that matters is the first one; the temporary file may not even exist.
            let _ = std::fs::remove_file(&temporary);
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Makes one report out of `parts`. They must come from the same commit and the same place: numbers
/// of different ones do not belong into one table.
pub fn merge(parts: impl IntoIterator<Item = Report>) -> anyhow::Result<Report> {
    let mut parts = parts.into_iter();
    let Some(mut whole) = parts.next() else {
        bail!("no report to merge: name at least one")
    };
    for part in parts {
        ensure!(
            part.commit == whole.commit,
            "reports of different commits ({} and {}): measure again with one build",
            whole.commit,
            part.commit
        );
        ensure!(
            part.host == whole.host,
            "reports of different hosts ({} {} and {} {}): keep them apart",
            whole.host.place,
            whole.host.cpu,
            part.host.place,
            part.host.cpu
        );
        whole.guest = whole.guest.or(part.guest);
        whole.boot = match (whole.boot, part.boot) {
            (Some(a), Some(b)) => Some(merge_boots(a, b)?),
            (a, b) => a.or(b),
        };
        for other in part.boot_others {
            merge_other(&mut whole.boot_others, other)?;
        }
        whole.recovery.extend(part.recovery);
        whole.recovery_ratios = ratios(&whole.recovery);
        whole.drivers.extend(part.drivers);
        whole.traffic.extend(part.traffic);
        whole.suspend.extend(part.suspend);
        whole.suspend_followed.extend(part.suspend_followed);
        whole.clones.extend(part.clones);
        whole.switch.extend(part.switch);
        whole.campaigns.extend(part.campaigns);
        if part.isolation.is_some() {
            ensure!(
                whole.isolation.is_none(),
                "two reports say what isolation costs: leave one out"
            );
            whole.isolation = part.isolation;
        }
        for (section, value) in part.other {
            match (whole.other.get_mut(&section), value) {
                (None, value) => {
                    whole.other.insert(section, value);
                }
                (Some(serde_json::Value::Array(all)), serde_json::Value::Array(more)) => {
                    all.extend(more);
                }
                (Some(_), _) => bail!("two reports have a section \"{section}\": leave one out"),
            }
        }
    }
    Ok(whole)
}

/// Boots are measured one by one, each in a fresh place, and become one set of samples.
fn merge_boots(mut a: Boot, b: Boot) -> anyhow::Result<Boot> {
    a.runs.extend(b.runs);
    let ready: Vec<f64> = a.runs.iter().filter_map(|run| run.vmm_ready_us).collect();
    a.vmm_ready_us = Stat::from_samples(&ready);
    a.to_init_us = to_init(&a.runs)?;
    a.vmm_rss_kib = a.vmm_rss_kib.max(b.vmm_rss_kib);
    Ok(a)
}

/// Adds boots of another monitor to those of the same one.
fn merge_other(all: &mut Vec<OtherBoot>, more: OtherBoot) -> anyhow::Result<()> {
    match all.iter_mut().find(|other| other.vmm == more.vmm) {
        Some(other) => {
            other.runs.extend(more.runs);
            other.to_init_us = to_init(&other.runs)?;
        }
        None => all.push(more),
    }
    Ok(())
}

fn to_init(runs: &[BootRun]) -> anyhow::Result<Stat> {
    let samples: Vec<f64> = runs.iter().map(|run| run.to_init_us).collect();
    Stat::from_samples(&samples)
        .context("a report tells of boots, but has no runs: measure them again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Host, Method, Phase, Recovery, RecoveryRun};

    fn part(method: Method) -> Report {
        let run = RecoveryRun {
            at_us: [(Phase::FirstRx, 1.5)].into(),
            ..Default::default()
        };
        Report {
            schema: SCHEMA,
            commit: "abc".to_owned(),
            host: Host {
                place: "lab".to_owned(),
                second_stage: "npt".to_owned(),
                kernel: "6.1".to_owned(),
                cpu: "AMD".to_owned(),
            },
            guest: None,
            boot: None,
            boot_others: Vec::new(),
            recovery: Recovery::from_runs("e1000", method, vec![run])
                .into_iter()
                .collect(),
            recovery_ratios: Vec::new(),
            drivers: Vec::new(),
            traffic: Vec::new(),
            suspend: Vec::new(),
            suspend_followed: Vec::new(),
            clones: Vec::new(),
            switch: Vec::new(),
            campaigns: Vec::new(),
            isolation: None,
            other: Default::default(),
        }
    }

    #[test]
    fn parts_of_one_measurement_become_one_report() {
        let mut later = part(Method::Reboot);
        later
            .other
            .insert("campaign".to_owned(), serde_json::json!({"seed": 1}));
        let whole = merge([part(Method::Restart), later]).unwrap();
        assert_eq!(whole.recovery.len(), 2);
        assert_eq!(whole.other["campaign"]["seed"], 1);
    }

    #[test]
    fn boots_measured_one_by_one_become_one_set() {
        let boot = |us: f64| {
            let runs = vec![BootRun {
                vmm_ready_us: Some(1.0),
                to_init_us: us,
                vmm_rss_kib: Some(us as u64),
            }];
            let to_init_us = Stat::from_samples(&[us]).unwrap();
            let mut report = part(Method::Restart);
            report.boot_others.push(OtherBoot {
                vmm: "other".to_owned(),
                to_init_us,
                runs: runs.clone(),
            });
            report.boot = Some(Boot {
                vmm_ready_us: None,
                to_init_us,
                vmm_rss_kib: us as u64,
                runs,
            });
            report
        };
        let whole = merge([boot(30.0), boot(10.0), boot(20.0)]).unwrap();
        let ours = whole.boot.unwrap();
        assert_eq!(
            (ours.to_init_us.n, ours.to_init_us.p50, ours.vmm_rss_kib),
            (3, 20.0, 30)
        );
        assert_eq!(ours.vmm_ready_us.unwrap().n, 3);
        assert_eq!(whole.boot_others.len(), 1);
        assert_eq!(whole.boot_others[0].to_init_us.max, 30.0);
    }

    #[test]
    fn numbers_of_different_builds_or_hosts_are_kept_apart() {
        let mut other = part(Method::Reboot);
        other.commit = "def".to_owned();
        assert!(merge([part(Method::Restart), other]).is_err());
        let mut other = part(Method::Reboot);
        other.host.place = "host".to_owned();
        assert!(merge([part(Method::Restart), other]).is_err());
        assert!(merge([]).is_err());
    }

    #[test]
    fn a_report_survives_writing_and_reading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/report.json");
        let mut report = part(Method::Restart);
        report
            .other
            .insert("campaign".to_owned(), serde_json::json!([{"device": "x"}]));
        write(&report, &path).unwrap();
        assert_eq!(read(&path).unwrap(), report);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1
        );
    }

    #[test]
    fn something_else_is_not_taken_for_a_report() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        std::fs::write(&path, "{\"schema\": 1}").unwrap();
        assert!(read(&path).is_err());
        let mut report = part(Method::Restart);
        report.schema = 2;
        write(&report, &path).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("schema 2"), "{error}");
    }
}
