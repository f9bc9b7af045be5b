//! Which tests go to the labs, and in which order: those that share a guest a few at a time, all
//! others one by one, the longest first. So labs side by side come to their ends at nearly the same
//! time.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

use super::programs::Program;
use super::record::TestRecord;

/// The tests of each of a program's modules whose names begin so share a guest: they run in one
/// process.
const SHARED: &str = "shared";
/// So many of them at most: what is lost with a lab that hangs is no more than these. Each process
/// boots a guest.
const TOGETHER: usize = 8;
/// Tests in modules of this name take long, and most of what they show others show, too: they run
/// in the full form of the suite, and for whoever asks for them by name.
const LONG: &str = "long";

/// Whether a test takes long.
pub fn is_long(test: &str) -> bool {
    test.split("::").any(|part| part == LONG)
}

/// Seconds for a test of which nothing is known: most take less, so that those with known times
/// fill the gaps.
const UNKNOWN: f64 = 60.0;

/// Tests of one program that run in one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The program.
    pub program: Arc<Program>,
    /// The tests' names in it.
    pub tests: Vec<String>,
}

impl Batch {
    /// A program's tests, divided into what can run for itself.
    pub fn divide(program: Program, tests: Vec<String>) -> Vec<Self> {
        let program = Arc::new(program);
        let batch = |tests| Self {
            program: program.clone(),
            tests,
        };
        let mut shared = BTreeMap::<String, Vec<String>>::new();
        let mut batches = Vec::new();
        for test in tests {
            match test.split_once("::") {
                Some((module, _)) if module.starts_with(SHARED) => {
                    shared.entry(module.to_owned()).or_default().push(test);
                }
                _ => batches.push(batch(vec![test])),
            }
        }
        for tests in shared.into_values() {
            // As many in each, so that none boots a guest for one test.
            let processes = tests.len().div_ceil(TOGETHER);
            let chunks = tests.chunks(tests.len().div_ceil(processes));
            batches.extend(chunks.map(|tests| batch(tests.to_vec())));
        }
        batches
    }
}

/// What labs take their work from.
pub struct Queue(Mutex<VecDeque<Batch>>);

impl Queue {
    /// The batches, those that took longest in earlier runs first.
    pub fn new(mut batches: Vec<Batch>, times: &Times) -> Self {
        batches.sort_by(|a, b| times.of(b).total_cmp(&times.of(a)));
        Self(Mutex::new(batches.into()))
    }

    /// The next one.
    pub fn take(&self) -> Option<Batch> {
        let mut batches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        batches.pop_front()
    }
}

/// How long tests took in labs on two processors that did nothing else, in seconds, by full name:
/// so the longest come first in a clone in which nothing ran yet, too.
const ELSEWHERE: &str = include_str!("times.json");

/// How long tests took when they were last run. Nothing but the order depends on it.
pub struct Times {
    path: PathBuf,
    /// By full name.
    seconds: BTreeMap<String, f64>,
}

impl Times {
    /// What the file of an earlier run says; if there is none that can be understood, what is known
    /// from elsewhere.
    pub fn read(path: &Path) -> Self {
        let seconds = std::fs::read(path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .or_else(|| serde_json::from_str(ELSEWHERE).ok());
        Self {
            path: path.to_owned(),
            seconds: seconds.unwrap_or_default(),
        }
    }

    fn of(&self, batch: &Batch) -> f64 {
        let names = batch.tests.iter().map(|test| batch.program.full_name(test));
        names
            .map(|name| self.seconds.get(&name).copied().unwrap_or(UNKNOWN))
            .sum()
    }

    /// Remembers those that passed for the next run.
    pub fn keep(mut self, tests: &[TestRecord]) -> anyhow::Result<()> {
        let passed = tests.iter().filter(|test| test.passed);
        self.seconds
            .extend(passed.map(|test| (test.name.clone(), test.seconds)));
        std::fs::write(&self.path, serde_json::to_vec_pretty(&self.seconds)?)
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Place;

    fn batches(tests: &[&str]) -> Vec<Batch> {
        let program = Program {
            path: "/t/linux".into(),
            directory: "/w/vmm".into(),
            name: "vmm::linux".into(),
            boots_linux: true,
            environment: &[],
        };
        Batch::divide(program, tests.iter().map(|t| (*t).to_owned()).collect())
    }

    fn order(queue: &Queue) -> Vec<Vec<String>> {
        std::iter::from_fn(|| queue.take().map(|batch| batch.tests)).collect()
    }

    #[test]
    fn tests_that_share_a_guest_stay_together() {
        let divided = |tests: &[&str]| -> Vec<String> {
            let batches = batches(tests).into_iter();
            batches.map(|batch| batch.tests.join(" ")).collect()
        };
        let tests = ["a::x", "shared::nic::y", "b", "shared_two::w", "shared::z"];
        let expected = ["a::x", "b", "shared::nic::y shared::z", "shared_two::w"];
        assert_eq!(divided(&tests), expected);
        assert_eq!(divided(&["a", "b"]).len(), 2);
        // No process has many more of them than another.
        let many: Vec<String> = (0..TOGETHER + 2).map(|n| format!("shared::t{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let sizes: Vec<usize> = batches(&many).iter().map(|b| b.tests.len()).collect();
        assert_eq!(sizes, [TOGETHER / 2 + 1, TOGETHER / 2 + 1]);
    }

    #[test]
    fn long_tests_are_told_by_their_module() {
        assert!(is_long("switch::long::streams") && is_long("long::a"));
        assert!(!is_long("a::a_long_way") && !is_long("longer::b"));
    }

    #[test]
    fn what_took_longest_in_the_last_run_comes_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("times.json");
        let record = |name: &str, seconds, passed| TestRecord {
            name: format!("vmm::linux::{name}"),
            place: Place::Lab,
            passed,
            second_try: false,
            seconds,
            processor_seconds: None,
        };
        let ran = [
            record("short", 1.0, true),
            record("long", 100.0, true),
            // It says nothing of how long a test takes that it failed.
            record("failed", 0.1, false),
        ];
        Times::read(&path).keep(&ran).unwrap();
        let batches = batches(&["short", "new", "long", "failed"]);
        let queue = Queue::new(batches, &Times::read(&path));
        assert_eq!(order(&queue), [["long"], ["new"], ["failed"], ["short"]]);
    }

    #[test]
    fn without_a_run_before_the_order_is_that_of_times_from_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("times.json");
        std::fs::write(&path, "{\"a\": ").unwrap();
        for path in [path, directory.path().join("none")] {
            let times = Times::read(&path);
            let longest = times.seconds.iter().max_by(|a, b| a.1.total_cmp(b.1));
            let (name, seconds) = longest.unwrap();
            assert!(*seconds > 60.0 && name.contains("::linux::"), "{name}");
        }
    }
}
