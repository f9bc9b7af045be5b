//! What a guest does in a run, as data: how its driver is made ready, steps that have the kernel
//! call the driver's functions, and how it is seen whether the device works. One shell script,
//! whose output says how each step ended.
//!
//! Those that the program brings are beside this file; a file of one's own is of the same form.

mod called;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use agent_protocol::traffic::TrafficResult;
use serde::{Deserialize, Serialize};

pub use called::{Calls, Shuffle, Steps};

/// The workloads that the program brings.
const OWN: &[&str] = &[
    include_str!("e1000.toml"),
    include_str!("null_blk.toml"),
    include_str!("dummy.toml"),
];

/// Longest file with a workload, in bytes.
pub const MAX_WORKLOAD: u64 = 64 << 10;
/// Most steps, and functions.
const MAX_STEPS: usize = 200;
const MAX_FUNCTIONS: usize = 500;
/// Longest name, in bytes.
const MAX_NAME: usize = 64;

/// A file of random contents in the guest's memory, and its checksum: nobody has business with it.
const CONTENTS: &str = "/tmp/campaign-contents";

/// How long each kind of traffic runs, and how long it waits for what does not come, in seconds.
const TRAFFIC_SECONDS: &str = "0.03 1.5";

/// Word in front of a line of the script's that says how a step ended.
const STEP: &str = "step:";
/// In front of one that says what became of traffic.
const SENT: &str = "sent:";
/// In front of one that says when a step was over: the guest's uptime in seconds.
const AT: &str = "at:";

/// The program's own steps, behind those of the workload.
const OWN_STEPS: [&str; 3] = ["works", "contents", "end"];

/// What has the guest's kernel check its heap and its free pages (Documentation/mm/slub.rst: sanity
/// checks, red zones, poisoning), stop at once where it crashes, and show warnings on its console.
pub const CHECKS: &[&str] = &[
    "slub_debug=FZP",
    "page_poison=1",
    "oops=panic",
    "panic=0",
    "loglevel=5",
];

/// What makes trials alike, and faster: programs are at the same addresses at each start, and a host
/// that emulates its processor keeps what it has translated of them by their addresses.
const ALIKE: &str = "norandmaps";

/// What says when a processor has stood still for too long, and how long that may be while nothing
/// is isolated, in seconds; of the first it is half of the time. An isolated call may take as long.
const WATCHES: [(&str, u32); 2] = [
    ("/proc/sys/kernel/watchdog_thresh", 2),
    ("/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout", 5),
];

/// What a guest does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The driver's module.
    pub driver: String,
    /// Its parameters.
    #[serde(default)]
    pub parameters: String,
    /// Options of `cofferdam run` that the guest needs, separated by blanks.
    #[serde(default)]
    pub run: String,
    /// The driver is that of the NIC which is plugged into the user-mode gateway: it gets an
    /// address, and the script has the interface as `$IF` and the gateway as `$GATEWAY`.
    #[serde(default)]
    pub network: bool,
    /// Modules that are loaded besides.
    #[serde(default)]
    pub modules: Vec<String>,
    /// Shell commands that are run once, when the driver is loaded.
    #[serde(default)]
    pub prepare: String,
    /// Shell functions for the steps.
    #[serde(default)]
    pub shell: String,
    /// Functions that are isolated and get faults.
    pub entries: Vec<String>,
    /// Functions of the driver that those call and that get faults too.
    #[serde(default)]
    pub helpers: Vec<String>,
    /// Shell command that succeeds if the device works.
    pub works: String,
    /// What is done, in this order. Each leaves the device as it was, all of them together at
    /// least.
    pub steps: Vec<Step>,
}

/// Something that the guest does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// A shell command. What it writes is not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Or traffic with checked contents, as the agent's tool calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<String>,
    /// Shell command behind it whose end does not matter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<String>,
    /// Its command compares contents, as `cmp` does: with exit status 1 they are not what they
    /// should be.
    #[serde(default)]
    pub compares: bool,
    /// Steps of one group are done all together or not at all: those that need each other. A step
    /// without is alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// It is done in each trial, whatever its function.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub always: bool,
}

