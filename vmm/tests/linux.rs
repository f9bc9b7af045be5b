//! What stock Linux makes of the machine itself: devices that come and go, a panic.
//!
//! Each test needs a KVM that boots Linux and the guest images.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent_protocol::Client;
use devices::pci::config::InterruptPin;
use devices::serial::SerialBackend;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::console::Console;
use devices::virtio::pci::VirtioPciFunction;
use vmm::memory::MemorySource;
use vmm::{DEFAULT_COMMAND_LINE, OnGuestReset, Payload, PciSlot, Vm, VmConfig, VmHandle};

/// Time for a boot, or for a driver to come or go, in a busy lab.
const LIMIT: Duration = Duration::from_secs(120);

struct Machine {
    agent: Client,
    handle: VmHandle,
    thread: Option<JoinHandle<()>>,
    directory: tempfile::TempDir,
}

fn virtio<D: VirtioDevice + 'static>(
    handle: &VmHandle,
    slot: &PciSlot,
    device: D,
) -> Arc<Mutex<VirtioPciFunction<D>>> {
    let vectors = handle.msi_vectors(device.queue_sizes().len() as u16 + 1);
    let line = slot.intx_line(InterruptPin::A);
    let function = VirtioPciFunction::new(device, handle.dma_space(), line, vectors.unwrap());
    Arc::new(Mutex::new(function.unwrap()))
}

impl Machine {
    fn boot(append: &str) -> Self {
        let images =
            std::env::var_os("COFFERDAM_IMAGES").expect("COFFERDAM_IMAGES names the images");
        let images = PathBuf::from(images);
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let console = std::fs::File::create(directory.path().join("console")).unwrap();
        let mut vm = Vm::new(VmConfig {
            memory_bytes: 256 << 20,
            memory: MemorySource::default(),
            vcpus: 1,
            payload: Payload::Linux {
                kernel: images.join("vmlinux"),
                initrd: Some(images.join("initrd.cpio")),
                cmdline: format!("{DEFAULT_COMMAND_LINE} {append}"),
            },
            console: SerialBackend::Output(console),
            on_guest_reset: OnGuestReset::Exit,
        })
        .unwrap();
        let handle = vm.handle();
        let slot = vm.reserve_pci_slot().unwrap();
        let channel = Console::new(
            "org.cofferdam.agent.0",
            UnixListener::bind(&socket).unwrap(),
        )
        .unwrap();
        let channel = virtio(&handle, &slot, channel);
        vm.add_pci(&slot, channel.clone()).unwrap();
        vm.add_subscriber(channel);
        let thread = std::thread::spawn(move || {
            vm.run().unwrap();
        });
        let mut agent = Client::unix(&socket);
        agent.hello(LIMIT).unwrap();
        agent.set_limit(LIMIT);
        Self {
            agent,
            handle,
            thread: Some(thread),
            directory,
        }
    }

    fn shell(&mut self, script: &str) -> String {
        let result = self.agent.run(&["sh", "-c", script]).unwrap();
        assert!(
            result.success(),
            "{script}: {}{}",
            result.stdout_text(),
            String::from_utf8_lossy(&result.stderr)
        );
        result.stdout_text()
    }

    fn plug_disk(&self, file: &Path) -> u8 {
        let slot = self.handle.reserve_pci_slot().unwrap();
        let disk = Block::new(Disk::open(file, false).unwrap(), "plugged");
        let function = virtio(&self.handle, &slot, disk);
        self.handle
            .plug(&slot, function.clone(), vec![function])
            .unwrap();
        slot.number()
    }

