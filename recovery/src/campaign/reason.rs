//! Why a fault was not recovered from, in words: of what was seen of the run.

use super::record::Record;
use super::verdict::{Seen, Verdict, is_crash, is_stall};
use super::{Way, plan::Trial};

/// A run of a fault that was not recovered from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotRecovered<'a> {
    /// The fault.
    pub trial: &'a Trial,
    /// What it came to natively, if that was tried.
    pub native: Option<Verdict>,
    /// How it was tried.
    pub way: Way,
    /// What it came to.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
}

impl Record {
    /// Its isolated runs that were not recovered from: escapes, calls that were taken back and
    /// something does not work, and what harms natively and was not noticed.
    pub fn not_recovered(&self) -> impl Iterator<Item = NotRecovered<'_>> {
        let native = self.runs.get(&Way::Native).map(|run| run.verdict);
        let isolated = self.runs.iter().filter(|(way, _)| **way != Way::Native);
        let bad = isolated.filter(move |(_, run)| run.verdict.is_bad(native));
        bad.map(move |(way, run)| NotRecovered {
            trial: &self.trial,
            native,
            way: *way,
            verdict: run.verdict,
            reason: reason(run.verdict, &run.seen),
        })
    }
}

/// What of all that was seen decided it.
fn reason(verdict: Verdict, seen: &Seen) -> String {
    let line = |is_it: fn(&str) -> bool| seen.log.iter().find(|line| is_it(line)).cloned();
    if verdict == Verdict::Escaped {
        let said = line(is_crash).or_else(|| line(is_stall));
        let said = said.or_else(|| seen.elsewhere.first().cloned());
        let changed = |what: &String| format!("memory that nobody had to change: {what}");
        let said = said.or_else(|| seen.bystanders.first().map(changed));
        return said.unwrap_or_else(|| "the guest's agent does not answer".to_owned());
    }
    if let Some(why) = &seen.given_up {
        return format!("given up: {why}");
    }
    if !seen.finished {
        return "the work does not end".to_owned();
    }
    if seen.corrupted > 0 {
        return format!("{} packets, bytes or files are otherwise", seen.corrupted);
    }
    if !seen.works {
        return match seen.rungs {
            0 => "the device does not work".to_owned(),
            1 => "the device does not work, after a rung of the ladder".to_owned(),
            rungs => format!("the device does not work, after {rungs} rungs of the ladder"),
        };
    }
    match (seen.differs.as_slice(), seen.log.first()) {
        ([], Some(line)) => line.clone(),
        ([], None) => "nothing".to_owned(),
        (differs, _) => format!("steps that ended otherwise: {}", differs.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    fn reasons(way: Way, native: Verdict, verdict: Verdict, seen: Seen) -> Vec<String> {
        let mut record = record(1, &[(Way::Native, native), (way, verdict)]);
        if let Some(run) = record.runs.get_mut(&way) {
            run.seen = seen;
        }
        record.not_recovered().map(|one| one.reason).collect()
    }

    #[test]
    fn each_that_was_not_recovered_has_a_reason_and_others_have_none() {
        use Verdict::*;
        let seen = || Seen {
            finished: true,
            answers: true,
            works: true,
            ..Seen::default()
        };
        let of = |verdict, seen| reasons(Way::Once, Crash, verdict, seen).join("; ");
        for well in [Recovered, Benign, NotActivated] {
            assert_eq!(of(well, seen()), "");
        }
        let mut one = seen();
        one.differs = vec!["up: 1".to_owned()];
        assert!(of(Undetected, one.clone()).contains("up: 1"));
        assert!(
            reasons(Way::Once, Benign, Undetected, one.clone()).is_empty(),
            "what is benign natively need not be noticed"
        );
        one.works = false;
        assert_eq!(
            of(DetectedNotRecovered, one.clone()),
            "the device does not work"
        );
        one.rungs = 2;
        assert!(of(DetectedNotRecovered, one.clone()).contains("after 2 rungs"));
        one.corrupted = 3;
        assert!(of(DetectedNotRecovered, one.clone()).starts_with("3 packets"));
        one.finished = false;
        assert_eq!(of(Undetected, one.clone()), "the work does not end");
        one.given_up = Some("too many".to_owned());
        assert_eq!(of(DetectedNotRecovered, one.clone()), "given up: too many");
        assert!(of(Escaped, one.clone()).contains("does not answer"));
        one.bystanders = vec!["page at 0x1000 + 0x8".to_owned()];
        assert_eq!(
            of(Escaped, one.clone()),
            "memory that nobody had to change: page at 0x1000 + 0x8"
        );
        one.elsewhere = vec!["a file".to_owned()];
        assert_eq!(of(Escaped, one.clone()), "a file");
        let lines = ["WARNING: a", "rcu: self-detected stall", "kernel BUG at b"];
        one.log = lines.map(str::to_owned).into();
        assert_eq!(of(Escaped, one.clone()), "kernel BUG at b");
        one.log.pop();
        assert_eq!(of(Escaped, one), "rcu: self-detected stall");
    }
}