/// Why something is no workload.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The file.
    #[error("it is no workload: line {line}: {why}")]
    Form {
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong there.
        why: String,
    },
    /// What is in it.
    #[error("{what}: {why}")]
    Wrong {
        /// What.
        what: String,
        /// Why.
        why: &'static str,
    },
}

impl Workload {
    /// Of the program's own, the one for this driver.
    pub fn of_driver(driver: &str) -> Option<Self> {
        Self::own().find(|workload| workload.driver == driver)
    }

    /// The program's own.
    pub fn own() -> impl Iterator<Item = Self> {
        OWN.iter().filter_map(|text| Self::read(text).ok())
    }

    /// Reads a file with a workload.
    pub fn read(text: &str) -> Result<Self, WorkloadError> {
        let workload: Self = parse(text)?;
        workload.check()?;
        Ok(workload)
    }

    /// Whether it is one, wherever it is from.
    pub fn check(&self) -> Result<(), WorkloadError> {
        if self.entries.is_empty() {
            return Err(WorkloadError::Wrong {
                what: "entries".to_owned(),
                why: "none",
            });
        }
        self.check_work()
    }

    /// The same of one of which all functions are meant, without naming any.
    pub(crate) fn check_work(&self) -> Result<(), WorkloadError> {
        let wrong = |what: &str, why| WorkloadError::Wrong {
            what: what.chars().take(MAX_NAME).collect(),
            why,
        };
        let modules = self.modules.iter().chain([&self.driver]);
        for name in modules.chain(&self.entries).chain(&self.helpers) {
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
            if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(is_good) {
                return Err(wrong(name, "no name of a module or function"));
            }
        }
        if self.entries.len() > MAX_FUNCTIONS || self.helpers.len() > MAX_FUNCTIONS {
            return Err(wrong("entries", "more than 500"));
        }
        if !(1..=MAX_STEPS).contains(&self.steps.len()) {
            return Err(wrong("steps", "none, or more than 200"));
        }
        for step in &self.steps {
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b" _-.".contains(&byte);
            let name = step.name.as_str();
            if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(is_good) {
                return Err(wrong(
                    name,
                    "no name of a step: letters, digits, ' ', '-', '_', '.'",
                ));
            }
            if OWN_STEPS.contains(&name) {
                return Err(wrong(name, "the program's own step has this name"));
            }
            if self.steps.iter().filter(|other| other.name == name).count() > 1 {
                return Err(wrong(name, "two steps have this name"));
            }
            if step.command.is_some() == step.traffic.is_some() {
                return Err(wrong(name, "give a command or traffic"));
            }
            let traffic = step.traffic.as_deref().unwrap_or_default();
            if !traffic
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            {
                return Err(wrong(name, "no kind of traffic"));
            }
            if step.traffic.is_some() && !self.network {
                return Err(wrong(name, "traffic needs `network = true`"));
            }
        }
        Ok(())
    }

    /// All functions that get faults.
    pub fn functions(&self) -> impl Iterator<Item = &String> {
        self.entries.iter().chain(&self.helpers)
    }

    /// A script that succeeds if the device works.
    pub fn works_alone(&self, interface: &str, gateway: Ipv4Addr) -> String {
        let (shell, works) = (self.shell.trim(), &self.works);
        format!("IF={interface} GATEWAY={gateway}\n{shell}\n{works}\n")
    }

    /// The steps up to the one called `last`, of which alone the output is seen.
    pub fn script_up_to(&self, last: &str) -> String {
        let mut script = format!("{}\n", self.shell.trim());
        for step in &self.steps {
            let command = step.command.as_deref().unwrap_or("false");
            if step.name == last {
                script.push_str(&format!("(\n{command}\n) 2>&1\n"));
                return script;
            }
            script.push_str(&format!("(\n{command}\n) >/dev/null 2>&1\n"));
        }
        script.push_str(&format!("(\n{}\n) 2>&1\n", self.works));
        script
    }

