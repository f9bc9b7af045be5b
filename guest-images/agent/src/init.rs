//! The guest's process 1.
//!
//! ```text
//!  first line on the console ─► /proc /sys /dev ─► modules ─► mounts ─► network ─► server, shell
//!                                                                              │
//!                       shell ended, or a signal that asks for it ◄── wait ◄───┘
//!                                       │
//!                                  sync, power off
//! ```
//!
//! It starts no threads and waits for every process that is left to it. The server is a child:
//! should it die, it is started again and the guest lives on. What fails is said on the console,
//! and the boot goes on: a guest without its network is easier to look into than one that has
//! stopped.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_protocol::INIT_LINE;
use agent_protocol::init_config::{self, BootModule, InitConfig, Mount};
use agent_protocol::message::AgentError;
use rustix::mount::{MountFlags, mount, mount_bind_recursive, mount_remount};
use rustix::process::{Pid, WaitOptions};
use rustix::system::RebootCommand;

use crate::cmdline::{self, Exit, Network};
use crate::fail::{Context, Result, error};
use crate::net::Watch;
use crate::{hypervisor, modules, net, sys};

/// Begins every line on the console.
const CONSOLE_TAG: &str = "cofferdam-init:";

/// How long to wait for an interface after its driver was loaded.
const INTERFACE_LIMIT: Duration = Duration::from_secs(10);

/// No machine that this runs on has more.
const MOST_PROCESSORS: usize = 256;

/// So many times is a server started that dies.
const SERVER_STARTS: u32 = 100;

/// Runs as process 1; never returns.
pub fn run() -> ! {
    let uptime = sys::stamp().mono_ns;
    let (seconds, us) = (uptime / 1_000_000_000, uptime / 1000 % 1_000_000);
    write_console(&format!("{INIT_LINE} {seconds}.{us:06}\n"));
    sys::block_init_signals();
    mount_kernel_file_systems();
    let options = cmdline::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    if let Some(exit) = options.exit {
        complain(Err::<(), _>(end_machine(exit)));
    }
    for word in &options.unknown {
        say(&format!("{word} is not understood"));
    }
    let config = read_config();
    for module in &config.modules {
        load_boot_module(module);
    }
    for name in &options.modules {
        complain(modules::ensure(name, ""));
    }
    if config.keep_machines {
        complain(alone(hypervisor::keep_machines));
    }
    for entry in &config.mounts {
        complain(
            mount_entry(entry).or_else(|failed| if entry.optional { Ok(()) } else { Err(failed) }),
        );
    }
    complain(net::set_link("lo", true));
    let mut dhcp = Vec::new();
    for network in &options.networks {
        match set_up_network(network) {
            Ok(Some(interface)) => dhcp.push(interface),
            other => complain(other),
        }
    }
    for interface in dhcp {
        complain(start_dhcp(&interface).map(drop));
    }
    let shell = options.shell.unwrap_or(config.shell) && Path::new(SHELL).exists();
    supervise(config.serve, shell)
}

fn supervise(serve: bool, shell: bool) -> ! {
    let mut starts = 0;
    let mut start_server = || {
        starts += 1;
        if !serve || starts > SERVER_STARTS {
            return None;
        }
        keep(
            program("/init", &["serve"])
                .spawn()
                .context(|| "start the server".into()),
        )
    };
    let mut server = start_server();
    let shell = if shell { keep(start_shell()) } else { None };
    loop {
        match sys::wait_signal() {
            Ok(libc::SIGUSR1 | libc::SIGUSR2) => {
                complain(Err::<(), _>(end_machine(Exit::PowerOff)))
            }
            Ok(libc::SIGTERM | libc::SIGINT) => complain(Err::<(), _>(end_machine(Exit::Reboot))),
            _ => {}
        }
        while let Some(pid) = reap() {
            if is(&shell, pid) {
                complain(Err::<(), _>(end_machine(Exit::PowerOff)));
            }
            if is(&server, pid) {
                // Not in a circle as fast as the machine can.
                std::thread::sleep(Duration::from_millis(200));
                server = start_server();
            }
        }
    }
}

fn keep(started: Result<Child>) -> Option<Child> {
    started.map_err(|failed| say(&failed.message)).ok()
}

fn is(child: &Option<Child>, pid: Pid) -> bool {
    child
        .as_ref()
        .is_some_and(|c| i64::from(c.id()) == i64::from(pid.as_raw_nonzero().get()))
}

/// Takes one process that has ended.
fn reap() -> Option<Pid> {
    rustix::process::wait(WaitOptions::NOHANG)
        .ok()
        .flatten()
        .map(|(pid, _)| pid)
}

/// Writes what is unwritten and ends the machine. Returns only when the kernel refuses.
pub fn end_machine(how: Exit) -> AgentError {
    rustix::fs::sync();
    let command = match how {
        Exit::PowerOff => RebootCommand::PowerOff,
        Exit::Reboot => RebootCommand::Restart,
    };
    match rustix::system::reboot(command).context(|| format!("{how:?}")) {
        Err(refused) => refused,
        Ok(()) => error(format!("{how:?} was accepted but did not happen")),
    }
}