    /// What of the guest's kernel grows if a device leaves something behind.
    fn left_behind(&mut self) -> BTreeMap<&'static str, String> {
        [
            ("functions", "ls /sys/bus/pci/devices | wc -l"),
            ("disks", "ls /sys/block | wc -l"),
            ("interrupts", "grep -c virtio /proc/interrupts || true"),
            ("windows", "grep -c virtio /proc/iomem || true"),
        ]
        .map(|(name, script)| (name, self.shell(script)))
        .into()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let console = std::fs::read(self.directory.path().join("console"));
            eprintln!("{}", String::from_utf8_lossy(&console.unwrap_or_default()));
        }
        // One that has ended already refuses.
        let _ = self.handle.power_off();
        let joined = self.thread.take().map(JoinHandle::join);
        assert!(
            !matches!(joined, Some(Err(_))),
            "the machine's thread panicked"
        );
    }
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_disk_comes_works_and_goes_twenty_times() {
    let mut machine = Machine::boot("");
    machine.shell("modprobe virtio_blk || insmod $(find /lib/modules -name 'virtio_blk.ko*')");
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let before = machine.left_behind();
    let mut files = None;
    for round in 0..20 {
        let slot = machine.plug_disk(file.path());
        assert_eq!(slot, 2, "the slot is free again in round {round}");
        let mut seen = false;
        wait_until("the guest sees the disk", || {
            seen = machine.shell("ls /sys/block").contains("vda");
            seen
        });
        let word = format!("round {round}");
        machine.shell(&format!(
            "echo '{word}' | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null"
        ));
        let written = std::fs::read(file.path()).unwrap();
        assert!(written.starts_with(word.as_bytes()), "{written:?}");
        machine.handle.unplug(slot).unwrap();
        wait_until("the guest lets the disk go", || {
            !machine.handle.is_plugged(slot)
        });
        assert_eq!(machine.left_behind(), before, "in round {round}");
        wait_until("the slot is free", || {
            machine
                .handle
                .reserve_pci_slot()
                .is_ok_and(|free| free.number() == slot)
        });
        assert_eq!(*files.get_or_insert_with(open_files), open_files());
    }
    let log = machine.shell("dmesg");
    assert!(
        !log.contains("BUG") && !log.contains("WARNING: CPU"),
        "{log}"
    );
}

/// All of a machine's memory that is not zero, by page.
fn memory_of(handle: &VmHandle) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    for range in handle.ram().populated() {
        for at in range.step_by(4096) {
            let mut page = vec![0; 4096];
            std::os::unix::fs::FileExt::read_exact_at(handle.ram().memfd(), &mut page, at).unwrap();
            if page.iter().any(|&byte| byte != 0) {
                pages.insert(at / 4096, page);
            }
        }
    }
    pages
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_at_work_is_rewound_to_the_byte_and_works_on() {
    const REWINDS: usize = 10;
    let mut machine = Machine::boot("");
    machine.shell("(while :; do dd if=/dev/urandom of=/tmp/x bs=64k count=8; md5sum /tmp/x; done) >/dev/null 2>&1 &");
    // Nobody is connected: the guest would be told, in its memory, that who was is not any more.
    let handle = machine.handle.clone();
    let devices = || {
        let save = handle.quiesce(LIMIT, |quiesced| quiesced.save_devices());
        save.unwrap().unwrap()
    };
    let connected = devices();
    machine.agent.disconnect();
    wait_until("the device hears that its client went", || {
        devices() != connected
    });
    std::thread::sleep(Duration::from_secs(1));
    handle.pause().unwrap();
    handle.mark("warm", LIMIT).unwrap();
    let then = memory_of(&handle);
    let mut changed = 0;
    for round in 0..REWINDS {
        handle.resume().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        handle.pause().unwrap();
        changed += handle.rewind(Some("warm"), LIMIT).unwrap().pages;
        let now = memory_of(&handle);
        let pages = then.keys().chain(now.keys());
        let differ: Vec<_> = pages
            .filter(|page| then.get(page) != now.get(page))
            .collect();
        assert!(differ.is_empty(), "rewind {round}: pages {differ:x?}");
    }
    assert!(
        changed > REWINDS as u64,
        "{changed} pages: the guest does nothing"
    );
    handle.resume().unwrap();
    machine.agent.hello(LIMIT).unwrap();
    machine.agent.set_limit(LIMIT);
    let log = machine.shell("sleep 2; cat /tmp/x | wc -c; dmesg");
    for bad in ["BUG", "WARNING: CPU", "soft lockup", "stall"] {
        assert!(!log.contains(bad), "{bad}: {log}");
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_panic_is_noticed() {
    let mut machine = Machine::boot("panic=0");
    assert!(!machine.handle.status().panicked);
    // When the agent has answered: a guest that panicked keeps its processor busy for as long as it
    // is waited for.
    machine.shell(
        "setsid sh -c 'sleep 0.3; echo c > /proc/sysrq-trigger' > /dev/null 2>&1 < /dev/null &",
    );
    let handle = machine.handle.clone();
    wait_until("the panic is told", || handle.status().panicked);
    assert_eq!(handle.status().panics, 1);
}
