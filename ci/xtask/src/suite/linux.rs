//! The `#[ignore]`d tests, found in the workspace's test programs: they need the images. Those of targets named
//! `linux*` (`tests/linux/`) boot guests and run where that is possible, all others on this host. The tests of one program run
//! in one process, one after the other, so that they can share a guest; in labs, programs run side by side. A program
//! that hangs its lab is tried again as a whole in a new one.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::count::Count;
use crate::lab::{Ended, Kind, Lab, Request, Settings, watch_interrupts};
use crate::place::Place;
use crate::steps::{capture, cargo, duration};
use crate::workspace::Workspace;

/// For a program, and for each of its tests beyond that: several boots, or twenty driver restarts, in a busy lab.
const PROGRAM_LIMIT: Duration = Duration::from_secs(240);
const TEST_LIMIT: Duration = Duration::from_secs(40);

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

impl Program {
    fn full_name(&self, test: &str) -> String {
        format!("{}::{test}", self.name)
    }
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
    /// How long it took: to its end from that of the one before it.
    pub seconds: f64,
}

/// What came of all of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// Each test.
    pub tests: Vec<TestRecord>,
    /// Labs that hung.
    pub retries: u32,
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

/// Emulated processors of a lab for tests. With two, QEMU's guests with several vCPUs now and then do not come up
/// (`docs/lab.md`); with one lab for each of the host's processors there is no use for more either.
const LAB_CPUS: u32 = 1;

/// A program and those of its tests that are to run.
type Chosen = (Program, Vec<String>);

/// Runs every ignored test whose name contains `filter`, guests in `place`. What was done is in `findings` even if it ends
/// early.
pub fn run(
    workspace: &Workspace,
    place: Place,
    filter: &str,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    watch_interrupts()?;
    let mut in_labs: VecDeque<Chosen> = VecDeque::new();
    for program in programs(workspace)? {
        let mut tests = ignored(&program)?;
        tests.retain(|test| program.full_name(test).contains(filter));
        if tests.is_empty() {
            continue;
        }
        if place == Place::Lab && program.boots_linux {
            in_labs.push_back((program, tests));
            continue;
        }
        let request = request(workspace, &program, &tests)?;
        let mut run = ProgramRun::new(&program, &tests, Place::Host);
        let ended = super::host::run(&request, &mut |is_stderr, bytes| run.read(is_stderr, bytes))?;
        if ended == Ended::Interrupted {
            bail!("interrupted");
        }
        findings.tests.extend(run.finish(ended));
    }
    run_in_labs(workspace, in_labs, findings)
}

