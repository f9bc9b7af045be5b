//! All modules of some kinds, in one table.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use guest_images::modules::ModuleTree;
use isolation::analysis::analyze;
use isolation::analysis::coverage::{FAMILIES, Family, Obstacle, family_of, obstacles};
use isolation::analysis::findings::{Finding, FindingKind};
use isolation::analysis::kernel::Kernel;
use serde::Serialize;

use super::{kernel, read};
use crate::table::{number, table};

/// One module in short.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    name: String,
    family: &'static str,
    /// Suspend and resume in each of its drivers; `None` if it has no driver.
    suspends_and_resumes: Option<bool>,
    obstacles: Vec<Obstacle>,
    pub findings: Vec<Finding>,
}

impl Row {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Table {
    /// By kind of driver.
    pub families: BTreeMap<&'static str, Family>,
    /// All of them together.
    pub total: Family,
    /// Files that could not be read, with the reason.
    pub unread: Vec<(String, String)>,
    /// Threads that worked, and how long it took.
    jobs: usize,
    seconds: f64,
    /// Each module, by name.
    pub modules: Vec<Row>,
}

/// Reads all modules under `modules` that are of a kind that is tabled.
pub fn run(kernel_file: &Path, modules: &Path, jobs: usize) -> anyhow::Result<Table> {
    let begin = Instant::now();
    let tree = ModuleTree::open(modules)?;
    let files: Vec<(PathBuf, &'static str)> = tree
        .files()
        .filter_map(|(_, file)| {
            let text = file.to_str()?;
            let (_, path) = text.rsplit_once("/kernel/")?;
            Some((file.to_owned(), family_of(path)?))
        })
        .collect();
    let Some((first, _)) = files.first() else {
        bail!(
            "{} has no network, block, sound, USB or input modules (in kernel/drivers/net and so on)",
            modules.display()
        );
    };
    let kernel = kernel::read(kernel_file, &read(first)?)?;
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((file, family)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = one(file, family, &kernel);
                    if let Ok(mut results) = results.lock() {
                        results.push((file, result));
                    }
                }
            });
        }
    });
    let mut results = results
        .into_inner()
        .ok()
        .context("a thread that read modules panicked")?;
    results.sort_by_key(|(file, _)| *file);
    let mut table = Table {
        families: FAMILIES
            .iter()
            .map(|(name, _)| (*name, Family::default()))
            .collect(),
        total: Family::default(),
        unread: Vec::new(),
        jobs,
        seconds: 0.0,
        modules: Vec::new(),
    };
    for (file, result) in results {
        match result {
            Ok((row, counted)) => {
                table
                    .families
                    .entry(row.family)
                    .or_default()
                    .merge(&counted);
                table.total.merge(&counted);
                table.modules.push(row);
            }
            Err(why) => table
                .unread
                .push((file.display().to_string(), format!("{why:#}"))),
        }
    }
    table.modules.sort_by(|a, b| a.name.cmp(&b.name));
    table.seconds = begin.elapsed().as_secs_f64();
    Ok(table)
}

fn one(file: &Path, family: &'static str, kernel: &Kernel) -> anyhow::Result<(Row, Family)> {
    let report = analyze(&read(file)?, kernel)?;
    let mut counted = Family::default();
    counted.add(&report);
    let row = Row {
        family,
        suspends_and_resumes: report.suspends_and_resumes(),
        obstacles: obstacles(&report),
        name: report.name,
        findings: report.findings,
    };
    Ok((row, counted))
}

/// What the lines of the table are called, and what stands in them.
pub fn lines(family: &Family) -> Vec<(String, usize)> {
    let obstacle = |obstacle| family.obstacles.get(&obstacle).copied().unwrap_or(0);
    let mut lines = vec![
        ("modules".to_owned(), family.modules),
        ("that register a driver".to_owned(), family.drivers),
        (
            "  with suspend and resume".to_owned(),
            family.suspend_and_resume,
        ),
        (
            "nothing in the way of isolating".to_owned(),
            family.isolated_today,
        ),
        (
            "only the device's state in the way".to_owned(),
            family.but_for_device,
        ),
        (
            "in the way: no entry".to_owned(),
            obstacle(Obstacle::NoEntry),
        ),
        (
            "in the way: no gate or no answer".to_owned(),
            obstacle(Obstacle::NoGate),
        ),
        (
            "in the way: device is not put back".to_owned(),
            obstacle(Obstacle::Device),
        ),
        (
            "some calls only by restarting the driver".to_owned(),
            obstacle(Obstacle::KernelFunctions),
        ),
        ("entries".to_owned(), family.entries),
        ("  gated and answered for".to_owned(), family.gated),
        ("  taken back as a whole".to_owned(), family.whole),
        ("  taken back by opposites".to_owned(), family.compensated),
    ];
    for kind in FindingKind::ALL {
        lines.push((
            kind.words().to_owned(),
            family.findings.get(&kind).copied().unwrap_or(0),
        ));
    }
    lines
}

/// For a person.
pub fn text(all: &Table) -> String {
    let mut heads = vec![""];
    heads.extend(all.families.keys());
    heads.push("all");
    let mut shown = table(&heads);
    let columns: Vec<Vec<(String, usize)>> = all
        .families
        .values()
        .chain([&all.total])
        .map(lines)
        .collect();
    let names = lines(&all.total);
    for (index, (name, _)) in names.iter().enumerate() {
        let numbers = columns
            .iter()
            .map(|column| number(column.get(index).map_or(0, |(_, count)| *count)));
        shown.add_row(std::iter::once(comfy_table::Cell::new(name)).chain(numbers));
    }
    let mut text = format!(
        "{shown}\n{} modules in {:.1} s by {} threads\n",
        all.total.modules, all.seconds, all.jobs
    );
    for (file, why) in &all.unread {
        text.push_str(&format!("not read: {file}: {why}\n"));
    }
    text
}
