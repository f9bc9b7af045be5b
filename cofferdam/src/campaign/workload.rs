//! What a guest does in a run: traffic with checked contents through its NIC, and what makes the kernel call the other
//! functions of the driver. One script, whose output says how each step ended.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use agent_protocol::traffic::TrafficResult;

use crate::bench::network::{GATEWAY, INTERFACE};

/// A file of random contents in the guest's memory, and its checksum: nobody has business with it.
const CONTENTS: &str = "/tmp/campaign-contents";

/// Steps with the commands that do them. Each leaves the interface as it was.
const STEPS: &[(&str, &str)] = &[
    ("ethtool -S", "ethtool -S $IF"),
    ("ethtool -i", "ethtool -i $IF"),
    ("ethtool -d", "ethtool -d $IF"),
    ("ethtool -g", "ethtool -g $IF"),
    ("promisc on", "ip link set $IF promisc on"),
    ("promisc off", "ip link set $IF promisc off"),
    (
        "address",
        "ip link set $IF address $(cat /sys/class/net/$IF/address)",
    ),
    ("mtu 1400", "ip link set $IF mtu 1400"),
    ("mtu 1500", "ip link set $IF mtu 1500"),
    ("ring 128", "ethtool -G $IF rx 128"),
    ("ring 256", "ethtool -G $IF rx 256"),
    ("checksums off", "ethtool -K $IF rx off"),
    ("checksums on", "ethtool -K $IF rx on"),
    ("negotiate", "ethtool -r $IF"),
    ("down", "ip link set $IF down"),
    ("up", "ip link set $IF up"),
];

/// Kinds of traffic, with what the tool in the guest calls them; before the steps and behind them.
const TRAFFIC: &[(&str, &str)] = &[("pings", "ping_flood"), ("stream", "tcp_echo")];

/// How long each kind of traffic runs, and how long it waits for what does not come, in seconds.
const TRAFFIC_SECONDS: &str = "0.2 3";

/// Word in front of a line of the script's that says how a step ended.
const STEP: &str = "step:";
/// In front of one that says what became of traffic.
const SENT: &str = "sent:";

/// What came of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status of each step that was come to.
    pub steps: BTreeMap<String, String>,
    /// Packets or bytes that arrived otherwise than they were sent.
    pub corrupted: u64,
    /// It came to its end.
    pub finished: bool,
    /// At its end the device carried packets.
    pub works: bool,
    /// The file is not what it was.
    pub contents_changed: bool,
}

impl Outcome {
    /// Steps that ended otherwise than in `other`.
    pub fn differs(&self, other: &Self) -> Vec<String> {
        let all = other.steps.iter();
        all.filter(|(step, status)| self.steps.get(*step) != Some(status))
            .map(|(step, _)| match self.steps.get(step) {
                Some(status) => format!("{step}: {status}"),
                None => format!("{step}: not done"),
            })
            .collect()
    }

    /// Steps that ended alike in both.
    pub fn alike(mut self, other: &Self) -> Self {
        self.steps
            .retain(|step, status| other.steps.get(step) == Some(status));
        self
    }
}

/// The script that makes the file.
pub fn preparation() -> String {
    format!(
        "dd if=/dev/urandom of={CONTENTS} bs=4096 count=256 2>/dev/null && sha256sum {CONTENTS} > {CONTENTS}.sum"
    )
}

/// The script.
pub fn script() -> String {
    let mut script = format!(
        "IF={INTERFACE}\n\
         s() {{ n=$1; shift; \"$@\" >/dev/null 2>&1; echo \"{STEP}$? $n\"; }}\n\
         t() {{ r=$(/init traffic $2 {GATEWAY} {TRAFFIC_SECONDS} 2>/dev/null); echo \"{STEP}$? $1\"; echo \"{SENT}$r\"; }}\n\
         up() {{ for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
         [ \"$(cat /sys/class/net/$IF/carrier 2>/dev/null)\" = 1 ] && return 0; sleep 0.2; done; return 1; }}\n"
    );
    let mut line = |text: String| {
        // Into memory.
        let _ = writeln!(script, "{text}");
    };
    for (name, kind) in TRAFFIC {
        line(format!("t \"{name}\" {kind}"));
    }
    for (name, command) in STEPS {
        line(format!("s \"{name}\" {command}"));
        if matches!(*name, "up" | "negotiate")
            || name.starts_with("mtu")
            || name.starts_with("ring")
        {
            line("up".to_owned());
        }
    }
    line("s link up".to_owned());
    for (name, kind) in TRAFFIC {
        line(format!("t \"{name} again\" {kind}"));
    }
    // The address resolution may have to begin anew.
    line(format!("s works ping -c 3 -i 0.2 -W 2 {GATEWAY}"));
    line(format!("s contents sha256sum -c {CONTENTS}.sum"));
    line(format!("echo \"{STEP}0 end\""));
    script
}

/// What the script's output says, which comes from the guest and may be anything.
pub fn read(output: &str) -> Outcome {
    let mut outcome = Outcome::default();
    for line in output.lines() {
        if let Some((status, step)) = line
            .strip_prefix(STEP)
            .and_then(|line| line.split_once(' '))
        {
            match step {
                "end" => outcome.finished = true,
                "works" => outcome.works = status == "0",
                "contents" => outcome.contents_changed = status != "0",
                _ => {
                    outcome.steps.insert(step.to_owned(), status.to_owned());
                }
            }
        } else if let Some(json) = line.strip_prefix(SENT) {
            let sent: TrafficResult = serde_json::from_str(json).unwrap_or_default();
            outcome.corrupted = outcome.corrupted.saturating_add(sent.corrupted);
        }
    }
    outcome
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_in_the_script_and_read_from_its_output() {
        let script = script();
        for (name, command) in STEPS {
            assert!(
                script.contains(&format!("s \"{name}\" {command}\n")),
                "{name}"
            );
        }
        let sent = serde_json::to_string(&TrafficResult {
            corrupted: 2,
            ..TrafficResult::default()
        });
        let output = format!(
            "step:0 pings\nsent:{}\nstep:1 stream\nsent:\nstep:0 works\nstep:0 contents\nnoise\nstep:0 end\n",
            sent.unwrap()
        );
        let outcome = read(&output);
        assert_eq!(outcome.steps.len(), 2);
        assert_eq!(
            (outcome.corrupted, outcome.works, outcome.finished),
            (2, true, true)
        );
        assert!(!outcome.contents_changed);
        assert!(read("step:1 contents\n").contents_changed);
        assert_eq!(read("\u{0}step\nstep:\nsent:{"), Outcome::default());
    }

    #[test]
    fn what_ended_otherwise_is_named_and_what_varies_by_itself_is_left_out() {
        let well = read("step:0 a\nstep:0 b\nstep:0 c\n");
        let baseline = well.clone().alike(&read("step:0 a\nstep:0 b\nstep:1 c\n"));
        let faulty = read("step:1 a\nstep:0 c\n");
        assert_eq!(faulty.differs(&baseline), ["a: 1", "b: not done"]);
        assert!(well.differs(&baseline).is_empty());
    }
}
