//! `try`: a person's own module in a guest, with one command.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use guest_images::folder::fitting;
use guest_images::{BuiltImage, images_in};
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;

use super::images::UserImages;
use super::isolation::StoresArgs;
use super::{Ending, print_bytes, print_json};
use crate::options::{DiskSpec, MemorySize, NetOption, NicOption, VmName};
use crate::run::MAX_VCPUS;
use crate::trial::candidate::Candidate;
use crate::trial::{Machine, Trial, TrialVm};

/// Longest name of a guest that is made of a module's, in bytes.
const MAX_NAME: usize = 60;

/// `try`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The guest is booted from the image of the kernel that the module was built for (`cofferdam image
build` makes one), the module is inserted with what it needs, and its functions are isolated,
before anything calls them but its own start. What --run says is run by the guest's shell then.
Ctrl-C ends the guest and leaves nothing.

Exit status: 0: no call was taken back; 1: it could not be tried, and why; 3: a call was taken
back, or the guest's kernel has panicked; 4: the command has failed, and no call was taken back.

Examples:
  cofferdam try my.ko
  cofferdam try my.ko --isolate my_open,my_xmit --run 'ip link set my0 up'
  cofferdam try my_nic.ko --net user --run 'ip link set eth0 up; udhcpc -i eth0 -n' --json
  cofferdam try my.ko --keep --name mine && cofferdam exec mine -- dmesg")]
pub struct TryOptions {
    /// The module's file; it may be packed (.ko.xz, .ko.zst)
    #[arg(value_name = "FILE.ko")]
    file: PathBuf,
    /// Which functions are isolated: all that can be, some by their names (NAME,NAME), those that
    /// fit a pattern as a shell's, or none, to see what the module does by itself
    #[arg(long, value_name = "all|none|NAME,...", default_value = "all", value_parser = parse_isolate)]
    isolate: Isolate,
    /// A command for the guest's shell
    #[arg(long, value_name = "COMMAND")]
    run: Option<String>,
    /// Kill the command after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Parameters of the module, as for insmod
    #[arg(long, value_name = "TEXT", default_value = "")]
    params: String,
    #[command(flatten)]
    stores: StoresArgs,
    /// How long a call may run, in microseconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=60_000_000))]
    budget_us: Option<u64>,
    #[command(flatten)]
    images: UserImages,
    /// Image to boot, by its name; the first that fits the module when not given
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: MemorySize,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u8,
    /// A NIC and what it is plugged into, as for `run` (may be given again)
    #[arg(long, value_name = "WIRE[,nic=MODEL][,mac=ADDRESS]")]
    net: Vec<NetOption>,
    /// A NIC that is somewhere else, as for `run` (may be given again)
    #[arg(long, value_name = "NIC", value_parser = checked::<NicOption>)]
    nic: Vec<String>,
    /// Disk image, as for `run` (may be given again)
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<DiskSpec>,
    /// Leave the guest running, for `exec`, `status`, `violations`, `debug` and the others
    #[arg(long, visible_alias = "interactive")]
    keep: bool,
    /// Name of the guest; try-MODULE when not given
    #[arg(long, value_name = "NAME")]
    name: Option<VmName>,
    /// As JSON, with the output of the command
    #[arg(long)]
    json: bool,
}

/// Which functions are isolated.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Isolate {
    None,
    Some(Wanted),
}

fn parse_isolate(text: &str) -> Result<Isolate, String> {
    let is_pattern = |name: &str| name.contains(['*', '?', '[', '{']);
    let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
    match text {
        "none" => Ok(Isolate::None),
        "all" => Ok(Isolate::Some(Wanted::All)),
        // A comma may be part of one.
        pattern if is_pattern(pattern) => Ok(Isolate::Some(Wanted::Matching(pattern.to_owned()))),
        _ if names.iter().any(String::is_empty) => {
            Err("give all, none, names of functions with commas between them, or a pattern".into())
        }
        _ => Ok(Isolate::Some(Wanted::Named(names))),
    }
}

/// The text of a value, if it is one.
fn checked<T: std::str::FromStr>(text: &str) -> Result<String, T::Err> {
    text.parse::<T>().map(|_| text.to_owned())
}

impl TryOptions {
    /// `try`
    pub fn run(self) -> anyhow::Result<Ending> {
        let candidate = Candidate::read(&self.file)?;
        let image = self.image(&candidate)?;
        candidate.fits(&image)?;
        let machine = self.machine(&candidate)?;
        let contain = self.stores.contain(Contain::default())?;
        let trial = Trial {
            params: self.params,
            isolate: match self.isolate {
                Isolate::None => None,
                Isolate::Some(wanted) => Some(wanted),
            },
            contain,
            budget_us: self.budget_us,
            command: self.run,
            limit_s: self.timeout,
            quiet: self.json,
        };
        let progress = |line: &str| eprintln!("{line}");
        progress(&format!(
            "booting Linux {} (image {})",
            image.release(),
            image.name
        ));
        let mut vm = TrialVm::start(&image, &machine)?;
        vm.wait_for_agent()?;
        let mut report = crate::trial::run(&mut vm, &candidate, &image, &trial, &progress)?;
        let mut console = None;
        if machine.keep && report.panicked.is_none() {
            report.vm = Some(machine.name.to_string());
            vm.agent.disconnect();
            console = vm.let_go();
        }
        if self.json {
            print_json(&report)?;
        } else {
            let mut text = report.text();
            if let Some(console) = console {
                text.push_str(&format!(
                    "the guest goes on: `cofferdam exec {0} -- COMMAND`, `cofferdam stop {0}`; its console is in {1}\n",
                    machine.name,
                    console.display()
                ));
            }
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::Status(ExitCode::from(report.status())))
    }

    /// The image that is booted.
    fn image(&self, candidate: &Candidate) -> anyhow::Result<BuiltImage> {
        let folder = self.images.folder()?;
        let mut images = images_in(&folder)?;
        if let Some(name) = &self.image {
            let names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
            let there = match names.as_slice() {
                [] => "none".to_owned(),
                some => some.join(", "),
            };
            let absent = format!(
                "there is no image {name:?} in {}, but {there}",
                folder.display()
            );
            images.retain(|image| image.name == *name);
            if images.is_empty() {
                bail!(absent);
            }
        }
        let image = fitting(&images, candidate.release(), &candidate.depends)
            .map_err(|why| anyhow::anyhow!(why))
            .with_context(|| format!("cannot try {}", self.file.display()))?;
        Ok(image.clone())
    }

    /// The VM.
    fn machine(&self, candidate: &Candidate) -> anyhow::Result<Machine> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => {
                let mut name = format!("try-{}", candidate.file.name);
                name.truncate(MAX_NAME);
                name.parse()?
            }
        };
        let mut options = vec![
            format!("--memory={}", self.memory),
            format!("--vcpus={}", self.vcpus),
            // One that panics stays as it is: what its module's calls did is still known.
            "--append=panic=0".to_owned(),
        ];
        options.extend(self.net.iter().map(|net| format!("--net={net}")));
        options.extend(self.nic.iter().map(|nic| format!("--nic={nic}")));
        options.extend(self.disk.iter().map(|disk| format!("--disk={disk}")));
        Ok(Machine {
            name,
            options,
            keep: self.keep,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_isolated_is_all_none_names_or_a_pattern() {
        assert_eq!(parse_isolate("all"), Ok(Isolate::Some(Wanted::All)));
        assert_eq!(parse_isolate("none"), Ok(Isolate::None));
        let named = Wanted::Named(vec!["a".into(), "b".into()]);
        assert_eq!(parse_isolate("a, b"), Ok(Isolate::Some(named)));
        let pattern = Wanted::Matching("my_{open,close}".into());
        assert_eq!(parse_isolate("my_{open,close}"), Ok(Isolate::Some(pattern)));
        for wrong in ["", ",", "a,,b", "a,"] {
            parse_isolate(wrong).unwrap_err();
        }
    }
}
