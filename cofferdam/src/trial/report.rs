//! What became of a trial: as JSON, as a table, as an exit status.

use guest_images::BuiltImage;
use isolation::status::{EntryStatus, ModuleStatus};
use recovery::ladder::LadderStatus;
use recovery::violations::Violations;
use serde::{Deserialize, Serialize};

use super::candidate::Candidate;
use crate::control::protocol::Status;
use crate::table::{number, table};
use crate::top::text::clean;
use crate::words::counted;

/// Most violations that a person is shown.
const MAX_SHOWN: usize = 8;

/// Exit status when a call was taken back, the driver is not isolated any more, or the guest has
/// panicked.
const TAKEN_BACK: u8 = 3;
/// Exit status when only the command in the guest has failed.
const COMMAND_FAILED: u8 = 4;

/// A function that is not isolated though all were wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotIsolated {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: serde_json::Value,
}

/// A command that was run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Ran {
    /// The command.
    pub command: String,
    /// Its exit status.
    pub status: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// It was killed because its time was up.
    pub timed_out: bool,
    /// Why its end is not known.
    pub problem: Option<String>,
    /// What it wrote to standard output, if that was kept.
    pub stdout: String,
    /// What it wrote to standard error, if that was kept.
    pub stderr: String,
}

impl Ran {
    /// A command that is about to run.
    pub fn new(command: &str) -> Self {
        Self {
            command: command.to_owned(),
            ..Self::default()
        }
    }

    /// How it ended, in words; nothing of one that ended well.
    fn failed(&self) -> Option<String> {
        match (self.status, self.signal, &self.problem) {
            (Some(0), ..) => None,
            (Some(status), ..) => Some(format!("ended with status {status}")),
            (_, Some(signal), _) => Some(format!("was killed by signal {signal}")),
            (.., Some(problem)) => Some(format!("did not end: {problem}")),
            _ => Some("was killed because its time was up".to_owned()),
        }
    }
}

/// What became of a trial.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the module.
    pub module: String,
    /// Its file.
    pub file: String,
    /// The guest's kernel.
    pub kernel: String,
    /// The image that it was booted from.
    pub image: String,
    /// Whether functions were isolated.
    pub isolated: bool,
    /// The isolated functions with their counters, as `cofferdam status` has them.
    pub entries: Vec<EntryStatus>,
    /// Functions that cannot be isolated.
    pub not_isolated: Vec<NotIsolated>,
    /// Calls of all isolated functions.
    pub calls: u64,
    /// Calls whose effects are in the guest.
    pub commits: u64,
    /// Calls that were taken back.
    pub taken_back: u64,
    /// What they did wrong, like ones counted.
    pub violations: Vec<Violations>,
    /// Why the module is not isolated any more, if it is not.
    pub broken: Option<String>,
    /// How its recovery stands.
    pub recovery: Option<LadderStatus>,
    /// What the guest's kernel said last, if it has panicked.
    pub panicked: Option<String>,
    /// The command that was run.
    pub command: Option<Ran>,
    /// Name of the VM, if it goes on.
    pub vm: Option<String>,
}

impl Report {
    /// Of a module of which nothing is known yet.
    pub fn new(candidate: &Candidate, image: &BuiltImage) -> Self {
        Self {
            module: candidate.file.name.clone(),
            file: candidate.path.display().to_string(),
            kernel: image.release().to_owned(),
            image: image.name.clone(),
            isolated: false,
            entries: Vec::new(),
            not_isolated: Vec::new(),
            calls: 0,
            commits: 0,
            taken_back: 0,
            violations: Vec::new(),
            broken: None,
            recovery: None,
            panicked: None,
            command: None,
            vm: None,
        }
    }

    /// Takes over what the VM has counted.
    pub fn count(&mut self, status: &Status, violations: Vec<Violations>) {
        let own = |module: &&ModuleStatus| module.module == self.module;
        match status.isolation.iter().find(own) {
            Some(module) => {
                self.entries.clone_from(&module.entries);
                self.broken.clone_from(&module.broken);
            }
            None if self.isolated => {
                self.broken =
                    Some("the module is not there any more, and its counters are not".into());
            }
            None => {}
        }
        self.recovery = status.recovery.get(&self.module).cloned();
        let sum = |of: fn(&EntryStatus) -> u64| self.entries.iter().map(of).sum();
        self.calls = sum(|entry| entry.calls);
        self.commits = sum(|entry| entry.commits);
        let aborts: u64 = sum(|entry| entry.aborts);
        // Those of a module that was removed or restarted are in the log alone.
        let logged: u64 = violations.iter().map(|violation| violation.count).sum();
        self.taken_back = aborts.max(logged);
        self.violations = violations;
    }

    /// The exit status that tells it.
    pub fn status(&self) -> u8 {
        let gone = self
            .command
            .as_ref()
            .is_some_and(|ran| ran.failed().is_some());
        if self.taken_back > 0 || self.panicked.is_some() || self.is_broken() {
            TAKEN_BACK
        } else if gone {
            COMMAND_FAILED
        } else {
            0
        }
    }

    /// Whether its domain failed; a module that its own command has removed has not.
    fn is_broken(&self) -> bool {
        self.broken.is_some() && !self.entries.is_empty()
    }

