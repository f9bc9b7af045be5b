//! `mark`, `rewind`, `marks`: a guest goes back to where it was.

use std::collections::HashMap;

use anyhow::bail;
use comfy_table::Cell;
use vmm::{MarkInfo, Rewound};

use super::isolation::ask;
use super::table::{number, table};
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;
use crate::words::counted;

/// Name of a mark when none is given.
const DEFAULT_NAME: &str = "mark";

/// `mark`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A mark is kept by the VM's process and ends with it; `cofferdam snapshot` writes to disk. Marks form a tree: one that is
set after a rewind follows the mark that the guest was rewound to.

Examples:
  cofferdam mark web
  cofferdam mark web booted
  cofferdam rewind web booted")]
pub struct MarkOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the mark
    #[arg(default_value = DEFAULT_NAME)]
    name: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl MarkOptions {
    /// `mark`
    pub fn run(self) -> anyhow::Result<Ending> {
        let mark = match ask(&self.vm, &Request::Mark { name: self.name })? {
            Reply::Marked(mark) => mark,
            other => bail!("the VM answered something else: {other:?}"),
        };
        if self.json {
            print_json(&mark)?;
        } else {
            let follows = mark.parent.as_ref();
            let follows = follows.map_or_else(String::new, |parent| format!(", follows {parent}"));
            let text = format!("{}: {} MiB kept{follows}\n", mark.name, mib(mark.bytes));
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// `rewind`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Everything goes back to the mark: memory, processors, devices, what is isolated, and the guest's clocks. Who talks to the
guest over its network or its agent has to begin anew.

Examples:
  cofferdam rewind web
  cofferdam rewind web booted --json")]
pub struct RewindOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the mark; the one that the guest was at last when not given
    name: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl RewindOptions {
    /// `rewind`
    pub fn run(self) -> anyhow::Result<Ending> {
        let rewound = match ask(&self.vm, &Request::Rewind { name: self.name })? {
            Reply::Rewound(rewound) => rewound,
            other => bail!("the VM answered something else: {other:?}"),
        };
        match self.json {
            true => print_json(&rewound)?,
            false => print_bytes(sentence(&rewound).as_bytes())?,
        }
        Ok(Ending::SUCCESS)
    }
}

fn sentence(rewound: &Rewound) -> String {
    let phases = rewound.phases;
    let us = |ns: u64| ns as f64 / 1e3;
    format!(
        "back at {}: {} in {:.0} us (find {:.0}, memory {:.0}, machine {:.0}, devices {:.0}, isolation {:.0}), after {:.0} us \
         to come to rest\n",
        rewound.mark,
        counted(rewound.pages, "page", "pages"),
        us(phases.work_ns()),
        us(phases.find_ns),
        us(phases.memory_ns),
        us(phases.machine_ns),
        us(phases.devices_ns),
        us(phases.participants_ns),
        us(phases.rest_ns),
    )
}

/// `marks`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam marks web
  cofferdam marks web --forget booted")]
pub struct MarksOptions {
    /// Name of the VM
    vm: VmName,
    /// Forget this mark first; those that follow it stay
    #[arg(long, value_name = "NAME")]
    forget: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl MarksOptions {
    /// `marks`
    pub fn run(self) -> anyhow::Result<Ending> {
        let request = match self.forget {
            Some(name) => Request::ForgetMark { name },
            None => Request::Marks {},
        };
        let marks = match ask(&self.vm, &request)? {
            Reply::Marks { marks } => marks,
            other => bail!("the VM answered something else: {other:?}"),
        };
        if self.json {
            print_json(&marks)?;
        } else if marks.is_empty() {
            print_bytes(b"no marks: set one with `cofferdam mark`\n")?;
        } else {
            let mut shown = table(&["mark", "pages kept", "MiB", ""]);
            shown.add_rows(rows(&marks));
            print_bytes(format!("{shown}\n").as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// The marks as a tree: each indented by how many it follows.
fn rows(marks: &[MarkInfo]) -> Vec<Vec<Cell>> {
    let mut depths: HashMap<&str, usize> = HashMap::new();
    let rows = marks.iter().map(|mark| {
        let parent = mark.parent.as_deref().and_then(|name| depths.get(name));
        let depth = parent.map_or(0, |depth| depth + 1);
        depths.insert(&mark.name, depth);
        vec![
            Cell::new(format!("{}{}", "  ".repeat(depth), mark.name)),
            number(mark.pages),
            number(mib(mark.bytes)),
            Cell::new(if mark.current {
                "the guest is here"
            } else {
                ""
            }),
        ]
    });
    rows.collect()
}

/// Bytes in MiB, for people.
fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_indented_below_those_they_follow() {
        let mark = |name: &str, parent: Option<&str>| MarkInfo {
            name: name.to_owned(),
            parent: parent.map(str::to_owned),
            pages: 256,
            bytes: 1 << 20,
            current: name == "c",
        };
        let marks = [
            mark("a", None),
            mark("b", Some("a")),
            mark("c", Some("b")),
            mark("d", Some("a")),
        ];
        let names: Vec<_> = rows(&marks).iter().map(|row| row[0].content()).collect();
        assert_eq!(names, ["a", "  b", "    c", "  d"]);
        assert_eq!(rows(&marks)[2][3].content(), "the guest is here");
    }
}
