//! What a campaign's process says to a program that has started it: lines of JSON.

use std::collections::BTreeMap;

use recovery::campaign::Way;
use recovery::campaign::record::Record;
use recovery::campaign::summary::{Counts, Summary};
use recovery::campaign::verdict::Verdict;
use serde::{Deserialize, Serialize};

use super::Progress;

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "line")]
pub enum Line {
    /// What is done.
    Says {
        /// In words.
        text: String,
    },
    /// A trial was made.
    Made(Figures),
    /// A trial was made once more: the record of the file, and of now.
    Replayed {
        /// Of the file.
        then: Box<Record>,
        /// Of now.
        now: Box<Record>,
    },
}

/// How far a campaign is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Trials in its file.
    pub trials: u32,
    /// How many there are to be.
    pub of: u32,
    /// How long the rest will take, in seconds.
    pub left_s: u64,
    /// Verdicts by way.
    pub ways: BTreeMap<Way, Counts>,
    /// Of the faults that are harm natively, what they came to when isolated.
    pub of_harm: BTreeMap<Way, Counts>,
    /// Trials to be looked at, by verdict: how many.
    pub to_look_at: BTreeMap<Verdict, usize>,
}

impl Figures {
    /// Of a campaign that is to have `of` trials and goes on for `left_s` seconds.
    pub fn new(summary: &Summary, of: u32, left_s: u64) -> Self {
        let look_at = summary.to_look_at.iter();
        Self {
            trials: summary.trials,
            of,
            left_s,
            ways: summary.ways.clone(),
            of_harm: summary.of_harm.clone(),
            to_look_at: look_at
                .map(|(verdict, trials)| (*verdict, trials.len()))
                .collect(),
        }
    }
}

impl From<&Progress<'_>> for Figures {
    fn from(progress: &Progress<'_>) -> Self {
        Self::new(progress.summary, progress.of, progress.left.as_secs())
    }
}
