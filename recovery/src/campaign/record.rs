//! A campaign's file: JSON lines, the first about the campaign, each other one about a trial.
//!
//! A campaign that was interrupted goes on where its file ends. A last line that is cut off is what
//! a full disk or a killed process leaves: it is written anew.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};

use isolation::attach::request::Contain;
use serde::{Deserialize, Serialize};

use super::Way;
use super::plan::Trial;
use super::verdict::{Seen, Verdict, is_zero, verdict};
use super::workload::{Steps, Workload, WorkloadError};

/// Of what this program writes.
pub const FORMAT: u32 = 2;

/// Longest file that is read, in bytes: some kilobytes for each of a hundred thousand trials.
pub const MAX_FILE: u64 = 1 << 30;

/// Longest line of a file, in bytes: a workload has 64 KiB, and what is seen of a trial is bounded.
pub const MAX_LINE: u64 = 4 << 20;

/// What a campaign is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub campaign: u32,
    /// What the guest does, and its driver.
    pub workload: Workload,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// What decides the trials.
    pub seed: u64,
    /// Names of the kinds.
    pub kinds: Vec<String>,
    /// How stores of isolated calls are checked.
    #[serde(default)]
    pub contain: Contain,
    /// Which steps of the work are done in a trial.
    #[serde(default)]
    pub steps: Steps,
    /// Runs without a fault that the memory of isolated runs is compared with; 0 where it is not.
    #[serde(default)]
    pub twins: u32,
}

/// A run of a trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// What it came to.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: Seen,
}

impl Run {
    /// Judges what was seen of a run that was made in this way.
    pub fn of(way: Way, seen: Seen) -> Self {
        Self {
            verdict: verdict(way, &seen),
            seen,
        }
    }
}

/// A trial that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Which one.
    #[serde(flatten)]
    pub trial: Trial,
    /// The instruction, and what was put in its place; or when the device failed how.
    pub says: String,
    /// Names of the steps that the guest did; none if it did all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<String>,
    /// Its runs.
    pub runs: BTreeMap<Way, Run>,
    /// How long it took, in milliseconds, with further VMs that it needed; 0 where that is not
    /// known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub took_ms: u64,
}

/// Why a campaign's file cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Something else.
    #[error("line {line} is not a campaign's: {source}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A line that is none of a campaign's, for its length.
    #[error("line {0} is longer than {MAX_LINE} bytes")]
    Long(usize),
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// Nothing.
    #[error("it is empty")]
    Empty,
    /// Another program's.
    #[error("it is of format {0}, and this program knows format {FORMAT}")]
    Format(u32),
    /// The workload in its first line is none.
    #[error("line 1: {0}")]
    Workload(#[from] WorkloadError),
    /// Trials are missing or come twice.
    #[error("line {line} is trial {found}, and trial {expected} belongs there")]
    Order {
        /// Its number, from 1.
        line: usize,
        /// Of the trial.
        found: u32,
        /// Of the one that belongs there.
        expected: u32,
    },
}

/// A campaign's file that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Campaign {
    /// What it is.
    pub header: Header,
    /// Its trials, from the first on.
    pub records: Vec<Record>,
    /// Bytes of the text that are whole lines: what is behind was cut off.
    pub whole_bytes: usize,
}

/// Reads a campaign's file.
pub fn read(text: &str) -> Result<Campaign, FileError> {
    let whole_bytes = text.rfind('\n').map_or(0, |at| at + 1);
    let whole = text.get(..whole_bytes).unwrap_or_default();
    let mut lines = Lines::new(whole.as_bytes());
    let header = lines.header()?;
    let records = lines.collect::<Result<_, _>>()?;
    Ok(Campaign {
        header,
        records,
        whole_bytes,
    })
}

/// A campaign's file, a trial at a time: its [`Lines::header`], then its records. A last line that
/// is cut off is left out.
#[derive(Debug)]
pub struct Lines<R> {
    input: R,
    /// Number of the line that was read last.
    line: usize,
    text: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// From the first line on.
    pub fn new(input: R) -> Self {
        Self {
            input,
            line: 0,
            text: Vec::new(),
        }
    }

    /// What the campaign is. It comes before the first record.
    ///
    /// # Errors
    /// The file is none of a campaign, or of another format.
    pub fn header(&mut self) -> Result<Header, FileError> {
        if !self.next_line()? {
            return Err(FileError::Empty);
        }
        let at = |source| FileError::Line { line: 1, source };
        let format: Format = serde_json::from_slice(&self.text).map_err(at)?;
        if format.campaign != FORMAT {
            return Err(FileError::Format(format.campaign));
        }
        let header: Header = serde_json::from_slice(&self.text).map_err(at)?;
        header.workload.check()?;
        Ok(header)
    }

