//! A report as one HTML file that needs nothing else.
//!
//! Every number in it is in the JSON as well. Colours follow the reader's light or dark setting.

use std::fmt::Write as _;
use std::path::Path;

use super::plot::{
    boot_boxes, css, end_boxes, ordered_medians, phase_color, recovery_bars, recovery_boxes,
};
use super::ratio::{FGFT_SHORTER_BY, Ratio};
use super::{Boot, Method, Phase, Recovery, Report, Stat, Traffic};

/// Writes the page.
pub fn write(report: &Report, path: &Path) -> anyhow::Result<()> {
    super::merge::write_whole(path, page(report)?.as_bytes())
}

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
.bar { height: .8em; background: #4878cf; }
.note { opacity: .75; }";

/// The whole page.
fn page(report: &Report) -> anyhow::Result<String> {
    let mut body = String::from("<h1>Cofferdam: what was measured</h1>\n");
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
        facts.push((
            "guest",
            format!("{} vCPU, {} MiB", guest.vcpus, guest.mem_mib),
        ));
    }
    body.push_str("<table>\n");
    for (name, value) in facts {
        row(&mut body, &[name.to_owned(), escape(&value)]);
    }
    body.push_str("</table>\n");
    if !report.recovery_ratios.is_empty() {
        ratio_section(&mut body, &report.recovery_ratios);
    }
    if !report.recovery.is_empty() {
        recovery_section(&mut body, &report.recovery)?;
    }
    if let Some(boot) = &report.boot {
        boot_section(&mut body, report, boot)?;
    }
    if !report.traffic.is_empty() {
        traffic_section(&mut body, &report.traffic);
    }
    super::isolation::section(&mut body, report);
    for (name, value) in &report.other {
        let text = serde_json::to_string_pretty(value)?;
        let _ = write!(
            body,
            "<h2>{}</h2>\n<pre>{}</pre>\n",
            escape(name),
            escape(&text)
        );
    }
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>Cofferdam: what was measured</title>\n<style>\n{STYLE}\n</style>\n</head>\n\
         <body>\n{body}</body>\n</html>\n"
    ))
}

fn ratio_section(body: &mut String, ratios: &[Ratio]) {
    body.push_str("<h2>Rollback against restart and reboot</h2>\n<table>\n<tr>");
    for head in [
        "rollback of",
        "n",
        "caller runs again, ms (median)",
        "p99",
        "largest",
        "against",
        "sooner by",
        "first packet sooner by",
    ] {
        let _ = write!(body, "<th>{head}</th>");
    }
    body.push_str("</tr>\n");
    let ms = |us: f64| format!("{:.3}", us / 1e3);
    for ratio in ratios {
        row(
            body,
            &[
                escape(&ratio.name()),
                ratio.n.to_string(),
                ms(ratio.returned_us.p50),
                ms(ratio.returned_us.p99),
                ms(ratio.returned_us.max),
                ratio.against.name().to_owned(),
                format!("{:.0} times", ratio.returned),
                ratio.first_rx_text(),
            ],
        );
    }
    body.push_str("</table>\n");
    body.push_str("<p class=\"note\">The slowest of each:</p>\n<ul class=\"note\">\n");
    let entries = ratios.iter().filter(|ratio| ratio.entry.is_some());
    for ratio in entries.filter(|ratio| ratio.against == ratios[0].against) {
        let _ = writeln!(body, "<li>{}</li>", escape(&ratio.slowest));
    }
    body.push_str("</ul>\n");
    let shorter = |part: f64| format!("{:.2} %", part * 100.0);
    body.push_str("<table>\n<tr><th>failures shorter than by restart</th><th>by</th></tr>\n");
    for ratio in ratios {
        if let (None, Method::Restart, Some(sooner)) = (&ratio.entry, ratio.against, ratio.first_rx)
        {
            let ours = format!(
                "Cofferdam, this report, {} (fault to first packet)",
                ratio.name()
            );
            row(body, &[ours, shorter(1.0 - 1.0 / sooner)]);
        }
    }
    row(
        body,
        &[
            "FGFT, as published by its authors (six drivers, their hardware)".to_owned(),
            shorter(FGFT_SHORTER_BY),
        ],
    );
    body.push_str("</table>\n");
}

