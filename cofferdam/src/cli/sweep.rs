//! `sweep`: modules of a kernel's package, one after the other, with all of their functions
//! isolated.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use recovery::campaign::workload::checks;
use recovery::sweep::record::{FaultEnd, Record, Sweep, Verdict};
use recovery::sweep::{Case, cases};
use serde::Serialize;

use super::images::Images;
use super::{Ending, print_bytes, print_json};
use crate::bench::guest::GuestOptions;
use crate::bench::together::Together;
use crate::sweep::{self, SweepOptions};
use crate::table::{number, table};

/// The initramfs that has the modules.
const INITRD: &str = "initrd-sweep.cpio";

/// `sweep`
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Each module is loaded in a guest that is rewound before it, does its work natively, and then once more with all of its functions
isolated: what is otherwise counts, and so does each call that is taken back. Then one fault is put into functions that were
called, one at a time, and the work is done twice more. One line of JSON a module goes into the file; a sweep that was
interrupted goes on where its file ends.

Examples:
  cofferdam sweep --file sweep.jsonl
  cofferdam sweep --class qdisc,filter --faults 2 --file few.jsonl
  cofferdam sweep --module sch_htb,interface/bridge --file one.jsonl
  cofferdam sweep show sweep.jsonl
  cofferdam sweep list"
)]
pub struct SweepArgs {
    #[command(subcommand)]
    command: Option<SweepCommand>,
    #[command(flatten)]
    run: RunArgs,
}

/// What else can be done.
#[derive(Debug, clap::Subcommand)]
enum SweepCommand {
    /// Show what is in a sweep's file
    Show {
        /// The file
        file: PathBuf,
        /// Each module, not only those that are not right
        #[arg(long)]
        all: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List the modules with what each is to do
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    #[command(flatten)]
    images: Images,
    /// Modules of these classes; of all without it
    #[arg(long, value_name = "CLASS", value_delimiter = ',')]
    class: Vec<String>,
    /// These modules, by name or as CLASS/NAME; all without it
    #[arg(long, value_name = "MODULE", value_delimiter = ',')]
    module: Vec<String>,
    /// In how many functions of each module that is right a fault is tried
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=1000))]
    faults: u32,
    /// Where what came of each module is written
    #[arg(long, value_name = "FILE", default_value = "sweep.jsonl")]
    file: PathBuf,
    /// What came of all as JSON
    #[arg(long)]
    json: bool,
}

impl SweepArgs {
    /// `sweep`
    pub fn run(self) -> anyhow::Result<Ending> {
        match self.command {
            None => {
                let _together = Together::begin(false)?;
                self.run.run()
            }
            Some(SweepCommand::Show { file, all, json }) => {
                show(&sweep::read(&file)?, all, json)?;
                Ok(Ending::SUCCESS)
            }
            Some(SweepCommand::List { json }) => list(json),
        }
    }
}

impl RunArgs {
    fn run(self) -> anyhow::Result<Ending> {
        let cases = self.cases()?;
        let options = SweepOptions {
            guest: GuestOptions::new(&self.images.images)?
                .initrd(INITRD)
                .with("--memory 512M")
                .with(&checks()),
            cases,
            faults: self.faults,
            file: self.file,
        };
        let mut tell = |what: &str| eprintln!("sweep: {what}");
        let mut each = |record: &Record| eprintln!("sweep: {}", line(record));
        let sweep = sweep::run(&options, &mut tell, &mut each)?;
        show(&sweep, false, self.json)?;
        Ok(Ending::SUCCESS)
    }

