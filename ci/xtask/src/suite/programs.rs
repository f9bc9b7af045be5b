//! The workspace's test programs and their `#[ignore]`d tests.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

use crate::steps::{capture, cargo};
use crate::workspace::Workspace;

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
    /// What it finds in its environment besides.
    pub environment: &'static [(&'static str, &'static str)],
}

/// The program whose tests run drivers in domains.
const ISOLATION: &str = "isolation::linux";

/// Guests in which frames fill several pages and the kernel's allocators check what is done to
/// their memory.
const CHECKED: &[(&str, &str)] = &[
    ("COFFERDAM_GUEST_APPEND", "slub_debug=FZPU page_poison=1"),
    ("COFFERDAM_GUEST_MTU", "9000"),
];

impl Program {
    /// The program as often as it is to be run: in the `full` form of the suite, drivers are run in
    /// domains once more in guests whose kernel checks its memory.
    pub fn forms(self, full: bool) -> Vec<Self> {
        let checked = (full && self.name == ISOLATION).then(|| Self {
            name: format!("{ISOLATION} (MTU 9000, checked memory)"),
            environment: CHECKED,
            ..self.clone()
        });
        [self].into_iter().chain(checked).collect()
    }

    /// `crate::target::test`.
    pub fn full_name(&self, test: &str) -> String {
        format!("{}::{test}", self.name)
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
pub fn build(workspace: &Workspace) -> anyhow::Result<Vec<Program>> {
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
                environment: &[],
                path,
                directory,
                name: format!("{package}::{}", target.name),
            });
        }
    }
    Ok(programs)
}

/// Names of a program's ignored tests.
pub fn ignored(program: &Program) -> anyhow::Result<Vec<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_run_in_domains_once_more_in_the_full_form() {
        let program = |name: &str| Program {
            path: "/t/linux".into(),
            directory: "/w/isolation".into(),
            name: name.into(),
            boots_linux: true,
            environment: &[],
        };
        assert_eq!(program(ISOLATION).forms(false), [program(ISOLATION)]);
        let other = program("vmm::linux");
        assert_eq!(other.clone().forms(true), [other]);
        let [plain, checked] = &program(ISOLATION).forms(true)[..] else {
            panic!("not two");
        };
        assert_eq!(*plain, program(ISOLATION));
        assert_eq!(checked.environment, CHECKED);
        assert_ne!(checked.name, plain.name);
    }

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
            environment: &[],
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
}
