//! What the images hold.

use agent_protocol::init_config::{BootModule, InitConfig, Mount};
use serde::Serialize;

use crate::hardware::hardware_image;
use crate::kernels::KernelSource;
use crate::swept::sweep_image;

/// Images that are built from one kernel.
#[derive(Clone, Debug, Serialize)]
pub struct ImageSet {
    /// The kernel.
    pub kernel: &'static KernelSource,
    /// Its release, where it is not to be the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// The images.
    pub images: Vec<ImageSpec>,
    /// Modules that are put beside the images for the host to read (types, sections), besides those
    /// that some image holds.
    pub host_modules: Vec<String>,
}

/// One initramfs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageSpec {
    /// File name under the output directory, such as `initrd.cpio` or `l1/initrd.cpio`.
    pub file: String,
    /// What `/init` does. The modules it names are in the image without being named again.
    pub init: InitConfig,
    /// More modules that the image holds; what they depend on is added.
    pub modules: Vec<String>,
    /// `busybox` with links for all its commands.
    pub busybox: bool,
    /// Programs with the libraries they need.
    pub programs: Vec<Program>,
    /// Packages of which the image holds all but documentation, with the libraries that their
    /// programs need.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// Any other files.
    pub files: Vec<ExtraFile>,
}

/// A program out of a package.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Program {
    /// Package name.
    pub package: String,
    /// Path in the package and in the image, absolute.
    pub path: String,
}

impl Program {
    /// `path` out of `package`.
    pub fn new(package: &str, path: &str) -> Self {
        Self {
            package: package.into(),
            path: path.into(),
        }
    }
}

/// A file whose content is given.
#[derive(Clone, Debug, Serialize)]
pub struct ExtraFile {
    /// Path in the image, absolute.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: Vec<u8>,
}

/// The images of a kernel that the project uses; the lab's is the default kernel's.
pub fn images_of(kernel: &'static KernelSource) -> ImageSet {
    let lab = kernel.is_default().then(lab_image);
    ImageSet {
        kernel,
        release: None,
        images: [small_image(), full_image(), hardware_image(), sweep_image()]
            .into_iter()
            .chain(lab)
            .collect(),
        // Drivers whose imports the model of kernel functions covers.
        host_modules: strings(&["8139too", "r8169"]),
    }
}

/// `initrd-small.cpio`: nothing but `/init`, to time a boot.
pub fn small_image() -> ImageSpec {
    ImageSpec {
        file: "initrd-small.cpio".into(),
        ..ImageSpec::default()
    }
}

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

/// Where `udhcpc` finds what to do with a lease.
pub const UDHCPC_SCRIPT: &str = "/etc/udhcpc.script";

fn udhcpc_script() -> ExtraFile {
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

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| w.to_string()).collect()
}
