//! A sweep's file: JSON lines, the first about the sweep, each other one about a module; and what
//! each came to.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Of what this program writes.
pub const FORMAT: u32 = 1;

/// Longest file that is read, in bytes: some kilobytes for each of a few thousand modules.
pub const MAX_FILE: u64 = 64 << 20;

/// What a sweep is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub sweep: u32,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// In how many functions of a module a fault is tried at most.
    pub faults: u32,
}

/// An isolated function that was called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Called {
    /// Its name.
    pub name: String,
    /// Calls.
    pub calls: u64,
    /// Those that ran inside to their end.
    pub inside: u64,
    /// Those that were taken back.
    pub taken_back: u64,
    /// Those that went on in the guest, or that it ran altogether, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub outside: BTreeMap<String, u64>,
}

/// What came of a fault.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The function that it was in.
    pub function: String,
    /// Where, in bytes from its start.
    pub offset: u64,
    /// A call came to it.
    pub reached: bool,
    /// Calls that were taken back.
    pub taken_back: u64,
    /// The guest's agent answers, and its kernel has not panicked.
    pub answers: bool,
    /// The module works afterwards.
    pub works: bool,
    /// Calls of the function afterwards that ran inside to their end.
    pub inside_again: u64,
    /// From the first fault to its caller about to run again, in microseconds, where the driver was
    /// not restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub returned_us: Option<u64>,
    /// Steps that then end otherwise than natively.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differs: Vec<String>,
    /// Lines of the kernel's log that count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
}

/// What a fault came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultEnd {
    /// No call came to it.
    NotReached,
    /// A call was taken back, and the module works, with a clean log.
    Recovered,
    /// A call was taken back, and something is not as it was.
    Detected,
    /// None was taken back.
    Undetected,
    /// The guest is lost.
    Lost,
}

impl Fault {
    /// What it came to.
    pub fn end(&self) -> FaultEnd {
        match () {
            () if !self.answers => FaultEnd::Lost,
            () if !self.reached => FaultEnd::NotReached,
            () if self.taken_back == 0 => FaultEnd::Undetected,
            () if self.works && self.log.is_empty() => FaultEnd::Recovered,
            () => FaultEnd::Detected,
        }
    }
}

/// What came of a module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it is one of.
    pub class: String,
    /// Its name.
    pub module: String,
    /// Why its work cannot be done natively, which leaves nothing to be compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfit: Option<String>,
    /// Why it cannot be isolated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// How long it takes natively to remove the module and to insert it again, in microseconds:
    /// the least that a restart of the driver takes, which also has to set up again what it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_us: Option<u64>,
    /// Functions with gates.
    #[serde(default)]
    pub gated: usize,
    /// Functions that cannot have one.
    #[serde(default)]
    pub ungated: usize,
    /// Those that were called.
    #[serde(default)]
    pub called: Vec<Called>,
    /// What calls did wrong, in words: without a fault each is a false alarm.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub violations: Vec<String>,
    /// Why the domain does not run calls any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// Steps that ended otherwise than natively.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differs: Vec<String>,
    /// Contents that were otherwise than they were written.
    #[serde(default)]
    pub corrupted: u64,
    /// Lines of the kernel's log that count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// The guest's agent answers, and its kernel has not panicked.
    #[serde(default)]
    pub answers: bool,
    /// It could be removed afterwards, or cannot natively either.
    #[serde(default)]
    pub removed: bool,
    /// Faults that were tried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
    /// How long all of it took, in milliseconds.
    pub took_ms: u64,
}

/// What a module came to, without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Its work cannot be done natively.
    Unfit,
    /// It is not isolated, for a reason that was given.
    Refused,
    /// All went as natively, and functions of it were called.
    Right,
    /// All went as natively, but no function with a gate was called.
    NotCalled,
    /// Calls were taken back that had done nothing wrong.
    FalseAlarm,
    /// Something went otherwise than natively.
    Differs,
    /// The guest is lost.
    Lost,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Right,
        Self::NotCalled,
        Self::FalseAlarm,
        Self::Differs,
        Self::Lost,
        Self::Refused,
        Self::Unfit,
    ];
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unfit => "not fit natively",
            Self::Refused => "refused",
            Self::Right => "right",
            Self::NotCalled => "not called",
            Self::FalseAlarm => "false alarm",
            Self::Differs => "differs",
            Self::Lost => "guest lost",
        })
    }
}

