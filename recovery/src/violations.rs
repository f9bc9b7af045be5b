//! What calls of a guest's modules did wrong since its VM began: like ones are counted, and what a
//! module did is kept when it is released, restarted or exchanged.

use std::collections::HashMap;
use std::mem::discriminant;
use std::path::{Path, PathBuf};

use isolation::fault_image::Kept;
use isolation::status::report::ViolationReport;
use serde::{Deserialize, Serialize};

/// Kinds of violations that are kept for a module; the one that was seen longest ago goes first.
const MOST_KINDS: usize = 64;

/// Modules that are remembered. A guest has few drivers, but names come from whoever asks.
const MOST_MODULES: usize = 64;

/// Violations of one function at one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violations {
    /// The isolated function.
    pub entry: String,
    /// How often.
    pub count: u64,
    /// When the first one happened, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub first_ns: u64,
    /// When the last one did.
    pub last_ns: u64,
    /// The last one, for people.
    pub text: String,
    /// The last image of the guest at one of them, if any was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
}

fn image_of(report: &ViolationReport) -> Option<PathBuf> {
    let image = report.image.as_ref().and_then(Kept::path);
    image.map(Path::to_owned)
}

/// All that was seen of one guest.
#[derive(Debug, Default)]
pub struct ViolationLog(HashMap<String, Vec<Kind>>);

#[derive(Debug)]
struct Kind {
    count: u64,
    first_ns: u64,
    last: ViolationReport,
    image: Option<PathBuf>,
}

impl Kind {
    fn is_like(&self, other: &ViolationReport) -> bool {
        let kind = |report: &ViolationReport| discriminant(&report.violation.kind);
        self.last.entry == other.entry
            && self.last.at == other.at
            && kind(&self.last) == kind(other)
    }

    /// Whether one that is like the last one is told in the same words: who fails on and on does
    /// not wait for copies of them.
    fn reads_as(&self, other: &ViolationReport) -> bool {
        let last = &self.last;
        let (one, two) = (&last.violation, &other.violation);
        let what = one.kind == two.kind && one.root == two.root;
        let left = one.reached_device == two.reached_device
            && one.spills == two.spills
            && one.published == two.published;
        what && left
            && last.instruction == other.instruction
            && last.touched == other.touched
            && last.call_chain == other.call_chain
            && last.stays == other.stays
            && last.device_lost == other.device_lost
            && last.told == other.told
            && last.image == other.image
    }
}

impl ViolationLog {
    /// A call of `module` failed.
    pub fn add(&mut self, module: &str, report: &ViolationReport) {
        if !self.0.contains_key(module) && self.0.len() >= MOST_MODULES {
            return;
        }
        let kinds = self.0.entry(module.to_owned()).or_default();
        if let Some(kind) = kinds.iter_mut().find(|kind| kind.is_like(report)) {
            kind.count = kind.count.saturating_add(1);
            if kind.reads_as(report) {
                kind.last.at_ns = report.at_ns;
            } else {
                kind.last = report.clone();
            }
            kind.image = image_of(report).or(kind.image.take());
            return;
        }
        if kinds.len() >= MOST_KINDS
            && let Some(oldest) = (0..kinds.len()).min_by_key(|at| kinds[*at].last.at_ns)
        {
            kinds.swap_remove(oldest);
        }
        kinds.push(Kind {
            count: 1,
            first_ns: report.at_ns,
            last: report.clone(),
            image: image_of(report),
        });
    }

    /// What calls of `module` did wrong, the latest last.
    pub fn of(&self, module: &str) -> Vec<Violations> {
        let kinds = self.0.get(module).into_iter().flatten();
        let mut all: Vec<Violations> = kinds
            .map(|kind| Violations {
                entry: kind.last.entry.clone(),
                count: kind.count,
                first_ns: kind.first_ns,
                last_ns: kind.last.at_ns,
                text: kind.last.to_string(),
                image: kind.image.clone(),
            })
            .collect();
        all.sort_by_key(|violations| violations.last_ns);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::double::report;

    fn at(entry: &str, at: &str, at_ns: u64) -> ViolationReport {
        ViolationReport {
            at: at.to_owned(),
            at_ns,
            ..report(entry)
        }
    }

    #[test]
    fn like_violations_are_counted_and_the_latest_comes_last() {
        let mut log = ViolationLog::default();
        log.add("m", &at("f", "f+1", 10));
        log.add("m", &at("f", "f+2", 20));
        for at_ns in 30..600 {
            log.add("m", &at("f", "f+1", at_ns));
        }
        log.add("n", &at("f", "f+1", 1000));
        let all = log.of("m");
        let counts: Vec<_> = all.iter().map(|one| (one.count, one.last_ns)).collect();
        assert_eq!(counts, [(1, 20), (571, 599)]);
        assert_eq!(all[1].first_ns, 10);
        assert!(all[1].text.contains("f+1"), "{}", all[1].text);
        assert!(log.of("x").is_empty());
    }

    #[test]
    fn the_words_are_those_of_the_last_one() {
        let mut log = ViolationLog::default();
        let touching = |touched: &str, at_ns| ViolationReport {
            touched: Some(touched.to_owned()),
            ..at("f", "f+1", at_ns)
        };
        for (at_ns, touched) in [(1, "a"), (2, "a"), (3, "b"), (4, "b"), (5, "c")] {
            log.add("m", &touching(touched, at_ns));
            let [one] = log.of("m").try_into().unwrap();
            assert!(one.text.ends_with(touched), "{}", one.text);
            assert_eq!((one.count, one.last_ns), (at_ns, at_ns));
        }
    }

    #[test]
    fn the_last_image_that_was_kept_is_told_when_no_more_are() {
        let mut log = ViolationLog::default();
        let kept = |image| ViolationReport {
            image,
            ..at("f", "f+1", 1)
        };
        log.add("m", &kept(None));
        assert_eq!(log.of("m")[0].image, None);
        for path in ["/a", "/b"] {
            log.add("m", &kept(Some(Kept::In(path.into()))));
        }
        log.add("m", &kept(Some(Kept::Enough(2))));
        assert_eq!(log.of("m")[0].image.as_deref(), Some(Path::new("/b")));
    }

    #[test]
    fn a_guest_cannot_fill_the_log() {
        let mut log = ViolationLog::default();
        for n in 0..1000 {
            log.add("m", &at("f", &format!("f+{n}"), n));
            log.add(&format!("m{n}"), &at("f", "f", n));
        }
        let all = log.of("m");
        assert_eq!(all.len(), MOST_KINDS);
        assert_eq!(all.last().unwrap().last_ns, 999);
        assert_eq!(log.0.len(), MOST_MODULES);
    }
}
