//! `campaign false-alarms`: isolated calls without a fault, none of which is to be taken back.

use std::time::Duration;

use isolation::attach::request::Contain;
use recovery::campaign::workload::Steps;

use super::{WorkArgs, setup};
use crate::campaign::alarms::{self, FalseAlarms};
use crate::cli::images::Images;
use crate::cli::isolation::StoresArgs;
use crate::cli::{Ending, print_bytes, print_json};
use crate::table::table;
use crate::words::counted;

/// `campaign false-alarms`
#[derive(Debug, clap::Args)]
pub struct AlarmsArgs {
    #[command(flatten)]
    images: Images,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    stores: StoresArgs,
    /// How long the guest works
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    minutes: u32,
    /// What decides the order of its steps
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl AlarmsArgs {
    /// `campaign false-alarms`
    pub fn run(self) -> anyhow::Result<Ending> {
        let contain = self.stores.contain(Contain::Full)?;
        let setup = setup(
            &self.images,
            self.work.workload()?,
            contain,
            (Steps::All, 0),
        )?;
        let time = Duration::from_secs(60 * u64::from(self.minutes));
        let mut each = |found: &FalseAlarms| {
            let (calls, taken_back) = found.totals();
            eprintln!(
                "campaign: {} in {} s, {}, {taken_back} taken back",
                counted(found.rounds, "round", "rounds"),
                found.took_s,
                counted(calls, "call", "calls"),
            );
            true
        };
        let mut tell = |what: &str| eprintln!("campaign: {what}");
        let found = alarms::look(&setup, self.seed, time, &mut tell, &mut each)?;
        match self.json {
            true => print_json(&found)?,
            false => print_bytes(text(&found).as_bytes())?,
        }
        Ok(match found.totals().1 {
            0 => Ending::SUCCESS,
            _ => Ending::FAILURE,
        })
    }
}

/// The headline, and calls by function.
fn text(found: &FalseAlarms) -> String {
    let (calls, taken_back) = found.totals();
    let mut text = format!(
        "{} in {} of {} without a fault, {} in {} s\n\n",
        counted(taken_back, "false alarm", "false alarms"),
        counted(calls, "isolated call", "isolated calls"),
        found.driver,
        counted(found.rounds, "round", "rounds"),
        found.took_s
    );
    let mut table = table(&["isolated", "calls", "taken back", "in the guest"]);
    for entry in &found.entries {
        table.add_row(vec![
            entry.name.clone(),
            entry.calls.to_string(),
            entry.taken_back.to_string(),
            entry.in_the_guest.to_string(),
        ]);
    }
    text.push_str(&format!("{table}\n"));
    for line in found.alarms.iter().chain(&found.failed_steps) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::worker::EntryCalls;

    #[test]
    fn the_headline_has_all_calls_and_what_was_wrong_is_below() {
        let entry = |name: &str, calls, taken_back| EntryCalls {
            name: name.to_owned(),
            calls,
            taken_back,
            in_the_guest: 3,
        };
        let mut found = FalseAlarms {
            driver: "e1000".to_owned(),
            rounds: 2,
            took_s: 60,
            entries: vec![entry("f", 7, 0), entry("g", 5, 0)],
            ..FalseAlarms::default()
        };
        let said = text(&found);
        assert!(
            said.starts_with(
                "0 false alarms in 12 isolated calls of e1000 without a fault, 2 rounds in 60 s\n"
            ),
            "{said}"
        );
        found.entries.push(entry("h", 1, 1));
        found.alarms = vec!["h: stray write".to_owned()];
        let said = text(&found);
        assert!(said.starts_with("1 false alarm in 13"), "{said}");
        assert!(said.ends_with("h: stray write\n"), "{said}");
    }
}