impl Record {
    /// Its name, of which there is one.
    pub fn name(&self) -> String {
        format!("{}/{}", self.class, self.module)
    }

    /// What it came to.
    pub fn verdict(&self) -> Verdict {
        let otherwise = !self.differs.is_empty()
            || self.corrupted > 0
            || !self.log.is_empty()
            || !self.removed
            || self.broken.is_some();
        match () {
            () if self.unfit.is_some() => Verdict::Unfit,
            () if self.refused.is_some() => Verdict::Refused,
            () if !self.answers => Verdict::Lost,
            () if !self.violations.is_empty() => Verdict::FalseAlarm,
            () if otherwise => Verdict::Differs,
            () if self.called.is_empty() => Verdict::NotCalled,
            () => Verdict::Right,
        }
    }

    /// Functions that were called and, of these, those of which a call ran inside to its end.
    pub fn inside(&self) -> (usize, usize) {
        let inside = self.called.iter().filter(|one| one.inside > 0).count();
        (self.called.len(), inside)
    }

    /// Calls and, of these, those that ran inside to their end.
    pub fn calls(&self) -> (u64, u64) {
        let sum = |count: fn(&Called) -> u64| {
            let counts = self.called.iter().map(count);
            counts.fold(0, u64::saturating_add)
        };
        (sum(|one| one.calls), sum(|one| one.inside))
    }

    /// How many faults came to that.
    pub fn faults_that(&self, end: FaultEnd) -> usize {
        self.faults
            .iter()
            .filter(|fault| fault.end() == end)
            .count()
    }

    /// Of each fault that was recovered from by taking the call back alone: how many times as long
    /// removing and inserting the module takes.
    pub fn ratios(&self) -> Vec<f64> {
        let recovered = self
            .faults
            .iter()
            .filter(|fault| fault.end() == FaultEnd::Recovered);
        let returned = recovered.filter_map(|fault| fault.returned_us.filter(|us| *us > 0));
        let restart = self.restart_us.map(|us| us as f64);
        returned
            .filter_map(|us| Some(restart? / us as f64))
            .collect()
    }

    /// What a person wants to know of one that is not right, in one line.
    pub fn why(&self) -> Option<String> {
        let first = |lines: &[String]| lines.first().cloned();
        let whys = [
            self.unfit.clone(),
            self.refused.clone(),
            first(&self.violations),
            self.broken.clone(),
            first(&self.log),
            first(&self.differs),
            (!self.answers).then(|| "the guest does not answer".to_owned()),
            (self.corrupted > 0).then(|| "contents changed".to_owned()),
            (!self.removed).then(|| "it cannot be removed".to_owned()),
        ];
        let bad = !matches!(self.verdict(), Verdict::Right | Verdict::NotCalled);
        whys.into_iter().flatten().next().filter(|_| bad)
    }
}

/// Why a sweep's file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Something else.
    #[error("line {line} is not a sweep's: {source}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Nothing.
    #[error("it is empty")]
    Empty,
    /// Another program's.
    #[error("it is of format {0}, and this program knows format {FORMAT}")]
    Format(u32),
    /// One module comes twice.
    #[error("line {line} is about {name}, and so is one before")]
    Twice {
        /// Its number, from 1.
        line: usize,
        /// The module, with its class.
        name: String,
    },
}

/// A sweep's file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sweep {
    /// What it is.
    pub header: Header,
    /// Its modules.
    pub records: Vec<Record>,
    /// Bytes of the text that are whole lines: what is behind was cut off.
    pub whole_bytes: usize,
}