/// One line on the console.
fn say(text: &str) {
    write_console(&format!("{CONSOLE_TAG} {text}\n"));
}

fn write_console(line: &str) {
    // No console, no line: there is nobody else to tell.
    let _unheard = std::io::stdout().write_all(line.as_bytes());
}

fn complain<T>(result: Result<T>) {
    if let Err(failed) = result {
        say(&failed.message);
    }
}

fn mount_kernel_file_systems() {
    for (fstype, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        complain(mount(fstype, target, fstype, flags, None).context(|| format!("mount {target}")));
    }
}

fn read_config() -> InitConfig {
    let path = init_config::PATH;
    let Ok(text) = fs::read(path) else {
        return InitConfig::default();
    };
    serde_json::from_slice(&text).unwrap_or_else(|failed| {
        say(&format!("{path}: {failed}"));
        InitConfig::default()
    })
}

/// Does `what` while all processors but the first are off.
fn alone(what: fn() -> Result<()>) -> Result<()> {
    let mut others = Vec::new();
    for number in 1..MOST_PROCESSORS {
        let switch = format!("/sys/devices/system/cpu/cpu{number}/online");
        if !Path::new(&switch).exists() {
            break;
        }
        fs::write(&switch, "0").context(|| format!("switch processor {number} off"))?;
        others.push(switch);
    }
    let done = what();
    for switch in others {
        fs::write(&switch, "1").context(|| format!("write {switch}"))?;
    }
    done
}

fn load_boot_module(module: &BootModule) {
    let loaded = modules::ensure(&module.name, &module.params);
    if !module.optional {
        complain(loaded);
    }
}

fn mount_entry(entry: &Mount) -> Result<()> {
    let what = || format!("mount {} on {}", entry.source, entry.target);
    // On a read-only file system the directory must be there already; then this fails and mount
    // tells.
    let _there = fs::create_dir_all(&entry.target);
    if entry.fstype == "bind" {
        mount_bind_recursive(entry.source.as_str(), entry.target.as_str()).context(what)?;
        if entry.read_only {
            let flags = MountFlags::BIND | MountFlags::RDONLY;
            mount_remount(entry.target.as_str(), flags, "").context(what)?;
        }
        return Ok(());
    }
    let flags = if entry.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let options = std::ffi::CString::new(entry.options.as_str())
        .map_err(|_| error("mount options with a zero byte"))?;
    mount(
        entry.source.as_str(),
        entry.target.as_str(),
        entry.fstype.as_str(),
        flags,
        options.as_c_str(),
    )
    .context(what)
}

/// Loads the driver and sets a fixed address. Gives the interface when its address is to come by
/// DHCP.
fn set_up_network(network: &Network) -> Result<Option<String>> {
    let watch = Watch::new()?;
    let before = net::names();
    modules::ensure(&network.module, "")?;
    let interface = match net::names().difference(&before).next() {
        Some(interface) => interface.clone(),
        // The driver was loaded before, or is slow.
        None => {
            watch.present("eth0", INTERFACE_LIMIT)?;
            "eth0".into()
        }
    };
    let Some(address) = network.address else {
        net::set_link(&interface, true)?;
        return Ok(Some(interface));
    };
    net::set_address(&interface, address)?;
    net::set_link(&interface, true)?;
    network.gateway.map_or(Ok(()), net::set_gateway)?;
    Ok(None)
}

const SHELL: &str = "/bin/sh";

/// A child of process 1, with the environment and the signals that it should have.
fn program(path: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
        .env("HOME", "/root");
    sys::start_with_signals_free(&mut command);
    command
}

fn start_dhcp(interface: &str) -> Result<Child> {
    let mut command = program(
        "/bin/udhcpc",
        &["-f", "-i", interface, "-s", "/etc/udhcpc.script"],
    );
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
        .spawn()
        .context(|| format!("start udhcpc for {interface}"))
}

/// A shell that has the console for its terminal, so that Ctrl-C works.
fn start_shell() -> Result<Child> {
    // The last console is the one that /dev/console is; /dev/console itself cannot be a session's
    // terminal.
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let device = Path::new("/dev").join(active.split_whitespace().next_back().unwrap_or("ttyS0"));
    let open = || File::options().read(true).write(true).open(&device);
    let (input, output, errors) = (open(), open(), open());
    let what = || format!("open {}", device.display());
    let mut command = program("/bin/busybox", &["setsid", "-c", SHELL, "-l"]);
    command
        .stdin(input.context(what)?)
        .stdout(output.context(what)?)
        .stderr(errors.context(what)?);
    command
        .env("TERM", "vt100")
        .spawn()
        .context(|| "start the shell".into())
}
