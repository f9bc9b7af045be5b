//! The dashboard for Grafana shows what there is at `/metrics`, all of it, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::client::Service;
use crate::common::place::{Place, finish, signal};
use crate::devices::host;
use crate::scripted::script;

/// Labels of each metric.
type Metrics = BTreeMap<String, BTreeSet<String>>;

fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboard/cofferdam.json")
}

fn dashboard() -> Value {
    serde_json::from_str(&std::fs::read_to_string(file()).unwrap()).unwrap()
}

/// `/metrics` of a service with guests of this host's KVM that have a NIC by turns, and one that
/// only speaks the protocol and says that calls of it have failed. Twice: the second time of
/// another service.
fn metrics() -> [String; 2] {
    let place = Place::new();
    let service = Service::start(&place, "");
    let host = host(&place);
    let left = place.start("left", &place.idle_kernel(), "--nic device=nic0");
    let right = place.start("right", &place.idle_kernel(), "--nic device=nic0");
    let (dir, _script) = script(&place);
    let switch = service.post("/v1/devices/nic0/switch", r#"{"to":"right"}"#);
    switch.ok(200);
    let first = service.get("/metrics").ok(200).text;
    service.kill();
    let service = Service::start(&place, "");
    let second = service.get("/metrics").ok(200).text;
    service.end();
    drop(dir);
    for process in [left, right, host] {
        signal(&process, libc::SIGTERM);
        finish(process);
    }
    [first, second]
}

/// The labels of each metric that has a sample.
fn labels(text: &str) -> Metrics {
    let mut metrics = Metrics::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap());
        let labels = metrics.entry(name.to_owned()).or_default();
        if let Some(inner) = rest.strip_prefix('{') {
            let inner = inner.rsplit_once('}').unwrap().0;
            labels.extend(inner.split(',').map(|one| name_before(one, '=')));
        }
    }
    metrics
}

fn name_before(text: &str, mark: char) -> String {
    text.split(mark).next().unwrap().trim().to_owned()
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The metrics that a query names, each with the labels that it is chosen by.
fn named(query: &str) -> Metrics {
    let mut metrics = Metrics::new();
    let mut rest = query;
    while let Some(at) = rest.find("cofferdam_") {
        let after = rest.split_at(at).1;
        let end = after.find(|c| !is_of_a_name(c)).unwrap_or(after.len());
        let (name, after) = after.split_at(end);
        let labels = metrics.entry(name.to_owned()).or_default();
        if let Some(chosen) = after.strip_prefix('{') {
            let chosen = chosen.split('}').next().unwrap();
            labels.extend(chosen.split(',').map(|one| name_before(one, '=')));
        }
        rest = after;
    }
    metrics
}

/// The labels that a query sums by.
fn sums_by(query: &str) -> Option<BTreeSet<String>> {
    let (_, by) = query.split_once(" by (")?;
    let by = by.split(')').next().unwrap();
    Some(by.split(',').map(|one| one.trim().to_owned()).collect())
}

/// The words between two marks.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> Vec<&'a str> {
    let parts = text.split(begin).skip(1);
    parts.map(|part| part.split(end).next().unwrap()).collect()
}

/// The variables that a text uses.
fn variables(text: &str) -> BTreeSet<&str> {
    let parts = text.split('$').skip(1);
    let names = parts.map(|part| part.trim_start_matches('{'));
    names
        .map(|part| part.split(|c| !is_of_a_name(c)).next().unwrap())
        .collect()
}

/// What is wrong with a dashboard for these metrics.
fn findings(dashboard: &Value, metrics: &Metrics) -> Vec<String> {
    let mut found = Vec::new();
    let mut shown = BTreeSet::new();
    let list = dashboard["templating"]["list"].as_array().unwrap();
    let mut known: BTreeSet<&str> = list
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    known.insert("__rate_interval");
    let mut check = |query: &str, wanted: BTreeSet<String>| {
        let named = named(query);
        if named.is_empty() {
            found.push(format!("{query}: no metric"));
        }
        for (name, chosen) in named {
            match metrics.get(&name) {
                None => found.push(format!("{query}: no metric {name}")),
                Some(labels) => {
                    let of_it = chosen.union(&wanted).filter(|one| !labels.contains(*one));
                    found.extend(of_it.map(|one| format!("{query}: no label {one}")));
                }
            }
            shown.insert(name);
        }
        let unknown = variables(query)
            .into_iter()
            .filter(|one| !known.contains(one));
        found.extend(unknown.map(|one| format!("{query}: no variable {one}")));
    };
    for variable in list.iter().filter(|one| one["type"] == "query") {
        let query = variable["query"]["query"].as_str().unwrap();
        let label = query.rsplit(',').next().unwrap().trim_end_matches(')');
        check(query, BTreeSet::from([label.trim().to_owned()]));
    }
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            let legend = target["legendFormat"].as_str().unwrap();
            let told = between(legend, "{{", "}}");
            // Prometheus itself gives this one to each.
            let told = told.into_iter().filter(|label| *label != "instance");
            let told: BTreeSet<String> = told.map(str::to_owned).collect();
            let by = sums_by(query).unwrap_or_else(|| told.clone());
            if !told.is_subset(&by) {
                check(
                    query,
                    BTreeSet::from([format!("of {legend} after the sum")]),
                );
            }
            check(query, by);
        }
    }
    let missing = metrics.keys().filter(|name| {
        // Both are in what the buckets are.
        let of_histogram = name.strip_suffix("_sum").or(name.strip_suffix("_count"));
        let name = of_histogram.map_or((*name).clone(), |name| format!("{name}_bucket"));
        !shown.contains(&name)
    });
    found.extend(missing.map(|name| format!("no panel shows {name}")));
    found
}

