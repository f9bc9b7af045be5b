//! `run`: one VM in this process, from the command line to the last file removed.
//!
//! ```text
//! signals ──► watch ─────────────┐ power off, or at last the end by force
//! terminal ─► console (thread) ──┼► VmHandle ──► Vm::run (main thread: event loop, vCPU threads)
//! control.sock ─► service ───────┘                │
//!                                    machine: serial, agent's console, NIC ─► wire, disks
//! ```
//!
//! What must be gone at the end (terminal mode, sockets, the runtime folder) belongs to
//! [`watch::Belongings`], which the orderly way and the way by force both clear.

mod at_ports;
mod attachment;
mod console;
mod disturbance;
mod elsewhere;
pub mod escape;
pub mod isolation;
mod kept_console;
mod known;
pub(crate) mod machine;
pub(crate) mod memory;
mod meter;
mod nics;
mod panic_watch;
mod plugging;
pub(crate) mod resident;
mod restored;
pub mod saved;
mod service;
mod steps;
mod summary;
pub mod terminal;
pub(crate) mod watch;

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ::isolation::attach::Isolator;
use anyhow::{Context, ensure};
use devices::clock::monotonic_ns;
use devices::serial::SerialBackend;
use isolation::Isolation;
use kept_console::KeptConsole;
use panic_watch::GuestPanic;
use recovery::guest::LiveGuest;
use recovery::supervisor::Supervisor;
use restored::Saved;
use vmm::memory::{MemorySource, Userfault};
use vmm::{ExitReason, OnGuestReset, Payload, Vm, VmConfig};

use crate::ending::Ending;
use crate::long_work::LongWork;
use crate::options::{DiskSpec, MacAddress, MemorySize, NicSpec, SerialSpec, VmName};
use crate::runtime_dir::{RuntimeRoot, VmDir};
use crate::sandbox::{Entered, Group, GroupOptions, Jail, MachineSandbox, Namespaces};
use crate::signals::Signals;
use steps::Steps;

pub use saved::Restored;

/// Most vCPUs a VM can have.
pub const MAX_VCPUS: u8 = vmm::MAX_VCPUS;

/// How long those who wait for an answer may hold up the end.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Most NICs a VM can have.
pub const MAX_NICS: usize = 8;

/// What to run.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The VM's name.
    pub name: VmName,
    /// bzImage or ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line in place of the default one.
    pub cmdline: Option<String>,
    /// More for the kernel command line.
    pub append: Vec<String>,
    /// Disks, in this order.
    pub disks: Vec<DiskSpec>,
    /// NICs, in this order.
    pub nets: Vec<NetConfig>,
    /// It has a PS/2 mouse.
    pub mouse: bool,
    /// Guest memory.
    pub memory: MemorySize,
    /// It is in large pages that the host has set aside.
    pub large_pages: bool,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Where the serial console goes.
    pub serial: SerialSpec,
    /// End when the guest reboots.
    pub no_reboot: bool,
    /// What it goes on from instead of booting.
    pub restored: Option<Restored>,
    /// What its process gives up.
    pub sandbox: MachineSandbox,
    /// Its process is in a jail.
    pub jail: bool,
    /// The control group of its process.
    pub group: GroupOptions,
}

/// A NIC.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// What it is.
    pub nic: NicSpec,
    /// Its address; `None` for one that has its own.
    pub mac: Option<MacAddress>,
    /// It was saved on a wire of another kind.
    pub is_another_wire: bool,
    /// Of a guest that goes on from a snapshot: the model of its device host's NIC that was saved.
    pub saved_model: Option<String>,
}

impl RunConfig {
    /// The kernel command line.
    fn command_line(&self) -> String {
        let mut words = vec![self.cmdline.as_deref().unwrap_or(vmm::DEFAULT_COMMAND_LINE)];
        words.extend(self.append.iter().map(String::as_str));
        words.retain(|word| !word.is_empty());
        words.join(" ")
    }

