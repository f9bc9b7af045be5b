//! `violations`: what calls of an isolated driver did wrong.

use anyhow::bail;
use devices::clock::monotonic_ns;
use recovery::violations::Violations;

use super::isolation::ask;
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;
use crate::words::duration;

/// `violations`
#[derive(Debug, clap::Args)]
pub struct ViolationsOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the module
    module: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl ViolationsOptions {
    /// `violations`
    pub fn run(self) -> anyhow::Result<Ending> {
        let request = Request::Violations {
            module: self.module.clone(),
        };
        let Reply::Violations {
            isolated,
            all,
            reports,
            ..
        } = ask(&self.vm, &request)?
        else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&serde_json::json!({
                "isolated": isolated,
                "violations": all,
                "last_reports": reports,
            }))?;
        } else {
            let text = violations_text(&self.module, isolated, &all, monotonic_ns());
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// What calls of a module did wrong, for a person who reads it at `now_ns`.
fn violations_text(module: &str, isolated: bool, all: &[Violations], now_ns: u64) -> String {
    let mut text = String::new();
    if all.is_empty() {
        text.push_str(&format!("no call of {module} has done anything wrong\n"));
    }
    let ago = |ns: u64| duration(now_ns.saturating_sub(ns) / 1_000_000);
    for violations in all {
        let times = match violations.count {
            1 => format!("once, {} ago", ago(violations.last_ns)),
            count => format!(
                "{count} times, first {} ago, last {} ago",
                ago(violations.first_ns),
                ago(violations.last_ns)
            ),
        };
        text.push_str(&format!("{times}: {}\n", violations.text));
        if let Some(image) = &violations.image {
            text.push_str(&format!("  cofferdam debug {}\n", image.display()));
        }
    }
    if !isolated {
        text.push_str(&format!("{module} is not isolated any more\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_are_counted_and_say_when() {
        let violations = |count| Violations {
            entry: "f".to_owned(),
            count,
            first_ns: 1_000_000_000,
            last_ns: 61_000_000_000,
            text: "f: what it did".to_owned(),
            image: None,
        };
        let text = violations_text("m", true, &[violations(1), violations(32)], 63_000_000_000);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "once, 2.0 s ago: f: what it did");
        assert_eq!(
            lines[1],
            "32 times, first 1 min 2 s ago, last 2.0 s ago: f: what it did"
        );
        assert_eq!(lines.len(), 2);
        let kept = Violations {
            image: Some("/faults/m-f-0001".into()),
            ..violations(1)
        };
        let text = violations_text("m", true, &[kept], 63_000_000_000);
        assert!(
            text.ends_with("\n  cofferdam debug /faults/m-f-0001\n"),
            "{text}"
        );
        let none = violations_text("m", true, &[], 0);
        assert_eq!(none, "no call of m has done anything wrong\n");
        let released = violations_text("m", false, &[violations(1)], 63_000_000_000);
        assert!(released.ends_with("m is not isolated any more\n"));
    }
}
