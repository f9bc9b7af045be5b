//! Kernels: each boots without a warning, drives its NIC with its stock driver and carries a
//! stream.

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_protocol::traffic::TrafficKind;
use cofferdam::bench::guest::{Guest, GuestOptions};
use cofferdam::bench::network::LINK_TIME;
use cofferdam::bench::{network, traffic};

use super::isolation::ask;
use super::{boot, options, ping, shell};

/// Lines of a kernel log that are no fault of the machine: how they begin, and what they are about.
const KNOWN: [(&str, &str); 8] = [
    // Weaknesses of the host's processor that its microcode does not mend.
    (
        "Speculative Return Stack Overflow: ",
        "the host's processor",
    ),
    // A TSC that the host's KVM does not vouch for: a nested or emulated host.
    (
        "Unstable clock detected, switching default tracing clock",
        "the host's clock",
    ),
    (
        "If you want to keep using the local clock, then add:",
        "the host's clock",
    ),
    ("\"trace_clock=local\"", "the host's clock"),
    ("on the kernel command line", "the host's clock"),
    // A vCPU that got no processor for a while.
    ("hrtimer: interrupt took", "a busy host"),
    ("clocksource: Long readout interval", "a busy host"),
    // Since Linux 6.12 on every AMD processor whose frequency is not the kernel's to choose.
    (
        "amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled",
        "frequencies, which are the host's",
    ),
];

/// Lines of `dmesg -r` with the level of a warning (4) or worse, but for those that are known.
fn warnings(log: &str) -> Vec<&str> {
    let is_serious = |line: &&str| {
        line.strip_prefix('<')
            .and_then(|rest| rest.split_once('>'))
            .and_then(|(level, _)| level.parse::<u32>().ok())
            .is_some_and(|level| level & 7 <= 4)
    };
    let text = |line: &str| {
        line.split_once("] ")
            .map_or_else(|| line.to_owned(), |(_, text)| text.trim().to_owned())
    };
    log.lines()
        .filter(is_serious)
        .filter(|line| !KNOWN.iter().any(|(known, _)| text(line).starts_with(known)))
        .collect()
}

/// Boots a guest of the kernel in `images`, from the file `kernel` there, and has it carry a
/// checked stream through a NIC that its driver set up by DHCP: e1000 where the kernel has it.
fn works(images: &Path, kernel: &'static str) -> Guest {
    let has_e1000 = images.join("modules/e1000.ko").exists();
    let (nic, driver) = match has_e1000 {
        true => ("e1000", "e1000"),
        false => ("virtio", "virtio_net"),
    };
    let folder = tempfile::tempdir().unwrap();
    for (name, image) in [("vmlinux", kernel), ("initrd.cpio", "initrd.cpio")] {
        let image = images.join(image).canonicalize().unwrap_or_else(|error| {
            panic!(
                "{}/{image}: {error}: cargo xtask images --kernel",
                images.display()
            )
        });
        std::os::unix::fs::symlink(image, folder.path().join(name)).unwrap();
    }
    let options = GuestOptions {
        images: folder.path().to_path_buf(),
        ..options()
    };
    let append = format!("cofferdam.net={driver},dhcp");
    let mut options = options.with(&format!("--vcpus 2 --net user --nic {nic}"));
    options.arguments.extend(["--append".into(), append]);
    let mut guest = boot(&options);
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    let leased =
        "for i in $(seq 120); do ip -4 route | grep -q default && exit; sleep 0.5; done; exit 1";
    shell(&mut guest, leased);
    ping(&mut guest, "10.0.2.2", 1400);
    stream(&mut guest);
    let driver = shell(&mut guest, "readlink /sys/class/net/eth0/device/driver");
    let driver = driver.trim().rsplit('/').next();
    assert_eq!(driver, Some(if has_e1000 { "e1000" } else { "virtio_net" }));
    let log = shell(&mut guest, "dmesg -r");
    assert!(log.lines().count() > 100, "{log}");
    let warnings = warnings(&log);
    assert!(warnings.is_empty(), "{warnings:#?}");
    guest
}

#[track_caller]
fn stream(guest: &mut Guest) {
    let stream = traffic::send(guest, TrafficKind::TcpEcho, Duration::from_secs(3)).unwrap();
    assert_eq!((stream.corrupted, &stream.error), (0, &None), "{stream:?}");
    assert!(stream.bytes_from_peer > 0, "{stream:?}");
}

/// Where the images of a kernel that is not the chosen one are.
fn images_of(kernel: &str) -> PathBuf {
    let kernels = std::env::var_os("COFFERDAM_KERNELS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/images"),
        PathBuf::from,
    );
    kernels.join(kernel)
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn linux_6_12_boots_without_a_warning_and_its_e1000_survives_faults() {
    let mut guest = works(&images_of("6.12-amd64"), "vmlinux");
    let entries = ["e1000_clean", "e1000_xmit_frame", "e1000_intr"];
    // One that sleeps: parts of it are done in the guest, and are taken back.
    let sleeps = "e1000_set_ringparam";
    let all = entries.iter().chain([&sleeps]);
    let wanted: String = all.map(|entry| format!(" --entry {entry}")).collect();
    // A second for a call is little in a busy lab.
    let isolate = format!("isolate guest e1000{wanted} --budget-us 10000000");
    let said = ask(&mut guest, &isolate);
    assert!(said.contains("4 functions"), "{said}");
    for entry in entries {
        ask(&mut guest, &format!("inject guest e1000 {entry} --times 3"));
        ping(&mut guest, "10.0.2.2", 1400);
    }
    ask(
        &mut guest,
        &format!("inject guest e1000 {sleeps} --at last"),
    );
    if let Err(error) = guest.shell("! ethtool -G eth0 rx 128") {
        let status = ask(&mut guest, "status guest");
        let violations = ask(&mut guest, "violations guest e1000");
        panic!("{error:#}: the fault did not fail the call: {status}\n{violations}");
    }
    // Only the ring for reception is to have this size.
    assert!(!shell(&mut guest, "ethtool -g eth0").contains("128"));
    let violations = ask(&mut guest, "violations guest e1000");
    assert!(violations.contains(sleeps), "{violations}");
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    ping(&mut guest, "10.0.2.2", 1400);
    shell(&mut guest, "ethtool -G eth0 rx 128");
    assert!(shell(&mut guest, "ethtool -g eth0").contains("128"));
    let strength = ask(&mut guest, "status guest");
    let contained = "each store is checked against what the call may write";
    assert!(strength.contains(contained), "{strength}");
    ask(&mut guest, "release guest e1000");
    ping(&mut guest, "10.0.2.2", 1400);
    shell(
        &mut guest,
        "ip link set eth0 down; rmmod e1000; modprobe e1000",
    );
    let log = shell(&mut guest, "dmesg -r");
    let warnings = warnings(&log);
    assert!(warnings.is_empty(), "{warnings:#?}");
}

#[test]
fn lines_of_a_log_are_told_by_their_level_and_known_ones_left_out() {
    let log = "<6>[    0.1] Linux version\n<4>[    0.2] x86/fpu: odd\n<4>[    0.3] hrtimer: interrupt took 5 ns\n\
        <12>[    0.4] from user space\n<3>[    0.5] bad\n<30>[    0.6] systemd says\n";
    assert_eq!(
        warnings(log),
        [
            "<4>[    0.2] x86/fpu: odd",
            "<12>[    0.4] from user space",
            "<3>[    0.5] bad"
        ]
    );
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn the_chosen_kernel_boots_without_a_warning_and_carries_a_stream() {
        drop(works(&options().images, "vmlinux"));
    }
}