    /// Those that were asked for.
    fn cases(&self) -> anyhow::Result<Vec<Case>> {
        let all = cases().context("the program's own cases")?;
        for class in &self.class {
            let known = all.iter().any(|case| case.class == *class);
            ensure!(
                known,
                "there is no class {class}: `cofferdam sweep list` shows them"
            );
        }
        let is_meant = |case: &Case, module: &String| {
            *module == case.workload.driver || *module == case.name()
        };
        for module in &self.module {
            let known = all.iter().any(|case| is_meant(case, module));
            ensure!(
                known,
                "nothing is known of a module {module}: `cofferdam sweep list` shows those that can be swept"
            );
        }
        let wanted = |case: &Case| {
            (self.class.is_empty() || self.class.contains(&case.class))
                && (self.module.is_empty()
                    || self.module.iter().any(|module| is_meant(case, module)))
        };
        let cases: Vec<_> = all.into_iter().filter(wanted).collect();
        ensure!(
            !cases.is_empty(),
            "none of these modules is in these classes"
        );
        Ok(cases)
    }
}

/// What came of a module, in a line.
fn line(record: &Record) -> String {
    let (called, inside) = record.inside();
    let mut line = format!("{}: {}", record.name(), record.verdict());
    if called > 0 {
        line.push_str(&format!(
            ", {inside} of {called} functions that were called ran inside"
        ));
    }
    if !record.faults.is_empty() {
        let reached = record.faults.len() - record.faults_that(FaultEnd::NotReached);
        let recovered = record.faults_that(FaultEnd::Recovered);
        line.push_str(&format!(", {recovered} of {reached} faults recovered from"));
        if let Some(ratio) = median(record.ratios()) {
            line.push_str(&format!(", {ratio:.0} times sooner than a restart"));
        }
    }
    if let Some(why) = record.why() {
        line.push_str(": ");
        line.push_str(why.lines().next().unwrap_or_default());
    }
    line
}

/// Figures of a class, or of all.
#[derive(Debug, Default, Serialize)]
struct Figures {
    modules: usize,
    verdicts: BTreeMap<String, usize>,
    /// Functions that were called, and of these those of which a call ran inside to its end.
    functions: (usize, usize),
    /// Calls, and of these those that ran inside to their end.
    calls: (u64, u64),
    /// Faults that were come to, those that were recovered from, those that were noticed, and
    /// guests lost by one.
    faults: [usize; 4],
    /// Of faults that were recovered from by taking the call back: how many times as long a restart
    /// of the driver takes at least.
    times_sooner: Vec<f64>,
}

/// The middle one, if there is one.
fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied()
}

impl Figures {
    fn add(&mut self, record: &Record) {
        self.modules += 1;
        *self
            .verdicts
            .entry(record.verdict().to_string())
            .or_default() += 1;
        let ((called, inside), (calls, inside_calls)) = (record.inside(), record.calls());
        self.functions = (self.functions.0 + called, self.functions.1 + inside);
        self.calls = (
            self.calls.0.saturating_add(calls),
            self.calls.1.saturating_add(inside_calls),
        );
        let ends = |end| record.faults_that(end);
        let [recovered, detected, lost] =
            [FaultEnd::Recovered, FaultEnd::Detected, FaultEnd::Lost].map(ends);
        self.faults[0] += record.faults.len() - ends(FaultEnd::NotReached);
        self.faults[1] += recovered;
        self.faults[2] += recovered + detected;
        self.faults[3] += lost;
        self.times_sooner.extend(record.ratios());
    }
}

