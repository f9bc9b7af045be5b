//! The image of the lab's emulated server.

use agent_protocol::init_config::{BootModule, InitConfig, Mount};

use crate::full::udhcpc_script;
use crate::spec::{ImageSpec, Program, strings};

/// `l1/initrd.cpio`: the lab's emulated server, with the host's root read-only on `/host` and the
/// directory for results on `/host/tmp`... see [`lab_mounts`].
pub fn lab_image() -> ImageSpec {
    ImageSpec {
        file: "l1/initrd.cpio".into(),
        init: InitConfig {
            modules: lab_modules(),
            mounts: lab_mounts(),
            shell: false,
            serve: true,
            keep_machines: true,
        },
        modules: strings(&["e1000e", "loop", "ext4"]),
        busybox: true,
        programs: vec![
            Program::new("iproute2", "/bin/ip"),
            Program::new("ethtool", "/sbin/ethtool"),
        ],
        packages: vec![],
        files: vec![udhcpc_script()],
    }
}

fn lab_modules() -> Vec<BootModule> {
    let mut modules: Vec<BootModule> = [
        "virtio_pci",
        "virtio_console",
        "9pnet_virtio",
        "9p",
        "tun",
        "virtio_net",
        "af_packet",
        "kvm",
    ]
    .map(BootModule::new)
    .into();
    modules.push(BootModule::optional("kvm-amd"));
    modules.push(BootModule::optional("vfio-pci"));
    modules.push(BootModule::optional("vfio_iommu_type1"));
    modules
}

/// The host's root by 9p tag `host`, read-only, on `/host`; the writable 9p tag `out` on `/out` and
/// again on `/host/mnt`, where programs in a `chroot` of `/host` reach it; the lab's own `/proc`,
/// `/sys`, `/dev`, `/run` and `/tmp` in place of the host's.
fn lab_mounts() -> Vec<Mount> {
    let nine_p = "trans=virtio,version=9p2000.L,msize=1048576";
    let mount = |source: &str, target: &str, fstype: &str| Mount {
        source: source.into(),
        target: target.into(),
        fstype: fstype.into(),
        options: String::new(),
        read_only: false,
        optional: false,
    };
    let mut mounts = vec![
        Mount {
            options: format!("{nine_p},cache=loose"),
            read_only: true,
            ..mount("host", "/host", "9p")
        },
        Mount {
            options: nine_p.into(),
            optional: true,
            ..mount("out", "/out", "9p")
        },
    ];
    for directory in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
        mounts.push(mount(directory, &format!("/host{directory}"), "bind"));
    }
    mounts.push(Mount {
        optional: true,
        ..mount("/out", "/host/mnt", "bind")
    });
    mounts
}