/// Reads a sweep's file.
///
/// # Errors
/// It is none, or of another form.
pub fn read(text: &str) -> Result<Sweep, FileError> {
    let whole_bytes = text.rfind('\n').map_or(0, |at| at + 1);
    let whole = text.get(..whole_bytes).unwrap_or_default();
    let mut lines = (1..).zip(whole.lines());
    let (_, first) = lines.next().ok_or(FileError::Empty)?;
    let at = |line| move |source| FileError::Line { line, source };
    let header: Header = serde_json::from_str(first).map_err(at(1))?;
    if header.sweep != FORMAT {
        return Err(FileError::Format(header.sweep));
    }
    let mut records: Vec<Record> = Vec::new();
    for (line, text) in lines {
        let record: Record = serde_json::from_str(text).map_err(at(line))?;
        let name = record.name();
        if records.iter().any(|other| other.name() == name) {
            return Err(FileError::Twice { line, name });
        }
        records.push(record);
    }
    Ok(Sweep {
        header,
        records,
        whole_bytes,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn right() -> Record {
        Record {
            class: "qdisc".to_owned(),
            module: "sch_htb".to_owned(),
            gated: 9,
            called: vec![Called {
                name: "htb_enqueue".to_owned(),
                calls: 7,
                inside: 7,
                ..Called::default()
            }],
            answers: true,
            removed: true,
            ..Record::default()
        }
    }

    #[test]
    fn what_is_worst_decides() {
        let mut record = right();
        assert_eq!((record.verdict(), record.why()), (Verdict::Right, None));
        record.called.clear();
        assert_eq!(record.verdict(), Verdict::NotCalled);
        record.removed = false;
        assert_eq!(record.verdict(), Verdict::Differs);
        assert_eq!(record.why().as_deref(), Some("it cannot be removed"));
        record.differs.push("stream: 1".to_owned());
        assert_eq!(record.why().as_deref(), Some("stream: 1"));
        record.violations.push("stray write".to_owned());
        assert_eq!(record.verdict(), Verdict::FalseAlarm);
        record.answers = false;
        assert_eq!(record.verdict(), Verdict::Lost);
        record.refused = Some("no model".to_owned());
        assert_eq!(record.verdict(), Verdict::Refused);
        record.unfit = Some("add: 2".to_owned());
        assert_eq!(record.verdict(), Verdict::Unfit);
        assert_eq!(record.why().as_deref(), Some("add: 2"));
    }

    #[test]
    fn a_fault_is_recovered_from_only_if_all_is_well_afterwards() {
        let mut fault = Fault {
            reached: true,
            taken_back: 1,
            answers: true,
            works: true,
            ..Fault::default()
        };
        assert_eq!(fault.end(), FaultEnd::Recovered);
        fault.log.push("WARNING".to_owned());
        assert_eq!(fault.end(), FaultEnd::Detected);
        fault.taken_back = 0;
        assert_eq!(fault.end(), FaultEnd::Undetected);
        fault.reached = false;
        assert_eq!(fault.end(), FaultEnd::NotReached);
        fault.answers = false;
        assert_eq!(fault.end(), FaultEnd::Lost);
    }

    #[test]
    fn a_restart_is_compared_with_faults_that_were_recovered_from() {
        let mut record = right();
        let fault = |returned_us| Fault {
            reached: true,
            taken_back: 1,
            answers: true,
            works: true,
            returned_us,
            ..Fault::default()
        };
        record.faults = [Some(500), None, Some(0), Some(250)].map(fault).into();
        assert!(record.ratios().is_empty());
        record.restart_us = Some(100_000);
        assert_eq!(record.ratios(), [200.0, 400.0]);
        record.faults[3].works = false;
        assert_eq!(record.ratios(), [200.0]);
    }

    #[test]
    fn what_was_written_is_read_again_and_another_file_is_refused_with_its_line() {
        let header = Header {
            sweep: FORMAT,
            kernel: "6.1.0".to_owned(),
            faults: 8,
        };
        let line = |value: &str| value.to_owned() + "\n";
        let head = line(&serde_json::to_string(&header).unwrap());
        let one = line(&serde_json::to_string(&right()).unwrap());
        let sweep = read(&(head.clone() + &one)).unwrap();
        assert_eq!(
            (&sweep.header, &sweep.records[..]),
            (&header, &[right()][..])
        );
        let cut = read(&(head.clone() + &one[..one.len() - 5])).unwrap();
        assert_eq!((cut.records.len(), cut.whole_bytes), (0, head.len()));
        let refused = |text: &str| read(text).unwrap_err().to_string();
        assert!(refused("").contains("empty"));
        assert!(refused("hello\n").contains("line 1"));
        assert!(refused(&head.replace("\"sweep\":1", "\"sweep\":7")).contains("format 7"));
        assert!(refused(&(head.clone() + "{}\n")).contains("line 2"));
        assert!(refused(&(head + &one + &one)).contains("line 3 is about qdisc/sch_htb"));
    }
}