    /// Takes the next line that is whole; whether there is one.
    fn next_line(&mut self) -> Result<bool, FileError> {
        self.text.clear();
        let mut input = self.input.by_ref().take(MAX_LINE);
        let bytes = input.read_until(b'\n', &mut self.text)?;
        self.line += 1;
        match self.text.last() {
            Some(b'\n') => Ok(true),
            _ if bytes as u64 == MAX_LINE => Err(FileError::Long(self.line)),
            _ => Ok(false),
        }
    }

    fn record(&mut self) -> Result<Option<Record>, FileError> {
        if !self.next_line()? {
            return Ok(None);
        }
        let line = self.line;
        let at = |source| FileError::Line { line, source };
        let record: Record = serde_json::from_slice(&self.text).map_err(at)?;
        // The first trial is in the second line.
        let expected = u32::try_from(line - 1).unwrap_or(u32::MAX);
        let found = record.trial.number;
        if found != expected {
            return Err(FileError::Order {
                line,
                found,
                expected,
            });
        }
        Ok(Some(record))
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Record, FileError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.record().transpose()
    }
}

/// The part of a header that every format has.
#[derive(Deserialize)]
struct Format {
    campaign: u32,
}

#[cfg(test)]
pub(crate) mod tests {
    use isolation::mutation::Kind;

    use super::super::kind::TrialKind;
    use super::*;

    fn header() -> Header {
        Header {
            campaign: FORMAT,
            workload: Workload::of_driver("e1000").unwrap(),
            kernel: "6.1.0".to_owned(),
            seed: 3,
            kinds: vec!["nop".to_owned()],
            contain: Contain::Full,
            steps: Steps::Called,
            twins: 0,
        }
    }

    pub(crate) fn record(number: u32, verdicts: &[(Way, Verdict)]) -> Record {
        let run = |(way, verdict): &(Way, Verdict)| {
            let seen = Seen::default();
            let verdict = *verdict;
            (*way, Run { verdict, seen })
        };
        Record {
            trial: Trial {
                number,
                kind: TrialKind::Code(Kind::Nop),
                function: "e1000_open".to_owned(),
                offset: 9,
                seed: u64::MAX,
            },
            says: "left out".to_owned(),
            steps: Vec::new(),
            runs: verdicts.iter().map(run).collect(),
            took_ms: 0,
        }
    }

    fn text(header: &Header, records: &[Record]) -> String {
        let line = |json: Result<String, _>| json.map(|line: String| line + "\n").unwrap();
        let mut text = line(serde_json::to_string(header));
        for record in records {
            text.push_str(&line(serde_json::to_string(record)));
        }
        text
    }

    #[test]
    fn what_was_written_is_read_again_and_a_cut_off_line_is_not() {
        let records = [1, 2].map(|number| record(number, &[(Way::Native, Verdict::Crash)]));
        let whole = text(&header(), &records);
        let campaign = read(&whole).unwrap();
        assert_eq!(
            (&campaign.header, &campaign.records[..]),
            (&header(), &records[..])
        );
        assert_eq!(campaign.whole_bytes, whole.len());
        let cut = read(&whole[..whole.len() - 10]).unwrap();
        assert_eq!(cut.records, records[..1]);
        assert_eq!(cut.whole_bytes, text(&header(), &records[..1]).len());
    }

    #[test]
    fn another_file_is_refused_with_its_line() {
        let refused = |text: &str| read(text).unwrap_err().to_string();
        assert!(refused("").contains("empty"));
        assert!(
            refused("{\"campaign\":1").contains("empty"),
            "no line is whole"
        );
        assert!(refused("hello\n").contains("line 1"));
        let other = Header {
            campaign: 9,
            ..header()
        };
        assert!(refused(&text(&other, &[])).contains("format 9"));
        let mut hostile = header();
        hostile.workload.entries = vec!["f; reboot".to_owned()];
        assert!(refused(&text(&hostile, &[])).contains("f; reboot"));
        let garbage = text(&header(), &[]) + "{}\n";
        assert!(refused(&garbage).contains("line 2"));
        let long = text(&header(), &[]) + &" ".repeat(MAX_LINE as usize + 1) + "\n";
        assert!(refused(&long).contains("line 2 is longer"));
        let gap = text(&header(), &[record(1, &[]), record(3, &[])]);
        assert!(refused(&gap).contains("trial 3, and trial 2"));
    }
}
