//! `bench`: its options, and what is printed and written at the end.

use std::path::PathBuf;
use std::time::Duration;

use ::recovery::campaign::workload::Workload;
use agent_protocol::traffic::TrafficKind;
use anyhow::Context;

use super::images::Images;
use super::{Ending, print_bytes};
use crate::bench::guest::GuestOptions;
use crate::bench::switch::MovedNic;
use crate::bench::{boot, drivers, isolation, recovery, rollback, suspend, switch, traffic};
use crate::options::NicModel;
use crate::options::PciAddress;
use crate::report::ratio::ratios;
use crate::report::switch::SwitchMethod;
use crate::report::traffic::NicPlace;
use crate::report::{Method, Report, environment, html, merge, svg};

/// `bench`
#[derive(Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// Time boots: start of the process to the first line of /init
    #[command(after_help = "\
Example:
  cofferdam bench boot --runs 5 --json boot.json")]
    Boot {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        runs: Runs,
        /// Which monitor boots the guest
        #[arg(long, value_enum, default_value_t = Monitor::Cofferdam)]
        vmm: Monitor,
    },
    /// Time how long the network is gone: rollback of a call, driver restart, guest reboot
    #[command(after_help = "\
The gateway pings the guest all the time. For rollback, faults are put into single calls of the driver; for
the others, the guest's agent restarts the driver or the guest is reset.

Examples:
  cofferdam bench recovery --runs 5 --json recovery.json --html recovery.html
  cofferdam bench recovery --method rollback,restart --entry e1000_clean --rollbacks 300
  cofferdam bench recovery --method rollback,restart --spilled e1000_set_ringparam,e1000_open")]
    Recovery {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        runs: Runs,
        /// Ways of recovery
        #[arg(
            long,
            value_enum,
            value_delimiter = ',',
            default_values_t = [Method::Rollback, Method::Restart, Method::Reboot]
        )]
        method: Vec<Method>,
        /// An entry point of the driver whose calls are made to fail and rolled back; may be given
        /// several times. Without it, and without --seven whose calls are atomic
        #[arg(long, value_name = "FUNCTION", value_delimiter = ',')]
        entry: Vec<String>,
        /// One whose calls go on in the guest where they wait, and fail after that; may be given
        /// several times. Without it, and without --entry, e1000_set_ringparam and e1000_open
        #[arg(long, value_name = "FUNCTION", value_delimiter = ',')]
        spilled: Vec<String>,
        /// How many rollbacks of each entry point
        #[arg(
            long,
            value_name = "N",
            default_value_t = 100,
            value_parser = clap::value_parser!(u16).range(1..=10_000)
        )]
        rollbacks: u16,
    },
    /// Time failed calls of one stock driver after the other, against a restart of it
    #[command(after_help = "\
Each has a guest of its own. It is removed and inserted, natively, until it works again; then functions of it are
isolated, and calls of them fail, one at a time. Those that drive functions of the host's PCI bus have those of the
lab's server.

Example:
  cofferdam bench drivers --restarts 5 --rollbacks 30 --driver 8139cp,nvme --json drivers.json")]
    Drivers {
        #[command(flatten)]
        common: Common,
        /// These drivers; all that are known without it
        #[arg(long, value_name = "MODULE", value_delimiter = ',')]
        driver: Vec<String>,
        /// Restarts of each
        #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
        restarts: u16,
        /// Failed calls of each function
        #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        rollbacks: u16,
    },
    /// Measure what isolation costs: traffic with functions of the driver isolated, against none
    #[command(after_help = "\
Packet rate and TCP throughput with each set of functions isolated, as a fraction of the same traffic with none,
and what a call of each function costs and where its time goes.