    /// The report for a person.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if !self.entries.is_empty() {
            text.push_str(&self.table());
        }
        for violation in self.violations.iter().take(MAX_SHOWN) {
            let times = counted(violation.count, "time", "times");
            text.push_str(&format!("{times}: {}\n", clean(&violation.text)));
        }
        if self.violations.len() > MAX_SHOWN {
            let more = (self.violations.len() - MAX_SHOWN) as u64;
            text.push_str(&format!(
                "and {}; --json has all\n",
                counted(more, "other kind", "other kinds")
            ));
        }
        if let Some(broken) = &self.broken {
            text.push_str(&format!(
                "{} is not isolated any more: {}\n",
                self.module,
                clean(broken)
            ));
        }
        if let Some(line) = &self.panicked {
            text.push_str(&format!("the guest's kernel has panicked: {line}\n"));
        }
        if let Some(ran) = &self.command
            && let Some(failed) = ran.failed()
        {
            text.push_str(&format!("the command {failed}\n"));
        }
        text.push_str(&self.verdict());
        text
    }

    /// The functions that were called.
    fn table(&self) -> String {
        let mut rows = table(&["isolated in", "calls", "commits", "taken back", "mean us"]);
        let mut called: Vec<&EntryStatus> = self
            .entries
            .iter()
            .filter(|entry| entry.calls > 0)
            .collect();
        called.sort_by(|a, b| b.calls.cmp(&a.calls).then(a.name.cmp(&b.name)));
        for entry in &called {
            rows.add_row(vec![
                clean(&entry.name).into(),
                number(entry.calls),
                number(entry.commits),
                number(entry.aborts),
                number(entry.total_ns / entry.calls.max(1) / 1000),
            ]);
        }
        let others = (self.entries.len() - called.len()) as u64;
        let mut text = match called.is_empty() {
            true => String::new(),
            false => format!("{rows}\n"),
        };
        if others > 0 {
            text.push_str(&format!(
                "{} isolated, and not called\n",
                counted(others, "function more is", "functions more are")
            ));
        }
        if !self.not_isolated.is_empty() {
            let count = self.not_isolated.len() as u64;
            text.push_str(&format!(
                "{} cannot be isolated; --json says why\n",
                counted(count, "function", "functions")
            ));
        }
        text
    }

    /// All of it in a line.
    fn verdict(&self) -> String {
        let module = &self.module;
        let on = format!("on Linux {}", self.kernel);
        if !self.isolated {
            return format!("{module} was inserted {on}; none of its functions is isolated\n");
        }
        match (self.taken_back, self.calls) {
            (0, 0) => format!(
                "{module} {on}: no isolated function was called; --run gives it something to do\n"
            ),
            (0, calls) => format!(
                "{module} {on}: {}, none taken back\n",
                counted(calls, "call", "calls")
            ),
            (taken, calls) => format!(
                "{module} {on}: {}, {taken} of them taken back\n",
                counted(calls.max(taken), "call", "calls")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            module: "mine".into(),
            file: "mine.ko".into(),
            kernel: "6.1.0-7-amd64".into(),
            image: "6.1-amd64".into(),
            isolated: true,
            entries: Vec::new(),
            not_isolated: Vec::new(),
            calls: 0,
            commits: 0,
            taken_back: 0,
            violations: Vec::new(),
            broken: None,
            recovery: None,
            panicked: None,
            command: None,
            vm: None,
        }
    }

    fn entry(name: &str, calls: u64, aborts: u64) -> EntryStatus {
        EntryStatus {
            calls,
            commits: calls - aborts,
            aborts,
            ..EntryStatus::new(name)
        }
    }

    #[test]
    fn the_exit_status_tells_whether_a_call_was_taken_back() {
        let mut report = report();
        assert_eq!(report.status(), 0);
        report.command = Some(Ran {
            status: Some(1),
            ..Ran::new("false")
        });
        assert_eq!(report.status(), COMMAND_FAILED);
        report.taken_back = 1;
        assert_eq!(report.status(), TAKEN_BACK);
        report.taken_back = 0;
        report.command = None;
        report.panicked = Some("Kernel panic".into());
        assert_eq!(report.status(), TAKEN_BACK);
        report.panicked = None;
        report.broken = Some("its tables".into());
        // Removed by its own command.
        assert_eq!(report.status(), 0);
        report.entries = vec![entry("mine_xmit", 3, 0)];
        assert_eq!(report.status(), TAKEN_BACK);
    }

    #[test]
    fn a_person_sees_what_was_called_most_first_and_what_was_not() {
        let mut report = report();
        report.entries = vec![
            entry("mine_open", 1, 0),
            entry("mine_stop", 0, 0),
            entry("mine_xmit", 7, 2),
        ];
        report.calls = 8;
        report.commits = 6;
        report.taken_back = 2;
        report.violations = vec![Violations {
            entry: "mine_xmit".into(),
            count: 2,
            first_ns: 0,
            last_ns: 0,
            text: "mine_xmit: stray write\x1b[2J".into(),
            image: None,
        }];
        let text = report.text();
        let at = |word: &str| {
            text.find(word)
                .unwrap_or_else(|| panic!("no {word} in {text}"))
        };
        assert!(at("mine_xmit") < at("mine_open"), "{text}");
        assert!(
            !text.contains("mine_stop") && !text.contains('\x1b'),
            "{text}"
        );
        at("1 function more is isolated, and not called");
        at("2 times: mine_xmit: stray write");
        assert!(text.ends_with("8 calls, 2 of them taken back\n"), "{text}");
        report.command = Some(Ran {
            timed_out: true,
            ..Ran::new("sleep 9")
        });
        assert!(report.text().contains("its time was up"));
    }
}
