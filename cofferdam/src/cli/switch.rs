//! `switch`: the turn at a shared NIC goes to another guest.

use std::time::Duration;

use anyhow::bail;

use super::device_host::ask;
use super::{Ending, print_bytes, print_json};
use crate::device::protocol::{MAX_SLICE_MS, MIN_SLICE_MS, Reply, Request};
use crate::options::VmName;
use crate::words::switched;

/// `switch`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Both guests go on; neither probes or resets its driver. The one that had the turn sees its link go, or, where the device is \
served with --parked stall, nothing for up to a second.

Examples:
  cofferdam switch nic0 --to right
  cofferdam switch nic0 --to right --json | jq .phases
  cofferdam switch nic0 --every 100ms
  cofferdam switch nic0 --hold")]
pub struct SwitchOptions {
    /// Name of the device host
    device: VmName,
    /// Name of the VM that is to have the turn
    #[arg(long, value_name = "VM", required_unless_present_any = ["every", "hold"])]
    to: Option<VmName>,
    /// Pass the turn on after each such time, such as 100ms or 2s, to all VMs that are attached
    #[arg(long, value_name = "TIME", value_parser = slice, conflicts_with = "to")]
    every: Option<Duration>,
    /// Pass the turn on by time no more
    #[arg(long, conflicts_with_all = ["to", "every"])]
    hold: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// A time slice as a person types it.
fn slice(text: &str) -> Result<Duration, String> {
    let (digits, unit) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1000),
        (None, None) => return Err("give a time such as 100ms or 2s".to_owned()),
    };
    let digits = Some(digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let ms = digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|count| count.checked_mul(unit))
        .filter(|ms| (MIN_SLICE_MS..=MAX_SLICE_MS).contains(ms));
    match ms {
        Some(ms) => Ok(Duration::from_millis(ms)),
        None => Err("give a time from 1ms to 3600s, such as 100ms".to_owned()),
    }
}

impl SwitchOptions {
    /// `switch`
    pub fn run(self) -> anyhow::Result<Ending> {
        let request = match (self.to, self.every) {
            (Some(to), _) => Request::Switch { to: to.to_string() },
            (None, Some(every)) => Request::Every {
                ms: u64::try_from(every.as_millis()).unwrap_or(u64::MAX),
            },
            (None, None) => Request::Hold {},
        };
        let reply = ask(&self.device, &request)?;
        let text = match &reply {
            Reply::Switched(record) if self.json => {
                return print_json(record).map(|()| Ending::SUCCESS);
            }
            reply if self.json => return print_json(reply).map(|()| Ending::SUCCESS),
            Reply::Switched(record) => format!("{}\n", switched(record)),
            Reply::Turn { turn } => {
                let has = turn.as_deref().unwrap_or("nobody");
                match self.every {
                    Some(every) => format!(
                        "passed on every {} ms; {has} has the turn\n",
                        every.as_millis()
                    ),
                    None => format!("{has} keeps the turn\n"),
                }
            }
            other => bail!("the device host answered something else: {other:?}"),
        };
        print_bytes(text.as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_have_a_unit_and_bounds() {
        assert_eq!(slice("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(slice("2s"), Ok(Duration::from_secs(2)));
        for bad in [
            "",
            "100",
            "ms",
            "0ms",
            "-1s",
            "+1s",
            "3601s",
            "1.5s",
            "99999999999999999999s",
            "1m",
        ] {
            assert!(slice(bad).is_err(), "{bad}");
        }
    }
}