/// Several labs side by side, one for each of this host's processors.
fn run_in_labs(
    workspace: &Workspace,
    programs: VecDeque<Chosen>,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let labs = processors.min(programs.len());
    let left = Mutex::new(programs);
    let next = || {
        left.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let found = Mutex::new(findings);
    let (next, found) = (&next, &found);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..labs)
            .map(|number| {
                // One that was left running serves one command at a time.
                let kind = if number == 0 { Kind::Any } else { Kind::Fresh };
                scope.spawn(move || {
                    let mut settings = Settings::new(workspace);
                    settings.number = number;
                    settings.machine.cpus = LAB_CPUS;
                    let mut lab = Lab::open(settings, kind)?;
                    while let Some(chosen) = next() {
                        let of_program = run_in_lab(workspace, &mut lab, &chosen)?;
                        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                        found.retries += of_program.retries;
                        found.tests.extend(of_program.tests);
                    }
                    lab.close()
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

fn run_in_lab(
    workspace: &Workspace,
    lab: &mut Lab,
    (program, tests): &Chosen,
) -> anyhow::Result<Findings> {
    let request = request(workspace, program, tests)?;
    let mut run = ProgramRun::new(program, tests, Place::Lab);
    let outcome = lab.run(&request, &mut |is_stderr, bytes| run.read(is_stderr, bytes))?;
    if outcome.ended == Ended::Interrupted {
        bail!("interrupted");
    }
    Ok(Findings {
        tests: run.finish(outcome.ended),
        retries: outcome.retries,
    })
}

/// Understands what a test program says while it runs.
struct ProgramRun<'a> {
    program: &'a Program,
    tests: &'a [String],
    place: Place,
    /// All that it said.
    output: Vec<u8>,
    /// The unfinished line on its standard output, where the results are.
    line: Vec<u8>,
    records: Vec<TestRecord>,
    last_end: Instant,
}

impl<'a> ProgramRun<'a> {
    fn new(program: &'a Program, tests: &'a [String], place: Place) -> Self {
        Self {
            program,
            tests,
            place,
            output: Vec::new(),
            line: Vec::new(),
            records: Vec::new(),
            last_end: Instant::now(),
        }
    }

    fn read(&mut self, is_stderr: bool, bytes: &[u8]) -> std::io::Result<()> {
        self.output.extend_from_slice(bytes);
        if is_stderr {
            return Ok(());
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                if let Some((test, passed)) = read_result(String::from_utf8_lossy(&line).trim_end())
                {
                    self.record(test, passed);
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, test: &str, passed: bool) {
        if !self.tests.iter().any(|known| known == test) {
            return;
        }
        let name = self.program.full_name(test);
        // A lab that hung: the program begins anew.
        self.records.retain(|record| record.name != name);
        let seconds = self.last_end.elapsed().as_secs_f64();
        self.last_end = Instant::now();
        let word = if passed { "ok" } else { "FAILED" };
        let (time, place) = (duration(seconds), self.place.word());
        eprintln!("      test {name} ... {word} ({time}, {place})");
        self.records.push(TestRecord {
            name,
            place: self.place,
            passed,
            seconds,
        });
    }

    /// A test that the program did not come to has failed, and so has every one if the program says nothing of them but ends
    /// badly.
    fn finish(mut self, ended: Ended) -> Vec<TestRecord> {
        for test in self.tests {
            let name = self.program.full_name(test);
            if !self.records.iter().any(|record| record.name == name) {
                self.record(test, false);
            }
        }
        let all_passed = self.records.iter().all(|record| record.passed);
        if all_passed && ended != Ended::Exited(0) {
            // All tests ended well, but something behind them did not.
            self.records
                .iter_mut()
                .for_each(|record| record.passed = false);
        }
        if !all_passed || ended != Ended::Exited(0) {
            eprintln!(
                "{}\n      {} ended: {ended:?}",
                String::from_utf8_lossy(&self.output),
                self.program.name
            );
        }
        self.records
    }
}

/// Test and whether it passed, of a line such as `test boots ... ok`.
fn read_result(line: &str) -> Option<(&str, bool)> {
    let (test, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match result {
        "ok" => Some((test, true)),
        "FAILED" => Some((test, false)),
        _ => None,
    }
}

fn request(workspace: &Workspace, program: &Program, tests: &[String]) -> anyhow::Result<Request> {
    let path = program.path.to_string_lossy().into_owned();
    let mut argv = vec![path];
    argv.extend(["--ignored", "--test-threads", "1", "--exact"].map(str::to_owned));
    argv.extend_from_slice(tests);
    let limit = PROGRAM_LIMIT + TEST_LIMIT * u32::try_from(tests.len())?;
    let mut request = Request::new(argv, limit)?;
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

    fn program() -> Program {
        Program {
            path: "/t/boot".into(),
            directory: "/w/vmm".into(),
            name: "vmm::boot".into(),
            boots_linux: true,
        }
    }

    fn passed(said: &[&str], ended: Ended) -> Vec<(String, bool)> {
        let (program, tests) = (program(), ["a", "b"].map(str::to_owned));
        let mut run = ProgramRun::new(&program, &tests, Place::Lab);
        for piece in said {
            run.read(false, piece.as_bytes()).unwrap();
            run.read(true, b"a word on standard error").unwrap();
        }
        let records = run.finish(ended);
        records
            .into_iter()
            .map(|record| (record.name, record.passed))
            .collect()
    }

    fn both(a: bool, b: bool) -> Vec<(String, bool)> {
        vec![("vmm::boot::a".into(), a), ("vmm::boot::b".into(), b)]
    }

    #[test]
    fn results_are_read_from_what_a_program_says() {
        let said = [
            "running 2 tests\ntest a ...",
            " ok\ntest b ... FAIL",
            "ED\n\ntest c ... ok\n",
        ];
        assert_eq!(passed(&said, Ended::Exited(101)), both(true, false));
        assert_eq!(
            passed(&["test a ... ok\ntest b ... ok\n"], Ended::Exited(0)),
            both(true, true)
        );
    }

    #[test]
    fn tests_that_a_program_did_not_come_to_have_failed() {
        assert_eq!(
            passed(&["test a ... ok\ntest b ... "], Ended::TimeLimit),
            both(true, false)
        );
        assert_eq!(passed(&[""], Ended::Exited(0)), both(false, false));
    }

    #[test]
    fn a_program_that_ends_badly_after_its_tests_fails_them() {
        let said = ["test a ... ok\ntest b ... ok\n"];
        assert_eq!(passed(&said, Ended::Signaled(11)), both(false, false));
    }

    #[test]
    fn a_second_try_replaces_what_the_first_found() {
        let said = [
            "test a ... FAILED\n",
            "running 2 tests\ntest a ... ok\ntest b ... ok\n",
        ];
        assert_eq!(passed(&said, Ended::Exited(0)), both(true, true));
    }

    #[test]
    fn environment_of_a_program_is_that_of_its_crate() {
        let tests = ["boots".to_owned()];
        let request = request(&Workspace::find().unwrap(), &program(), &tests).unwrap();
        let values: Vec<_> = request
            .env
            .iter()
            .filter(|(name, _)| name == "CARGO_MANIFEST_DIR")
            .collect();
        assert_eq!(values.len(), 1);
        assert_eq!(values[0].1, "/w/vmm");
        assert_eq!(request.argv[request.argv.len() - 2..], ["--exact", "boots"]);
    }
}
