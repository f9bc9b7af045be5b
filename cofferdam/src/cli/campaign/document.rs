//! A campaign's figures as tables of documents.

use std::fmt::Write as _;

use recovery::campaign::Way;
use recovery::campaign::record::Record;
use recovery::campaign::summary::{Counts, Summary, total};
use recovery::campaign::verdict::Verdict;

/// What became of the faults that harm natively, a row each.
pub(super) fn harm(summary: &Summary) -> String {
    let native = summary.ways.get(&Way::Native).cloned().unwrap_or_default();
    let parts: Vec<_> = [
        (Verdict::Crash, "crash"),
        (Verdict::Hang, "hang"),
        (Verdict::SilentCorruption, "corrupt silently"),
        (Verdict::LostDevice, "lose the device"),
    ]
    .into_iter()
    .map(|(verdict, word)| format!("{word} ({})", of(&native, &[verdict])))
    .collect();
    let (once, stays) = (of_harm(summary, Way::Once), of_harm(summary, Way::Stays));
    let mut text = format!(
        "| of the {} that natively {} | taken out when a call had come to it | left in |\n| --- | --- | --- |\n",
        summary.harmful(),
        parts.join(", ")
    );
    let lives =
        |counts: &Counts| total(counts.values()).saturating_sub(of(counts, &[Verdict::Escaped]));
    row(&mut text, "the guest lives", [lives(&once), lives(&stays)]);
    for (word, verdicts) in [
        ("recovered, the device works", &[Verdict::Recovered][..]),
        (
            "taken back, the device does not work or lost data was reported",
            &[Verdict::DetectedNotRecovered],
        ),
        ("no effect seen", &[Verdict::Benign, Verdict::NotActivated]),
        ("not noticed", &[Verdict::Undetected]),
        ("escaped", &[Verdict::Escaped]),
    ] {
        row(&mut text, word, [of(&once, verdicts), of(&stays, verdicts)]);
    }
    text
}

fn row(text: &mut String, word: &str, [once, stays]: [u32; 2]) {
    // Into memory.
    let _ = writeln!(text, "| {word} | {once} | {stays} |");
}

fn of_harm(summary: &Summary, way: Way) -> Counts {
    summary.of_harm.get(&way).cloned().unwrap_or_default()
}

fn of(counts: &Counts, verdicts: &[Verdict]) -> u32 {
    total(verdicts.iter().filter_map(|verdict| counts.get(verdict)))
}

/// Each run that was not recovered from, with its trial's number and why.
pub(super) fn reasons(records: &[Record]) -> String {
    let mut text = String::from(
        "| trial | fault | natively | isolated | it ended | why |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for one in records.iter().flat_map(Record::not_recovered) {
        let way = match one.way {
            Way::Stays => "left in",
            _ => "taken out",
        };
        let place = match one.trial.function.as_str() {
            recovery::campaign::plan::EDGE => "the device".to_owned(),
            function => format!("`{function}+{:#x}`", one.trial.offset),
        };
        let _ = writeln!(
            text,
            "| {} | `{}` in {place} | {} | {way} | {} | {} |",
            one.trial.number,
            one.trial.kind.name(),
            one.native.map_or("-", Verdict::name),
            one.verdict.name(),
            cell(&one.reason)
        );
    }
    text
}

/// A text of a guest's, as a cell of a table.
fn cell(text: &str) -> String {
    let plain = |c: char| match c {
        '|' | '`' | '<' | '>' | '*' | '[' | ']' | '_' | '\\' => format!("\\{c}"),
        c if c.is_control() => " ".to_owned(),
        c => c.to_string(),
    };
    text.chars().take(200).map(plain).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::path::Path;

    use super::*;

    /// Behind the name of a campaign: the file with the runs that were not recovered from.
    const REASONS: &str = "-not-recovered.md";

    #[test]
    fn the_tables_in_the_documents_are_those_of_the_data() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let read = |name: &str| std::fs::read_to_string(docs.join(name)).unwrap();
        let document = read("measurements.md");
        let files = std::fs::read_dir(docs.join("measurements")).unwrap();
        let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let measured = files.filter_map(|file| Some(file.strip_suffix(REASONS)?.to_owned()));
        let measured: Vec<_> = measured.collect();
        assert!(!measured.is_empty());
        for name in measured {
            let data = read(&format!("measurements/{name}.jsonl"));
            let records = recovery::campaign::record::read(&data).unwrap().records;
            let table = harm(&Summary::of(&records));
            assert!(document.contains(&table), "{name}:\n{table}");
            let reasons = reasons(&records);
            assert_eq!(
                read(&format!("measurements/{name}{REASONS}")),
                reasons,
                "{name}"
            );
        }
    }

    #[test]
    fn what_a_guest_says_makes_no_table_of_its_own() {
        assert_eq!(cell("a | b\n`c` \u{1b}[1m"), "a \\| b \\`c\\`  \\[1m");
        assert_eq!(cell(&"x".repeat(900)).len(), 200);
    }
}