Example:
  cofferdam bench isolation --seconds 10 --set e1000_xmit_frame --set e1000_clean+e1000_intr --json isolation.json")]
    Isolation {
        #[command(flatten)]
        common: Common,
        /// How long each kind of traffic runs with each set
        #[arg(
            long,
            default_value_t = 10,
            value_parser = clap::value_parser!(u64).range(1..=3600)
        )]
        seconds: u64,
        /// Functions that are isolated together, joined by `+`; may be given several times
        #[arg(long = "set", value_name = "FUNCTION[+FUNCTION...]", default_values = isolation::SETS)]
        sets: Vec<String>,
    },
    /// Time snapshots, restores, marks and rewinds, against a boot
    #[command(after_help = "\
Example:
  cofferdam bench suspend --runs 5 --memory 256,2048 --json suspend.json")]
    Suspend {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        runs: Runs,
        /// Sizes of guest memory, in MiB
        #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [256], value_parser = clap::value_parser!(u64).range(64..=65_536))]
        memory: Vec<u64>,
        /// How many guests go on from one snapshot at a time, to see what they cost; 0 for none
        #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=256))]
        clones: u16,
        /// Folder that snapshots are written in; that of temporary files when not given
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,
        /// Time restores with nothing of the snapshot in the host's page cache, too: of a folder
        /// that is on a disk, and not in memory
        #[arg(long, requires = "folder")]
        cold: bool,
    },
    /// Time how a NIC moves between two running guests: a switch of the device host, against unplug
    /// and plug
    #[command(after_help = "\
Example:
  cofferdam bench switch --switches 100 --moves 10 --memory 256,2048 --json switch.json
  cofferdam bench switch --vfio 0000:00:02.0 --driver e1000e --far-end eth0 --large-pages")]
    Switch {
        #[command(flatten)]
        common: Common,
        /// A function of the host in place of a model; it is given to vfio-pci meanwhile
        #[arg(long, value_name = "ADDRESS", requires_all = ["driver", "far_end"])]
        vfio: Option<PciAddress>,
        /// The guests' driver for that function
        #[arg(long, value_name = "MODULE", requires = "vfio")]
        driver: Option<String>,
        /// The interface of the host that the function's cable ends in, by which is heard whose
        /// frames come when
        #[arg(long, value_name = "INTERFACE", requires = "vfio")]
        far_end: Option<String>,
        /// Measure with guest memory of large pages, too, which the host sets aside meanwhile
        #[arg(long)]
        large_pages: bool,
        /// Ways
        #[arg(
            long,
            value_enum,
            value_delimiter = ',',
            default_values_t = [SwitchMethod::ContextStall, SwitchMethod::Context, SwitchMethod::Hotplug]
        )]
        method: Vec<SwitchMethod>,
        /// How many switches of the device host, each way
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        switches: u16,
        /// How many moves by unplug and plug
        #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
        moves: u16,
        /// Sizes of the memory of each guest, in MiB
        #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [256], value_parser = clap::value_parser!(u64).range(64..=65_536))]
        memory: Vec<u64>,
    },
    /// Put faults into a driver on purpose, natively and isolated, and say what became of them
    #[command(after_help = "\
A short `cofferdam campaign`, as a part of a report.

Example:
  cofferdam bench campaign --driver null_blk --trials 10 --json campaign.json")]
    Campaign {
        #[command(flatten)]
        common: Common,
        /// The driver's module, one for which there is a workload: e1000, null_blk, dummy
        #[arg(long, value_name = "MODULE", default_value = "null_blk", value_parser = parse_driver)]
        driver: Box<Workload>,
        /// Kinds of faults, or code or edge for all in the driver's code or at its device's edge;
        /// all without it
        #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = super::campaign::parse_kinds)]
        kinds: Vec<super::campaign::Kinds>,
        /// How many faults
        #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
        trials: u32,
        /// What decides which ones
        #[arg(long, value_name = "S", default_value_t = 1)]
        seed: u64,
    },
    /// Send traffic through the NIC and check every byte of it
    #[command(after_help = "\
Fails when anything is lost, reordered, doubled or changed.

