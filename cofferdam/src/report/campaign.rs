//! A campaign's figures in a report, and its plots: what became of faults by kind and by function,
//! and how soon calls were taken back.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use plotters::prelude::RGBColor;
use recovery::campaign::Way;
use recovery::campaign::summary::{Counts, Summary, total};
use recovery::campaign::verdict::Verdict;
use serde::{Deserialize, Serialize};

use super::plot::{Bar, bars, boxes_by_name};
use crate::words::counted;

/// A campaign in a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Campaign {
    /// The driver's module.
    pub driver: String,
    /// What decides the trials.
    pub seed: u64,
    /// How long it took, with the guest's boot, in seconds.
    pub took_s: f64,
    /// Its figures.
    pub summary: Summary,
}

/// What matters, a sentence a line.
pub fn headline(summary: &Summary) -> String {
    let (harmful, trials) = (summary.harmful(), summary.trials);
    let trials = counted(trials.into(), "fault", "faults");
    let mut text =
        format!("{trials}, of which {harmful} crash, hang, corrupt or lose the device natively\n");
    for (way, counts) in &summary.of_harm {
        let of = |verdict| counts.get(&verdict).copied().unwrap_or(0);
        let all = total(counts.values());
        text.push_str(&format!(
            "{}: of {all}, {} left the guest alive, {} recovered, {} had no effect, {} escaped\n",
            way.name(),
            all - of(Verdict::Escaped),
            of(Verdict::Recovered),
            of(Verdict::Benign).saturating_add(of(Verdict::NotActivated)),
            of(Verdict::Escaped)
        ));
    }
    text
}

/// Draws them into `folder`, which is made if it is not there.
pub fn write(summary: &Summary, folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (name, svg) in plots(summary)? {
        super::merge::write_whole(&folder.join(name), svg.as_bytes())?;
    }
    Ok(())
}

/// The plots by file name.
pub fn plots(summary: &Summary) -> anyhow::Result<BTreeMap<String, String>> {
    let mut plots = BTreeMap::new();
    for way in summary.ways.keys() {
        for (what, counts) in [("kinds", &summary.kinds), ("functions", &summary.functions)] {
            let name = format!("{what}-{}.svg", file_word(*way));
            plots.insert(name, verdicts(counts, *way)?);
        }
    }
    let times: Vec<_> = summary
        .latencies
        .iter()
        .flat_map(|(way, latencies)| {
            let row = |what: &str, way: &Way, color, times: &[u64]| {
                let us: Vec<f64> = times.iter().map(|ns| *ns as f64 / 1e3).collect();
                (!us.is_empty()).then(|| (format!("{what}, {}", file_word(*way)), color, us))
            };
            [
                row(
                    "detected",
                    way,
                    color(Verdict::DetectedNotRecovered),
                    &latencies.after_ns,
                ),
                row(
                    "taken back",
                    way,
                    color(Verdict::Recovered),
                    &latencies.rollback_ns,
                ),
            ]
        })
        .flatten()
        .collect();
    if !times.is_empty() {
        plots.insert("latencies.svg".to_owned(), boxes_by_name(&times)?);
    }
    Ok(plots)
}

fn file_word(way: Way) -> &'static str {
    match way {
        Way::Native => "native",
        Way::Once => "once",
        Way::Stays => "stays",
    }
}

/// A bar for each, with its verdicts.
fn verdicts(all: &BTreeMap<String, BTreeMap<Way, Counts>>, way: Way) -> anyhow::Result<String> {
    let rows: Vec<Bar> = all
        .iter()
        .filter_map(|(name, ways)| {
            let counts = ways.get(&way)?;
            Some(Bar {
                name: name.clone(),
                parts: counts
                    .iter()
                    .map(|(verdict, count)| (color(*verdict), f64::from(*count)))
                    .collect(),
                says: total(counts.values()).to_string(),
            })
        })
        .collect();
    let seen = |verdict: &Verdict| {
        let mut counts = all.values().filter_map(|ways| ways.get(&way));
        counts.any(|counts| counts.contains_key(verdict))
    };
    let key: Vec<_> = Verdict::ALL
        .into_iter()
        .filter(seen)
        .map(|verdict| (verdict.name(), color(verdict)))
        .collect();
    bars(&rows, &key, "faults")
}

/// Grey for what does nothing, green for what was taken back; the redder the worse.
fn color(verdict: Verdict) -> RGBColor {
    match verdict {
        Verdict::NotActivated => RGBColor(0xbb, 0xbb, 0xbb),
        Verdict::Benign => RGBColor(0x88, 0x88, 0x88),
        Verdict::Error => RGBColor(0x3d, 0x84, 0xd6),
        Verdict::Recovered => RGBColor(0x2a, 0x9d, 0x8f),
        Verdict::LostDevice => RGBColor(0xc9, 0xa2, 0x27),
        Verdict::DetectedNotRecovered => RGBColor(0xcc, 0x78, 0x1c),
        Verdict::SilentCorruption | Verdict::Undetected => RGBColor(0xb0, 0x5c, 0xc6),
        Verdict::Hang => RGBColor(0xe0, 0x7b, 0x7f),
        Verdict::Crash | Verdict::Escaped => RGBColor(0xd6, 0x45, 0x50),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use recovery::campaign::summary::Latencies;

    #[test]
    fn each_way_has_its_plots_with_a_key_of_what_was_seen() {
        let counts = Counts::from([(Verdict::Recovered, 3), (Verdict::Escaped, 1)]);
        let of_kind = BTreeMap::from([(Way::Once, counts.clone())]);
        let mut summary = Summary {
            trials: 4,
            ways: BTreeMap::from([(Way::Once, counts)]),
            kinds: BTreeMap::from([("nop".to_owned(), of_kind)]),
            ..Summary::default()
        };
        let names = |summary: &Summary| plots(summary).unwrap().into_keys().collect::<Vec<_>>();
        assert_eq!(names(&summary), ["functions-once.svg", "kinds-once.svg"]);
        let svg = plots(&summary).unwrap().remove("kinds-once.svg").unwrap();
        for text in ["nop", "recovered", "escaped", ">\n4\n<"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        assert!(!svg.contains("benign"), "nothing of what was not seen");
        // A report may say anything.
        let lies = Counts::from([(Verdict::Benign, u32::MAX), (Verdict::NotActivated, 7)]);
        let lying = Summary {
            of_harm: BTreeMap::from([(Way::Once, lies)]),
            ..Summary::default()
        };
        assert!(headline(&lying).contains("4294967295 had no effect"));
        let latencies = Latencies {
            after_ns: Vec::new(),
            rollback_ns: vec![1_500_000],
        };
        summary.latencies.insert(Way::Once, latencies);
        let svg = plots(&summary).unwrap().remove("latencies.svg").unwrap();
        assert!(
            svg.contains("taken back, once") && !svg.contains("detected"),
            "{svg}"
        );
    }
}
