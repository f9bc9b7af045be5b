//! The `#[ignore]`d tests, found in the workspace's test programs: they need the images. Those of targets named
//! `linux*` (`tests/linux.rs`) boot guests and run where that is possible, all others on this host. They are run one by
//! one, so that each has its own time limit and one that hangs the lab is tried again in a new one. All share one lab
//! while it lives.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::count::Count;
use crate::lab::{Ended, Kind, Lab, Request, Settings, watch_interrupts};
use crate::place::Place;
use crate::steps::{capture, cargo, duration};
use crate::workspace::Workspace;

/// For one test: several boots and twenty driver restarts in the lab.
const TEST_LIMIT: Duration = Duration::from_secs(300);

/// Test targets whose names begin so boot Linux.
const LINUX_TARGETS: &str = "linux";

/// A test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Directory of its crate, in which cargo runs tests.
    pub directory: PathBuf,
    /// `crate::target`.
    pub name: String,
    /// Its ignored tests boot Linux.
    pub boots_linux: bool,
}

/// A test that ran.
#[derive(Clone, Debug, Serialize)]
pub struct TestRecord {
    /// Program and test.
    pub name: String,
    /// Where it ran.
    pub place: Place,
    /// Whether it passed.
    pub passed: bool,
    /// How long it took.
    pub seconds: f64,
    /// Labs that hung under it.
    pub retries: u32,
}

/// What came of all of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// Each test.
    pub tests: Vec<TestRecord>,
}

impl Findings {
    /// How many passed and failed.
    pub fn count(&self) -> Count {
        let passed = self.tests.iter().filter(|test| test.passed).count() as u64;
        Count {
            passed,
            failed: self.tests.len() as u64 - passed,
        }
    }
}

/// The fields we use of cargo's messages.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    profile: Option<Profile>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds the workspace's test programs and tells which they are.
pub fn programs(workspace: &Workspace) -> anyhow::Result<Vec<Program>> {
    let messages = capture(
        cargo()
            .args([
                "test",
                "--workspace",
                "--locked",
                "--no-run",
                "--message-format",
                "json",
            ])
            .current_dir(workspace.root()),
    )?;
    read_messages(&messages)
}

fn read_messages(messages: &str) -> anyhow::Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message =
            serde_json::from_str(line).context("cannot understand cargo's message")?;
        let Message {
            executable: Some(path),
            manifest_path: Some(manifest),
            target: Some(target),
            ..
        } = message
        else {
            continue;
        };
        if message.reason == "compiler-artifact"
            && message.profile.is_some_and(|profile| profile.test)
        {
            let directory = manifest.parent().map(Path::to_owned).unwrap_or_default();
            let package = directory
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            programs.push(Program {
                boots_linux: target.name.starts_with(LINUX_TARGETS),
                path,
                directory,
                name: format!("{package}::{}", target.name),
            });
        }
    }
    Ok(programs)
}

/// Names of a program's ignored tests.
fn ignored(program: &Program) -> anyhow::Result<Vec<String>> {
    let list = capture(
        std::process::Command::new(&program.path)
            .args(["--list", "--ignored", "--format", "terse"])
            .current_dir(&program.directory),
    )?;
    Ok(read_list(&list))
}

