//! How numbers, times and what happened are written for people, and read from them.

use recovery::ladder::Rungs;
use recovery::switch::Outcome;

use crate::device::protocol::SwitchRecord;

/// A number that somebody typed, also in hexadecimal with `0x`.
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

/// `1 call`, `2 calls`.
pub fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// `1st`, `2nd`, `13th`, `22nd`.
pub fn ordinal(number: u64) -> String {
    let ending = match (number % 100, number % 10) {
        (11..=13, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

/// A time as a person says it.
pub fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{}.{} s", s, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
}

/// How often each rung of a ladder was used, but for the last, a driver's stop.
pub fn rungs(rungs: &Rungs) -> String {
    format!(
        "failed calls that returned an error: {}, that were run again: {}; functions that rested: {}; resumes: {} ({} \
         failed); restarts: {} ({} failed); times back at a mark: {}; resets: {}",
        rungs.errors,
        rungs.retries,
        rungs.rests,
        rungs.resumes,
        rungs.failed_resumes,
        rungs.restarts,
        rungs.failed_restarts,
        rungs.rewinds,
        rungs.resets
    )
}

/// Time of a switch in which the device worked that is said apart.
const WORTH_A_WORD_NS: u64 = 1_000_000;

/// A switch in a line.
pub fn switched(record: &SwitchRecord) -> String {
    let name = |vm: &Option<String>| vm.clone().unwrap_or_else(|| "nobody".to_owned());
    let us = |ns: u64| format!("{:.1} us", ns as f64 / 1e3);
    let end = match &record.outcome {
        Outcome::Switched {} => String::new(),
        Outcome::Back { failed } => format!(", {failed}; the turn is where it was"),
        Outcome::Nobody { failed, .. } => format!(", {failed}; nobody has the turn"),
    };
    let (total, still) = (record.phases.total_ns(), record.phases.still_ns());
    let still = match total - still {
        0..WORTH_A_WORD_NS => String::new(),
        _ => format!(", standing still for {}", us(still)),
    };
    let first = record
        .first_frame_ns
        .map_or_else(String::new, |ns| format!(", first frame after {}", us(ns)));
    format!(
        "{}: {} to {} ({}) in {}{still}{first}{end}",
        record.number,
        name(&record.from),
        name(&record.to),
        record.reason.text(),
        us(total),
    )
}

#[cfg(test)]
mod tests {
    use recovery::switch::{Phases, Step, StepFailed};

    use super::*;
    use crate::device::protocol::Reason;

    #[test]
    fn numbers_read_as_english() {
        assert_eq!(counted(1, "call", "calls"), "1 call");
        assert_eq!(counted(0, "call", "calls"), "0 calls");
        let all = [1, 2, 3, 4, 11, 12, 13, 21, 102, 111, 112, 1003].map(ordinal);
        let right = "1st 2nd 3rd 4th 11th 12th 13th 21st 102nd 111th 112th 1003rd";
        assert_eq!(all.join(" "), right);
    }

    #[test]
    fn times_are_said_as_people_say_them() {
        assert_eq!(duration(1_250), "1.2 s");
        assert_eq!(duration(125_000), "2 min 5 s");
        assert_eq!(duration(7_500_000), "2 h 5 min");
    }

    #[test]
    fn a_switch_is_told_in_a_line() {
        let mut record = SwitchRecord {
            number: 3,
            begin_ns: 0,
            from: Some("left".to_owned()),
            to: None,
            reason: Reason::Gone,
            outcome: Outcome::Switched {},
            phases: Phases {
                quiesce_ns: Some(1500),
                resume_ns: Some(500),
                ..Phases::default()
            },
            first_frame_ns: Some(20_000),
            outage_ns: None,
        };
        let text = "3: left to nobody (VM gone) in 2.0 us, first frame after 20.0 us";
        assert_eq!(switched(&record), text);
        record.first_frame_ns = None;
        record.phases.prepare_ns = Some(3_000_000);
        let text = "3: left to nobody (VM gone) in 3002.0 us, standing still for 2.0 us";
        assert_eq!(switched(&record), text);
        record.phases.prepare_ns = None;
        record.outcome = Outcome::Back {
            failed: StepFailed {
                step: Step::Map,
                reason: "right has gone".to_owned(),
            },
        };
        assert!(
            switched(&record).ends_with("map failed: right has gone; the turn is where it was")
        );
    }
}
