//! What a person types: help, completions and reports, through the program itself.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

mod common;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::{contains, is_empty};

use common::module::module;

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
        "try",
        "image build",
        "image list",
        "man",
        "run",
        "status",
        "stop",
        "exec",
        "isolate",
        "debug",
        "bench boot",
        "bench recovery",
        "bench drivers",
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

/// `cofferdam` with a folder of images of its own.
fn with_images(images: &std::path::Path, words: &str) -> Command {
    let mut command = cofferdam(words);
    command.env("COFFERDAM_IMAGES", images);
    command
}

#[test]
fn images_are_listed_where_there_are_none_and_a_wrong_kernel_is_told_which_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent");
    with_images(&absent, "image list")
        .assert()
        .success()
        .stdout(is_empty())
        .stderr(contains("cofferdam image build --kernel debian:6.1"));
    with_images(&absent, "image list --json")
        .assert()
        .success()
        .stdout("[]\n");
    with_images(&absent, "image build --kernel debian:5.10")
        .assert()
        .code(2)
        .stderr(contains("6.12-cloud-amd64"));
    with_images(&absent, "image build --agent x --module ../x")
        .assert()
        .code(1)
        .stderr(contains("no name of a module"));
    with_images(&absent, "image build --agent x --package -o")
        .assert()
        .code(2);
    assert!(!absent.exists());
}

#[test]
fn what_cannot_be_tried_is_refused_in_a_line_that_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |file: &std::path::Path, says: &str| {
        let words = format!("try {}", file.display());
        let output = with_images(folder.path(), &words).assert().code(1);
        let error = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
        assert!(error.contains(says), "no {says:?} in {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    };
    let file = folder.path().join("mine.ko");
    refused(&file, "cannot read");
    refused(folder.path(), "is no file");
    std::fs::write(&file, b"#!/bin/sh\n").unwrap();
    refused(&file, "no kernel module");
    let whole = module(
        "mine",
        &["vermagic=6.1.0-48-amd64 SMP mod_unload ", "depends="],
    );
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    refused(&file, "no kernel module");
    std::fs::write(&file, &whole).unwrap();
    refused(&file, "cofferdam image build --kernel 6.1.0-48-amd64");
    cofferdam(&format!("try {} --isolate ,", file.display()))
        .assert()
        .code(2)
        .stderr(contains("names of functions"));
}

#[test]
fn every_command_has_a_manual_page_and_they_are_the_same_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let pages = |name: &str, images: &str| {
        let dir = folder.path().join(name);
        with_images(std::path::Path::new(images), "man")
            .arg(&dir)
            .assert()
            .success();
        let mut pages: Vec<(String, Vec<u8>)> = dir
            .read_dir()
            .unwrap()
            .map(|page| page.unwrap())
            .map(|page| {
                let name = page.file_name().to_str().unwrap().to_owned();
                (name, std::fs::read(page.path()).unwrap())
            })
            .collect();
        pages.sort();
        pages
    };
    let first = pages("one", "/a");
    assert_eq!(first, pages("two", "/b"));
    for name in [
        "cofferdam",
        "cofferdam-try",
        "cofferdam-image-build",
        "cofferdam-run",
        "cofferdam-device-serve",
        "cofferdam-man",
    ] {
        let page = first.iter().find(|(page, _)| *page == format!("{name}.1"));
        let (_, text) = page.unwrap_or_else(|| panic!("no page {name}"));
        let text = String::from_utf8_lossy(text);
        assert!(text.contains(".SH SYNOPSIS"), "{text}");
    }
    cofferdam("man /proc/absent")
        .assert()
        .code(1)
        .stderr(contains("cannot write"));
}

#[test]
fn a_file_of_options_is_read_and_what_is_wrong_in_it_has_a_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.toml");
    let words = format!("run --config {}", file.display());
    cofferdam(&words)
        .assert()
        .code(1)
        .stderr(contains("cannot read"));
    std::fs::write(&file, "kernel = \"/absent/vmlinux\"\nvcpus = 9\n").unwrap();
    cofferdam(&words)
        .assert()
        .code(1)
        .stderr(contains("web.toml: line 2, column 9").and(contains("1..=8")));
    std::fs::write(&file, "kernel = \"/absent/vmlinux\"\n").unwrap();
    cofferdam(&words)
        .assert()
        .code(1)
        .stderr(contains("/absent/vmlinux"));
}
