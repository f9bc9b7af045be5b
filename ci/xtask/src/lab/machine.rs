//! The emulated server: QEMU's command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What the server is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// QEMU's program.
    pub qemu: PathBuf,
    /// Kernel of L1.
    pub kernel: PathBuf,
    /// Initramfs of L1, with the agent.
    pub initrd: PathBuf,
    /// Directory that L1 may write.
    pub out: PathBuf,
    /// Emulated processors.
    pub cpus: u32,
    /// Emulated memory.
    pub memory_mib: u32,
}

/// File names in an instance's directory. QEMU runs there, so that long paths do not exceed what a
/// socket address holds.
pub const AGENT_SOCKET: &str = "agent.sock";
/// QEMU's test port, see [`super::kick`].
pub const TEST_SOCKET: &str = "test.sock";
/// QEMU's monitor.
pub const MONITOR_SOCKET: &str = "monitor.sock";
/// L1's console.
pub const CONSOLE_LOG: &str = "console.log";
/// What QEMU itself says.
pub const QEMU_LOG: &str = "qemu.log";

/// 9p tags, as the lab image mounts them.
const HOST_TAG: &str = "host";
const OUT_TAG: &str = "out";

/// No mitigations: L1 is not there to be attacked, and emulating them costs. `iommu=pt`: L1's own
/// devices are not translated, those under VFIO are. `init_on_alloc=0`: huge pages are cleared
/// twice otherwise, the first time all of one without a place where others may run.
/// `no_timer_check`: whether the timer's interrupt comes is judged by how many come in the time of
/// ten, and on a busy machine the emulated timer is late. `norandmaps`: the emulator keeps what it
/// has translated by its address as a program sees it, so that a program at another address each
/// time is translated anew at each start (`docs/lab.md`, *Timings*).
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet iommu=pt mitigations=off \
                                   init_on_alloc=0 no_timer_check norandmaps";

/// Without `erms`, with which Linux clears and copies pages byte by byte (`rep stosb`): each byte
/// stored to a page that held code is a look at all that was translated of that page.
const PROCESSOR: &str = "EPYC-Milan,+svm,+npt,-erms";

/// Memory for translated code, in MiB: what guests that are gone have left there is thrown away
/// soon.
const ACCELERATOR: &str = "tcg,thread=multi,tb-size=256";

/// The network card for VFIO whose cable ends in the server itself: where it is, its driver in
/// Linux, and the server's interface at the other end.
pub const CABLED: [&str; 3] = ["0000:00:02.0", "e1000e", "eth0"];

/// More network cards for VFIO, by slot. Each has a network of its own, with what sends everything
/// back at 10.0.2.100.
const CARDS: [(u8, &str); 6] = [
    (0x10, "rtl8139"),
    (0x11, "pcnet"),
    (0x12, "i82559c"),
    (0x13, "vmxnet3"),
    (0x14, "ne2k_pci"),
    (0x15, "e1000"),
];

/// The disk behind the lab's NVMe controller: its file, in the instance's directory, and its bytes.
pub const DISK: (&str, u64) = ("disk.img", 64 << 20);

impl Machine {
    /// QEMU's arguments. Sockets and logs are relative: QEMU is started in the instance's
    /// directory.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        self.add_server(&mut args);
        add_network(&mut args);
        add_disk_and_sound(&mut args);
        add_usb(&mut args);
        add_channels(&mut args);
        self.add_files(&mut args);
        args
    }

    fn add_server(&self, args: &mut Vec<OsString>) {
        add(args, &["-machine", "q35", "-accel", ACCELERATOR]);
        add(args, &["-cpu", PROCESSOR, "-smp", &self.cpus.to_string()]);
        add(args, &["-m", &self.memory_mib.to_string()]);
        add(args, &["-display", "none", "-vga", "none"]);
        add(args, &["-nodefaults", "-no-reboot"]);
        add(args, &["-append", KERNEL_COMMAND_LINE]);
        add(args, &["-device", "amd-iommu,intremap=on"]);
    }

    /// Kernel and initramfs, and what is shared of the host's files.
    fn add_files(&self, args: &mut Vec<OsString>) {
        for (option, path) in [("-kernel", &self.kernel), ("-initrd", &self.initrd)] {
            args.extend([option.into(), path.into()]);
        }
        for (path, tag, access) in [
            (Path::new("/"), HOST_TAG, ",readonly=on"),
            (&self.out, OUT_TAG, ""),
        ] {
            let mut share = OsString::from("local,path=");
            share.push(escape(path));
            // Without `remap` file systems of the host with equal inode numbers are mixed up.
            share.push(format!(
                ",mount_tag={tag},security_model=none,multidevs=remap{access}"
            ));
            args.extend(["-virtfs".into(), share]);
        }
    }
}

