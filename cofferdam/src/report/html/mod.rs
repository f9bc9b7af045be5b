//! A report as one HTML file that needs nothing else.
//!
//! Every number in it is in the JSON as well. Colours follow the reader's light or dark setting.
//! What is in a report may have come from a guest: all text is escaped, and only plots and this
//! program's own style are not.

mod campaign;
mod isolation;
mod suspend;
mod switch;
mod table;

use std::path::Path;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::plot::{
    boot_boxes, css, end_boxes, ordered_medians, phase_color, recovery_bars, recovery_boxes,
};
use super::ratio::{FGFT_SHORTER_BY, Ratio};
use super::traffic::{Traffic, of_own};
use super::{Boot, Method, Phase, Recovery, Report};
use table::{stat_row, stats, table};

/// Writes the page.
pub fn write(report: &Report, path: &Path) -> anyhow::Result<()> {
    super::merge::write_whole(path, page(report)?.into_string().as_bytes())
}

const TITLE: &str = "Cofferdam: what was measured";

const STYLE: &str = "\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #8888; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
svg { max-width: 100%; height: auto; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
.legend span + span + span { margin-left: 1.2em; }
.bar { height: .8em; background: #4878cf; }
.note { opacity: .75; }";

/// The whole page.
fn page(report: &Report) -> anyhow::Result<Markup> {
    let recovery = match report.recovery.as_slice() {
        [] => None,
        recoveries => Some(recovery_section(recoveries)?),
    };
    let boot = report.boot.as_ref();
    let boot = boot.map(|boot| boot_section(report, boot)).transpose()?;
    let campaigns = match report.campaigns.as_slice() {
        [] => None,
        campaigns => Some(campaign::section(campaigns)?),
    };
    let others = report
        .other
        .iter()
        .map(|(name, value)| anyhow::Ok((name, serde_json::to_string_pretty(value)?)));
    let others = others.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { (TITLE) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (TITLE) }
                (facts(report))
                @if !report.recovery_ratios.is_empty() { (ratio_section(&report.recovery_ratios)) }
                @if let Some(section) = recovery { (section) }
                @if let Some(section) = boot { (section) }
                @if !report.suspend.is_empty() { (suspend::section(&report.suspend, &report.suspend_followed, &report.clones)) }
                @if !report.switch.is_empty() { (switch::section(&report.switch)) }
                @if !report.traffic.is_empty() { (traffic_section(&report.traffic)) }
                @if let Some(isolation) = &report.isolation { (isolation::section(isolation)) }
                @if let Some(section) = campaigns { (section) }
                @for (name, value) in others {
                    h2 { (name) }
                    pre { (value) }
                }
            }
        }
    })
}

/// Where and with what it was measured.
fn facts(report: &Report) -> Markup {
    let host = &report.host;
    let mut facts = vec![
        ("commit", report.commit.clone()),
        ("where", host.place.clone()),
        ("second stage", host.second_stage.clone()),
        ("host's kernel", host.kernel.clone()),
        ("processor", host.cpu.clone()),
    ];
    if let Some(guest) = &report.guest {
        facts.push(("guest's kernel", guest.kernel.clone()));
        let size = format!("{} vCPU, {} MiB", guest.vcpus, guest.mem_mib);
        facts.push(("guest", size));
    }
    html! {
        table {
            @for (name, value) in facts { tr { td { (name) } td { (value) } } }
        }
    }
}