fn show(sweep: &Sweep, all: bool, json: bool) -> anyhow::Result<()> {
    let mut total = Figures::default();
    let mut classes: BTreeMap<&str, Figures> = BTreeMap::new();
    for record in &sweep.records {
        total.add(record);
        classes.entry(&record.class).or_default().add(record);
    }
    if json {
        return print_json(&serde_json::json!({
            "kernel": sweep.header.kernel, "all": total, "classes": classes, "modules": sweep.records,
        }));
    }
    let mut text = format!(
        "{} with all functions isolated, Linux {}: {} right, {} of {} functions that were called ran inside\n\n",
        crate::words::counted(total.modules as u64, "module", "modules"),
        sweep.header.kernel,
        total
            .verdicts
            .get(&Verdict::Right.to_string())
            .unwrap_or(&0),
        total.functions.1,
        total.functions.0,
    );
    let verdicts: Vec<String> = Verdict::ALL.iter().map(ToString::to_string).collect();
    let mut heads = vec!["class", "modules"];
    heads.extend(verdicts.iter().map(String::as_str));
    heads.extend([
        "functions called",
        "inside",
        "calls",
        "inside",
        "faults",
        "recovered",
        "times sooner than a restart (median)",
    ]);
    let mut figures = table(&heads);
    for (class, of) in classes.into_iter().chain([("all", total)]) {
        let mut row = vec![comfy_table::Cell::new(class), number(of.modules)];
        row.extend(
            verdicts
                .iter()
                .map(|verdict| number(of.verdicts.get(verdict).unwrap_or(&0))),
        );
        row.extend([number(of.functions.0), number(of.functions.1)]);
        row.extend([number(of.calls.0), number(of.calls.1)]);
        row.extend([number(of.faults[0]), number(of.faults[1])]);
        let sooner = median(of.times_sooner);
        row.push(number(
            sooner.map_or_else(String::new, |times| format!("{times:.0}")),
        ));
        figures.add_row(row);
    }
    text.push_str(&format!("{figures}\n"));
    let wanted = |record: &&Record| all || record.why().is_some();
    for record in sweep.records.iter().filter(wanted) {
        text.push_str(&line(record));
        text.push('\n');
    }
    print_bytes(text.as_bytes())
}

fn list(json: bool) -> anyhow::Result<Ending> {
    #[derive(Serialize)]
    struct Row {
        class: String,
        module: String,
        steps: Vec<String>,
    }
    let rows = cases()
        .context("the program's own cases")?
        .into_iter()
        .map(|case| Row {
            steps: case
                .workload
                .steps
                .iter()
                .map(|step| step.name.clone())
                .collect(),
            module: case.workload.driver,
            class: case.class,
        });
    if json {
        print_json(&rows.collect::<Vec<_>>())?;
        return Ok(Ending::SUCCESS);
    }
    let mut list = table(&["class", "module", "what it does"]);
    for row in rows {
        list.add_row([row.class, row.module, row.steps.join(", ")]);
    }
    print_bytes(format!("{list}\n").as_bytes())?;
    Ok(Ending::SUCCESS)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn the_image_of_sweeps_has_all_that_is_loaded() {
        let image = guest_images::images_of(guest_images::kernels::DEFAULT);
        let mut images = image.images.into_iter();
        let image = images.find(|image| image.file == INITRD).unwrap();
        let named = |module: &str| recovery::sweep::loaded_name(module);
        let there: Vec<_> = image.modules.iter().map(|module| named(module)).collect();
        for case in cases().unwrap() {
            for module in case.workload.modules.iter().chain([&case.workload.driver]) {
                assert!(there.contains(&named(module)), "{}: {module}", case.name());
            }
        }
    }

    #[test]
    fn modules_are_chosen_by_class_and_name_and_others_are_refused() {
        let args = |class: &[&str], module: &[&str]| RunArgs {
            images: Images {
                images: PathBuf::new(),
            },
            class: class.iter().map(|class| (*class).to_owned()).collect(),
            module: module.iter().map(|module| (*module).to_owned()).collect(),
            faults: 0,
            file: PathBuf::new(),
            json: false,
        };
        let names = |class: &[&str], module: &[&str]| {
            let cases = args(class, module).cases().unwrap();
            cases.iter().map(Case::name).collect::<Vec<_>>()
        };
        assert_eq!(names(&[], &["sch_htb"]), ["qdisc/sch_htb"]);
        assert_eq!(
            names(&[], &["bridge"]),
            ["interface/bridge", "members/bridge"]
        );
        assert_eq!(names(&["members"], &["bridge"]), ["members/bridge"]);
        assert_eq!(names(&[], &["members/bridge"]), ["members/bridge"]);
        for refused in [
            args(&["nothing"], &[]),
            args(&[], &["e1000"]),
            args(&["qdisc"], &["bridge"]),
        ] {
            assert!(refused.cases().is_err());
        }
    }
}