    /// Whether it has a function of the host for itself.
    fn has_passthrough(&self) -> bool {
        let of_the_host = |net: &NetConfig| matches!(net.nic, NicSpec::Passthrough(_));
        self.nets.iter().any(of_the_host)
    }

    /// Puts this process into the namespaces of its jail, if it is to be in one. There is no other
    /// thread.
    fn begin_jail(&self) -> anyhow::Result<Option<Namespaces>> {
        if !self.jail {
            return Ok(None);
        }
        ensure!(
            !self.has_passthrough(),
            "a function of the host takes rights that a jail has not: leave --jail away, or --nic vfio=..."
        );
        self.sandbox.begin_jail(&self.sockets()).map(Some)
    }

    /// By what a guest that goes on lazily has its pages brought when it is isolated. Without it,
    /// as where this is nobody with the right to it, all of them are copied then.
    fn userfault(&self) -> Option<Arc<Userfault>> {
        self.restored.as_ref().filter(|from| from.lazy)?;
        let opened = Userfault::open();
        let told = |error| tracing::debug!("memory is copied when something is isolated: {error}");
        opened.map_err(told).ok().map(Arc::new)
    }

    /// What there is of the runtime folder in a jail: its own folder, and those of device hosts if
    /// it has a NIC of one.
    fn folders_of_jail(&self, own: &Path) -> Vec<PathBuf> {
        let is_shared = |net: &NetConfig| matches!(net.nic, NicSpec::Device(_));
        let hosts = RuntimeRoot::from_environment().devices();
        let hosts = self
            .nets
            .iter()
            .any(is_shared)
            .then(|| hosts.path().to_owned());
        hosts.into_iter().chain([own.to_owned()]).collect()
    }

    /// Sockets that the process makes, besides those in its folder.
    fn sockets(&self) -> Vec<PathBuf> {
        let console = match &self.serial {
            SerialSpec::Unix(path) => Some(path.clone()),
            SerialSpec::Stdio | SerialSpec::File(_) | SerialSpec::Control => None,
        };
        let wires = self.nets.iter().filter_map(|net| match &net.nic {
            NicSpec::Model { wire, .. } => wire.own_socket().cloned(),
            NicSpec::Device(_) | NicSpec::Passthrough(_) => None,
        });
        wires.chain(console).collect()
    }
}

/// Runs a VM to its end.
pub fn run(config: RunConfig) -> anyhow::Result<Ending> {
    let started_ns = monotonic_ns();
    // In a jail it cannot be had any more.
    let userfault = config.userfault();
    // From here on a signal finds what it has to clear away.
    let signals = Signals::block().context("cannot block signals")?;
    // Before there is anything under the name, such as a control group.
    let dir = RuntimeRoot::from_environment().claim(&config.name)?;
    // By the rights that it has outside of the jail.
    let memory = config.memory.bytes();
    let group = config
        .group
        .enter(&config.name, config.jail, memory, config.vcpus)?;
    let jail = config.begin_jail()?;
    config.sandbox.begin();
    memory::make_buffers_lazy();
    let watch = watch::Watch::start(signals)?;
    let result = boot(&config, dir, (jail, &group, userfault), started_ns, &watch);
    // Whatever came of it: a signal that asked for the end has the last word.
    if let Some(signal) = watch.finish() {
        if let Err(error) = result {
            eprintln!("cofferdam: {}", crate::error_text::one_line(&error));
        }
        return Ok(Ending::Signal(signal));
    }
    match result? {
        ExitReason::GuestPowerOff | ExitReason::HostPowerOff => Ok(Ending::SUCCESS),
        ExitReason::GuestReset => {
            tracing::info!("the guest rebooted, which ends it with --no-reboot");
            Ok(Ending::Status(ExitCode::SUCCESS))
        }
    }
}

fn no_fifos(config: &RunConfig) -> anyhow::Result<()> {
    no_fifo("kernel", &config.kernel)?;
    config
        .initrd
        .as_ref()
        .map_or(Ok(()), |initrd| no_fifo("initrd", initrd))
}

