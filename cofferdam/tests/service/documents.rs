//! What is written about the service is so.

use std::path::Path;

use serde_json::Value;

use crate::client::Service;
use crate::common::place::{Place, finish};

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name);
    std::fs::read_to_string(path).unwrap()
}

/// Paths and methods of the committed document.
fn operations() -> Vec<(String, Vec<String>)> {
    let document: Value = serde_json::from_str(&read("openapi.json")).unwrap();
    let paths = document["paths"].as_object().unwrap();
    paths
        .iter()
        .map(|(path, item)| {
            (
                path.clone(),
                item.as_object().unwrap().keys().cloned().collect(),
            )
        })
        .collect()
}

#[test]
fn the_committed_openapi_document_is_what_the_program_makes() {
    let place = Place::new();
    let made = place.command().args(["serve", "--openapi"]).output();
    let made = String::from_utf8(made.unwrap().stdout).unwrap();
    assert!(
        made == read("openapi.json"),
        "renew it: cofferdam serve --openapi > docs/openapi.json"
    );
    let service = Service::start(&place, "");
    assert_eq!(service.get("/openapi.json").ok(200).text, made);
    let document: Value = serde_json::from_str(&made).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    service.end();
}

#[test]
fn each_answer_is_described_and_each_part_of_a_path_named() {
    let document: Value = serde_json::from_str(&read("openapi.json")).unwrap();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let summary = operation["summary"].as_str().unwrap_or_default();
            let is_a_line = !summary.is_empty() && !summary.contains('\n');
            assert!(
                is_a_line && !summary.ends_with('.'),
                "{method} {path}: {summary:?}"
            );
            for (status, answer) in operation["responses"].as_object().unwrap() {
                let description = answer["description"].as_str().unwrap_or_default();
                assert!(!description.is_empty(), "{method} {path}: {status}");
            }
            let parameters = operation["parameters"].as_array();
            let of_path = parameters
                .into_iter()
                .flatten()
                .filter(|one| one["in"] == "path");
            let names: Vec<_> = of_path.map(|one| one["name"].as_str().unwrap()).collect();
            for name in &names {
                assert!(
                    path.contains(&format!("{{{name}}}")),
                    "{method} {path}: {name}"
                );
            }
            assert_eq!(names.len(), path.matches('{').count(), "{method} {path}");
        }
    }
}

/// A validator that is not ours: `cargo xtask setup` installs it where it can.
#[test]
fn a_validator_of_others_has_nothing_against_the_document() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join("target/python/bin/python");
    let run = |words: &[&str]| std::process::Command::new(&python).args(words).output();
    let is_there = run(&["-c", "import openapi_spec_validator"]);
    if !is_there.is_ok_and(|output| output.status.success()) {
        let name = "service::documents::a_validator_of_others_has_nothing_against_the_document";
        return skipped::skip(name, "there is no openapi_spec_validator in target/python");
    }
    let document = root.join("docs/openapi.json");
    let output = run(&["-m", "openapi_spec_validator", document.to_str().unwrap()]);
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_is_in_the_document_is_served_and_nothing_else() {
    let place = Place::new();
    let service = Service::start(&place, "");
    for (path, methods) in operations() {
        let path = path
            .replace("{name}", "x")
            .replace("{module}", "x")
            .replace("{mark}", "x")
            .replace("{id}", "x")
            .replace("{address}", "x")
            .replace("{plot}", "x")
            .replace("{number}", "1");
        for method in ["get", "put", "post", "delete", "patch"] {
            if path == "/v1/events" && method == "get" {
                // It has no end; another test listens.
                continue;
            }
            let answer = service.ask(&method.to_ascii_uppercase(), &path, None);
            let code = match answer.head.contains("problem+json") {
                true => answer.json()["code"].as_str().unwrap().to_owned(),
                false => String::new(),
            };
            assert_ne!(code, "no_such_path", "{method} {path}");
            let is_there = methods.iter().any(|other| other == method);
            assert_eq!(
                code != "wrong_method",
                is_there,
                "{method} {path}: {answer:?}"
            );
        }
    }
    service.end();
}

#[test]
fn the_guide_names_every_path_code_and_event() {
    let guide = read("service.md");
    for (path, methods) in operations() {
        for method in methods {
            let row = format!("`{} {path}`", method.to_ascii_uppercase());
            assert!(guide.contains(&row), "docs/service.md does not name {row}");
        }
    }
    let document: Value = serde_json::from_str(&read("openapi.json")).unwrap();
    let schemas = &document["components"]["schemas"];
    let codes = schemas["Code"]["enum"]
        .as_array()
        .cloned()
        .unwrap_or_else(|| {
            let each = schemas["Code"]["oneOf"].as_array().unwrap();
            each.iter().map(|one| one["const"].clone()).collect()
        });
    assert!(codes.len() > 10);
    let events = schemas["Event"]["oneOf"].as_array().unwrap();
    let events = events.iter().map(|event| {
        let tag = &event["properties"]["event"];
        tag["enum"][0]
            .as_str()
            .or(tag["const"].as_str())
            .unwrap()
            .to_owned()
    });
    let codes = codes.iter().map(|code| code.as_str().unwrap().to_owned());
    for name in codes.chain(events) {
        assert!(
            guide.contains(&format!("`{name}`")),
            "docs/service.md does not name {name}"
        );
    }
}

/// The blocks of shell in docs/service.md, one after the other in one shell, as a reader would type
/// them.
#[test]
fn the_examples_of_the_guide_work() {
    let place = Place::new();
    let guide = read("service.md");
    let mut script = String::from("set -eu\n");
    for block in guide.split("```sh\n").skip(1) {
        script.push_str(block.split("```").next().unwrap());
    }
    assert!(script.contains("--unix-socket"));
    let program = Path::new(env!("CARGO_BIN_EXE_cofferdam")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    crate::campaigns::campaign(&place, "first", 3);
    let mut shell = std::process::Command::new("bash");
    shell
        .args(["-c", &script])
        .env("PATH", path)
        .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
        .env("KERNEL", place.idle_kernel())
        .env("SNAPSHOT", place.path("snapshot"))
        .env("CAMPAIGNS", place.path("campaigns"))
        .env("TOKENS", place.path("tokens"))
        .env("TOLD", place.path("told"))
        .env("PORT", "0")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    if std::process::Command::new("curl")
        .arg("--version")
        .output()
        .is_err()
    {
        let name = "service::documents::the_examples_of_the_guide_work";
        skipped::skip(name, "there is no curl");
        return;
    }
    let output = finish(shell.spawn().unwrap());
    assert!(output.status.success(), "{output:?}\n{script}");
    place.assert_empty();
}
