//! Devices that go on by themselves while isolated calls of their stock drivers run: the lab's
//! e1000e and RTL8139C+, given to a guest by VFIO, and a card of a device host. They write guest
//! memory meanwhile, and are put back where a call that has reached them fails, as far as their
//! state can be taken.

use std::os::unix::fs::symlink;

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::{Guest, GuestOptions};
use devices::vfio::binding::Sysfs;
use serde_json::Value;

use super::isolation::{ask, ask_json, refused};
use super::passthrough::{FUNCTION, bring_up, transfer};
use super::{assert_log_is_healthy, boot, insert_nic, nic_works, options, shell};

/// Functions of the driver, the place of the fault, what has the guest call them, and whether the
/// call has reached its device by then.
const FAULTS: [(&str, &str, &str, bool); 5] = [
    ("e1000_xmit_frame", "middle", "true", false),
    ("e1000e_poll", "last", "true", false),
    ("e1000_intr_msix_rx", "first", "true", false),
    (
        "e1000_get_ethtool_stats",
        "last",
        "ethtool -S eth0 >/dev/null; true",
        true,
    ),
    (
        "e1000_get_regs",
        "last",
        "ethtool -d eth0 >/dev/null; true",
        true,
    ),
];

fn module(guest: &mut Guest) -> Value {
    let status = ask_json(guest, "status guest");
    let modules = status["isolation"].as_array().cloned().unwrap_or_default();
    modules
        .into_iter()
        .find(|one| one["module"] == "e1000e")
        .unwrap()
}

/// One fault of a kind of [`FAULTS`] in `module`, behind which the NIC works; what is reported of
/// it, `number` reports there are then.
#[track_caller]
fn fails(
    guest: &mut Guest,
    module: &str,
    (number, (function, place, command, _)): (usize, (&str, &str, &str, bool)),
) -> Value {
    ask(
        guest,
        &format!("inject guest {module} {function} --at {place}"),
    );
    shell(guest, command);
    nic_works(guest);
    let reports = ask_json(guest, &format!("violations guest {module}"));
    let all = reports["last_reports"].as_array().unwrap();
    assert_eq!(all.len(), number, "{function}: {reports}");
    let last = all.iter().find(|one| one["entry"] == function);
    last.unwrap_or_else(|| panic!("{function}: {reports}"))
        .clone()
}

/// How often recovery has had the driver begin anew.
fn begun_anew(guest: &mut Guest, module: &str) -> u64 {
    let rungs = ask_json(guest, "status guest")["recovery"][module]["rungs"].clone();
    rungs["resumes"].as_u64().unwrap() + rungs["restarts"].as_u64().unwrap()
}

#[track_caller]
fn assert_no_violation(guest: &mut Guest) {
    let violations = module(guest)["violations"].clone();
    assert_eq!(violations, 0, "{}", ask(guest, "violations guest e1000e"));
}

#[test]
#[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
fn the_driver_of_a_device_that_runs_by_itself_is_isolated_and_its_faults_are_taken_back() {
    Sysfs::default()
        .bind(FUNCTION.parse().unwrap(), false)
        .unwrap();
    // A kernel that chooses its addresses: its areas of memory do not begin where whole tables do.
    let options = options();
    let images = options.images.canonicalize().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, image) in [("vmlinux", "vmlinuz"), ("initrd.cpio", "initrd.cpio")] {
        symlink(images.join(image), folder.path().join(name)).unwrap();
    }
    let options = GuestOptions {
        images: folder.path().to_path_buf(),
        ..options
    };
    let mut guest = boot(&options.with(&format!("--nic vfio={FUNCTION} --memory 256M")));
    bring_up(&mut guest);
    // It writes memory that nobody follows, and can be isolated all the same; a mark cannot be set.
    ask(
        &mut guest,
        "isolate guest e1000e --entries all --budget-us 10000000",
    );
    refused(&mut guest, "mark guest", "cannot be marked");
    // The packets that were in its ring before it was isolated, and more. In small pieces: a step
    // has a limit.
    (0..4).for_each(|_| transfer(&mut guest, 2));
    assert_no_violation(&mut guest);
    for fault in (1..).zip(FAULTS) {
        let last = fails(&mut guest, "e1000e", fault);
        assert_eq!(last["violation"]["reached_device"], fault.1.3, "{last}");
        assert_eq!(last["device_lost"], Value::Null, "{last}");
        assert_eq!(last["stays"], Value::Null, "{last}");
    }
    transfer(&mut guest, 2);
    // Nobody has begun anew for it.
    let probes = "dmesg | grep -c 'Intel(R) PRO/1000 Network Driver'";
    assert_eq!(shell(&mut guest, probes).trim(), "1");
    assert_log_is_healthy(
        &mut guest,
        &["Reset adapter", "Detected Hardware Unit Hang"],
    );
    ask(&mut guest, "release guest e1000e");
    transfer(&mut guest, 2);
}

/// The lab's RTL8139C+, with a pin and without a description of its registers.
const UNDESCRIBED: &str = "0000:00:10.0";

/// As [`FAULTS`].
const UNDESCRIBED_FAULTS: [(&str, &str, &str, bool); 3] = [
    (
        "cp_get_drvinfo",
        "last",
        "ethtool -i eth0 >/dev/null; true",
        false,
    ),
    ("cp_start_xmit", "last", "true", false),
    // Loads a register first, and returns what its caller follows.
    (
        "cp_get_stats",
        "middle",
        "cat /proc/net/dev >/dev/null",
        true,
    ),
];