/// A FIFO can be a file's name as well, and who opens one waits until somebody writes to it.
fn no_fifo(what: &str, path: &Path) -> anyhow::Result<()> {
    let is_fifo = path
        .metadata()
        .is_ok_and(|metadata| metadata.file_type().is_fifo());
    ensure!(!is_fifo, "{what} {} is a FIFO: give a file", path.display());
    Ok(())
}

/// Makes the VM, runs it and takes it down.
fn boot(
    config: &RunConfig,
    dir: VmDir,
    (jail, group, userfault): (Option<Namespaces>, &Group, Option<Arc<Userfault>>),
    started_ns: u64,
    watch: &watch::Watch,
) -> anyhow::Result<ExitReason> {
    let mut steps = Steps::since(started_ns);
    let paths = dir.paths().clone();
    let belongings = watch.belongings();
    belongings.add_dir(dir);
    no_fifos(config)?;
    steps.done("signals and the runtime folder are there");
    let saved = open_saved(config, userfault, belongings)?;
    steps.done("the snapshot is open");
    let console::Opened {
        backend,
        input,
        typed,
    } = console::open(&config.serial, belongings)?;
    let panic = GuestPanic::default();
    let console = KeptConsole::new(typed);
    let observer = console.observer(panic.observer());
    let backend = SerialBackend::Observed(Box::new(backend), observer);
    let mut vm = make(config, saved.as_ref(), backend)?;
    steps.done("the machine is made");
    if let Some(saved) = &saved {
        saved.fetch_ahead(&vm)?;
    }
    if config.mouse {
        vm.add_mouse();
    }
    let mut add = || machine::add_devices(&mut vm, config, &paths.agent_socket(), belongings);
    let nics = match config.has_passthrough() {
        // All of guest memory is allocated by that, and stays where it is.
        true => memory::with_huge_pages(add),
        false => add(),
    }?;
    vm.handle()
        .set_outside(Arc::new(elsewhere::Elsewhere(nics.clone())));
    steps.done("its devices are made");
    if let Some(saved) = &saved {
        put_into(&mut vm, saved, &nics, watch)?;
        steps.done("it has the snapshot's state");
    }
    let writes_disks = config.disks.iter().any(|disk| !disk.read_only);
    let supervisor = start_recovery(&vm, &nics, paths.agent_socket(), writes_disks, &panic)?;
    let in_line = saved.as_ref().map(|_| restored::get_in_line(&supervisor));
    let in_line = in_line.transpose()?;
    let plugging = plugging::Plugging::new(
        config.name.clone(),
        vm.handle(),
        nics.clone(),
        belongings.clone(),
    );
    let told = service::Told {
        panic,
        console: console.clone(),
        started_ns,
    };
    let service = service::VmService::new(config, plugging, supervisor.clone(), told)?;
    steps.done("recovery and the service are made");
    // Everything is open; nobody has been answered yet, and the guest does not run.
    let sandbox = wall_off(config, (jail, group), &paths.dir, belongings)?;
    vm.on_vcpu_start(move || sandbox.enter_vcpu());
    steps.done("the sandbox is entered");
    if let Some((saved, agent)) = saved.as_ref().zip(in_line) {
        // Its threads are behind the walls from their beginning.
        saved.tell_guest(&vm, &nics, &supervisor, agent)?;
    }
    let control = crate::control::server::serve(&paths.control_socket(), Arc::new(service))?;
    if !watch.attach(vm.handle()) {
        // Asked to end before it began.
        return Ok(ExitReason::HostPowerOff);
    }
    if let Some(input) = input {
        input.start(vm.handle(), belongings)?;
    }
    is_ready(config, saved.is_some(), &mut steps);
    let ended = vm.run();
    // Its last faults may be why it has ended.
    supervisor.guest().settle_reports();
    console.end();
    control.wait_for_answers(ANSWER_TIME);
    Ok(ended?)
}