Example:
  cofferdam bench traffic --seconds 60 --kind ping_flood,tcp_echo --at vmm,device-host --json traffic.json")]
    Traffic {
        #[command(flatten)]
        common: Common,
        /// How long each kind is sent
        #[arg(
            long,
            default_value_t = 60,
            value_parser = clap::value_parser!(u64).range(1..=3600)
        )]
        seconds: u64,
        /// What is sent
        #[arg(
            long,
            value_delimiter = ',',
            value_parser = parse_kind,
            default_value = "ping_flood,udp_echo,tcp_echo,tcp_sink,tcp_source"
        )]
        kind: Vec<TrafficKind>,
        /// Through which NIC
        #[arg(long, value_name = "MODEL", default_value_t = NicModel::default())]
        nic: NicModel,
        /// Where the NIC is
        #[arg(long, value_name = "PLACE", value_delimiter = ',', default_values = ["vmm", "device-host"])]
        at: Vec<NicPlace>,
    },
}

/// What all measurements take.
#[derive(Debug, clap::Args)]
pub struct Common {
    #[command(flatten)]
    images: Images,
    /// Where to write the report
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to write the report as a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Where to write its plots as SVG files
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

/// How often something is measured.
#[derive(Debug, clap::Args)]
pub struct Runs {
    /// How often
    #[arg(
        long,
        value_name = "N",
        default_value_t = 5,
        value_parser = clap::value_parser!(u16).range(1..=1000)
    )]
    runs: u16,
}

/// Monitors that `bench boot` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Monitor {
    /// This one, with the ELF kernel
    Cofferdam,
    /// QEMU's q35 with the same kernel's bzImage
    Qemu,
}

fn parse_driver(name: &str) -> Result<Box<Workload>, String> {
    super::campaign::own_workload(name).map(Box::new)
}

fn parse_kind(name: &str) -> Result<TrafficKind, String> {
    TrafficKind::from_name(name).ok_or_else(|| {
        let names: Vec<&str> = TrafficKind::ALL.iter().map(|kind| kind.name()).collect();
        format!("there are {}", names.join(", "))
    })
}

