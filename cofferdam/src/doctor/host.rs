//! The host around KVM: memory, huge pages, TAP, VFIO, and what the lab needs.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::report::Check;
use super::speed::SecondStage;

/// Available memory below which a guest of the default size and its VMM do not fit.
const LEAST_MEMORY_MIB: u64 = 512;
/// The lab's emulated server has 4 GiB, of which a run touches about half.
const LAB_MEMORY_MIB: u64 = 3072;
/// `TUNSETIFF` of `linux/if_tun.h`.
const TUNSETIFF: libc::c_ulong = 0x4004_54CA;

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn read_number(path: impl AsRef<Path>) -> Option<u64> {
    read(path)?.parse().ok()
}

fn entries(path: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    paths
}

/// The processor's name.
pub fn cpu_name() -> String {
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
    };
    field("model name")
        .or_else(|| field("vendor_id"))
        .unwrap_or_else(|| "unknown CPU".into())
}

/// What the processor's maker calls its second stage.
pub fn second_stage_name(found: SecondStage) -> &'static str {
    let intel = || {
        read("/proc/cpuinfo")
            .unwrap_or_default()
            .contains("GenuineIntel")
    };
    match found {
        SecondStage::Hardware if intel() => "ept",
        SecondStage::Hardware => "npt",
        SecondStage::Shadow | SecondStage::Emulated => "shadow",
    }
}

/// Release of the host's kernel.
pub fn kernel_release() -> String {
    read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into())
}

/// Huge pages for guest memory: an option that saves second-stage walks, never needed.
pub fn hugepages() -> Check {
    let name = "hugepages";
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let free = read_number(format!("{pool}/free_hugepages")).unwrap_or(0);
    let reserved = read_number(format!("{pool}/nr_hugepages")).unwrap_or(0);
    let shmem = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let transparent = ["[always]", "[advise]", "[within_size]", "[force]"]
        .iter()
        .any(|mode| shmem.contains(mode));
    if reserved > 0 {
        Check::good(name, format!("{free} of {reserved} pages of 2 MiB free"))
    } else if transparent {
        Check::good(
            name,
            "none reserved; transparent ones for shared memory are on",
        )
    } else {
        Check::limited(
            name,
            "none reserved, transparent ones for shared memory are off",
            "guests work without; for speed: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )
    }
}

/// Makes a TAP interface, which goes away with its descriptor.
pub fn tap() -> Check {
    let name = "TAP";
    let file = match OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        Ok(file) => file,
        Err(error) => {
            return Check::missing(
                name,
                format!("/dev/net/tun cannot be opened: {error}"),
                "run as root and load the module tun; --net user needs neither",
            );
        }
    };
    match make_tap(&file, b"cofdoc%d") {
        Ok(()) => Check::good(name, "interfaces can be made"),
        Err(error) => Check::missing(
            name,
            format!("TUNSETIFF failed: {error}"),
            "run as root (CAP_NET_ADMIN), or have root make the interface with `ip tuntap add`; --net user needs neither",
        ),
    }
}

/// `pattern` is an interface name, in which the kernel replaces `%d` by the first free number.
fn make_tap(file: &File, pattern: &[u8]) -> std::io::Result<()> {
    // SAFETY: `ifreq` is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(pattern) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// VFIO and the IOMMU behind it: for devices handed to guests.
pub fn vfio() -> Check {
    let groups = entries("/sys/kernel/iommu_groups").len();
    let container = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/vfio/vfio")
        .is_ok();
    let bound: Vec<String> = entries("/dev/vfio")
        .iter()
        .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
        .filter(|name| name.parse::<u32>().is_ok())
        .collect();
    let nics = network_functions();
    let nics = if nics.is_empty() {
        String::new()
    } else {
        format!("; PCI network functions: {}", nics.join(", "))
    };
    match (groups, container) {
        (0, _) => Check::limited(
            "VFIO",
            format!("no IOMMU group{nics}"),
            "only for passthrough: switch on the IOMMU in the firmware and with intel_iommu=on; the lab has one",
        ),
        (_, false) => Check::limited(
            "VFIO",
            format!("{groups} IOMMU groups, /dev/vfio/vfio cannot be opened{nics}"),
            "only for passthrough: load the module vfio-pci and run as root",
        ),
        (_, true) => {
            let bound = if bound.is_empty() {
                "none bound to vfio".into()
            } else {
                format!("bound to vfio: {}", bound.join(", "))
            };
            Check::good("VFIO", format!("{groups} IOMMU groups, {bound}{nics}"))
        }
    }
}

/// PCI functions of class 2 with their driver and IOMMU group.
fn network_functions() -> Vec<String> {
    entries("/sys/bus/pci/devices")
        .into_iter()
        .filter(|path| read(path.join("class")).is_some_and(|class| class.starts_with("0x02")))
        .map(|path| {
            let target = |link: &str| {
                let target = fs::read_link(path.join(link)).ok()?;
                Some(target.file_name()?.to_string_lossy().into_owned())
            };
            let address = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            let driver = target("driver").unwrap_or_else(|| "no driver".into());
            let group = target("iommu_group")
                .map(|group| format!(", group {group}"))
                .unwrap_or_default();
            format!("{address} ({driver}{group})")
        })
        .collect()
}

/// Memory that can still be had, by the kernel's estimate and the control group's limit.
pub fn memory() -> Check {
    let available_mib = available_mib();
    let found = format!("{available_mib} MiB available");
    if available_mib >= LAB_MEMORY_MIB {
        Check::good("memory", found)
    } else if available_mib >= LEAST_MEMORY_MIB {
        Check::limited(
            "memory",
            found,
            format!("small guests fit; the lab needs {LAB_MEMORY_MIB} MiB"),
        )
    } else {
        Check::missing(
            "memory",
            found,
            format!("free some: a guest needs {LEAST_MEMORY_MIB} MiB with all around it"),
        )
    }
}

fn available_mib() -> u64 {
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let system_kib = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .unwrap_or(0);
    let group_kib = || {
        let limit = read_number("/sys/fs/cgroup/memory.max")?;
        Some(limit.saturating_sub(read_number("/sys/fs/cgroup/memory.current")?) / 1024)
    };
    system_kib.min(group_kib().unwrap_or(u64::MAX)) / 1024
}

/// What the lab needs of this host, and whether it is all there.
pub fn lab() -> (Check, bool) {
    let name = "lab";
    let Some(qemu) = find_in_path("qemu-system-x86_64") else {
        return (
            Check::missing(name, "QEMU is not installed", "run `cargo xtask setup`"),
            false,
        );
    };
    let version = Command::new(&qemu)
        .arg("--version")
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .and_then(|text| text.split_whitespace().nth(3).map(str::to_owned));
    match version {
        Some(version) => (Check::good(name, format!("QEMU {version}")), true),
        None => (
            Check::missing(
                name,
                format!("{} does not run", qemu.display()),
                "run `cargo xtask setup`",
            ),
            false,
        ),
    }
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| {
            file.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_leaves_no_tap_behind() {
        // Without the right to make one there is nothing to leave behind.
        let Ok(file) = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
        else {
            return;
        };
        let interface = format!("cofd{}", std::process::id());
        if make_tap(&file, interface.as_bytes()).is_err() {
            return;
        }
        let path = Path::new("/sys/class/net").join(interface);
        assert!(path.exists());
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn programs_are_found_where_path_says() {
        assert!(find_in_path("sh").is_some_and(|path| path.is_file()));
        assert_eq!(find_in_path("no-program-has-this-name"), None);
    }
}
