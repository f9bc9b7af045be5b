//! Which steps of the guest's work call a function: what a trial of a fault in it has the guest do.
//!
//! The guest's own function tracer tells (Documentation/trace/ftrace.rst), in one run of the work
//! without a fault. A kernel that cannot trace functions tells nothing, and the guest does all of
//! its work in each trial.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use rand_core::{Rng, SeedableRng};
use rand_xorshift::XorShiftRng;
use serde::{Deserialize, Serialize};

use super::{Step, Workload};

/// Groups of steps that call the function that are done: the first ones.
const MAX_GROUPS: usize = 2;

/// In front of a line of the script's that names a function, and a step in which it was called.
const CALLED: &str = "called:";

/// Which steps the guest does in a trial.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Steps {
    /// All.
    #[default]
    All,
    /// The first that call the function with the fault, and those that are always done; all where
    /// that is not known.
    Called,
}

/// Steps in which each function was called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Calls(BTreeMap<String, BTreeSet<String>>);

impl Calls {
    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Workload {
    /// The script, with what functions of the driver each step calls on its output.
    pub fn traced_script(&self, interface: &str, gateway: Ipv4Addr) -> String {
        let driver = &self.driver;
        let begin = format!(
            "T=/sys/kernel/tracing; [ -e $T/trace ] || mount -t tracefs tracefs $T
echo '*:mod:{driver}' >$T/set_ftrace_filter && echo function >$T/current_tracer || T=
echo >$T/trace
c() {{ n=$1; [ -n \"$T\" ] || return 0; echo 0 >$T/tracing_on
sed -n 's/.*: \\([A-Za-z0-9_.]*\\)[^<]*<-.*/\\1/p' $T/trace | sort -u | while read f; do echo \"{CALLED}$f $n\"; done
echo >$T/trace; echo 1 >$T/tracing_on; }}"
        );
        self.write_script(interface, gateway, Some(&begin))
    }

    /// What the output of [`Workload::traced_script`] says, which comes from the guest and may be
    /// anything.
    pub fn read_calls(&self, output: &str) -> Calls {
        let mut calls = Calls::default();
        let called = output.lines().filter_map(|line| line.strip_prefix(CALLED));
        for (function, step) in called.filter_map(|line| line.split_once(' ')) {
            let is_step = self.steps.iter().any(|known| known.name == step);
            if is_step && self.functions().any(|known| known == function) {
                let steps = calls.0.entry(function.to_owned()).or_default();
                steps.insert(step.to_owned());
            }
        }
        calls
    }

    /// Names of the steps for a fault in this function, as [`Steps::Called`] says.
    pub fn steps_for(&self, calls: &Calls, function: &str) -> Vec<String> {
        let called = calls.0.get(function);
        let is_called =
            |step: &&Step| called.is_some_and(|called| called.contains(&step.name)) && !step.always;
        let mut groups: Vec<&str> = Vec::new();
        for step in self.steps.iter().filter(is_called) {
            if groups.len() < MAX_GROUPS && !groups.contains(&step.group()) {
                groups.push(step.group());
            }
        }
        let is_chosen = |step: &&Step| step.always || groups.contains(&step.group());
        let all = called.is_none();
        let steps = self.steps.iter().filter(|step| all || is_chosen(step));
        steps.map(|step| step.name.clone()).collect()
    }

    /// The same with these steps alone; with all if none of them is one of its own.
    pub fn only(&self, steps: &[String]) -> Self {
        let mut part = self.clone();
        part.steps.retain(|step| steps.contains(&step.name));
        if part.steps.is_empty() {
            part.steps.clone_from(&self.steps);
        }
        part
    }
}

/// Orders of the steps, one after the other, that a seed decides.
pub struct Shuffle(XorShiftRng);

impl Shuffle {
    /// The orders of this seed.
    pub fn new(seed: u64) -> Self {
        Self(XorShiftRng::seed_from_u64(seed))
    }

    /// The same work with its groups of steps in the next order.
    pub fn next(&mut self, workload: &Workload) -> Workload {
        let mut groups: Vec<(u64, Vec<Step>)> = Vec::new();
        for step in &workload.steps {
            let known = groups
                .iter_mut()
                .find(|(_, group)| group.first().is_some_and(|one| one.group() == step.group()));
            match known {
                Some((_, group)) => group.push(step.clone()),
                None => groups.push((self.0.next_u64(), vec![step.clone()])),
            }
        }
        groups.sort_by_key(|(key, _)| *key);
        let mut shuffled = workload.clone();
        shuffled.steps = groups.into_iter().flat_map(|(_, group)| group).collect();
        shuffled
    }
}

impl Step {
    /// What is done all together or not at all.
    fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(&self.name)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn workload() -> Workload {
        let step = |name: &str, more: &str| {
            format!("[[steps]]\nname = \"{name}\"\ncommand = \"true\"\n{more}\n")
        };
        let text = "driver = \"d\"\nentries = [\"f\", \"g\"]\nhelpers = [\"h\"]\nworks = \"true\"\n"
            .to_owned()
            + &step("a", "")
            + &step("down", "group = \"link\"")
            + &step("up", "group = \"link\"")
            + &step("b", "")
            + &step("c", "") + &step("last", "always = true");
        Workload::read(&text).unwrap()
    }

    #[test]
    fn the_first_groups_that_call_a_function_are_done_and_what_is_always_done() {
        let workload = workload();
        let said = "called:f a\ncalled:f up\ncalled:f c\ncalled:g up\ncalled:h last\nstep:0 a\n";
        let calls = workload.read_calls(said);
        let steps = |function| workload.steps_for(&calls, function).join(" ");
        assert_eq!(steps("f"), "a down up last");
        assert_eq!(steps("g"), "down up last");
        assert_eq!(steps("h"), "last");
        // Nobody knows.
        assert_eq!(steps("unknown"), "a down up b c last");
        let part = workload.only(&["up".to_owned(), "gone".to_owned()]);
        assert_eq!(part.steps.len(), 1);
        assert_eq!(workload.only(&["gone".to_owned()]), workload);
    }

    #[test]
    fn the_seed_decides_the_order_of_groups_and_each_has_its_steps_in_theirs() {
        let workload = workload();
        let orders = |seed| {
            let mut shuffle = Shuffle::new(seed);
            let order = |_| {
                let shuffled = shuffle.next(&workload);
                let names = shuffled.steps.iter().map(|step| step.name.clone());
                names.collect::<Vec<_>>().join(" ")
            };
            (0..20).map(order).collect::<Vec<_>>()
        };
        let one = orders(1);
        assert_eq!(one, orders(1));
        assert_ne!(one, orders(2));
        let different: BTreeSet<_> = one.iter().collect();
        assert!(different.len() > 10, "{one:?}");
        for order in &one {
            assert!(order.contains("down up"), "{order}");
            assert_eq!(order.split(' ').count(), 6, "{order}");
        }
    }

    #[test]
    fn what_a_guest_makes_up_is_not_taken_over() {
        let workload = workload();
        for said in [
            "called:f nowhere\n",
            "called:another a\n",
            "called:\ncalled:f\n",
        ] {
            assert!(workload.read_calls(said).is_empty(), "{said}");
        }
    }

    #[test]
    fn the_tracers_lines_are_read_where_there_is_one() {
        use std::process::Command;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["set_ftrace_filter", "current_tracer", "tracing_on"] {
            std::fs::write(at(name), "").unwrap();
        }
        std::fs::write(at("trace"), "").unwrap();
        let mut workload = workload();
        // In place of the kernel: the step's own commands write what it would have.
        workload.steps.truncate(1);
        let line = "  sh-1  [000] ..s2.  17.993652: f [d] <-caller\\n <idle>-0 [001] d.h1. 18.5: h.cold <-g\\n# f\\n";
        workload.steps[0].command = Some(format!("printf '{line}' >$T/trace"));
        let script = workload.traced_script("eth0", Ipv4Addr::LOCALHOST);
        let traces = |place: &str| {
            let script = script.replace("/sys/kernel/tracing", place);
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            let output = String::from_utf8(output.stdout).unwrap();
            assert!(workload.read_output(&output).finished, "{output}");
            output
        };
        let output = traces(folder.path().to_str().unwrap());
        assert!(output.contains("called:f a\ncalled:h.cold a\n"), "{output}");
        assert_eq!(
            workload.read_calls(&output),
            workload.read_calls("called:f a")
        );
        let without = traces(at("nothing").to_str().unwrap());
        assert!(workload.read_calls(&without).is_empty());
    }
}
