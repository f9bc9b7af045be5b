//! A campaign's figures, as tables.

use std::collections::BTreeMap;

use comfy_table::Table;
use recovery::campaign::Way;
use recovery::campaign::summary::{Counts, Summary, total};
use recovery::campaign::times::Pace;
use recovery::campaign::verdict::Verdict;

use crate::cli::{print_bytes, print_json};
use crate::report::{self, Stat};
use crate::table::{number, table};
use crate::words::counted;

/// Prints them.
pub(super) fn show(summary: &Summary, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(summary);
    }
    print_bytes(text(summary).as_bytes())
}

/// Its figures, for people.
pub(in crate::cli) fn text(summary: &Summary) -> String {
    let mut text = report::campaign::headline(summary);
    text.push_str(&pace(&summary.pace));
    text.push_str(&format!("\n{}\n", verdicts("how it ended", &summary.ways)));
    if !summary.of_harm.is_empty() {
        let harm = verdicts("of those that harm natively", &summary.of_harm);
        text.push_str(&format!("\n{harm}\n"));
    }
    if !summary.latencies.is_empty() {
        text.push_str(&format!("\n{}\n", latencies(summary)));
    }
    // The hardest of the ways that were made.
    let isolated = match summary.ways.contains_key(&Way::Stays) {
        true => Way::Stays,
        false => Way::Once,
    };
    let ended = format!("{}: recovered, undetected, escaped", isolated.name());
    let mut kinds = table(&["kind", "trials", "harm natively", &ended]);
    for (kind, ways) in &summary.kinds {
        let of = |way| ways.get(&way);
        let count = |way, verdict| {
            of(way)
                .and_then(|all: &Counts| all.get(&verdict))
                .copied()
                .unwrap_or(0)
        };
        let trials = ways.values().map(|all| total(all.values())).max();
        let harm = of(Way::Native).into_iter().flatten();
        let harm = total(
            harm.filter(|(verdict, _)| verdict.is_harm())
                .map(|(_, n)| n),
        );
        let ends = [Verdict::Recovered, Verdict::Undetected, Verdict::Escaped]
            .map(|verdict| count(isolated, verdict).to_string());
        kinds.add_row(vec![
            comfy_table::Cell::new(kind),
            number(trials.unwrap_or(0)),
            number(harm),
            comfy_table::Cell::new(ends.join(", ")),
        ]);
    }
    text.push_str(&format!("\n{kinds}\n"));
    for (verdict, trials) in &summary.to_look_at {
        let trials: Vec<_> = trials.iter().map(u32::to_string).collect();
        text.push_str(&format!(
            "{}: trial {}\n",
            verdict.name(),
            trials.join(", ")
        ));
    }
    text
}

/// How fast the trials were made, and where their time went; nothing where that is not known.
fn pace(pace: &Pace) -> String {
    let Some(a_minute) = pace.a_minute() else {
        return String::new();
    };
    let share = |ms: u64| 100.0 * ms as f64 / pace.took_ms as f64;
    let all: Vec<_> = pace.times.phases().into();
    let others = all.iter().filter(|(phase, _)| *phase != "work");
    let others: Vec<_> = others
        .map(|(phase, ms)| format!("{phase} {:.0}", share(*ms)))
        .collect();
    let runs = all
        .iter()
        .fold(0, |sum: u64, (_, ms)| sum.saturating_add(*ms));
    format!(
        "{} of known time: {a_minute:.1} a minute of one VM; {:.0} % of the time outside the guest's work ({}, between runs {:.0})\n",
        counted(pace.trials.into(), "trial", "trials"),
        100.0 * pace.outside(pace.took_ms),
        others.join(", "),
        share(pace.took_ms.saturating_sub(runs)),
    )
}

/// How soon faults were detected, and how long it took to take calls back.
fn latencies(summary: &Summary) -> Table {
    let mut table = table(&[
        "first call taken back",
        "runs",
        "detected after: median, longest",
        "taken back in: median, longest",
    ]);
    let words = |times: &[u64]| {
        let us: Vec<_> = times.iter().map(|ns| *ns as f64 / 1e3).collect();
        match Stat::from_samples(&us) {
            Some(stat) => format!("{:.0} us, {:.0} us", stat.p50, stat.max),
            None => "-".to_owned(),
        }
    };
    for (way, latencies) in &summary.latencies {
        table.add_row(vec![
            comfy_table::Cell::new(way.name()),
            number(latencies.rollback_ns.len()),
            number(words(&latencies.after_ns)),
            number(words(&latencies.rollback_ns)),
        ]);
    }
    table
}

fn verdicts(head: &str, ways: &BTreeMap<Way, Counts>) -> Table {
    let mut heads = vec![head];
    heads.extend(ways.keys().map(|way| way.name()));
    let mut table = table(&heads);
    for verdict in Verdict::ALL {
        let counts: Vec<_> = ways
            .values()
            .map(|all| all.get(&verdict).copied())
            .collect();
        if counts.iter().all(Option::is_none) {
            continue;
        }
        let mut row = vec![comfy_table::Cell::new(verdict.name())];
        row.extend(counts.into_iter().map(|count| match count {
            Some(count) => number(count),
            None => number(""),
        }));
        table.add_row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_told_where_it_is_known() {
        let mut known = Pace::default();
        assert_eq!(pace(&known), "");
        known.trials = 30;
        known.took_ms = 60_000;
        known.times.work = 45_000;
        known.times.rewind = 6_000;
        let text = pace(&known);
        assert!(
            text.starts_with("30 trials of known time: 30.0 a minute"),
            "{text}"
        );
        assert!(text.contains("25 % of the time outside"), "{text}");
        assert!(
            text.contains("rewind 10,") && text.contains("between runs 15"),
            "{text}"
        );
    }

    #[test]
    fn figures_begin_with_what_matters() {
        let mut summary = Summary {
            trials: 12,
            ..Summary::default()
        };
        summary.ways.insert(
            Way::Native,
            Counts::from([(Verdict::Crash, 5), (Verdict::Benign, 7)]),
        );
        let of_harm = Counts::from([
            (Verdict::Recovered, 3),
            (Verdict::Escaped, 1),
            (Verdict::Benign, 1),
        ]);
        summary.of_harm.insert(Way::Once, of_harm);
        summary.to_look_at.insert(Verdict::Escaped, vec![4]);
        let text = text(&summary);
        assert!(text.starts_with("12 faults, of which 5 crash"), "{text}");
        assert!(text.contains(
            "isolated, once: of 5, 4 left the guest alive, 3 recovered, 1 had no effect, 1 escaped"
        ));
        assert!(text.contains("escaped: trial 4"));
        assert!(
            !text.contains("lost device"),
            "rows without a count are left out"
        );
    }
}
