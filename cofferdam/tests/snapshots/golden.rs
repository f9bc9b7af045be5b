//! Snapshots of a whole VM that an earlier program wrote: a NIC on the user-mode gateway, a disk,
//! the agent's console, and a diff on it. This program reads them, and the guest goes on.
//!
//! `COFFERDAM_WRITE_GOLDEN=1 cargo test -p cofferdam --test snapshots golden` writes them, once for
//! each version of the format. Of an image only the pages are kept, one behind the other.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use serde_json::Value;
use vmm::snapshot::{FORMAT_VERSION, IMAGE_FILE, MAP_FILE, MemoryMap, PAGE_BYTES, Snapshot};

use crate::common::place::{Place, end, finish};
use crate::common::{EM_X86_64, elf};
use crate::filled::wait_until;
use crate::{go_on, nic};

/// Where a VM that is written is while it runs: its paths are in the manifest.
const PLACE: &str = "/tmp/cofferdam-golden";
/// The pages of an image.
const PAGES_FILE: &str = "memory.pages";
/// Files that are kept as they are.
const FILES: [&str; 4] = ["manifest.json", "machine.state", "devices.state", MAP_FILE];
const DIRS: [&str; 2] = ["full", "diff"];
const MEMORY_BYTES: u64 = 32 << 20;

fn golden(version: u32, name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    tests.join(format!("golden/snapshot-{version}")).join(name)
}

/// Frames that the guest says in `log` it has received.
fn received(log: &Path) -> usize {
    let text = std::fs::read(log).unwrap_or_default();
    text.iter().filter(|byte| **byte == nic::RECEIVED).count()
}

