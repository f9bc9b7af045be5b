//! `inject`: faults in calls of an isolated driver, on purpose.

use anyhow::{Context, bail};
use recovery::fault::{FaultKind, Place};

use super::{Ending, print_bytes};
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;
use crate::runtime_dir::RuntimeRoot;

/// `inject`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The guest's own text is not touched: only the domain's copy of the function, for single calls.
`cofferdam violations` shows what came of it, `cofferdam status` what was done about it.

Examples:
  cofferdam inject web e1000 e1000_xmit_frame
  cofferdam inject web e1000 e1000_clean --at last --fault endless_loop --every 10 --times 5
  cofferdam inject web e1000 e1000_open --at +0x1c")]
pub struct InjectOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the isolated module
    module: String,
    /// Name of one of its isolated functions
    function: String,
    /// Where: first, middle, last, or +OFFSET in bytes
    #[arg(long, value_name = "WHERE", default_value = "first", value_parser = parse_at)]
    at: At,
    /// What goes wrong
    #[arg(long, value_name = "FAULT", default_value = "null_dereference", value_parser = parse_fault)]
    fault: FaultKind,
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
}

/// Where a fault goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Place(Place),
    Offset(u64),
}

fn parse_at(text: &str) -> Result<At, String> {
    if let Some(place) = Place::ALL.into_iter().find(|place| place.name() == text) {
        return Ok(At::Place(place));
    }
    let offset = text
        .strip_prefix('+')
        .and_then(|offset| match offset.strip_prefix("0x") {
            Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
            Some(_) => None,
            None => offset.parse().ok(),
        });
    offset
        .map(At::Offset)
        .ok_or_else(|| "give first, middle, last, or an offset such as +0x1c".to_owned())
}

fn parse_fault(name: &str) -> Result<FaultKind, String> {
    let names = FaultKind::ALL.map(FaultKind::name).join(", ");
    FaultKind::from_name(name).ok_or_else(|| format!("there are {names}"))
}

impl InjectOptions {
    /// `inject`
    pub fn run(self) -> anyhow::Result<Ending> {
        let vm = RuntimeRoot::from_environment().find(Some(&self.vm))?;
        let mut control = ControlClient::connect(&vm.paths.control_socket())?;
        let request = Request::Instructions {
            module: self.module.clone(),
            function: self.function.clone(),
        };
        let Reply::Instructions { instructions } = control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        let offset = match self.at {
            At::Place(place) => place.candidates(&instructions).first().copied(),
            At::Offset(offset) => instructions
                .iter()
                .map(|instruction| instruction.offset)
                .find(|start| *start == offset),
        };
        let offset =
            offset.with_context(|| format!("no instruction of {} begins there", self.function))?;
        control.tell(&Request::Inject {
            module: self.module,
            entry: self.function.clone(),
            offset,
            fault: self.fault,
            every: self.every,
            times: self.times,
        })?;
        let text = format!(
            "{} at {}+{offset:#x}, {} times, in every {}. call\n",
            self.fault.name(),
            self.function,
            self.times,
            self.every
        );
        print_bytes(text.as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_word_or_an_offset() {
        assert_eq!(parse_at("last"), Ok(At::Place(Place::Last)));
        assert_eq!(parse_at("+0x1c"), Ok(At::Offset(0x1c)));
        assert_eq!(parse_at("+28"), Ok(At::Offset(28)));
        for wrong in ["", "+", "0x1c", "+0x", "+0x+1", "-1", "end"] {
            assert!(parse_at(wrong).is_err(), "{wrong}");
        }
        assert!(parse_fault("gremlin").unwrap_err().contains("halt"));
    }
}