#[test]
fn the_dashboard_shows_what_there_is_and_all_of_it_and_a_new_service_has_the_same() {
    let [first, second] = metrics();
    let metrics = labels(&first);
    assert_eq!(metrics, labels(&second));
    let kept = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| {
            line.contains("_bucket{") || line.contains("_count{") || line.contains("_sum{")
        });
        // Of a family they come in any order.
        let mut lines: Vec<_> = lines.map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(kept(&first), kept(&second), "what was counted is not lost");
    let switches = kept(&first);
    let all = "cofferdam_device_switch_duration_seconds_count{device=\"nic0\"} 2";
    assert!(switches.iter().any(|line| line == all), "{switches:?}");

    let mut dashboard = dashboard();
    assert_eq!(findings(&dashboard, &metrics), [""; 0]);

    // And what would be wrong is found.
    let target = |dashboard: &mut Value, field: &str, text: &str| {
        let panels = dashboard["panels"].as_array_mut().unwrap();
        let panel = panels.iter_mut().find(|one| !one["targets"].is_null());
        panel.unwrap()["targets"][0][field] = json!(text);
    };
    for (query, says) in [
        (
            "sum by (state) (cofferdam_guest)",
            "no metric cofferdam_guest",
        ),
        ("sum by (stage) (cofferdam_guests)", "no label stage"),
        ("cofferdam_guests{guest=\"x\"}", "no label guest"),
        ("cofferdam_guests{state=~\"$stage\"}", "no variable stage"),
        ("sum(up)", "no metric"),
    ] {
        target(&mut dashboard, "expr", query);
        let found = findings(&dashboard, &metrics).join("\n");
        assert!(found.contains(says), "{query}: {found}");
    }
    let found = findings(&dashboard, &metrics).join("\n");
    assert!(found.contains("no panel shows cofferdam_guests"), "{found}");
}

/// What `dashboard.py` says of a file, and whether it has nothing against it; `None` if the
/// packages of Python's that it takes are missing.
fn checked(test: &str, module: &str, words: &[&str]) -> Option<(String, bool)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join("target/python/bin/python");
    let run = |words: &[&str]| Command::new(&python).args(words).output();
    let is_there = run(&["-c", &format!("import {module}")]);
    if !is_there.is_ok_and(|output| output.status.success()) {
        let why = format!("there is no {module} in target/python");
        skipped::skip(&format!("service::dashboard::{test}"), &why);
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/service/dashboard.py");
    let output = run(&[&[script.to_str().unwrap()], words].concat()).unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.stderr.is_empty(),
        "{:?}",
        String::from_utf8(output.stderr)
    );
    Some((said.trim().to_owned(), output.status.success()))
}

#[test]
fn grafanas_own_types_have_nothing_against_the_dashboard() {
    let test = "grafanas_own_types_have_nothing_against_the_dashboard";
    let module = "grafana_foundation_sdk";
    let path = file();
    let Some((said, is_right)) = checked(test, module, &["schema", path.to_str().unwrap()]) else {
        return;
    };
    assert!(is_right, "{said}");
    assert!(said.parse::<u32>().unwrap() > 100, "objects: {said}");

    let place = Place::new();
    let mut wrong = dashboard();
    wrong["panels"][1]["titel"] = json!("x");
    wrong["panels"][1]["gridPos"]["h"] = json!("eight");
    wrong["panels"][1]["fieldConfig"]["defaults"]["custom"]["drawStyle"] = json!("wave");
    wrong["templating"]["list"][0]["type"] = json!("source");
    let path = place.file("wrong.json", wrong.to_string().as_bytes());
    let (said, is_right) = checked(test, module, &["schema", &path]).unwrap();
    assert!(!is_right && said.lines().count() == 4, "{said}");
}

#[test]
fn a_parser_of_others_reads_the_queries() {
    let test = "a_parser_of_others_reads_the_queries";
    let path = file();
    let words = ["queries", path.to_str().unwrap()];
    let Some((said, is_right)) = checked(test, "promql_parser", &words) else {
        return;
    };
    assert!(is_right, "{said}");
    assert!(said.parse::<u32>().unwrap() > 20, "queries: {said}");
    let place = Place::new();
    let mut wrong = dashboard();
    wrong["panels"][1]["targets"][0]["expr"] = json!("sum by (state (cofferdam_guests)");
    let path = place.file("wrong.json", wrong.to_string().as_bytes());
    let (said, is_right) = checked(test, "promql_parser", &["queries", &path]).unwrap();
    assert!(!is_right && said.lines().count() == 1, "{said}");
}

#[test]
fn a_parser_of_others_reads_the_metrics_and_their_histograms() {
    let test = "a_parser_of_others_reads_the_metrics_and_their_histograms";
    let place = Place::new();
    let [text, _] = metrics();
    let path = place.file("metrics", text.as_bytes());
    let words = ["metrics", path.as_str()];
    let Some((said, is_right)) = checked(test, "prometheus_client", &words) else {
        return;
    };
    assert!(is_right, "{said}");
    assert_eq!(said, "4", "histograms");
    // A bucket that does not hold what the one below it does.
    let mut buckets = text.lines().filter(|line| line.contains("le=\"+Inf\""));
    let bucket = buckets.find(|line| line.ends_with(" 2"));
    let bucket = bucket.unwrap();
    let less = format!("{} 1", bucket.strip_suffix(" 2").unwrap());
    let path = place.file("wrong", text.replace(bucket, &less).as_bytes());
    let (said, is_right) = checked(test, "prometheus_client", &["metrics", &path]).unwrap();
    assert!(!is_right, "{said}");
}