fn write_golden() {
    let (folder, place) = (Path::new(PLACE), Place::new());
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir(folder).unwrap();
    let at = |name: &str| folder.join(name).display().to_string();
    std::fs::write(at("kernel"), elf(EM_X86_64, &nic::code())).unwrap();
    File::create(at("disk")).unwrap().set_len(1 << 20).unwrap();
    let words = format!(
        "--memory 32M --net user --nic e1000 --mac 02:00:00:00:00:01 --disk {} --serial file={}",
        at("disk"),
        at("log")
    );
    let vm = place.start("golden", &at("kernel"), &words);
    let log = folder.join("log");
    wait_until("it receives", || received(&log) > 100);
    place.ask(&format!("snapshot golden {} --track", at("full")));
    wait_until("it receives more", || received(&log) > 200);
    let diff = format!("{} --diff {}", at("diff"), at("full"));
    place.ask(&format!("snapshot golden {diff} --stop"));
    assert!(finish(vm).status.success());
    for name in DIRS {
        let (from, to) = (folder.join(name), golden(FORMAT_VERSION, name));
        let _ = std::fs::remove_dir_all(&to);
        std::fs::create_dir_all(&to).unwrap();
        for file in FILES {
            std::fs::copy(from.join(file), to.join(file)).unwrap();
        }
        let snapshot = Snapshot::open(&from).unwrap();
        let mut pages = Vec::new();
        for run in snapshot.map().runs().iter().filter(|run| run.sum.is_some()) {
            let mut content = vec![0; run.bytes()];
            snapshot.read_run(run, &mut content).unwrap();
            pages.extend(content);
        }
        std::fs::write(to.join(PAGES_FILE), pages).unwrap();
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// The snapshots as `version` wrote them, in `place`.
fn unpack(version: u32, place: &Place) {
    for name in DIRS {
        let (from, to) = (golden(version, name), place.path(name));
        std::fs::create_dir(&to).unwrap();
        for file in FILES {
            std::fs::copy(from.join(file), to.join(file)).unwrap();
        }
        let image = File::create(to.join(IMAGE_FILE)).unwrap();
        image.set_len(MEMORY_BYTES).unwrap();
        let map = std::fs::read(from.join(MAP_FILE)).unwrap();
        let map = MemoryMap::from_bytes(&map, MEMORY_BYTES).unwrap();
        let pages = std::fs::read(from.join(PAGES_FILE)).unwrap();
        let mut rest = &pages[..];
        for run in map.runs().iter().filter(|run| run.sum.is_some()) {
            let (content, behind) = rest.split_at(run.bytes());
            image.write_all_at(content, run.first * PAGE_BYTES).unwrap();
            rest = behind;
        }
        assert!(rest.is_empty());
    }
}

#[test]
fn a_vm_that_an_earlier_program_saved_is_read() {
    if std::env::var_os("COFFERDAM_WRITE_GOLDEN").is_some() {
        write_golden();
    }
    (1..=FORMAT_VERSION).for_each(is_read);
}

fn is_read(version: u32) {
    let place = Place::new();
    unpack(version, &place);
    let diff = place.path("diff").display().to_string();
    assert!(
        place
            .ask(&format!("snapshot check {diff}"))
            .contains("whole (2 directories)")
    );
    let shown = place.ask(&format!("snapshot show {diff} --json"));
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown.as_array().unwrap().len(), 2);
    for directory in shown.as_array().unwrap() {
        let manifest = &directory["manifest"];
        assert_eq!(manifest["version"], version);
        let vm = &manifest["vm"];
        assert_eq!(vm["name"], "golden");
        assert_eq!(vm["memory"], "32M");
        assert_eq!(vm["nics"][0]["model"], "e1000");
        assert_eq!(vm["nics"][0]["wire"], "user");
        assert_eq!(vm["nics"][0]["mac"], "02:00:00:00:00:01");
        assert_eq!(vm["disks"].as_array().unwrap().len(), 1);
    }
    for name in DIRS {
        let snapshot = Snapshot::open(&place.path(name)).unwrap();
        vmm::MachineState::from_bytes(&snapshot.machine_state().unwrap()).unwrap();
        vmm::DeviceStates::from_bytes(&snapshot.device_states().unwrap()).unwrap();
    }
    // And is merged to one of its own.
    let whole = place.path("whole").display().to_string();
    place.ask(&format!("snapshot merge {diff} {whole}"));
    place.ask(&format!("snapshot check {whole}"));
}

/// The VM that goes on from `words`; `None` where this processor cannot stand in for the one that
/// it was saved on, or this host's KVM sets no TSC and its own is behind the saved one (a host that
/// has been up for less time), which is said.
fn try_to_go_on(place: &Place, words: &str) -> Option<Child> {
    let mut vm = go_on(place, words);
    let socket = place.path("run/golden/control.sock");
    loop {
        if socket.exists() {
            place.wait_for("golden");
            return Some(vm);
        }
        if vm.try_wait().unwrap().is_some() {
            let error = String::from_utf8(vm.wait_with_output().unwrap().stderr).unwrap();
            let reasons = ["the state needs", "a TSC that can be set"];
            let is_known = reasons.iter().any(|reason| error.contains(reason));
            assert!(is_known, "{error}");
            let test = "snapshots::golden::a_vm_that_an_earlier_program_saved_goes_on";
            skipped::skip(test, error.trim());
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn a_vm_that_an_earlier_program_saved_goes_on() {
    (1..=FORMAT_VERSION).for_each(goes_on);
}

fn goes_on(version: u32) {
    let place = Place::new();
    unpack(version, &place);
    let kernel = place.file("kernel", &elf(EM_X86_64, &nic::code()));
    let disk = place.path("disk").display().to_string();
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let log = place.path("log");
    for (name, lazily) in [
        ("full", ""),
        ("full", " --lazy"),
        ("diff", ""),
        ("diff", " --lazy"),
    ] {
        let _ = std::fs::remove_file(&log);
        let words = format!(
            "--snapshot {} --kernel {kernel} --disk {disk} --serial file={}{lazily}",
            place.path(name).display(),
            log.display()
        );
        let Some(vm) = try_to_go_on(&place, &words) else {
            return;
        };
        // The gateway answers each of its frames, as before.
        wait_until("it receives", || received(&log) > 50);
        let nics = &place.status_of("golden")["nics"];
        assert_eq!(nics[0]["mac"], "02:00:00:00:00:01", "{nics}");
        end(&place, vm, &[]);
    }
}
