//! The analysis of Debian's real modules.
//!
//! Needs what `cargo xtask images` builds (or `COFFERDAM_IMAGES`).

#![allow(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::collections::HashMap;
use std::path::PathBuf;

use isolation::analysis::kernel::{Kernel, Sleeps};
use isolation::analysis::reached::Atomic;
use isolation::analysis::{Report, analyze};

fn images() -> PathBuf {
    let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/images"));
    std::env::var_os("COFFERDAM_IMAGES").map_or_else(default, PathBuf::from)
}

/// Without a model: what waits is known from the kernel's text alone.
fn kernel() -> Kernel {
    let image = std::fs::read(images().join("vmlinux")).unwrap();
    Kernel::new(&image, HashMap::new()).unwrap()
}

fn module(name: &str) -> Vec<u8> {
    std::fs::read(images().join("modules").join(name)).unwrap()
}

fn from<'a>(report: &'a Report, function: &str) -> Vec<&'a str> {
    let entry = report
        .entries
        .iter()
        .find(|entry| entry.function == function);
    entry
        .unwrap()
        .from
        .iter()
        .map(|from| from.as_what.as_str())
        .collect()
}

#[test]
#[ignore = "needs the images of cargo xtask images"]
fn e1000_is_read_as_its_source_has_it() {
    let kernel = kernel();
    let report = analyze(&module("e1000.ko"), &kernel).unwrap();
    assert_eq!(
        from(&report, "e1000_xmit_frame"),
        ["net_device_ops.ndo_start_xmit"]
    );
    assert_eq!(from(&report, "e1000_get_link"), ["ethtool_ops.get_link"]);
    assert_eq!(from(&report, "e1000_probe"), ["pci_driver.probe"]);
    assert_eq!(from(&report, "e1000_intr"), ["interrupt handler"]);
    assert_eq!(from(&report, "e1000_clean"), ["poll"]);
    assert_eq!(report.suspends_and_resumes(), Some(true));
    let atomic = |function: &str| {
        let entry = report
            .entries
            .iter()
            .find(|entry| entry.function == function);
        entry.unwrap().atomic.clone()
    };
    assert_eq!(atomic("e1000_get_regs"), Atomic::Yes);
    assert!(matches!(atomic("e1000_open"), Atomic::No { .. }));
    // The veth driver has neither device nor suspend.
    assert_eq!(
        analyze(&module("veth.ko"), &kernel)
            .unwrap()
            .suspends_and_resumes(),
        None
    );
}

#[test]
#[ignore = "needs the images of cargo xtask images"]
fn the_kernels_functions_that_wait_are_known_from_its_text() {
    let kernel = kernel();
    for name in [
        "mutex_lock",
        "wait_for_completion",
        "msleep",
        "request_threaded_irq",
        "vzalloc",
    ] {
        assert_eq!(kernel.sleeps(name), Some(Sleeps::Yes), "{name}");
    }
    for name in ["_raw_spin_lock", "strcmp", "__const_udelay", "memcpy"] {
        assert_eq!(kernel.sleeps(name), Some(Sleeps::No), "{name}");
    }
    assert_eq!(kernel.sleeps("no_such_function"), None);
}

#[test]
#[ignore = "needs the images of cargo xtask images"]
fn whatever_is_cut_off_or_changed_in_a_real_module_it_is_read_or_refused() {
    let kernel = kernel();
    let whole = module("dummy.ko");
    for len in (0..whole.len()).step_by(whole.len() / 200) {
        let _either = analyze(&whole[..len], &kernel);
    }
    for step in 0..1000 {
        let mut changed = whole.clone();
        // Spread over the file, and each time another bit.
        let at = step * 7919 % whole.len();
        changed[at] ^= 1 << (step % 8);
        let _either = analyze(&changed, &kernel);
    }
}
