//! The lab's e1000e is taken from whoever has it: it is removed in sysfs, while a guest has it for
//! itself and while a device host has it, and is found again.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::control::protocol::{Reply, Request};
use cofferdam::runtime_dir::ROOT_VARIABLE;
use devices::vfio::binding::Sysfs;

use super::passthrough::{FUNCTION, bring_up, transfer};
use super::{assert_log_is_healthy, boot, options, shell, wait_until};

fn folder() -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(FUNCTION)
}

/// Removes the function: the kernel waits for whoever has it.
#[track_caller]
fn remove() {
    let removes = std::thread::spawn(|| std::fs::write(folder().join("remove"), "1"));
    wait_until("the function's end", || removes.is_finished());
    removes.join().unwrap().unwrap();
    assert!(!folder().exists());
}

/// Has the host find it again, and gives it away.
#[track_caller]
fn find() {
    std::fs::write("/sys/bus/pci/rescan", "1").unwrap();
    wait_until("the function", || folder().exists());
    Sysfs::default()
        .bind(FUNCTION.parse().unwrap(), true)
        .unwrap();
}

#[track_caller]
fn plug(guest: &Guest, nic: &str) -> String {
    let request = Request::Plug {
        net: None,
        nic: Some(nic.to_owned()),
    };
    match guest.control().unwrap().ask(&request) {
        Ok(Reply::Plugged(nic)) => nic.address,
        other => panic!("{other:?}"),
    }
}

/// Its kernel is as well as before, and its other devices work: the agent answers.
#[track_caller]
fn is_well(guest: &mut Guest) {
    // What a driver says that finds its card gone is no harm.
    shell(guest, "ip link set eth0 down; ip link set eth0 up; true");
    assert_log_is_healthy(guest, &[]);
}

fn unplug(guest: &Guest, address: String) {
    let mut control = guest.control().unwrap();
    control.tell(&Request::Unplug { address }).unwrap();
}

#[track_caller]
fn from_a_guest_that_has_it_for_itself(guest: &mut Guest) {
    let nic = format!("vfio={FUNCTION}");
    let address = plug(guest, &nic);
    bring_up(guest);
    transfer(guest, 4);
    remove();
    is_well(guest);
    let said = guest.last_words();
    assert!(said.contains("took a device back"), "{said}");
    unplug(guest, address);
    // It is found again, and works.
    find();
    let address = plug(guest, &nic);
    bring_up(guest);
    transfer(guest, 4);
    unplug(guest, address);
}

#[track_caller]
fn from_a_device_host(guest: &mut Guest, root: &Path) {
    let mut host = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .env(ROOT_VARIABLE, root)
        .env_remove("RUST_LOG")
        .args(["device", "serve", NAME, "--vfio", FUNCTION])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let socket = root.join(".devices").join(NAME).join("control.sock");
    wait_until("the device host", || UnixStream::connect(&socket).is_ok());
    let address = plug(guest, &format!("device={NAME}"));
    bring_up(guest);
    transfer(guest, 1);
    remove();
    wait_until("the device host's end", || {
        host.try_wait().unwrap().is_some()
    });
    let mut said = String::new();
    let mut stderr = host.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(host.wait().unwrap().code(), Some(1), "{said}");
    let errors = said.lines().filter(|line| line.starts_with("cofferdam: "));
    let errors: Vec<_> = errors.collect();
    assert_eq!(errors.len(), 1, "{said}");
    let line = format!("took {FUNCTION} back");
    assert!(errors[0].contains(&line), "{said}");
    is_well(guest);
    // It is there again: the guest has its NIC again, as after a host that was killed.
    find();
    let words = ["--vfio", FUNCTION];
    let served = DeviceHost::start(&options().program, root, &words).unwrap();
    wait_until("the guest's NIC", || {
        let contexts = served.status().unwrap().contexts;
        contexts.iter().any(|context| context.connected)
    });
    shell(guest, "rmmod e1000e");
    bring_up(guest);
    transfer(guest, 1);
    assert_log_is_healthy(guest, &[]);
    unplug(guest, address);
}

mod long {
    use super::*;

    #[test]
    #[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
    fn a_function_that_the_host_takes_back_is_given_back_and_nobody_is_harmed() {
        let sysfs = Sysfs::default();
        sysfs.bind(FUNCTION.parse().unwrap(), true).unwrap();
        let runtime = tempfile::tempdir().unwrap();
        let root = runtime.path();
        let mut guest = boot(&options().among(root, "left").with("--memory 256M"));
        from_a_guest_that_has_it_for_itself(&mut guest);
        from_a_device_host(&mut guest, root);
        drop(guest);
        sysfs.unbind(FUNCTION.parse().unwrap(), false).unwrap();
    }
}
