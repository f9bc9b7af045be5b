//! What a person types: help, completions and reports, through the program itself.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::{contains, is_empty};

fn cofferdam(words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
    let folder = std::env::temp_dir().join("no-cofferdam-runs-here");
    command
        .env("COFFERDAM_RUNTIME_DIR", folder)
        .args(words.split_whitespace());
    command
}

#[test]
fn help_of_every_command_can_be_had_and_the_main_ones_have_examples() {
    for words in [
        "",
        "run",
        "status",
        "stop",
        "exec",
        "isolate",
        "debug",
        "bench boot",
        "bench recovery",
        "bench traffic",
        "report html",
        "report merge",
        "completions",
    ] {
        cofferdam(&format!("{words} --help"))
            .assert()
            .success()
            .stdout(contains("Example").and(contains("Usage: cofferdam")));
    }
    for words in ["list", "pause", "resume", "reset", "doctor", "report show"] {
        cofferdam(&format!("{words} --help"))
            .assert()
            .success()
            .stdout(contains("Usage: cofferdam"));
    }
}

#[test]
fn shells_get_completions_that_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        cofferdam(&format!("completions {shell}"))
            .assert()
            .success()
            .stdout(contains("isolate").and(contains("recovery")));
    }
    cofferdam("completions tcsh")
        .assert()
        .code(2)
        .stderr(contains("tcsh"));
}

#[test]
fn tables_have_json_beside_them() {
    cofferdam("list")
        .assert()
        .success()
        .stdout(contains("vCPUs"));
    cofferdam("list --json").assert().success().stdout("[]\n");
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    let program = env!("CARGO_BIN_EXE_cofferdam");
    let script =
        format!("{program} completions bash | head -c 10 >/dev/null; exit ${{PIPESTATUS[0]}}");
    Command::new("bash")
        .args(["-c", &script])
        .assert()
        .success()
        .stderr(is_empty());
}

#[test]
fn reports_are_merged_shown_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let part = |section: &str| {
        format!(
            r#"{{"schema": 1, "commit": "abc", "host": {{"where": "lab", "second_stage": "npt",
            "kernel": "6.1", "cpu": "x"}}, {section}}}"#
        )
    };
    let stat = r#"{"n": 1, "min": 2e6, "p50": 2e6, "p99": 2e6, "max": 2e6}"#;
    let recovery = format!(
        r#""recovery": [{{"driver": "e1000", "method": "restart", "n": 1,
        "phases_us": {{"first_rx": {stat}}}, "total_us": {stat}}}]"#
    );
    std::fs::write(path("a.json"), part(&recovery)).unwrap();
    std::fs::write(path("b.json"), part(r#""campaign": {"seed": 7}"#)).unwrap();
    let (a, b, whole, page) = (
        path("a.json"),
        path("b.json"),
        path("all.json"),
        path("all.html"),
    );
    cofferdam(&format!("report merge {a} {b} --json {whole}"))
        .assert()
        .success();
    cofferdam(&format!("report show {whole}"))
        .assert()
        .success()
        .stdout(contains("restart (e1000): first_rx").and(contains("2000.000")));
    cofferdam(&format!("report html {whole}"))
        .assert()
        .success()
        .stdout(contains(&page));
    let html = std::fs::read_to_string(page).unwrap();
    assert!(html.contains("<svg") && html.contains("&quot;seed&quot;: 7"));
    let plots = path("plots");
    cofferdam(&format!("report svg {whole} --output {plots}"))
        .assert()
        .success()
        .stdout(contains(&plots));
    let baselines = std::fs::read_to_string(format!("{plots}/recovery-baselines.svg")).unwrap();
    assert!(baselines.starts_with("<svg"), "{baselines}");
    cofferdam("report show /nonexistent.json")
        .assert()
        .code(1)
        .stderr(
            contains("/nonexistent.json")
                .and(predicate::function(|text: &str| text.lines().count() == 1)),
        );
}

#[test]
fn measurements_without_images_say_how_to_make_them() {
    let folder = tempfile::tempdir().unwrap();
    for what in ["boot", "recovery", "traffic"] {
        cofferdam(&format!(
            "bench {what} --images {}",
            folder.path().display()
        ))
        .assert()
        .code(1)
        .stderr(contains("cargo xtask images"));
    }
}