impl BenchCommand {
    /// `bench`. Flat: an arm for each benchmark takes its options apart and puts what it measured
    /// into the report.
    #[expect(clippy::too_many_lines, reason = "flat: an arm for each benchmark")]
    pub fn run(self) -> anyhow::Result<Ending> {
        let mut report = environment::report_here();
        let mut progress = |line: &str| eprintln!("{line}");
        match self {
            Self::Boot { common, runs, vmm } => {
                let options = GuestOptions::new(&common.images.images)?;
                let runs = usize::from(runs.runs);
                match vmm {
                    Monitor::Cofferdam => {
                        report.boot = Some(boot::measure(&options, runs, &mut progress)?);
                    }
                    Monitor::Qemu => {
                        report
                            .boot_others
                            .push(boot::measure_qemu(&options, runs, &mut progress)?);
                    }
                }
                common.finish(&report)?;
            }
            Self::Recovery {
                common,
                runs,
                method,
                entry,
                spilled,
                rollbacks,
            } => {
                let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
                let (entries, spilling) = match entry.is_empty() && spilled.is_empty() {
                    true => (names(rollback::ENTRIES), names(rollback::SPILLING)),
                    false => (entry, spilled),
                };
                let options = recovery::RecoveryOptions {
                    guest: GuestOptions::new(&common.images.images)?,
                    methods: method,
                    runs: usize::from(runs.runs),
                    entries,
                    spilling,
                    rollbacks: usize::from(rollbacks),
                };
                let mut measured = recovery::Measured::default();
                let result = recovery::measure(&options, &mut measured, &mut progress);
                report.recovery_ratios = ratios(&measured.recoveries);
                report.recovery = measured.recoveries;
                report.guest = measured.guest;
                // What was measured is not lost because a later part failed.
                if result.is_ok() || !report.recovery.is_empty() {
                    common.finish(&report)?;
                }
                result?;
            }
            Self::Drivers {
                common,
                driver,
                restarts,
                rollbacks,
            } => {
                let options = drivers::DriversOptions {
                    guest: GuestOptions::new(&common.images.images)?,
                    drivers: drivers::known(&driver)?,
                    restarts: usize::from(restarts),
                    rollbacks: usize::from(rollbacks),
                };
                let measured = drivers::measure(&options, &mut progress);
                (report.drivers, report.guest) = (measured.drivers, measured.guest);
                common.finish(&report)?;
                anyhow::ensure!(measured.failed.is_empty(), measured.failed.join("\n"));
            }
            Self::Isolation {
                common,
                seconds,
                sets,
            } => {
                let functions = |set: &String| set.split('+').map(str::to_owned).collect();
                let options = isolation::IsolationOptions {
                    guest: GuestOptions::new(&common.images.images)?,
                    sets: sets.iter().map(functions).collect(),
                    time: Duration::from_secs(seconds),
                };
                let (costs, guest) = isolation::measure(&options, &mut progress)?;
                report.isolation = Some(costs);
                report.guest = Some(guest);
                common.finish(&report)?;
            }
            Self::Suspend {
                common,
                runs,
                memory,
                clones,
                folder,
                cold,
            } => {
                let options = suspend::SuspendOptions {
                    guest: GuestOptions::new(&common.images.images)?,
                    mem_mib: memory,
                    runs: usize::from(runs.runs),
                    folder,
                    cold,
                    clones: usize::from(clones),
                };
                let measured = suspend::measure(&options, &mut progress)?;
                report.suspend = measured.ways;
                report.suspend_followed = measured.followed;
                report.clones = measured.clones;
                report.guest = measured.guest;
                common.finish(&report)?;
            }
            Self::Switch {
                common,
                vfio,
                driver,
                far_end,
                large_pages,
                method,
                switches,
                moves,
                memory,
            } => {
                let nic = match (vfio, driver, far_end) {
                    (Some(address), Some(driver), Some(far_end)) => MovedNic::Function {
                        address,
                        driver,
                        far_end,
                    },
                    _ => MovedNic::Model,
                };
                let options = switch::SwitchOptions {
                    guest: GuestOptions::new(&common.images.images)?,
                    methods: method,
                    nic,
                    mem_mib: memory,
                    large_pages,
                    switches: usize::from(switches),
                    moves: usize::from(moves),
                };
                (report.switch, report.guest) = switch::measure(&options, &mut progress)?;
                common.finish(&report)?;
            }
            Self::Campaign {
                common,
                driver,
                kinds,
                trials,
                seed,
            } => {
                let images = &common.images;
                report.campaigns.push(super::campaign::measure(
                    images,
                    *driver,
                    kinds.into_iter().flatten().collect(),
                    (trials, seed),
                )?);
                common.finish(&report)?;
            }
            Self::Traffic {
                common,
                seconds,
                kind,
                nic,
                at,
            } => {
                let options = traffic::TrafficOptions {
                    guest: GuestOptions::new(&common.images.images)?,
                    nic,
                    places: at,
                    kinds: kind,
                    time: Duration::from_secs(seconds),
                };
                (report.traffic, report.guest) = traffic::measure(&options, &mut progress)?;
                common.finish(&report)?;
                if let Some(bad) = report.traffic.iter().find(|t| !traffic::all_well(t)) {
                    anyhow::bail!("{}: not all of it arrived as it was sent", bad.kind);
                }
            }
        }
        Ok(Ending::SUCCESS)
    }
}

impl Common {
    /// Prints the numbers and writes the files.
    fn finish(&self, report: &Report) -> anyhow::Result<()> {
        print_bytes(super::report::text(report).as_bytes())?;
        if let Some(path) = &self.json {
            merge::write(report, path)?;
        }
        if let Some(path) = &self.html {
            html::write(report, path).context("the page with plots")?;
        }
        if let Some(folder) = &self.svg {
            svg::write(report, folder).context("the plots")?;
        }
        Ok(())
    }
}
