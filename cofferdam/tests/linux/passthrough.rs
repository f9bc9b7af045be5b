//! The lab's e1000e, given to a guest by VFIO: stock `vfio-pci` and IOMMU below, the stock driver
//! above.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{INTERFACE, LINK_TIME};
use cofferdam::control::protocol::{Reply, Request};
use devices::vfio::binding::Sysfs;

use super::isolation::{ask, refused};
use super::{BOOT_TIME, assert_log_is_healthy, boot, options, ping, shell};

/// The lab's e1000e.
pub(super) const FUNCTION: &str = "0000:00:02.0";
/// The lab's IOMMU itself, which is behind none.
const WITHOUT_IOMMU: &str = "0000:00:01.0";
/// What answers on the network behind it with what it is sent.
const ECHO: &str = "10.0.2.100 7";
/// How long a driver may take to have a function.
const PROBE_TIME: Duration = Duration::from_secs(30);

fn cofferdam(words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
    command.args(words.split_whitespace());
    command
}

#[track_caller]
fn said(output: &Output, success: bool) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert_eq!(output.status.success(), success, "{text}");
    text
}

#[track_caller]
fn device(words: &str, success: bool) -> String {
    let output = cofferdam(&format!("device {words}")).output().unwrap();
    said(&output, success)
}

