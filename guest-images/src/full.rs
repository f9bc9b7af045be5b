//! The image that most of the project's guests boot, and what others begin with.

use agent_protocol::init_config::{BootModule, InitConfig};

use crate::spec::{ExtraFile, ImageSpec, Program, strings};

/// `initrd.cpio`: the guest for everything else.
pub fn full_image() -> ImageSpec {
    ImageSpec {
        file: "initrd.cpio".into(),
        init: InitConfig {
            modules: ["virtio_pci", "virtio_console", "pvpanic-mmio"]
                .map(BootModule::optional)
                .into(),
            shell: true,
            serve: true,
            ..InitConfig::default()
        },
        modules: strings(&[
            "e1000",
            "e1000e",
            "8021q",
            "dummy",
            "null_blk",
            "brd",
            "loop",
            "veth",
            "crc32c_generic",
            "virtio_net",
            "virtio_blk",
            "ext4",
            "af_packet",
        ]),
        busybox: true,
        programs: vec![
            Program::new("iproute2", "/bin/ip"),
            Program::new("ethtool", "/sbin/ethtool"),
        ],
        packages: vec![],
        files: vec![udhcpc_script()],
    }
}

/// Where `udhcpc` finds what to do with a lease.
pub const UDHCPC_SCRIPT: &str = "/etc/udhcpc.script";

/// The script that is there.
pub(crate) fn udhcpc_script() -> ExtraFile {
    let script = r#"#!/bin/sh
# Called by udhcpc: sets what the server gave.
case "$1" in
deconfig)
    ifconfig "$interface" 0.0.0.0 up
    ;;
bound|renew)
    ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}"
    for gateway in $router; do
        route add default gw "$gateway" dev "$interface"
        break
    done
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    ;;
esac
"#;
    ExtraFile {
        path: UDHCPC_SCRIPT.into(),
        mode: 0o755,
        content: script.into(),
    }
}