fn recovery_section(body: &mut String, recoveries: &[Recovery]) -> anyhow::Result<()> {
    body.push_str(
        "<h2>Recovery: how long the network is gone</h2>\n\
         <p class=\"note\">A phase lasts from the end of the phase before it to its own end. The last \
         one is the guest's first reply to the host.</p>\n",
    );
    let baselines: Vec<Recovery> = recoveries
        .iter()
        .filter(|recovery| recovery.method != Method::Rollback)
        .cloned()
        .collect();
    if !baselines.is_empty() {
        body.push_str(&recovery_bars(&baselines)?);
    }
    for (phase, what) in [
        (Phase::Returned, "until the caller runs again"),
        (Phase::FirstRx, "until a ping sent afterwards is answered"),
    ] {
        if let Some(svg) = end_boxes(recoveries, phase)? {
            let _ = writeln!(body, "<h3>Time {what}</h3>\n{svg}");
        }
    }
    for recovery in recoveries {
        let _ = writeln!(
            body,
            "<h3>{}, {} runs</h3>",
            escape(&recovery.name()),
            recovery.n
        );
        body.push_str(&recovery_boxes(recovery)?);
        stat_head(body, "phase", "ms");
        for (phase, _) in ordered_medians(recovery) {
            let swatch = format!(
                "<span class=\"swatch\" style=\"background:{}\"></span>{}",
                css(phase_color(phase)),
                phase.name()
            );
            if let Some(stat) = recovery.phases_us.get(&phase) {
                stat_row(body, &swatch, stat, 1e3);
            }
        }
        stat_row(body, "total", &recovery.total_us, 1e3);
        body.push_str("</table>\n");
        if !recovery.steps_us.is_empty() {
            stat_head(body, "step, by the guest's clock", "ms");
            for (step, stat) in &recovery.steps_us {
                stat_row(body, &escape(step), stat, 1e3);
            }
            body.push_str("</table>\n");
        }
    }
    Ok(())
}

fn boot_section(body: &mut String, report: &Report, boot: &Boot) -> anyhow::Result<()> {
    body.push_str("<h2>Boot</h2>\n");
    if let Some(svg) = boot_boxes(report)? {
        body.push_str(&svg);
    }
    stat_head(body, "start of the process to", "ms");
    if let Some(ready) = &boot.vmm_ready_us {
        stat_row(body, "vCPUs run", ready, 1e3);
    }
    stat_row(body, "first line of /init", &boot.to_init_us, 1e3);
    for other in &report.boot_others {
        let name = format!("first line of /init, {}", escape(&other.vmm));
        stat_row(body, &name, &other.to_init_us, 1e3);
    }
    body.push_str("</table>\n");
    for other in &report.boot_others {
        let _ = writeln!(
            body,
            "<p>Median against {}: {:.2}</p>",
            escape(&other.vmm),
            boot.to_init_us.p50 / other.to_init_us.p50
        );
    }
    let _ = writeln!(
        body,
        "<p>Resident memory beyond the guest's: {:.1} MiB (largest of the runs)</p>",
        boot.vmm_rss_kib as f64 / 1024.0
    );
    Ok(())
}

fn traffic_section(body: &mut String, traffic: &[Traffic]) {
    body.push_str("<h2>Traffic</h2>\n<table>\n<tr>");
    for head in [
        "kind",
        "driver",
        "s",
        "sent",
        "answered",
        "reordered",
        "doubled",
        "corrupted",
        "MiB out",
        "MiB in",
        "round trip, ms (median)",
    ] {
        let _ = write!(body, "<th>{head}</th>");
    }
    body.push_str("</tr>\n");
    let count = |n: Option<u64>| n.map_or_else(String::new, |n| n.to_string());
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for t in traffic {
        row(
            body,
            &[
                escape(&t.kind),
                escape(&t.driver),
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
            ],
        );
    }
    body.push_str("</table>\n");
}

/// Opens a table of numbers.
fn stat_head(body: &mut String, what: &str, unit: &str) {
    let _ = writeln!(
        body,
        "<table>\n<tr><th>{what}</th><th>runs</th><th>smallest, {unit}</th><th>median, {unit}</th>\
         <th>p99, {unit}</th><th>largest, {unit}</th></tr>"
    );
}

/// One line of such a table; `name` is HTML.
fn stat_row(body: &mut String, name: &str, stat: &Stat, unit_us: f64) {
    let value = |us: f64| format!("{:.3}", us / unit_us);
    row(
        body,
        &[
            name.to_owned(),
            stat.n.to_string(),
            value(stat.min),
            value(stat.p50),
            value(stat.p99),
            value(stat.max),
        ],
    );
}

/// One line of a table; the cells are HTML.
fn row(body: &mut String, cells: &[String]) {
    body.push_str("<tr>");
    for cell in cells {
        let _ = write!(body, "<td>{cell}</td>");
    }
    body.push_str("</tr>\n");
}

/// Text as HTML: what is in a report may have come from a guest.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Guest, Method, Phase, RecoveryRun, environment};

    #[test]
    fn a_page_needs_nothing_else_and_what_a_guest_said_stays_text() {
        let mut report = environment::report_here();
        report.guest = Some(Guest {
            kernel: "<script>alert(1)</script>".to_owned(),
            vcpus: 1,
            mem_mib: 256,
        });
        let run = RecoveryRun {
            at_us: [(Phase::FirstRx, 2e6)].into(),
            ..Default::default()
        };
        report
            .recovery
            .extend(Recovery::from_runs("e1000", Method::Reboot, vec![run]));
        let page = page(&report).unwrap();
        assert!(page.contains("first_rx") && page.contains("2000.000"));
        assert!(!page.contains("<script") && !page.contains("http-equiv"));
        assert!(!page.contains("src=") && !page.contains("href="));
    }
}
