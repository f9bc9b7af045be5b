//! What a new user does first, on the kernel that Debian ships (compressed, with address
//! randomisation) and with 2.5 GiB of memory: all functions of a module isolated, the commands of
//! the README as they stand there, all functions of two stock modules at once.

use std::os::unix::fs::symlink;
use std::path::Path;

use agent_protocol::traffic::TrafficKind;
use cofferdam::bench::guest::{Guest, GuestOptions};
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::bench::traffic;
use isolation::status::ModuleStatus;

use super::isolation::{ask, begins_anew};
use super::{assert_log_is_healthy, boot, options, ping, shell};

/// Memory of its own that a VM may have resident with all functions of `e1000` isolated, in KiB.
const RESIDENT_AT_MOST: u64 = 8 << 10;
/// Where a kernel that is not randomised begins.
const DEFAULT_TEXT: &str = "ffffffff81000000";

/// The commands of the README that are for a guest that runs, in its order, for the guest of these
/// tests.
fn commands(images: &Path) -> Vec<String> {
    let readme = include_str!("../../../README.md");
    let modules = images.join("modules");
    let of_the_guest = readme.lines().filter_map(|line| {
        let (command, _) = line.split_once('#').unwrap_or((line, ""));
        let words: Vec<&str> = command
            .strip_prefix("cofferdam ")?
            .split_whitespace()
            .collect();
        let (verb, rest) = words.split_first()?;
        let (&"web", rest) = rest.split_first()? else {
            return None;
        };
        Some(format!("{verb} guest {}", rest.join(" ")))
    });
    of_the_guest
        .map(|line| line.replace("target/images/modules", modules.to_str().unwrap()))
        .collect()
}

/// What is isolated.
fn modules(guest: &Guest) -> Vec<ModuleStatus> {
    guest.control().unwrap().status().unwrap().isolation
}

/// No call of any was taken back; prints how long the first call of each took, and how long the
/// others did.
#[track_caller]
fn assert_nothing_failed(guest: &Guest, names: &[&str]) {
    let modules = modules(guest);
    let isolated: Vec<&str> = modules
        .iter()
        .map(|module| module.module.as_str())
        .collect();
    assert_eq!(isolated, names);
    for module in &modules {
        assert_eq!((module.violations, &module.broken), (0, &None));
        let called = module.entries.iter().filter(|entry| entry.calls > 0);
        for entry in called.clone() {
            assert_eq!((entry.aborts, entry.refused), (0, 0), "{entry:?}");
            let others = (entry.total_ns - entry.first_ns) / (entry.calls - 1).max(1);
            println!(
                "{:32} {:6} calls, the first {:8} us, the others {:8} us",
                entry.name,
                entry.calls,
                entry.first_ns / 1000,
                others / 1000
            );
        }
        assert!(
            called.map(|entry| entry.commits).sum::<u64>() > 0,
            "{module:?}"
        );
    }
}

/// Resident memory of the VM's process that is not the guest's, in KiB.
fn resident(guest: &Guest) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let words = line.unwrap_or_else(|| panic!("no {name} in {status}"));
        words
            .split_whitespace()
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    // The guest's memory is shared (`RssShmem`).
    let (own, files) = (field("RssAnon:"), field("RssFile:"));
    println!("resident: {own} KiB of its own, {files} KiB of files");
    own
}

fn isolate_all(guest: &mut Guest, module: &str) {
    print!(
        "{}",
        ask(guest, &format!("isolate guest {module} --entries all"))
    );
}

/// Whether the kernel is where it would be without randomisation.
fn is_at_default(guest: &mut Guest) -> bool {
    let text = shell(guest, "grep ' _text$' /proc/kallsyms");
    text.starts_with(DEFAULT_TEXT)
}

/// All functions of `e1000` and `dummy` isolated, with traffic through both at once, and the
/// largest calls that there are.
#[track_caller]
fn two_modules_at_once(guest: &mut Guest) {
    isolate_all(guest, "e1000");
    guest.agent().load_module("dummy", "numdummies=1").unwrap();
    isolate_all(guest, "dummy");
    let at_once = "ip link set dummy0 up; ip addr add 10.9.0.1/24 dev dummy0; \
        ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev dummy0; \
        ping -c 20 -i 0.1 -W 1 10.9.0.2 > /dev/null & ping -c 20 -i 0.1 -W 5 10.0.2.2; wait; \
        cat /sys/class/net/dummy0/statistics/tx_packets";
    let said = shell(guest, at_once);
    assert!(said.contains(" 0% packet loss"), "{said}");
    let sent: u64 = said.lines().last().unwrap().trim().parse().unwrap();
    assert!(sent >= 20, "{said}");
    let stream = traffic::send(
        guest,
        TrafficKind::TcpEcho,
        std::time::Duration::from_secs(3),
    );
    let stream = stream.unwrap();
    assert_eq!((stream.corrupted, &stream.error), (0, &None), "{stream:?}");
    // The largest rings there are, and all of their buffers anew.
    shell(
        guest,
        "ethtool -G eth0 rx 4096 tx 4096; ip link set eth0 mtu 9000",
    );
    network::wait_for_link(guest, LINK_TIME).unwrap();
    ping(guest, "10.0.2.2", 1400);
    assert_nothing_failed(guest, &["dummy", "e1000"]);
    let own = resident(guest);
    assert!(
        own <= 2 * RESIDENT_AT_MOST,
        "{own} KiB after the largest calls"
    );
    assert_log_is_healthy(guest, &["Reset adapter"]);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_commands_of_the_readme_and_two_whole_modules_with_the_defaults() {
    let options = options();
    let images = options.images.canonicalize().unwrap();
    let kernel = std::fs::read(images.join("vmlinuz")).unwrap();
    assert_eq!(&kernel[0x202..0x206], b"HdrS");
    let folder = tempfile::tempdir().unwrap();
    for (name, image) in [("vmlinux", "vmlinuz"), ("initrd.cpio", "initrd.cpio")] {
        symlink(images.join(image), folder.path().join(name)).unwrap();
    }
    let mut options = GuestOptions {
        images: folder.path().to_path_buf(),
        ..options
    };
    options = options.with("--memory 2560M --net user --append");
    options.arguments.push("cofferdam.net=e1000,dhcp".into());
    let mut guest = boot(&options);
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    println!("without anything isolated");
    resident(&guest);
    isolate_all(&mut guest, "e1000");
    ping(&mut guest, "10.0.2.2", 1400);
    assert_nothing_failed(&guest, &["e1000"]);
    let own = resident(&guest);
    assert!(own <= RESIDENT_AT_MOST, "{own} KiB");
    ask(&mut guest, "release guest e1000");

    let commands = commands(&images);
    assert!(commands.len() > 12, "{commands:?}");
    for line in &commands {
        println!("cofferdam {line}");
        print!("{}", ask(&mut guest, line));
    }
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    ping(&mut guest, "10.0.2.2", 1400);
    // Its copies of what the guest wrote since would be counted below.
    ask(&mut guest, "marks guest --forget mark");

    two_modules_at_once(&mut guest);

    let first = is_at_default(&mut guest);
    begins_anew(&mut guest, |guest| {
        ask(guest, "reset guest");
    });
    // One boot in some five hundred has the kernel where it would be without.
    assert!(!(first && is_at_default(&mut guest)));
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    isolate_all(&mut guest, "e1000");
    ping(&mut guest, "10.0.2.2", 1400);
    assert_nothing_failed(&guest, &["e1000"]);
}
