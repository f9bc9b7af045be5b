//! Faults on purpose, as a part of the page.

use maud::{Markup, PreEscaped, html};
use recovery::campaign::Way;
use recovery::campaign::summary::Counts;
use recovery::campaign::verdict::Verdict;

use super::table::table;
use crate::report::campaign::{Campaign, headline, plots};

/// Plots of a campaign that stand in the page, with what they show.
const PLOTS: [(&str, &str); 3] = [
    ("kinds-native.svg", "By kind, natively:"),
    (
        "kinds-once.svg",
        "By kind, isolated, the fault taken out after a call came to it:",
    ),
    ("latencies.svg", "How soon the first call was taken back:"),
];

/// The part.
pub fn section(campaigns: &[Campaign]) -> anyhow::Result<Markup> {
    let parts = campaigns.iter().map(part);
    let parts = parts.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(html! {
        h2 { "Faults on purpose" }
        @for part in parts { (part) }
        p.note {
            "Each fault is one changed instruction, tried from the same state of the guest natively and isolated."
        }
    })
}

fn part(campaign: &Campaign) -> anyhow::Result<Markup> {
    let summary = &campaign.summary;
    let mut heads = vec!["how it ended"];
    heads.extend(summary.ways.keys().map(|way: &Way| way.name()));
    let seen = |verdict: &Verdict| summary.ways.values().any(|all| all.contains_key(verdict));
    let rows = Verdict::ALL.into_iter().filter(seen).map(|verdict| {
        let count = |all: &Counts| all.get(&verdict).map_or_else(String::new, u32::to_string);
        let counts = summary.ways.values().map(count);
        std::iter::once(verdict.name().to_owned())
            .chain(counts)
            .collect::<Vec<_>>()
    });
    let mut drawn = plots(summary)?;
    let drawn = PLOTS.map(|(name, what)| Some((what, drawn.remove(name)?)));
    Ok(html! {
        h3 { (campaign.driver) ", seed " (campaign.seed) }
        @for line in headline(summary).lines() { p { (line) } }
        (table(&heads, rows))
        @for (what, svg) in drawn.into_iter().flatten() {
            p { (what) }
            (PreEscaped(svg))
        }
    })
}