    /// The script. The interface and the gateway are there if it is about a NIC.
    pub fn script(&self, interface: &str, gateway: Ipv4Addr) -> String {
        self.write_script(interface, gateway, None)
    }

    /// The script. If there is something to `begin` with, that is done first, and has a shell
    /// function `c` which is called behind each step with its name.
    fn write_script(&self, interface: &str, gateway: Ipv4Addr, begin: Option<&str>) -> String {
        let mut script = String::new();
        let mut line = |text: &str| {
            script.push_str(text);
            script.push('\n');
        };
        if self.network {
            line(&format!("IF={interface} GATEWAY={gateway}"));
        }
        line(&format!(
            "t() {{ r=$(/init traffic $1 $GATEWAY {TRAFFIC_SECONDS} 2>/dev/null); s=$?; echo \"{SENT}$r\"; return $s; }}"
        ));
        line(&format!(
            "a() {{ read u r </proc/uptime; echo \"{AT}$u\"; }}"
        ));
        line(self.shell.trim());
        line(begin.unwrap_or_default());
        line("a");
        // In a shell of its own: a step that ends its shell does not end the script.
        let in_own_shell = |name: &str, command: &str| {
            format!("(\n{command}\n) >/dev/null 2>&1; echo \"{STEP}$? {name}\"")
        };
        for step in &self.steps {
            match (&step.command, &step.traffic) {
                (_, Some(traffic)) => {
                    line(&format!("t {traffic}; echo \"{STEP}$? {}\"", step.name))
                }
                (command, None) => {
                    line(&in_own_shell(
                        &step.name,
                        command.as_deref().unwrap_or("false"),
                    ));
                }
            }
            if let Some(then) = &step.then {
                line(&format!("(\n{then}\n) >/dev/null 2>&1"));
            }
            if begin.is_some() {
                line(&format!("c '{}'", step.name));
            }
            line("a");
        }
        line(&in_own_shell("works", &self.works));
        line("a");
        line(&in_own_shell(
            "contents",
            &format!("sha256sum -c {CONTENTS}.sum"),
        ));
        // Has the kernel look at all objects of its heap (Documentation/mm/slub.rst, slabinfo -v).
        line("a");
        line("for v in /sys/kernel/slab/*/validate; do echo 1 >$v; done 2>/dev/null");
        line(&format!("echo \"{STEP}0 end\""));
        line("a");
        script
    }

    /// What the script's output says, which comes from the guest and may be anything.
    pub fn read_output(&self, output: &str) -> Outcome {
        let mut outcome = Outcome::default();
        let (mut before, mut step_before) = (None, None);
        for line in output.lines() {
            if let Some((status, step)) = line
                .strip_prefix(STEP)
                .and_then(|line| line.split_once(' '))
            {
                step_before = Some(step);
                match step {
                    "end" => outcome.finished = true,
                    "works" => outcome.works = status == "0",
                    "contents" => outcome.contents_changed = status != "0",
                    _ => {
                        let compares = |known: &&Step| known.name == step && known.compares;
                        if status == "1" && self.steps.iter().any(|known| compares(&known)) {
                            outcome.corrupted = outcome.corrupted.saturating_add(1);
                        }
                        outcome.steps.insert(step.to_owned(), status.to_owned());
                    }
                }
            } else if let Some(json) = line.strip_prefix(SENT) {
                let sent: TrafficResult = serde_json::from_str(json).unwrap_or_default();
                outcome.corrupted = outcome.corrupted.saturating_add(sent.corrupted);
            } else if let Some(now) = line.strip_prefix(AT) {
                let now = now.parse().ok();
                let now = now.and_then(|now| Duration::try_from_secs_f64(now).ok());
                if let (Some(now), Some(before), Some(step)) = (now, before, step_before.take()) {
                    let took = now.saturating_sub(before);
                    outcome.took.insert(step.to_owned(), took);
                }
                before = now.or(before);
            }
        }
        outcome
    }
}

