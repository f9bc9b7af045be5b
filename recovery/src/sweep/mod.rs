//! Modules of a kernel's package, one after the other, with all of their functions isolated: what
//! they are to do, what came of it, and of a fault in each function that was called.
//!
//! ```text
//!   booted ─► loaded ─► the work, natively
//!   booted ─► loaded ─► isolated ─► the work ─► counters, log, removed
//!                           └─► a fault in one function ─► the work ─► does it work afterwards?   (for each that was called)
//! ```
//!
//! What modules of one class do is data: a file beside this one. Nothing here runs a guest.

pub mod record;

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::campaign::workload::{Step, Workload, WorkloadError};

/// What modules of each class do.
const CLASSES: &[&str] = &[
    include_str!("pair.toml"),
    include_str!("interface.toml"),
    include_str!("tunnel.toml"),
    include_str!("members.toml"),
    include_str!("ipsec.toml"),
    include_str!("congestion.toml"),
    include_str!("qdisc.toml"),
    include_str!("filter.toml"),
    include_str!("disk.toml"),
    include_str!("files.toml"),
    include_str!("sound.toml"),
    include_str!("charset.toml"),
];

/// Shell functions of those that have a cable with two ends.
const PAIR: &str = include_str!("pair.sh");

/// Modules that do the same, as a file says it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Class {
    class: String,
    /// Modules that are loaded before, and are not isolated.
    #[serde(default)]
    with: Vec<String>,
    /// They need the shell functions of a cable with two ends.
    #[serde(default)]
    pair: bool,
    /// Shell functions. `$M` is the module, `$A` what is said of it below.
    #[serde(default)]
    shell: String,
    /// Done before it is isolated.
    #[serde(default)]
    prepare: String,
    /// Succeeds if the module works.
    works: String,
    /// The modules, and what each is called where it is asked for.
    modules: BTreeMap<String, String>,
    /// Parameters of those that need any.
    #[serde(default)]
    parameters: BTreeMap<String, String>,
    steps: Vec<Step>,
}

/// A module and what it is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// What it is one of.
    pub class: String,
    /// Its work. No functions are named: all are isolated.
    pub workload: Workload,
}

impl Case {
    /// Its name, of which there is one.
    pub fn name(&self) -> String {
        format!("{}/{}", self.class, self.workload.driver)
    }
}

/// All cases, by class.
///
/// # Errors
/// One of the program's own files is none, which a test excludes.
pub fn cases() -> Result<Vec<Case>, WorkloadError> {
    let mut cases = Vec::new();
    for text in CLASSES {
        let class: Class = crate::campaign::workload::parse(text)?;
        for (module, called) in &class.modules {
            let case = case(&class, module, called);
            case.workload.check_work()?;
            cases.push(case);
        }
    }
    Ok(cases)
}

fn case(class: &Class, module: &str, called: &str) -> Case {
    let pair = if class.pair { PAIR } else { "" };
    let called = called.replace('\'', r"'\''");
    let shell = format!("M={module}\nA='{called}'\n{pair}\n{}", class.shell);
    let workload = Workload {
        driver: module.to_owned(),
        parameters: class.parameters.get(module).cloned().unwrap_or_default(),
        run: String::new(),
        network: false,
        modules: class.with.clone(),
        prepare: format!("{shell}\n{}", class.prepare),
        shell,
        entries: Vec::new(),
        helpers: Vec::new(),
        works: class.works.clone(),
        steps: class.steps.clone(),
    };
    Case {
        class: class.class.clone(),
        workload,
    }
}

/// A module's name as the kernel has it (`/proc/modules`).
pub fn loaded_name(module: &str) -> String {
    module.replace('-', "_")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_case_is_one_and_there_are_enough() {
        let cases = cases().unwrap();
        let names: BTreeSet<_> = cases.iter().map(Case::name).collect();
        assert_eq!(names.len(), cases.len(), "two cases have one name");
        let modules: BTreeSet<_> = cases.iter().map(|case| &case.workload.driver).collect();
        assert!(modules.len() >= 160, "{}", modules.len());
    }

    #[test]
    fn what_a_module_is_called_is_one_word_of_the_shell() {
        let cases = cases().unwrap();
        let mut quoted = cases
            .iter()
            .filter(|case| case.workload.driver == "cls_bpf");
        let script = &quoted.next().unwrap().workload.prepare;
        let output = std::process::Command::new("sh")
            .args([
                "-c",
                &format!(
                    "{}\necho \"$M:$A\"",
                    script.lines().take(2).collect::<Vec<_>>().join("\n")
                ),
            ])
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            "cls_bpf:bpf bytecode '1,6 0 0 4294967295' classid 1:1"
        );
    }

    #[test]
    fn scripts_are_scripts() {
        for case in cases().unwrap() {
            let script = case.workload.script("", std::net::Ipv4Addr::LOCALHOST);
            for script in [&script, &case.workload.prepare] {
                let output = std::process::Command::new("sh")
                    .args(["-n", "-c", script])
                    .output()
                    .unwrap();
                assert!(output.status.success(), "{}: {output:?}", case.name());
            }
        }
    }
}
