//! `report`: shows, merges and draws what was measured.

use std::path::PathBuf;

use super::{Ending, print_bytes, print_json};
use crate::report::drivers;
use crate::report::isolation::Isolation;
use crate::report::suspend::{Suspend, of_boot};
use crate::report::switch::{PHASES, Switch, than_hotplug};
use crate::report::traffic::{Traffic, of_own};
use crate::report::{Report, Stat, html, merge, svg};
use crate::table::{number, table};

/// `report`
#[derive(Debug, clap::Subcommand)]
pub enum ReportCommand {
    /// Show a report's numbers
    Show {
        /// Report that `bench` or `merge` wrote
        report: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make one report out of several of the same build and host
    #[command(after_help = "\
Example:
  cofferdam report merge boot.json recovery.json --json report.json --html report.html")]
    Merge {
        /// The parts
        #[arg(required = true)]
        parts: Vec<PathBuf>,
        /// Where to write the report
        #[arg(long, value_name = "FILE")]
        json: PathBuf,
        /// Where to write it as a page with plots
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
    },
    /// Draw a report: one page with plots and tables that needs nothing else
    #[command(after_help = "\
Example:
  cofferdam report html target/demo/report.json")]
    Html {
        /// Report that `bench` or `merge` wrote
        report: PathBuf,
        /// Where to write the page; beside the report when not given
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Draw a report's plots of recoveries, each as an SVG file
    #[command(after_help = "\
Example:
  cofferdam report svg target/bench/recovery.json --output plots")]
    Svg {
        /// Report that `bench` or `merge` wrote
        report: PathBuf,
        /// Folder for the files, made if it is not there
        #[arg(long, short, value_name = "FOLDER")]
        output: PathBuf,
    },
}

impl ReportCommand {
    /// `report`
    pub fn run(&self) -> anyhow::Result<Ending> {
        match self {
            Self::Show { report, json } => {
                let report = merge::read(report)?;
                if *json {
                    print_json(&report)?;
                } else {
                    print_bytes(text(&report).as_bytes())?;
                }
            }
            Self::Merge {
                parts,
                json,
                html: page,
            } => {
                let parts: Vec<Report> = parts
                    .iter()
                    .map(|part| merge::read(part))
                    .collect::<Result<_, _>>()?;
                let whole = merge::merge(parts)?;
                merge::write(&whole, json)?;
                if let Some(page) = page {
                    html::write(&whole, page)?;
                }
            }
            Self::Html { report, output } => {
                let page = output
                    .clone()
                    .unwrap_or_else(|| report.with_extension("html"));
                html::write(&merge::read(report)?, &page)?;
                print_bytes(format!("{}\n", page.display()).as_bytes())?;
            }
            Self::Svg { report, output } => {
                svg::write(&merge::read(report)?, output)?;
                print_bytes(format!("{}\n", output.display()).as_bytes())?;
            }
        }
        Ok(Ending::SUCCESS)
    }
}

/// Snapshots, restores and rewinds as a table.
fn suspend_text(all: &[Suspend]) -> String {
    let mut rows = table(&[
        "suspend",
        "MiB",
        "n",
        "pages",
        "ms (median)",
        "p99",
        "of the boot",
        "guest at rest, ms",
    ]);
    let ms = |us: f64| number(format!("{:.2}", us / 1e3));
    for row in all {
        let part = of_boot(all, row);
        rows.add_row(vec![
            row.method.words().into(),
            number(row.mem_mib),
            number(row.us.n),
            number(
                row.dirty_pages
                    .map_or_else(String::new, |pages| pages.to_string()),
            ),
            ms(row.us.p50),
            ms(row.us.p99),
            number(part.map_or_else(String::new, |part| format!("{part:.5}"))),
            row.rest_us.map_or_else(|| number(""), |rest| ms(rest.p50)),
        ]);
    }
    format!("{rows}\n")
}

/// A NIC that moves, as tables.
fn switch_text(all: &[Switch]) -> String {
    let mut rows = table(&[
        "switch",
        "device",
        "n",
        "outage, ms (median)",
        "p99",
        "largest",
        "shorter than plug",
        "its link left out",
        "late frames",
    ]);
    let mut heads = vec!["its parts, us (median)"];
    heads.extend(PHASES);
    let mut parts = table(&heads);
    let ms = |us: f64| number(format!("{:.2}", us / 1e3));
    for row in all {
        let shorter = than_hotplug(all, row);
        let times = |times: Option<f64>| {
            number(times.map_or_else(String::new, |times| format!("{times:.0} times")))
        };
        rows.add_row(vec![
            row.way.to_string().into(),
            row.device.as_str().into(),
            number(row.n),
            ms(row.outage_us.p50),
            ms(row.outage_us.p99),
            ms(row.outage_us.max),
            times(shorter.map(|shorter| shorter.times)),
            times(shorter.and_then(|shorter| shorter.times_without_link)),
            number(row.late_frames),
        ]);
        if !row.phases_us.is_empty() {
            let us = |name: &str| {
                let stat = row.phases_us.get(name);
                number(stat.map_or_else(String::new, |stat| format!("{:.0}", stat.p50)))
            };
            let name = row.way.to_string();
            let cells = PHASES.iter().map(|name| us(name));
            parts.add_row(
                std::iter::once(name.into())
                    .chain(cells)
                    .collect::<Vec<_>>(),
            );
        }
    }
    match parts.is_empty() {
        true => format!("{rows}\n"),
        false => format!("{rows}\n{parts}\n"),
    }
}

/// A report's numbers as tables.
pub fn text(report: &Report) -> String {
    let mut text = times_text(report) + &rollbacks_text(report);
    text.push_str(&drivers::text(&report.drivers));
    if let Some(boot) = &report.boot {
        text.push_str(&format!(
            "resident beyond guest memory: {} KiB\n",
            boot.vmm_rss_kib
        ));
    }
    if !report.suspend.is_empty() {
        text.push_str(&suspend_text(&report.suspend));
    }
    for campaign in &report.campaigns {
        text.push_str(&format!(
            "faults in {}, seed {}: {}\n",
            campaign.driver,
            campaign.seed,
            super::campaign::text(&campaign.summary)
        ));
    }
    for one in &report.suspend_followed {
        text.push_str(&format!(
            "with a mark set, {} MiB: pings {:.2}, TCP {:.2} of those without\n",
            one.mem_mib, one.pings_fraction, one.tcp_fraction
        ));
    }
    for one in &report.clones {
        text.push_str(&one.sentence());
        text.push('\n');
    }
    if !report.switch.is_empty() {
        text.push_str(&switch_text(&report.switch));
    }
    if let Some(isolation) = &report.isolation {
        text.push_str(&isolation_text(isolation));
    }
    if !report.traffic.is_empty() {
        text.push_str(&traffic_text(&report.traffic));
    }
    text
}

/// How long boots and recoveries take, as a table.
fn times_text(report: &Report) -> String {
    let mut stats = table(&["ms", "n", "smallest", "median", "p99", "largest"]);
    let mut add = |name: String, stat: &Stat| {
        let ms = |us: f64| number(format!("{:.3}", us / 1e3));
        stats.add_row(vec![
            name.into(),
            number(stat.n),
            ms(stat.min),
            ms(stat.p50),
            ms(stat.p99),
            ms(stat.max),
        ]);
    };
    if let Some(boot) = &report.boot {
        if let Some(ready) = &boot.vmm_ready_us {
            add("boot: to vCPUs run".to_owned(), ready);
        }
        add("boot: to /init".to_owned(), &boot.to_init_us);
    }
    for other in &report.boot_others {
        add(
            format!("boot of {}: to /init", other.vmm),
            &other.to_init_us,
        );
    }
    for recovery in &report.recovery {
        let method = recovery.name();
        for (phase, stat) in &recovery.phases_us {
            add(format!("{method}: {}", phase.name()), stat);
        }
        add(format!("{method}: total"), &recovery.total_us);
        for (step, stat) in &recovery.steps_us {
            add(format!("{method}: step {step}"), stat);
        }
    }
    match stats.is_empty() {
        true => String::new(),
        false => format!("{stats}\n"),
    }
}

/// How much sooner a rollback has the network back than other ways, as a table.
fn rollbacks_text(report: &Report) -> String {
    if report.recovery_ratios.is_empty() {
        return String::new();
    }
    let mut rows = table(&[
        "rollback of",
        "n",
        "returned, us",
        "p99",
        "largest",
        "sooner than",
        "returned",
        "first rx",
    ]);
    for ratio in &report.recovery_ratios {
        let us = |us: f64| number(format!("{us:.0}"));
        rows.add_row(vec![
            ratio.name().into(),
            number(ratio.n),
            us(ratio.returned_us.p50),
            us(ratio.returned_us.p99),
            us(ratio.returned_us.max),
            ratio.against.name().into(),
            number(format!("{:.0} times", ratio.returned)),
            number(ratio.first_rx_text()),
        ]);
    }
    format!("{rows}\n")
}

/// What isolation costs, as tables.
fn isolation_text(isolation: &Isolation) -> String {
    let mut rows = table(&["isolated", "pings/s", "of none", "TCP MiB/s", "of none"]);
    let mut costs = table(&[
        "function (in set)",
        "calls",
        "exits",
        "crossings",
        "system calls",
        "pages",
        "hold, us",
        "private VM, us",
        "host, us",
    ]);
    let decimals = |value: f64, n: usize| number(format!("{value:.n$}"));
    for set in &isolation.sets {
        rows.add_row(vec![
            set.name().into(),
            decimals(set.pings_per_s, 1),
            decimals(set.pings_fraction, 2),
            decimals(set.tcp_mib_per_s, 3),
            decimals(set.tcp_fraction, 2),
        ]);
        for f in &set.functions {
            costs.add_row(vec![
                format!("{} ({})", f.name, set.name()).into(),
                number(f.calls),
                decimals(f.exits_per_call, 2),
                decimals(f.crossings_per_call, 1),
                decimals(f.ioctls_per_call, 1),
                decimals(f.dirty_pages_per_call, 1),
                decimals(f.holding_us, 1),
                decimals(f.private_us, 1),
                decimals(f.host_us, 1),
            ]);
        }
    }
    format!(
        "{rows}\n{costs}\nexits to the isolator after release: {}\n",
        isolation.exits_when_off
    )
}

/// What was sent and what came back, as a table.
fn traffic_text(all: &[Traffic]) -> String {
    let mut rows = table(&[
        "traffic",
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
    ]);
    let own = |t: &Traffic| {
        let part = of_own(all, t);
        part.map_or_else(String::new, |part| format!("{part:.2}"))
    };
    for t in all {
        let count = |n: Option<u64>| number(n.map_or_else(String::new, |n| n.to_string()));
        let mib = |bytes: u64| number(format!("{:.1}", bytes as f64 / f64::from(1 << 20)));
        rows.add_row(vec![
            t.kind.clone().into(),
            t.nic_at.words().into(),
            number(own(t)),
            number(format!("{:.1}", t.seconds)),
            count(t.sent),
            count(t.answered),
            count(t.reordered),
            count(t.duplicated),
            number(t.corrupted),
            mib(t.bytes_to_peer),
            mib(t.bytes_from_peer),
        ]);
    }
    format!("{rows}\n")
}