/// A VM that is to be refused before its guest begins; what it says.
#[track_caller]
fn refused_vm(function: &str, change: impl FnOnce(&mut Command)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let images = options().images;
    let mut command = cofferdam(&format!("run --name refused --nic vfio={function}"));
    command
        .env("COFFERDAM_RUNTIME_DIR", folder.path())
        .arg("--kernel")
        .arg(images.join("vmlinux"))
        .arg("--initrd")
        .arg(images.join("initrd.cpio"));
    change(&mut command);
    let text = said(&command.output().unwrap(), false);
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// The driver that has the function on the host.
fn driver() -> Option<String> {
    let link = format!("/sys/bus/pci/devices/{FUNCTION}/driver");
    let target = std::fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn wait_for_driver(name: &str) {
    let deadline = Instant::now() + PROBE_TIME;
    while driver().as_deref() != Some(name) {
        assert!(Instant::now() < deadline, "{:?} has it", driver());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Loads the host's own driver, which the lab leaves out. It may be there from an earlier test.
fn load_hosts_driver() {
    if Path::new("/sys/module/e1000e").exists() {
        return;
    }
    let file = File::open(options().images.join("modules/e1000e.ko")).unwrap();
    rustix::system::finit_module(&file, c"", 0).unwrap();
}

/// A process that may not lock more memory than 1 MiB.
pub(super) fn with_little_locked_memory(command: &mut Command) {
    let limit = || {
        // SAFETY: plain system calls, which a child between fork and exec may make.
        let results = unsafe {
            let limit = libc::rlimit {
                rlim_cur: 1 << 20,
                rlim_max: 1 << 20,
            };
            // CAP_IPC_LOCK (capability.h), without which the limit counts.
            [
                libc::prctl(libc::PR_CAPBSET_DROP, 14, 0, 0, 0),
                libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit),
            ]
        };
        match results {
            [0, 0] => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(limit) };
}

pub(super) fn bring_up(guest: &mut Guest) {
    let seconds = LINK_TIME.as_secs();
    let script = format!(
        "modprobe e1000e && \
         for t in $(seq 1 600); do [ -e /sys/class/net/{INTERFACE} ] && break; sleep 0.1; done; \
         ip link set {INTERFACE} up && \
         for t in $(seq 1 {seconds}); do \
           [ \"$(cat /sys/class/net/{INTERFACE}/carrier)\" = 1 ] && break; sleep 1; \
         done; \
         udhcpc -i {INTERFACE} -s /etc/udhcpc.script -n -q -t 20 -T 1 2>&1"
    );
    let lease = shell(guest, &script);
    assert!(lease.contains("10.0.2."), "{lease}");
}

/// Sends so many times 64 KiB and gets them back, unchanged.
#[track_caller]
pub(super) fn transfer(guest: &mut Guest, blocks: u32) {
    let script = format!(
        "rm -f /received; dd if=/dev/urandom of=/sent bs=64k count={blocks} 2>/dev/null; \
         nc {ECHO} < /sent > /received & sender=$!; \
         for t in $(seq 1 60); do \
           cmp -s /sent /received && break; sleep 1; \
         done; cmp -s /sent /received || cat /proc/net/tcp; \
         kill $sender 2>/dev/null; cmp /sent /received && wc -c < /received"
    );
    assert_eq!(shell(guest, &script).trim(), (blocks << 16).to_string());
}

/// KiB of this server's memory that are large pages of files in memory, as guests have.
fn large_pages() -> u64 {
    let all = std::fs::read_to_string("/proc/meminfo").unwrap();
    let mut words = all.split_whitespace();
    words.find(|word| *word == "ShmemHugePages:").unwrap();
    words.next().unwrap().parse().unwrap()
}

/// All memory of the guest, which has 256 MiB, is in large pages. Besides what it costs in the
/// IOMMU's map: the lab's e1000e sends no packet of which a buffer is in pages that are not next to
/// each other in this server's memory, however often (QEMU 7.2, `net_tx_pkt_add_raw_fragment`).
#[track_caller]
fn assert_memory_is_in_large_pages() {
    let kib = large_pages();
    assert!(kib >= 250 << 10, "{kib} KiB");
}

/// The guest's exits for memory that is a device's.
fn accesses(guest: &Guest) -> u64 {
    let exits = guest.control().unwrap().status().unwrap().exits;
    exits["mmio_read"] + exits["mmio_write"]
}

/// Functions that are not given away, or not to be; the lab's is bound then, and refused to who may
/// not lock its memory.
#[track_caller]
fn what_cannot_be_had_is_refused() {
    // Not given away, and not to be given away.
    let text = refused_vm(FUNCTION, |_| {});
    assert!(
        text.contains("e1000e") && text.contains("cofferdam device bind"),
        "{text}"
    );
    let text = refused_vm(WITHOUT_IOMMU, |_| {});
    assert!(text.contains("no IOMMU"), "{text}");
    let text = refused_vm("0000:00:1e.7", |_| {});
    assert!(text.contains("no PCI function"), "{text}");
    let bound = device(&format!("bind {FUNCTION}"), true);
    assert!(bound.contains("before to e1000e"), "{bound}");
    assert_eq!(driver().as_deref(), Some("vfio-pci"));
    let text = refused_vm(FUNCTION, with_little_locked_memory);
    assert!(
        text.contains("limit of 262144 KiB") && text.contains("it is 1024 KiB"),
        "{text}"
    );
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_has_the_hosts_e1000e_and_the_host_gets_it_back() {
    load_hosts_driver();
    if driver().as_deref() == Some("vfio-pci") {
        device(&format!("unbind {FUNCTION}"), true);
    }
    wait_for_driver("e1000e");
    what_cannot_be_had_is_refused();
    let mut guest = boot(&options().with(&format!("--nic vfio={FUNCTION} --memory 256M")));
    assert_memory_is_in_large_pages();
    bring_up(&mut guest);
    ping(&mut guest, "10.0.2.2", 1400);
    // It drives the device by itself: what is left is now and then a vector's entry. A fault that is
    // armed sees every access, also one that never strikes; then the guest has its registers again.
    let mut seen = [0; 3];
    for (round, seen) in seen.iter_mut().enumerate() {
        if round == 1 {
            let never = "disturb guest --kind load_ones --after 1000000000000";
            ask(&mut guest, never);
        }
        let before = accesses(&guest);
        let start = Instant::now();
        transfer(&mut guest, 32);
        *seen = accesses(&guest) - before;
        println!("{seen} exits for registers, {:?}", start.elapsed());
        if round == 1 {
            ask(&mut guest, "disturb guest --undo");
        }
    }
    assert!(seen[0] < 50 && seen[2] < 50 && seen[1] > 500, "{seen:?}");
    // Receiver and transmitter have vectors of their own.
    let interrupts = shell(
        &mut guest,
        &format!("grep {INTERFACE}-[rt]x /proc/interrupts"),
    );
    for line in interrupts.lines() {
        let count = line
            .split_whitespace()
            .nth(1)
            .and_then(|n| n.parse::<u64>().ok());
        assert!(line.contains("MSI") && count > Some(10), "{interrupts}");
    }
    assert_eq!(interrupts.lines().count(), 2, "{interrupts}");

    // One guest has it, and it does not give its state away.
    let text = refused_vm(FUNCTION, |_| {});
    assert!(text.contains("in use"), "{text}");
    let text = device(&format!("unbind {FUNCTION}"), false);
    assert!(text.contains("end the guest"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshot");
    refused(
        &mut guest,
        &format!("snapshot guest {}", dir.display()),
        "cannot be saved",
    );

    // A guest that begins anew has new memory.
    guest.agent().reboot().unwrap();
    guest.wait_for_agent(BOOT_TIME).unwrap();
    bring_up(&mut guest);
    assert_memory_is_in_large_pages();
    transfer(&mut guest, 32);

    // With the pin.
    guest
        .shell("rmmod e1000e && modprobe e1000e IntMode=0")
        .unwrap();
    bring_up(&mut guest);
    ping(&mut guest, "10.0.2.2", 1400);
    let interrupts = shell(&mut guest, &format!("grep {INTERFACE} /proc/interrupts"));
    assert!(interrupts.contains("IO-APIC"), "{interrupts}");

    guest.agent().power_off().unwrap();
    assert!(guest.wait_for_end(BOOT_TIME).unwrap().success());
    let text = device(&format!("unbind {FUNCTION}"), true);
    assert!(text.contains("bound to e1000e again"), "{text}");
    wait_for_driver("e1000e");
}

/// As seen of monitors in wide use: a function attached in the moment in which another guest gives
/// it up is refused as busy, the second attempt is accepted and the device never sends anything;
/// and attempts that fail use up the slots.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_function_that_one_guest_lets_go_of_works_in_the_next_one_at_once() {
    let sysfs = Sysfs::default();
    sysfs.bind(FUNCTION.parse().unwrap(), false).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let guest = |name| boot(&options().among(folder.path(), name).with("--memory 256M"));
    let mut guests = ["left", "right"].map(guest);
    let plug = |guest: &Guest| {
        let request = Request::Plug {
            net: None,
            nic: Some(format!("vfio={FUNCTION}")),
        };
        let reply = guest.control().unwrap().ask(&request);
        reply.map(|reply| match reply {
            Reply::Plugged(nic) => nic.address,
            other => panic!("{other:?}"),
        })
    };
    let mut places = Vec::new();
    for has in [0, 1, 0] {
        let address = plug(&guests[has]).unwrap();
        let error = plug(&guests[1 - has]).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error:#}");
        bring_up(&mut guests[has]);
        transfer(&mut guests[has], 4);
        let mut control = guests[has].control().unwrap();
        let unplug = Request::Unplug {
            address: address.clone(),
        };
        control.tell(&unplug).unwrap();
        places.push(address);
    }
    // Those that were refused have taken no slot.
    assert_eq!(places[0], places[2]);
    assert_eq!(places[0], places[1]);
    for guest in &mut guests {
        assert_log_is_healthy(guest, &[]);
    }
    drop(guests);
    sysfs.unbind(FUNCTION.parse().unwrap(), false).unwrap();
}