/// Whether the output of a script says that the steps are done, and whether the device works: what
/// comes behind that are the checks.
pub fn is_over(output: &str) -> bool {
    let said = output.lines().filter_map(|line| line.strip_prefix(STEP));
    let mut steps = said.filter_map(|line| line.split_once(' '));
    steps.any(|(_, step)| step == OWN_STEPS[0])
}

/// Reads a file of data; what is wrong in it with its line.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, WorkloadError> {
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let before = text.get(..at).unwrap_or_default();
        WorkloadError::Form {
            line: before.matches('\n').count() + 1,
            why: error.message().replace('\n', " "),
        }
    })
}

/// Has the guest's kernel say sooner that a processor stands still, where it can be told to
/// (Documentation/admin-guide/lockup-watchdogs.rst, kernel-parameters.txt): it is at work alone.
pub fn watch_closely() -> String {
    let all = WATCHES.map(|(file, seconds)| {
        format!(
            "F={file} K=/tmp/${{F##*/}}; [ -w $F ] && cat $F >$K && echo {seconds} >$F || rm -f $K"
        )
    });
    all.join("\n") + "\n:\n"
}

/// Takes that back.
pub fn watch_as_usual() -> String {
    let all = WATCHES
        .map(|(file, _)| format!("F={file} K=/tmp/${{F##*/}}; [ -e $K ] && cat $K >$F; rm -f $K"));
    all.join("\n") + "\n:\n"
}

/// The script that makes the file whose contents nobody has business with.
pub fn preparation() -> String {
    format!(
        "dd if=/dev/urandom of={CONTENTS} bs=4096 count=256 2>/dev/null && sha256sum {CONTENTS} > {CONTENTS}.sum"
    )
}

/// The options of `run` that have the guest's kernel check itself, each time in the same way.
pub fn checks() -> String {
    let all = CHECKS.iter().chain([&ALIKE]);
    all.fold(String::new(), |mut options, check| {
        // Into memory.
        let _ = write!(options, " --append {check}");
        options
    })
}

/// What came of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status of each step that was come to.
    pub steps: BTreeMap<String, String>,
    /// Packets, bytes or files that are otherwise than they were sent or written.
    pub corrupted: u64,
    /// It came to its end.
    pub finished: bool,
    /// At its end the device worked.
    pub works: bool,
    /// The file is not what it was.
    pub contents_changed: bool,
    /// How long each step took, the program's own among them, as the guest says.
    pub took: BTreeMap<String, Duration>,
}

impl Outcome {
    /// Steps of `workload`, which this came of, that ended otherwise than in `other`, which may
    /// have more of them. One that succeeds is well, also where it does not by itself: others came
    /// before it there.
    pub fn differs(&self, other: &Self, workload: &Workload) -> Vec<String> {
        let is_done = |name: &str| workload.steps.iter().any(|step| step.name == name);
        let all = other.steps.iter().filter(|(step, _)| is_done(step));
        all.filter_map(|(step, status)| match self.steps.get(step) {
            Some(now) if now == status || now == "0" => None,
            Some(now) => Some(format!("{step}: {now}")),
            None => Some(format!("{step}: not done")),
        })
        .collect()
    }

    /// Steps that ended alike in both, with the longer of their times.
    pub fn alike(mut self, other: &Self) -> Self {
        self.steps
            .retain(|step, status| other.steps.get(step) == Some(status));
        for (step, took) in &other.took {
            let longest = self.took.entry(step.clone()).or_default();
            *longest = (*longest).max(*took);
        }
        self
    }

    /// How much of the time of this would not be taken by `workload`, which has some of the steps.
    pub fn left_out(&self, workload: &Workload) -> Duration {
        let is_done = |name: &str| {
            OWN_STEPS.contains(&name) || workload.steps.iter().any(|step| step.name == name)
        };
        let left_out = self.took.iter().filter(|(step, _)| !is_done(step));
        let times = left_out.map(|(_, took)| *took);
        times.fold(Duration::ZERO, Duration::saturating_add)
    }
}

#[cfg(test)]
mod tests;