/// As [`FAULTS`], of a driver whose card is in another process.
const ELSEWHERE_FAULTS: [(&str, &str, &str, bool); 3] = [
    ("e1000_xmit_frame", "first", "true", false),
    ("e1000_clean", "first", "true", false),
    (
        "e1000_get_regs",
        "last",
        "ethtool -d eth0 >/dev/null; true",
        true,
    ),
];

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn the_driver_of_a_nic_of_a_device_host_is_isolated_and_its_faults_are_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let words = ["--model", "e1000", "--net", "user"];
    let _host = DeviceHost::start(&options().program, root, &words).unwrap();
    let with = format!("--nic device={NAME} --memory 256M");
    let mut guest = boot(&options().among(root, "guest").with(&with));
    insert_nic(&mut guest, "e1000", 15);
    nic_works(&mut guest);
    ask(
        &mut guest,
        "isolate guest e1000 --entry e1000_xmit_frame --entry e1000_clean --entry e1000_get_regs --budget-us 10000000",
    );
    nic_works(&mut guest);
    for fault in (1..).zip(ELSEWHERE_FAULTS) {
        let last = fails(&mut guest, "e1000", fault);
        assert_eq!(last["violation"]["reached_device"], fault.1.3, "{last}");
        assert_eq!(last["device_lost"], Value::Null, "{last}");
    }
    assert_eq!(begun_anew(&mut guest, "e1000"), 0);
    assert_log_is_healthy(&mut guest, &["Reset adapter", "Detected Tx Unit Hang"]);
}

/// The lab's NVMe controller, with an empty disk.
const DISK: &str = "0000:00:18.0";

/// As [`FAULTS`]; what is read is not there then, and the next time it is. A driver that is not
/// described has reached its device when it has rung a doorbell, which is a store: it waits for the
/// end of the call.
const DISK_FAULTS: [(&str, &str); 3] = [
    ("nvme_queue_rq", "first"),
    ("nvme_queue_rq", "middle"),
    ("nvme_irq", "first"),
];

/// What is written to the disk is read from it again, past what the kernel keeps.
#[track_caller]
fn disk_works(guest: &mut Guest) {
    shell(
        guest,
        "dd if=/tmp/written of=/dev/nvme0n1 bs=64k oflag=direct && \
         dd if=/dev/nvme0n1 of=/tmp/read bs=64k count=4 iflag=direct && cmp /tmp/written /tmp/read",
    );
}

mod long {
    use super::*;

    #[test]
    #[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
    fn a_disk_controllers_driver_finds_requests_by_number_isolated_and_its_faults_are_taken_back() {
        Sysfs::default().bind(DISK.parse().unwrap(), true).unwrap();
        let with = format!("--nic vfio={DISK} --memory 256M");
        let mut guest = boot(&options().initrd("initrd-hardware.cpio").with(&with));
        shell(
            &mut guest,
            "modprobe nvme; head -c 262144 /dev/urandom >/tmp/written; \
             for t in $(seq 1 400); do [ -b /dev/nvme0n1 ] && exit 0; sleep 0.05; done; exit 1",
        );
        // Requests that were made before it was isolated.
        disk_works(&mut guest);
        ask(
            &mut guest,
            "isolate guest nvme --entries all --budget-us 10000000",
        );
        (0..4).for_each(|_| disk_works(&mut guest));
        let status = ask_json(&mut guest, "status guest");
        let (isolated, said) = (
            &status["isolation"][0],
            ask(&mut guest, "violations guest nvme"),
        );
        assert_eq!(isolated["violations"], 0, "{said}");
        let entries = isolated["entries"].as_array().unwrap();
        for function in ["nvme_queue_rq", "nvme_irq"] {
            let entry = entries.iter().find(|entry| entry["name"] == function);
            assert!(entry.unwrap()["calls"].as_u64() > Some(0), "{function}");
        }
        for (number, (function, place)) in (1..).zip(DISK_FAULTS) {
            let order = format!("inject guest nvme {function} --at {place}");
            ask(&mut guest, &order);
            shell(
                &mut guest,
                "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=1 iflag=direct; true",
            );
            disk_works(&mut guest);
            let reports = ask_json(&mut guest, "violations guest nvme");
            let all = reports["last_reports"].as_array().unwrap();
            assert_eq!(all.len(), number, "{function}: {reports}");
            assert_eq!(all[number - 1]["entry"], function, "{reports}");
        }
        assert_eq!(begun_anew(&mut guest, "nvme"), 0);
        // An error of a read is what the faults come to.
        assert_log_is_healthy(&mut guest, &["controller is down", "Disabling device"]);
    }

    #[test]
    #[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
    fn a_device_without_a_description_is_begun_anew_only_where_a_failed_call_had_reached_it() {
        Sysfs::default()
            .bind(UNDESCRIBED.parse().unwrap(), false)
            .unwrap();
        let with = format!("--nic vfio={UNDESCRIBED} --memory 256M");
        let mut guest = boot(&options().initrd("initrd-hardware.cpio").with(&with));
        insert_nic(&mut guest, "8139cp", 15);
        nic_works(&mut guest);
        ask(
            &mut guest,
            "isolate guest 8139cp --entries all --budget-us 10000000",
        );
        transfer(&mut guest, 2);
        for fault in (1..).zip(UNDESCRIBED_FAULTS) {
            let (last, reaches) = (fails(&mut guest, "8139cp", fault), fault.1.3);
            assert_eq!(last["device_lost"].is_string(), reaches, "{last}");
            let begun_anew = begun_anew(&mut guest, "8139cp");
            assert_eq!(begun_anew, u64::from(reaches), "{last}");
        }
        transfer(&mut guest, 2);
        assert_log_is_healthy(&mut guest, &[]);
    }
}
