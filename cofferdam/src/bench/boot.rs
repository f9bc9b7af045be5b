//! From the start of a process to the first line of the guest's `/init`: ours, and QEMU's for the
//! ratio.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use agent_protocol::INIT_LINE;
use anyhow::{Context, bail};
use devices::clock::monotonic_ns;

use super::guest::BOOT_TIME;
use super::guest::{Console, Guest, GuestOptions};
use crate::report::{Boot, BootRun, OtherBoot, Stat};

/// The initramfs that is booted: nothing but `/init`.
const INITRD: &str = "initrd-small.cpio";

/// Longest line of a console that is looked at, in bytes.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// Boots `runs` guests one after the other, telling `progress` of each.
pub fn measure(
    options: &GuestOptions,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<Boot> {
    let options = options
        .clone()
        .initrd(INITRD)
        .with("--net user --nic e1000");
    read_ahead(&[options.image("vmlinux")?, options.image(INITRD)?])?;
    let mut boots = Vec::new();
    for number in 1..=runs {
        let run = boot_once(&options).with_context(|| format!("boot {number}"))?;
        progress(&format!(
            "boot {number} of {runs}: {:.3} s",
            run.to_init_us / 1e6
        ));
        boots.push(run);
    }
    let ready: Vec<f64> = boots.iter().filter_map(|run| run.vmm_ready_us).collect();
    Ok(Boot {
        vmm_ready_us: Stat::from_samples(&ready),
        to_init_us: to_init(&boots)?,
        vmm_rss_kib: boots
            .iter()
            .filter_map(|run| run.vmm_rss_kib)
            .max()
            .context("no run told its memory")?,
        runs: boots,
    })
}

fn to_init(boots: &[BootRun]) -> anyhow::Result<Stat> {
    let samples: Vec<f64> = boots.iter().map(|run| run.to_init_us).collect();
    Stat::from_samples(&samples).context("no boot was measured")
}

/// Reads the files once, so that no boot is timed with the disk (or the lab's link to its host).
fn read_ahead(files: &[PathBuf]) -> anyhow::Result<()> {
    for file in files {
        std::fs::File::open(file)
            .and_then(|mut file| std::io::copy(&mut file, &mut std::io::sink()))
            .with_context(|| format!("cannot read {}", file.display()))?;
    }
    Ok(())
}

/// Boots one guest.
fn boot_once(options: &GuestOptions) -> anyhow::Result<BootRun> {
    let mut guest = Guest::start(options, &Console::Pipe)?;
    let stdout = guest.take_stdout().context("the VM has no console")?;
    let init_ns = wait_for_init(stdout, BOOT_TIME)
        .with_context(|| format!("the guest did not reach /init{}", guest.last_words()))?;
    let status = guest.control()?.status()?;
    Ok(BootRun {
        vmm_ready_us: status
            .ready_ns
            .map(|ready_ns| us(guest.started_ns, ready_ns)),
        to_init_us: us(guest.started_ns, init_ns),
        vmm_rss_kib: Some(status.vmm_rss_kib),
    })
}

/// Boots the same kernel's bzImage `runs` times with QEMU's q35 machine and its e1000.
pub fn measure_qemu(
    options: &GuestOptions,
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<OtherBoot> {
    let kernel = options.image("vmlinuz")?;
    let initrd = options.image(INITRD)?;
    read_ahead(&[kernel.clone(), initrd.clone()])?;
    let mut boots = Vec::new();
    for number in 1..=runs {
        let to_init_us = qemu_once(&kernel, &initrd)?;
        progress(&format!(
            "QEMU boot {number} of {runs}: {:.3} s",
            to_init_us / 1e6
        ));
        boots.push(BootRun {
            vmm_ready_us: None,
            to_init_us,
            vmm_rss_kib: None,
        });
    }
    Ok(OtherBoot {
        vmm: format!("QEMU {} q35", qemu_version()?),
        to_init_us: to_init(&boots)?,
        runs: boots,
    })
}

/// QEMU's program.
const QEMU: &str = "qemu-system-x86_64";

fn qemu_once(kernel: &Path, initrd: &Path) -> anyhow::Result<f64> {
    let started_ns = monotonic_ns();
    let mut child = Command::new(QEMU)
        .args([
            "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-smp", "1",
        ])
        .args([
            "-nodefaults",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .args(["-device", "e1000,netdev=n", "-netdev", "user,id=n"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 panic=-1 reboot=t quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {QEMU}: install qemu-system-x86"))?;
    let result = match child.stdout.take() {
        Some(stdout) => wait_for_init(stdout, BOOT_TIME).context("QEMU's guest: no /init"),
        None => Err(anyhow::anyhow!("QEMU has no console")),
    };
    // It has served its purpose, whatever came of it; waiting takes it off the process table.
    child
        .kill()
        .and_then(|()| child.wait())
        .context("cannot end QEMU")?;
    Ok(us(started_ns, result?))
}

fn qemu_version() -> anyhow::Result<String> {
    let output = Command::new(QEMU)
        .arg("--version")
        .output()
        .context("cannot start QEMU")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1);
    Ok(version.unwrap_or("of unknown version").to_owned())
}

/// Reads a console until `/init` says that it runs; when it did, by the host's monotonic clock.
fn wait_for_init(console: impl Read + Send + 'static, limit: Duration) -> anyhow::Result<u64> {
    let (tell, told) = mpsc::channel();
    // Ends with the console, which ends with the VM. It reads on afterwards, so that the guest is
    // not held up by a full pipe.
    std::thread::spawn(move || {
        let mut reader = BufReader::new(console);
        let mut line = Vec::new();
        let mut last = Vec::new();
        loop {
            line.clear();
            match (&mut reader)
                .take(MAX_LINE_BYTES)
                .read_until(b'\n', &mut line)
            {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            if contains(&line, INIT_LINE.as_bytes()) {
                // The receiver may have given up.
                let _ = tell.send(Ok(monotonic_ns()));
            }
            std::mem::swap(&mut line, &mut last);
        }
        let _ = tell.send(Err(String::from_utf8_lossy(&last).trim().to_owned()));
    });
    let deadline = Instant::now() + limit;
    match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(at_ns)) => Ok(at_ns),
        Ok(Err(last)) => bail!("its console ended with: {last}"),
        Err(_) => bail!("not within {limit:?}"),
    }
}

fn contains(line: &[u8], wanted: &[u8]) -> bool {
    memchr::memmem::find(line, wanted).is_some()
}

/// Time between two moments, in microseconds.
fn us(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_of_init_is_found_among_others() {
        let console = format!("[0.1] Linux\r\n{INIT_LINE}\r\nmore\r\n");
        let before = monotonic_ns();
        let at = wait_for_init(std::io::Cursor::new(console), BOOT_TIME).unwrap();
        assert!(at >= before);
    }

    #[test]
    fn a_console_that_ends_is_told_with_its_last_line() {
        let console = std::io::Cursor::new("Kernel panic - not syncing\r\n");
        let error = wait_for_init(console, BOOT_TIME).unwrap_err().to_string();
        assert!(error.contains("panic"), "{error}");
    }
}
