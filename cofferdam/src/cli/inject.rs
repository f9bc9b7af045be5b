//! `inject`: faults in calls of an isolated driver, on purpose.

use anyhow::{Context, bail};
use devices::edge::EdgeKind;
use devices::edge::When;
use isolation::mutation::Kind;
use recovery::fault::{FaultKind, Place};
use serde::Serialize;

use super::inject_code::{inject, list, undo};
use super::isolation::ask;
use super::when::parse_when;
use super::{Ending, print_bytes, print_json};
use crate::code_fault::CodeFault;
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;
use crate::words::{counted, number, ordinal};

/// `inject`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Of an isolated function the guest's own text is not touched: only the domain's copy, for single calls. `cofferdam
violations` shows what came of it, `cofferdam status` what was done about it. With --kind one instruction is changed as
programmers' mistakes would have it (`cofferdam campaign kinds` lists the kinds), also of a driver that is not isolated:
then in the guest's own text, where it stays until --undo, a rewind or a reset.

Examples:
  cofferdam inject web e1000 e1000_xmit_frame
  cofferdam inject web e1000 e1000_clean --at last --fault endless_loop --every 10 --times 5
  cofferdam inject web e1000 e1000_open --at +0x1c
  cofferdam inject web e1000 --list --at e1000_clean
  cofferdam inject web e1000 --kind missing_call --at e1000_clean --seed 3
  cofferdam inject web e1000 --kind flipped_condition --at e1000_open+0x4c --when always
  cofferdam inject web e1000 --undo")]
pub struct InjectOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the isolated module
    module: String,
    /// Name of one of its functions, unless --at has it
    function: Option<String>,
    /// Where: first, middle, last, +OFFSET in bytes, FUNCTION or FUNCTION+OFFSET
    #[arg(long, value_name = "WHERE", default_value = "first", value_parser = parse_at)]
    at: At,
    /// What goes wrong, in place of whatever instructions are there
    #[arg(long, value_name = "FAULT", default_value = "null_dereference", value_parser = parse_fault)]
    fault: FaultKind,
    /// What is changed about one instruction that it fits; without an offset --seed chooses which
    #[arg(long, value_name = "KIND", conflicts_with_all = ["fault", "every", "times"], value_parser = parse_kind)]
    kind: Option<Kind>,
    /// With --kind, into which calls: once (the first that comes to it), nth=N, always,
    /// p=PROBABILITY
    #[arg(long, value_name = "WHEN", default_value = "once", requires = "kind", value_parser = parse_when)]
    when: When,
    /// With --kind, what chooses among the ways and places, and by chance
    #[arg(long, value_name = "S", default_value_t = 1, requires = "kind")]
    seed: u64,
    /// List the instructions of the function with the kinds that fit
    #[arg(long, conflicts_with_all = ["fault", "every", "times", "undo"])]
    list: bool,
    /// Take back what is not used up of the module's faults
    #[arg(long, conflicts_with_all = ["fault", "every", "times", "kind"])]
    undo: bool,
    /// Into every how many calls
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    every: u32,
    /// Into how many calls; 0 takes an earlier order back
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What was ordered.
#[derive(Debug, Serialize)]
struct Ordered {
    module: String,
    function: String,
    /// Where in the function, in bytes.
    offset: u64,
    fault: &'static str,
    every: u32,
    times: u64,
    /// Faults of the order before that have not happened yet, and will.
    earlier: u64,
}

impl Ordered {
    /// For a person.
    fn text(&self) -> String {
        let fault = self.fault.replace('_', " ");
        let (function, offset) = (&self.function, self.offset);
        let mut text = match (self.every, self.times) {
            (_, 0) => format!("no more faults in calls of {function}\n"),
            (1, 1) => format!("the next call of {function} fails: {fault} at +{offset:#x}\n"),
            (1, times) => {
                format!("the next {times} calls of {function} fail: {fault} at +{offset:#x}\n")
            }
            (every, times) => format!(
                "every {} call of {function} fails, {} in all: {fault} at +{offset:#x}\n",
                ordinal(every.into()),
                counted(times, "time", "times")
            ),
        };
        if self.earlier > 0 {
            text.push_str(&format!(
                "an earlier order for {} goes on, of which {} left\n",
                self.module,
                counted(self.earlier, "fault is", "faults are")
            ));
        }
        text
    }
}

/// Where a fault goes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum At {
    Place(Place),
    Offset(u64),
    Function(String, Option<u64>),
}

fn parse_at(text: &str) -> Result<At, String> {
    if let Some(place) = Place::ALL.into_iter().find(|place| place.name() == text) {
        return Ok(At::Place(place));
    }
    let is_name = |name: &str| {
        let mut bytes = name.bytes();
        bytes.next().is_some_and(|first| !first.is_ascii_digit())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte))
    };
    let at = match text.split_once('+') {
        Some(("", offset)) => number(offset).map(At::Offset),
        Some((name, offset)) if is_name(name) => {
            number(offset).map(|offset| At::Function(name.to_owned(), Some(offset)))
        }
        None if is_name(text) => Some(At::Function(text.to_owned(), None)),
        _ => None,
    };
    at.ok_or_else(|| {
        "give first, middle, last, an offset such as +0x1c, or a function with or without one"
            .to_owned()
    })
}

/// A kind that an instruction can be changed by.
fn parse_kind(name: &str) -> Result<Kind, String> {
    if EdgeKind::from_name(name).is_some() {
        return Err("that goes wrong at a device's edge: cofferdam disturb".to_owned());
    }
    Kind::from_name(name).ok_or_else(|| {
        let names: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        format!("there are {}", names.join(", "))
    })
}

fn parse_fault(name: &str) -> Result<FaultKind, String> {
    let names = FaultKind::ALL.map(FaultKind::name).join(", ");
    FaultKind::from_name(name).ok_or_else(|| format!("there are {names}"))
}

impl InjectOptions {
    /// `inject`
    pub fn run(self) -> anyhow::Result<Ending> {
        if self.undo {
            undo(&self.vm, &self.module, self.json)?;
            return Ok(Ending::SUCCESS);
        }
        let (function, at) = match (self.function, self.at) {
            (None, At::Function(name, None)) => (name, None),
            (None, At::Function(name, Some(offset))) => (name, Some(At::Offset(offset))),
            (Some(_), At::Function(..)) => {
                bail!("name the function once: as FUNCTION, or with --at")
            }
            (Some(name), at) => (name, Some(at)),
            (None, _) => bail!(
                "name a function of {}: as FUNCTION, or with --at",
                self.module
            ),
        };
        if self.list {
            list(&self.vm, (&self.module, &function), self.kind, self.json)?;
            return Ok(Ending::SUCCESS);
        }
        if let Some(kind) = self.kind {
            let offset = match at {
                Some(At::Offset(offset)) => Some(offset),
                _ => None,
            };
            let fault = CodeFault {
                module: self.module,
                function,
                kind,
                offset,
                when: self.when,
                seed: self.seed,
            };
            inject(&self.vm, fault, self.json)?;
            return Ok(Ending::SUCCESS);
        }
        let offset = offset(&self.vm, &self.module, &function, at)?;
        let count = Request::FaultCount {
            module: self.module.clone(),
        };
        // Orders are kept until they are used up or withdrawn: who gives another should know of the
        // one before.
        let earlier = match ask(&self.vm, &count) {
            Ok(Reply::FaultCount(count)) if self.times > 0 => count.left,
            _ => 0,
        };
        let ordered = Ordered {
            module: self.module,
            function,
            offset,
            fault: self.fault.name(),
            every: self.every,
            times: self.times,
            earlier,
        };
        let request = Request::Inject {
            module: ordered.module.clone(),
            entry: ordered.function.clone(),
            offset,
            fault: self.fault,
            every: self.every,
            times: self.times,
        };
        let Reply::Done {} = ask(&self.vm, &request)? else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&ordered)?;
        } else {
            print_bytes(ordered.text().as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// Where the instruction begins that is meant.
fn offset(vm: &VmName, module: &str, function: &str, at: Option<At>) -> anyhow::Result<u64> {
    let request = Request::Instructions {
        module: module.to_owned(),
        function: function.to_owned(),
    };
    let Reply::Instructions { instructions } = ask(vm, &request)? else {
        bail!("the VM answered something else");
    };
    let offset = match at {
        None => Place::First.candidates(&instructions).first().copied(),
        Some(At::Place(place)) => place.candidates(&instructions).first().copied(),
        Some(At::Function(..)) => None,
        Some(At::Offset(offset)) => instructions
            .iter()
            .map(|instruction| instruction.offset)
            .find(|start| *start == offset),
    };
    offset.with_context(|| format!("no instruction of {function} begins there"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_ordered_is_said_in_english() {
        let said = |every, times, earlier| {
            let ordered = Ordered {
                module: "e1000".to_owned(),
                function: "e1000_clean".to_owned(),
                offset: 5,
                fault: FaultKind::ALL[0].name(),
                every,
                times,
                earlier,
            };
            ordered.text()
        };
        assert_eq!(
            said(1, 10, 0),
            "the next 10 calls of e1000_clean fail: null dereference at +0x5\n"
        );
        assert!(said(1, 1, 0).starts_with("the next call of e1000_clean fails:"));
        assert!(said(3, 2, 0).starts_with("every 3rd call of e1000_clean fails, 2 times in all:"));
        assert!(said(1, 0, 0).starts_with("no more faults"));
        assert!(
            said(1, 1, 4)
                .contains("an earlier order for e1000 goes on, of which 4 faults are left")
        );
    }

    #[test]
    fn a_place_is_a_word_or_an_offset() {
        assert_eq!(parse_at("last"), Ok(At::Place(Place::Last)));
        assert_eq!(parse_at("+0x1c"), Ok(At::Offset(0x1c)));
        assert_eq!(parse_at("+28"), Ok(At::Offset(28)));
        let function = |offset| At::Function("e1000_open".to_owned(), offset);
        assert_eq!(parse_at("e1000_open"), Ok(function(None)));
        assert_eq!(parse_at("e1000_open+0x4c"), Ok(function(Some(0x4c))));
        for wrong in [
            "", "+", "0x1c", "+0x", "+0x+1", "++1", "-1", "open+", "a b", "9p+1",
        ] {
            assert!(parse_at(wrong).is_err(), "{wrong}");
        }
        assert!(parse_fault("gremlin").unwrap_err().contains("halt"));
    }
}