fn add(args: &mut Vec<OsString>, words: &[&str]) {
    args.extend(words.iter().map(OsString::from));
}

fn add_network(args: &mut Vec<OsString>) {
    // For VFIO: L1 leaves it without a driver.
    add(args, &["-device", "e1000e,netdev=n,romfile="]);
    // What it is plugged into: a network that answers, and a card of the server itself, which
    // hears who sends.
    add(args, &["-netdev", "hubport,id=n,hubid=0"]);
    // Whoever connects there has what it sends come back.
    let user = "user,id=user,guestfwd=tcp:10.0.2.100:7-cmd:cat";
    add(args, &["-netdev", user]);
    add(args, &["-netdev", "hubport,id=answers,hubid=0,netdev=user"]);
    add(args, &["-netdev", "hubport,id=far,hubid=0"]);
    let far = "virtio-net-pci,netdev=far,addr=0x16,romfile=";
    add(args, &["-device", far]);
    for (slot, model) in CARDS {
        let id = format!("n{slot:x}");
        let card = format!("{model},netdev={id},addr={slot:#x},romfile=");
        let network = format!("user,id={id},guestfwd=tcp:10.0.2.100:7-cmd:cat");
        add(args, &["-device", &card, "-netdev", &network]);
    }
}

fn add_disk_and_sound(args: &mut Vec<OsString>) {
    let disk = "if=none,id=disk,file=disk.img,format=raw,cache=unsafe";
    add(args, &["-drive", disk]);
    add(args, &["-device", "nvme,drive=disk,serial=lab,addr=0x18"]);
    add(args, &["-audiodev", "none,id=audio"]);
    add(args, &["-device", "ES1370,audiodev=audio,addr=0x19"]);
    add(args, &["-device", "AC97,audiodev=audio,addr=0x1a"]);
}

/// A USB controller, with a network adapter whose network is as those of [`CARDS`].
fn add_usb(args: &mut Vec<OsString>) {
    add(args, &["-device", "qemu-xhci,id=usb,addr=0x1b"]);
    let network = "user,id=nusb,guestfwd=tcp:10.0.2.100:7-cmd:cat";
    add(args, &["-netdev", network]);
    add(args, &["-device", "usb-net,bus=usb.0,netdev=nusb"]);
}

/// Ways to talk to it: the agent's port, the console, QEMU's monitor and its port for tests.
fn add_channels(args: &mut Vec<OsString>) {
    add(args, &["-device", "virtio-serial-pci"]);
    let agent = format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off");
    add(args, &["-chardev", &agent]);
    let name = agent_protocol::PORT_NAME;
    let port = format!("virtserialport,chardev=agent,name={name}");
    add(args, &["-device", &port]);
    add(args, &["-serial", &format!("file:{CONSOLE_LOG}")]);
    let monitor = format!("socket,id=monitor,path={MONITOR_SOCKET},server=on,wait=off");
    add(args, &["-chardev", &monitor]);
    add(args, &["-mon", "chardev=monitor,mode=readline"]);
    let tests = format!("unix:{TEST_SOCKET},server=on,wait=off");
    add(args, &["-qtest", &tests, "-qtest-log", "none"]);
}

/// QEMU's option syntax ends a value at a comma, unless it is doubled.
fn escape(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        escaped.push(byte);
        if byte == b',' {
            escaped.push(byte);
        }
    }
    OsString::from_vec(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(out: &str) -> Vec<String> {
        let machine = Machine {
            qemu: "qemu".into(),
            kernel: "vmlinux".into(),
            initrd: "initrd".into(),
            out: out.into(),
            cpus: 2,
            memory_mib: 4096,
        };
        machine
            .arguments()
            .iter()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn host_root_cannot_be_written_and_results_can() {
        let args = machine("/results");
        let shares: Vec<_> = args
            .iter()
            .filter(|arg| arg.starts_with("local,path="))
            .collect();
        assert_eq!(shares.len(), 2);
        assert!(shares[0].starts_with("local,path=/,") && shares[0].ends_with("readonly=on"));
        assert!(shares[1].starts_with("local,path=/results,") && !shares[1].contains("readonly"));
    }

    #[test]
    fn commas_in_paths_are_no_options() {
        let args = machine("/a,readonly=on");
        assert!(
            args.iter()
                .any(|arg| arg.starts_with("local,path=/a,,readonly=on,mount_tag=out"))
        );
    }
}
