//! Counts tests by what the runners say at their ends.

use serde::Serialize;

/// How many tests did what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Did what they should.
    pub passed: u64,
    /// Did not.
    pub failed: u64,
    /// Could not run on this machine: the runners count them as passed.
    pub skipped: u64,
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        match self.skipped {
            0 => Ok(()),
            skipped => write!(f, ", {skipped} skipped"),
        }
    }
}

impl Count {
    /// Takes tests that passed in a runner's eyes for what they are: skipped.
    pub fn skip(&mut self, tests: u64) {
        let skipped = tests.min(self.passed);
        self.passed -= skipped;
        self.skipped += skipped;
    }

    /// Adds what a line of a runner's output says; any other line says nothing. nextest repeats,
    /// indented, what the program of a failed test said: that is not counted again.
    pub fn read_line(&mut self, line: &str) {
        let line = without_colours(line);
        // cargo test:  test result: ok. 3 passed; 0 failed; 1 ignored; ...
        // nextest:     Summary [   0.5s] 3 tests run: 2 passed (1 slow), 1 failed, 4 skipped
        let numbers = if let Some(rest) = line.strip_prefix("test result: ") {
            rest
        } else if let Some((_, rest)) = line
            .trim_start()
            .strip_prefix("Summary [")
            .and_then(|s| s.split_once(" run: "))
        {
            rest
        } else {
            return;
        };
        for part in numbers.split([';', ',', '.']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(number)), Some(word)) =
                (words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            match word {
                "passed" => self.passed += number,
                "failed" | "timed" => self.failed += number,
                _ => {}
            }
        }
    }
}

fn without_colours(line: &str) -> String {
    let mut text = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        text += before;
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(lines: &[&str]) -> (u64, u64) {
        let mut count = Count::default();
        lines.iter().for_each(|line| count.read_line(line));
        (count.passed, count.failed)
    }

    #[test]
    fn runners_of_both_kinds_are_understood() {
        let cargo = "test result: ok. 12 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.15s";
        let nextest =
            "     Summary [   4.477s] 21 tests run: 20 passed (2 slow), 1 failed, 3 skipped";
        assert_eq!(count(&[cargo]), (12, 1));
        assert_eq!(count(&[nextest]), (20, 1));
        assert_eq!(count(&[cargo, "running 4 tests", cargo]), (24, 2));
    }

    #[test]
    fn tests_that_timed_out_have_failed() {
        let line = "Summary [ 60.0s] 5 tests run: 3 passed, 1 failed, 1 timed out, 0 skipped";
        assert_eq!(count(&[line]), (3, 2));
    }

    #[test]
    fn colours_do_not_hide_numbers() {
        let line = "\u{1b}[32;1m     Summary\u{1b}[0m [   0.5s] \u{1b}[1m3\u{1b}[0m tests run: \u{1b}[1m3\u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m, 1 skipped";
        assert_eq!(count(&[line]), (3, 0));
    }

    #[test]
    fn output_of_tests_is_not_counted() {
        assert_eq!(
            count(&[
                "5 passed, 2 failed",
                "test x ... ok",
                "the Summary [x] of it"
            ]),
            (0, 0)
        );
    }
}
