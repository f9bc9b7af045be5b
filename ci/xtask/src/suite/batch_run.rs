//! What is understood of a test program while it runs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::emulator::Emulator;
use super::queue::Batch;
use super::record::TestRecord;
use crate::lab::Ended;
use crate::place::Place;
use crate::steps::duration;

/// How many tests are over, of how many.
pub struct Progress {
    pub over: AtomicUsize,
    all: usize,
}

impl Progress {
    pub fn new(all: usize) -> Self {
        Self {
            over: AtomicUsize::new(0),
            all,
        }
    }
}

/// Understands what a test program says while it runs.
pub struct BatchRun<'a> {
    /// The process of the lab that it runs in.
    pub emulator: Option<Emulator>,
    batch: &'a Batch,
    place: Place,
    /// What to call the place.
    place_name: String,
    progress: &'a Progress,
    /// All that it said.
    output: Vec<u8>,
    /// The unfinished line on its standard output, where the results are.
    line: Vec<u8>,
    records: Vec<TestRecord>,
    last_end: Instant,
}

impl<'a> BatchRun<'a> {
    /// Nothing is known of it yet.
    pub fn new(batch: &'a Batch, place: Place, place_name: String, progress: &'a Progress) -> Self {
        Self {
            emulator: None,
            batch,
            place,
            place_name,
            progress,
            output: Vec::new(),
            line: Vec::new(),
            records: Vec::new(),
            last_end: Instant::now(),
        }
    }

    /// Something that it wrote.
    pub fn read(&mut self, is_stderr: bool, bytes: &[u8]) -> std::io::Result<()> {
        self.output.extend_from_slice(bytes);
        if is_stderr {
            return Ok(());
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                if let Some((test, passed)) = read_result(String::from_utf8_lossy(&line).trim_end())
                {
                    self.record(test, passed);
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, test: &str, passed: bool) {
        if !self.batch.tests.iter().any(|known| known == test) {
            return;
        }
        let name = self.batch.program.full_name(test);
        let before = self.records.len();
        // A lab that hung: the program begins anew.
        self.records.retain(|record| record.name != name);
        let progress = self.progress;
        let over = match self.records.len() == before {
            true => 1 + progress.over.fetch_add(1, Ordering::Relaxed),
            false => progress.over.load(Ordering::Relaxed),
        };
        let seconds = self.last_end.elapsed().as_secs_f64();
        self.last_end = Instant::now();
        let word = if passed { "ok" } else { "FAILED" };
        let (time, place, all) = (duration(seconds), &self.place_name, progress.all);
        let processor_seconds = self.emulator.as_mut().and_then(Emulator::since_last);
        let took = processor_seconds.map_or_else(String::new, |seconds| {
            format!(", {} of processor time", duration(seconds))
        });
        eprintln!("      {over}/{all} test {name} ... {word} ({time}{took}, {place})");
        self.records.push(TestRecord {
            name,
            place: self.place,
            passed,
            second_try: false,
            seconds,
            processor_seconds,
        });
    }

    /// A test that the program did not come to has failed, and so has every one if the program says
    /// nothing of them but ends badly.
    pub fn finish(mut self, ended: Ended) -> Vec<TestRecord> {
        for test in &self.batch.tests {
            let name = self.batch.program.full_name(test);
            if !self.records.iter().any(|record| record.name == name) {
                self.record(test, false);
            }
        }
        let all_passed = self.records.iter().all(|record| record.passed);
        if all_passed && ended != Ended::Exited(0) {
            // All tests ended well, but something behind them did not.
            self.records
                .iter_mut()
                .for_each(|record| record.passed = false);
        }
        if !all_passed || ended != Ended::Exited(0) {
            eprintln!(
                "{}\n      {} ended: {ended:?}",
                String::from_utf8_lossy(&self.output),
                self.batch.program.name
            );
        }
        self.records
    }
}

/// Test and whether it passed, of a line such as `test boots ... ok`.
fn read_result(line: &str) -> Option<(&str, bool)> {
    let (test, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match result {
        "ok" => Some((test, true)),
        "FAILED" => Some((test, false)),
        _ => None,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::suite::programs::Program;

    /// Tests of a program.
    pub fn batch(tests: &[&str]) -> Batch {
        let program = Program {
            path: "/t/boot".into(),
            directory: "/w/vmm".into(),
            name: "vmm::boot".into(),
            boots_linux: true,
            environment: &[],
        };
        Batch {
            program: program.into(),
            tests: tests.iter().map(|test| (*test).to_owned()).collect(),
        }
    }

    fn passed(said: &[&str], ended: Ended) -> Vec<(String, bool)> {
        let (batch, progress) = (batch(&["a", "b"]), Progress::new(2));
        let mut run = BatchRun::new(&batch, Place::Lab, "lab 1".into(), &progress);
        for piece in said {
            run.read(false, piece.as_bytes()).unwrap();
            run.read(true, b"a word on standard error").unwrap();
        }
        let records = run.finish(ended);
        assert_eq!(progress.over.into_inner(), 2);
        records
            .into_iter()
            .map(|record| (record.name, record.passed))
            .collect()
    }

    fn both(a: bool, b: bool) -> Vec<(String, bool)> {
        vec![("vmm::boot::a".into(), a), ("vmm::boot::b".into(), b)]
    }

    #[test]
    fn results_are_read_from_what_a_program_says() {
        let said = [
            "running 2 tests\ntest a ...",
            " ok\ntest b ... FAIL",
            "ED\n\ntest c ... ok\n",
        ];
        assert_eq!(passed(&said, Ended::Exited(101)), both(true, false));
        assert_eq!(
            passed(&["test a ... ok\ntest b ... ok\n"], Ended::Exited(0)),
            both(true, true)
        );
    }

    #[test]
    fn tests_that_a_program_did_not_come_to_have_failed() {
        assert_eq!(
            passed(&["test a ... ok\ntest b ... "], Ended::TimeLimit),
            both(true, false)
        );
        assert_eq!(passed(&[""], Ended::Exited(0)), both(false, false));
    }

    #[test]
    fn a_program_that_ends_badly_after_its_tests_fails_them() {
        let said = ["test a ... ok\ntest b ... ok\n"];
        assert_eq!(passed(&said, Ended::Signaled(11)), both(false, false));
    }

    #[test]
    fn a_second_try_replaces_what_the_first_found() {
        let said = [
            "test a ... FAILED\n",
            "running 2 tests\ntest a ... ok\ntest b ... ok\n",
        ];
        assert_eq!(passed(&said, Ended::Exited(0)), both(true, true));
    }
}