fn ratio_section(ratios: &[Ratio]) -> Markup {
    let heads = [
        "rollback of",
        "n",
        "caller runs again, ms (median)",
        "p99",
        "largest",
        "against",
        "sooner by",
        "first packet sooner by",
    ];
    let ms = |us: f64| format!("{:.3}", us / 1e3);
    let rows = ratios.iter().map(|ratio| {
        vec![
            ratio.name(),
            ratio.n.to_string(),
            ms(ratio.returned_us.p50),
            ms(ratio.returned_us.p99),
            ms(ratio.returned_us.max),
            ratio.against.name().to_owned(),
            format!("{:.0} times", ratio.returned),
            ratio.first_rx_text(),
        ]
    });
    let entries = ratios.iter().filter(|ratio| ratio.entry.is_some());
    let slowest = entries.filter(|ratio| ratio.against == ratios[0].against);
    let shorter = |part: f64| format!("{:.2} %", part * 100.0);
    let ours = ratios.iter().filter_map(|ratio| {
        let sooner = ratio.first_rx?;
        let whole = ratio.entry.is_none() && ratio.against == Method::Restart;
        whole.then(|| {
            vec![
                format!(
                    "Cofferdam, this report, {} (fault to first packet)",
                    ratio.name()
                ),
                shorter(1.0 - 1.0 / sooner),
            ]
        })
    });
    let published = vec![
        "FGFT, as published by its authors (six drivers, their hardware)".to_owned(),
        shorter(FGFT_SHORTER_BY),
    ];
    html! {
        h2 { "Rollback against restart and reboot" }
        (table(&heads, rows))
        p.note { "The slowest of each:" }
        ul.note {
            @for ratio in slowest { li { (ratio.slowest) } }
        }
        (table(&["failures shorter than by restart", "by"], ours.chain([published])))
    }
}

/// The square that stands for a phase in plots.
fn swatch(phase: Phase) -> Markup {
    let style = format!("background:{}", css(phase_color(phase)));
    html! { span.swatch style=(style) {} }
}

/// Which colour is which phase of `recoveries`, in the order in which they come.
fn legend(recoveries: &[Recovery]) -> Markup {
    let mut phases: Vec<Phase> = Vec::new();
    for (phase, _) in recoveries.iter().flat_map(ordered_medians) {
        if !phases.contains(&phase) {
            phases.push(phase);
        }
    }
    html! {
        p.legend {
            @for phase in phases { (swatch(phase)) span { (phase.name()) } }
        }
    }
}

fn recovery_section(recoveries: &[Recovery]) -> anyhow::Result<Markup> {
    let baselines: Vec<Recovery> = recoveries
        .iter()
        .filter(|recovery| recovery.method != Method::Rollback)
        .cloned()
        .collect();
    let bars = match baselines.as_slice() {
        [] => None,
        baselines => Some(recovery_bars(baselines)?),
    };
    let mut ends = Vec::new();
    for (phase, what) in [
        (Phase::Returned, "until the caller runs again"),
        (Phase::FirstRx, "until a ping sent afterwards is answered"),
    ] {
        if let Some(svg) = end_boxes(recoveries, phase)? {
            ends.push((what, svg));
        }
    }
    let each = recoveries.iter().map(one_recovery);
    let each = each.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(html! {
        h2 { "Recovery: how long the network is gone" }
        p.note {
            "A phase lasts from the end of the phase before it to its own end. The last one is the guest's first reply to \
             the host."
        }
        @if let Some(bars) = bars {
            (PreEscaped(bars))
            (legend(&baselines))
        }
        @for (what, svg) in ends {
            h3 { "Time " (what) }
            (PreEscaped(svg))
        }
        @for one in each { (one) }
    })
}

/// One way of recovery with its phases and steps.
fn one_recovery(recovery: &Recovery) -> anyhow::Result<Markup> {
    let phases = ordered_medians(recovery).into_iter();
    let phases = phases.filter_map(|(phase, _)| {
        let stat = recovery.phases_us.get(&phase)?;
        Some(stat_row(
            html! { (swatch(phase)) (phase.name()) },
            stat,
            1e3,
        ))
    });
    let total = stat_row(html! { "total" }, &recovery.total_us, 1e3);
    let steps = recovery.steps_us.iter();
    let steps = steps.map(|(step, stat)| stat_row(html! { (step) }, stat, 1e3));
    Ok(html! {
        h3 { (recovery.name()) ", " (recovery.n) " runs" }
        (PreEscaped(recovery_boxes(recovery)?))
        (stats("phase", "ms", phases.chain([total])))
        @if !recovery.steps_us.is_empty() {
            (stats("step, by the guest's clock", "ms", steps))
        }
    })
}