/// The guest is about to begin, or to go on.
fn is_ready(config: &RunConfig, goes_on: bool, steps: &mut Steps) {
    match goes_on {
        true => memory::let_guest_have_huge_pages(),
        false => memory::give_back_unused(),
    }
    steps.done("it is ready to run");
    let begins = match goes_on {
        true => "the guest goes on",
        false => "the guest starts",
    };
    tracing::info!(name = %config.name, "{begins}");
}

/// Puts this process, whose folder is `dir`, behind its walls.
fn wall_off(
    config: &RunConfig,
    (jail, group): (Option<Namespaces>, &Group),
    dir: &Path,
    belongings: &watch::Belongings,
) -> anyhow::Result<Entered> {
    let jail = jail.map(|namespaces| Jail {
        namespaces,
        folders: config.folders_of_jail(dir),
    });
    let entered = config.sandbox.enter(config.sockets(), jail.as_ref())?;
    group.tell();
    if jail.is_some() {
        belongings.dir_stays();
    }
    Ok(entered)
}

/// Gives the VM, which has its devices, the saved state, unless it is asked to end before.
fn put_into(
    vm: &mut Vm,
    saved: &Saved,
    nics: &nics::Nics,
    watch: &watch::Watch,
) -> anyhow::Result<()> {
    let mut word = LongWork::begin();
    let mut tell = |what: &str| {
        word.tell(what);
        !watch.is_asked()
    };
    saved.put_into(vm, nics, &mut tell)
}

/// Opens the snapshot that it goes on from, if it does.
fn open_saved(
    config: &RunConfig,
    userfault: Option<Arc<Userfault>>,
    belongings: &Arc<watch::Belongings>,
) -> anyhow::Result<Option<Saved>> {
    let Some(from) = &config.restored else {
        return Ok(None);
    };
    if from.lazy {
        let belongings = belongings.clone();
        vmm::memory::when_memory_is_lost(move || belongings.clear());
    }
    Saved::open(from, userfault).map(Some)
}

/// Makes isolation and recovery ready for the machine, and has them follow its resets.
fn start_recovery(
    vm: &Vm,
    nics: &nics::Nics,
    agent_socket: PathBuf,
    writes_disks: bool,
    panic: &GuestPanic,
) -> anyhow::Result<Arc<Supervisor<Isolation>>> {
    let isolator = Isolator::attach(vm.handle())?;
    let (forgetful, drivers) = (isolator.clone(), nics.clone());
    vm.handle().on_reset(move || {
        forgetful.forget();
        drivers.forget();
    });
    let guest = Isolation::new(
        vm.handle(),
        isolator,
        agent_socket,
        nics.clone(),
        writes_disks,
    );
    let supervisor = Supervisor::start(guest).context("cannot start the thread of recovery")?;
    vm.handle().add_participant(supervisor.clone());
    vm.handle().add_participant(Arc::new(panic.clone()));
    let weak = Arc::downgrade(&supervisor);
    let forgotten = panic.clone();
    vm.handle().on_reset(move || {
        forgotten.forget();
        if let Some(supervisor) = weak.upgrade() {
            supervisor.guest_was_reset();
        }
    });
    Ok(supervisor)
}

/// The machine, without devices on PCI.
fn make(config: &RunConfig, saved: Option<&Saved>, console: SerialBackend) -> anyhow::Result<Vm> {
    let memory = match saved {
        Some(saved) => saved.memory()?,
        None if config.large_pages => MemorySource::LargePages,
        None => MemorySource::Fresh,
    };
    Ok(Vm::new(VmConfig {
        memory_bytes: config.memory.bytes(),
        memory,
        vcpus: config.vcpus,
        payload: Payload::Linux {
            kernel: config.kernel.clone(),
            initrd: config.initrd.clone(),
            cmdline: config.command_line(),
        },
        console,
        on_guest_reset: if config.no_reboot {
            OnGuestReset::Exit
        } else {
            OnGuestReset::Restart
        },
    })?)
}
