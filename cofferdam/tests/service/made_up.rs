//! Requests that a client of others (`schemathesis`) makes up from the OpenAPI document.
//! `cargo xtask setup` installs it where it can.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::place::{Place, end};
use crate::over_tcp::{DO, OverTcp};
use crate::scripted::script;

/// What it looks at in each answer. That all that fits the document is taken is not among it: what
/// a path or a wire is, the document does not say.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth";

/// Requests that wait for a guest's agent, which a guest without Linux has not, and those that are
/// jobs without being waited for.
const TAKE_LONG: &str =
    "/(exec|snapshot|isolation/.module.|suspend-device|resume-device|code-faults|upgrade)$";

/// Streams that have no end, and what ends the guest.
const LEFT_OUT: [&str; 3] = [
    "GET /v1/events",
    "GET /v1/guests/{name}/console",
    "DELETE /v1/guests/{name}",
];

fn client() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/python/bin/schemathesis")
}

/// Has it make up requests about the guest `name`; few, and each time the same.
fn made_up(place: &Place, over: &OverTcp, name: &str, words: &[&str]) {
    let parameters =
        format!("[parameters]\n\"path.name\" = \"{name}\"\n\"path.module\" = \"e1000\"\n");
    let config = place.file("schemathesis.toml", parameters.as_bytes());
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let mut command = Command::new(client());
    command
        .args(["--config-file", &config, "run"])
        .arg(document)
        .args(["--url", &format!("https://{}/", over.address)])
        .args(["--header", &format!("authorization: Bearer {DO}")])
        .args(["--tls-verify", "false", "--no-color", "--warnings", "off"])
        .args(["--phases", "examples,coverage,fuzzing", "--checks", CHECKS])
        .args([
            "--max-examples",
            "5",
            "--generation-deterministic",
            "--no-shrink",
        ])
        .args(["--workers", "1", "--continue-on-failure"])
        // Nothing is found by a machine's being slow.
        .args([
            "--request-timeout",
            "3600",
            "--suppress-health-check",
            "all",
        ])
        // What it keeps of a run.
        .current_dir(place.path(""));
    for operation in LEFT_OUT {
        command.args(["--exclude-name", operation]);
    }
    let output = command.args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn requests_that_others_make_up_find_nothing() {
    let name = "service::made_up::requests_that_others_make_up_find_nothing";
    let is_there = Command::new(client()).arg("--version").output();
    if !is_there.is_ok_and(|output| output.status.success()) {
        return skipped::skip(name, "there is no schemathesis in target/python");
    }
    let place = Place::new();
    crate::campaigns::campaign(&place, "idle", 3);
    let campaigns = place.path("campaigns").display().to_string();
    let words = format!("--campaigns {campaigns} --images /nonexistent");
    let over = OverTcp::start(&place, &words);
    // Snapshots and sockets that are made up go nowhere else.
    std::fs::create_dir(place.path("ours")).unwrap();
    let ours = place.path("ours").display().to_string();
    let vm = place.idle(&format!(
        "--memory 32M --net user --serial control --allow-dir {ours}"
    ));
    made_up(&place, &over, "idle", &["--exclude-path-regex", TAKE_LONG]);
    made_up(
        &place,
        &over,
        "nosuch",
        &["--include-path-regex", TAKE_LONG],
    );
    // A process that answers as one of a guest with Linux would.
    let (script, _) = script(&place);
    let with_answers = [
        "--include-path-regex",
        TAKE_LONG,
        "--exclude-path-regex",
        "/(exec|snapshot)$",
    ];
    made_up(&place, &over, "script", &with_answers);
    drop(script);
    // Whatever it did to the guest, that is there and answers.
    assert_eq!(place.status()["name"], "idle");
    over.service.end();
    end(&place, vm, &[]);
}
