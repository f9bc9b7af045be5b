//! `suspend-device`, `resume-device`: a driver's own suspend and resume functions, called in the
//! live guest.

use anyhow::bail;
use recovery::resume_device::DevicePhases;

use super::isolation::ask;
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

/// `suspend-device`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The driver stays, its interfaces are there and pass nothing. Do not take them down or remove the driver before \
`cofferdam resume-device`: drivers wait for ever for the end of what they have ended already.

Example:
  cofferdam suspend-device web e1000")]
pub struct SuspendDeviceOptions {
    #[command(flatten)]
    device: DeviceOptions,
}

/// `resume-device`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Devices that are not suspended are suspended and resumed, for one that does not work as its driver expects: it begins \
anew, and the driver, its interfaces and their configuration stay. The link is lost for a moment.

Example:
  cofferdam resume-device web e1000")]
pub struct ResumeDeviceOptions {
    #[command(flatten)]
    device: DeviceOptions,
}

/// Whose devices.
#[derive(Debug, clap::Args)]
struct DeviceOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the module; isolated or not
    module: String,
    /// The times as JSON
    #[arg(long)]
    json: bool,
}

impl SuspendDeviceOptions {
    /// `suspend-device`
    pub fn run(self) -> anyhow::Result<Ending> {
        let DeviceOptions { vm, module, json } = self.device;
        let Reply::DeviceSuspended(phases) = ask(&vm, &Request::SuspendDevice { module })? else {
            bail!("the VM answered something else");
        };
        print_phases("suspended", &phases, json)
    }
}

impl ResumeDeviceOptions {
    /// `resume-device`
    pub fn run(self) -> anyhow::Result<Ending> {
        let DeviceOptions { vm, module, json } = self.device;
        match ask(&vm, &Request::ResumeDevice { module })? {
            Reply::DeviceResumed(phases) => print_phases("resumed", &phases, json),
            Reply::Resumed { times_us } if json => {
                print_json(&serde_json::json!({ "times_us": times_us }))?;
                Ok(Ending::SUCCESS)
            }
            Reply::Resumed { times_us } => {
                let line = |us: &u64| format!("suspended and resumed in {} ms\n", millis(*us));
                let text: String = times_us.iter().map(line).collect();
                print_bytes(text.as_bytes())?;
                Ok(Ending::SUCCESS)
            }
            _ => bail!("the VM answered something else"),
        }
    }
}

fn print_phases(what: &str, phases: &DevicePhases, json: bool) -> anyhow::Result<Ending> {
    if json {
        print_json(phases)?;
        return Ok(Ending::SUCCESS);
    }
    print_bytes(phases_text(what, phases).as_bytes())?;
    Ok(Ending::SUCCESS)
}

fn phases_text(what: &str, phases: &DevicePhases) -> String {
    let part = |us: Option<u64>, none: &str| {
        us.map_or_else(|| none.to_owned(), |us| format!("{} ms", millis(us)))
    };
    format!(
        "{what}: driver {} ms, state {}, power {}\n",
        millis(phases.driver_us),
        part(phases.state_us, "not given away"),
        part(phases.power_us, "has one state only")
    )
}

fn millis(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_in_milliseconds_and_what_there_is_not_in_words() {
        let mut phases = DevicePhases {
            driver_us: 12_034,
            state_us: Some(50),
            power_us: Some(1),
        };
        assert_eq!(
            phases_text("suspended", &phases),
            "suspended: driver 12.034 ms, state 0.050 ms, power 0.001 ms\n"
        );
        (phases.state_us, phases.power_us) = (None, None);
        assert_eq!(
            phases_text("resumed", &phases),
            "resumed: driver 12.034 ms, state not given away, power has one state only\n"
        );
    }
}