fn boot_section(report: &Report, boot: &Boot) -> anyhow::Result<Markup> {
    let others = report.boot_others.iter();
    let ready = boot.vmm_ready_us.iter();
    let rows = ready
        .map(|ready| stat_row(html! { "vCPUs run" }, ready, 1e3))
        .chain([stat_row(
            html! { "first line of /init" },
            &boot.to_init_us,
            1e3,
        )])
        .chain(others.map(|other| {
            let name = html! { "first line of /init, " (other.vmm) };
            stat_row(name, &other.to_init_us, 1e3)
        }));
    let boxes = boot_boxes(report)?;
    let resident = boot.vmm_rss_kib as f64 / 1024.0;
    Ok(html! {
        h2 { "Boot" }
        @if let Some(svg) = boxes { (PreEscaped(svg)) }
        (stats("start of the process to", "ms", rows))
        @for other in &report.boot_others {
            p {
                "Median against " (other.vmm) ": "
                (format!("{:.2}", boot.to_init_us.p50 / other.to_init_us.p50))
            }
        }
        p {
            "Resident memory beyond the guest's: " (format!("{resident:.1}"))
            " MiB (largest of the runs)"
        }
    })
}

fn traffic_section(traffic: &[Traffic]) -> Markup {
    let heads = [
        "kind",
        "driver",
        "NIC in the",
        "of the VMM's own",
        "s",
        "sent",
        "answered",
        "reordered",
        "doubled",
        "corrupted",
        "MiB out",
        "MiB in",
        "round trip, ms (median)",
    ];
    let count = |n: Option<u64>| n.map_or_else(String::new, |n| n.to_string());
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let rows = traffic.iter().map(|t| {
        vec![
            t.kind.clone(),
            t.driver.clone(),
            t.nic_at.words().to_owned(),
            of_own(traffic, t).map_or_else(String::new, |part| format!("{part:.2}")),
            format!("{:.1}", t.seconds),
            count(t.sent),
            count(t.answered),
            count(t.reordered),
            count(t.duplicated),
            t.corrupted.to_string(),
            mib(t.bytes_to_peer),
            mib(t.bytes_from_peer),
            t.round_trip_us
                .map_or_else(String::new, |s| format!("{:.3}", s.p50 / 1e3)),
        ]
    });
    html! {
        h2 { "Traffic" }
        (table(&heads, rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Guest, Method, Phase, RecoveryRun, environment};

    fn run(phases: &[(Phase, f64)]) -> RecoveryRun {
        RecoveryRun {
            at_us: phases.iter().copied().collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_page_needs_nothing_else_and_what_a_guest_said_stays_text() {
        let mut report = environment::report_here();
        report.guest = Some(Guest {
            kernel: "<script>alert(1)</script>".to_owned(),
            vcpus: 1,
            mem_mib: 256,
        });
        report.recovery.extend(Recovery::from_runs(
            "<script>",
            Method::Reboot,
            vec![run(&[(Phase::FirstRx, 2e6)])],
        ));
        report
            .other
            .insert("<script>".to_owned(), "<script>".into());
        let page = page(&report).unwrap().into_string();
        assert!(page.contains("first_rx") && page.contains("2000.000"));
        assert!(!page.contains("<script") && !page.contains("http-equiv"));
        assert!(!page.contains("src=") && !page.contains("href="));
    }

    #[test]
    fn the_bars_of_restart_and_reboot_have_a_legend_with_each_phase_once() {
        let mut report = environment::report_here();
        for method in [Method::Restart, Method::Reboot] {
            let run = run(&[(Phase::Returned, 1e6), (Phase::LinkUp, 2e6)]);
            report
                .recovery
                .extend(Recovery::from_runs("e1000", method, vec![run]));
        }
        let page = page(&report).unwrap().into_string();
        let legend = page.split("class=\"legend\"").nth(1).unwrap();
        let legend = legend.split("</p>").next().unwrap();
        for phase in [Phase::Returned, Phase::LinkUp] {
            assert_eq!(legend.matches(phase.name()).count(), 1, "{legend}");
            let color = css(phase_color(phase));
            assert_eq!(legend.matches(&color).count(), 1, "{legend}");
        }
        assert!(!legend.contains(Phase::FirstRx.name()));
    }
}