fn read_list(list: &str) -> Vec<String> {
    list.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

/// Runs every ignored test whose name contains `filter`, guests in `place`. What was done is in `findings` even if it ends
/// early.
pub fn run(
    workspace: &Workspace,
    place: Place,
    filter: &str,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    watch_interrupts()?;
    let mut lab = None;
    for program in programs(workspace)? {
        let place = if program.boots_linux {
            place
        } else {
            Place::Host
        };
        for test in ignored(&program)? {
            let name = format!("{}::{test}", program.name);
            if !name.contains(filter) {
                continue;
            }
            if place == Place::Lab && lab.is_none() {
                lab = Some(Lab::open(Settings::new(workspace), Kind::Any)?);
            }
            let lab = lab.as_mut().filter(|_| place == Place::Lab);
            let record = run_test(name, place, &request(workspace, &program, &test)?, lab)?;
            findings.tests.push(record);
        }
    }
    lab.map_or(Ok(()), Lab::close)
}

fn run_test(
    name: String,
    place: Place,
    request: &Request,
    lab: Option<&mut Lab>,
) -> anyhow::Result<TestRecord> {
    let begin = Instant::now();
    let mut output = Vec::new();
    let mut take = |_: bool, bytes: &[u8]| {
        output.extend_from_slice(bytes);
        Ok(())
    };
    let (ended, retries) = match lab {
        Some(lab) => {
            let outcome = lab.run(request, &mut take)?;
            (outcome.ended, outcome.retries)
        }
        None => (super::host::run(request, &mut take)?, 0),
    };
    if ended == Ended::Interrupted {
        bail!("interrupted");
    }
    // A filter that matches nothing also ends well.
    let mut count = Count::default();
    let output = String::from_utf8_lossy(&output);
    output.lines().for_each(|line| count.read_line(line));
    let passed = ended == Ended::Exited(0) && count.passed == 1;
    let seconds = begin.elapsed().as_secs_f64();
    let word = if passed { "ok" } else { "FAILED" };
    let again = if retries > 0 {
        ", the lab hung once"
    } else {
        ""
    };
    eprintln!(
        "      test {name} ... {word} ({}, {}{again})",
        duration(seconds),
        place.word()
    );
    if !passed {
        eprintln!("{output}\n      ended: {ended:?}");
    }
    Ok(TestRecord {
        name,
        place,
        passed,
        seconds,
        retries,
    })
}

fn request(workspace: &Workspace, program: &Program, test: &str) -> anyhow::Result<Request> {
    let path = program.path.to_string_lossy().into_owned();
    let words = [
        path.as_str(),
        "--ignored",
        "--exact",
        test,
        "--nocapture",
        "--test-threads",
        "1",
    ];
    let mut request = Request::new(words.map(str::to_owned).to_vec(), TEST_LIMIT)?;
    request.cwd = program.directory.clone();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    for (name, value) in [
        ("CARGO_MANIFEST_DIR", text(&program.directory)),
        ("COFFERDAM_IMAGES", text(&workspace.images())),
    ] {
        request.env.retain(|(other, _)| other != name);
        request.env.push((name.to_owned(), value));
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_picked_out_of_cargos_messages() {
        let artifact = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/vmm/Cargo.toml","target":{{"name":"boot"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let messages = [
            artifact(true, r#""/t/boot-1""#),
            artifact(false, r#""/t/program""#),
            artifact(true, "null"),
            r#"{"reason":"build-finished","success":true}"#.into(),
        ];
        let programs = read_messages(&messages.join("\n")).unwrap();
        let boot = Program {
            path: "/t/boot-1".into(),
            directory: "/w/vmm".into(),
            name: "vmm::boot".into(),
            boots_linux: false,
        };
        assert_eq!(programs, [boot]);
    }

    #[test]
    fn benchmarks_and_summaries_are_no_tests() {
        assert_eq!(
            read_list("a::b: test\nc: benchmark\nd: test\n\n2 tests, 1 benchmark\n"),
            ["a::b", "d"]
        );
    }

    #[test]
    fn environment_of_a_test_is_that_of_its_crate() {
        let program = Program {
            path: "/t/boot".into(),
            directory: "/w/vmm".into(),
            name: "vmm::boot".into(),
            boots_linux: false,
        };
        let request = request(&Workspace::find().unwrap(), &program, "boots").unwrap();
        let values: Vec<_> = request
            .env
            .iter()
            .filter(|(name, _)| name == "CARGO_MANIFEST_DIR")
            .collect();
        assert_eq!(values.len(), 1);
        assert_eq!(values[0].1, "/w/vmm");
        assert_eq!(request.argv[2..4], ["--exact", "boots"]);
    }
}
