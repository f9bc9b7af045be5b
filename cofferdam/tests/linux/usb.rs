//! A USB network adapter behind the lab's USB controller, which is given to a guest by VFIO: the
//! stock drivers of both, isolated. The adapter's driver reaches its device through other modules
//! only (`usbcore`, `xhci_hcd`).

use devices::vfio::binding::Sysfs;

use super::isolation::{ask, ask_json};
use super::{assert_log_is_healthy, boot, nic_works, options, shell};

/// The lab's USB controller.
const CONTROLLER: &str = "0000:00:1b.0";

/// Functions of the adapter's drivers (`usbnet`, which is common to all, and `rndis_host`, which is
/// this kind's), with the place of the fault.
const FAULTS: [(&str, &str, &str); 3] = [
    ("usbnet", "usbnet_start_xmit", "middle"),
    ("rndis_host", "rndis_tx_fixup", "last"),
    ("rndis_host", "rndis_rx_fixup", "first"),
];

mod long {
    use super::*;

    #[test]
    #[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
    fn the_drivers_of_a_usb_network_adapter_are_isolated_and_their_faults_are_taken_back() {
        Sysfs::default()
            .bind(CONTROLLER.parse().unwrap(), true)
            .unwrap();
        let with = format!("--nic vfio={CONTROLLER} --memory 256M");
        let mut guest = boot(&options().initrd("initrd-hardware.cpio").with(&with));
        shell(
            &mut guest,
            "modprobe xhci-pci && modprobe rndis_host && \
             for t in $(seq 1 1200); do [ -e /sys/class/net/usb0 ] && break; sleep 0.05; done; \
             ip link set usb0 name eth0 && ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0",
        );
        nic_works(&mut guest);
        for module in ["usbnet", "rndis_host"] {
            let isolate = format!("isolate guest {module} --entries all --budget-us 10000000");
            ask(&mut guest, &isolate);
        }
        (0..3).for_each(|_| nic_works(&mut guest));
        for module in ["usbnet", "rndis_host"] {
            let reports = ask_json(&mut guest, &format!("violations guest {module}"));
            assert_eq!(reports["last_reports"], serde_json::json!([]), "{reports}");
        }
        for (module, function, place) in FAULTS {
            let order = format!("inject guest {module} {function} --at {place}");
            ask(&mut guest, &order);
            nic_works(&mut guest);
            let reports = ask_json(&mut guest, &format!("violations guest {module}"));
            let all = reports["last_reports"].as_array().unwrap();
            let failed = all.iter().filter(|one| one["entry"] == function).count();
            assert_eq!(failed, 1, "{function}: {reports}");
        }
        assert_log_is_healthy(&mut guest, &[]);
    }
}
