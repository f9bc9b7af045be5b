//! Boots a kernel on this terminal: `boot KERNEL [INITRD] [MIB] [VCPUS] [COMMAND LINE]`. Prints the
//! machine's figures at its end.

use devices::serial::SerialBackend;
use vmm::{DEFAULT_COMMAND_LINE, OnGuestReset, Payload, Vm, VmConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let start = devices::clock::monotonic_ns();
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("give a kernel")?.into();
    let initrd = arguments
        .next()
        .filter(|path| !path.is_empty())
        .map(Into::into);
    let mib: u64 = arguments.next().as_deref().unwrap_or("256").parse()?;
    let vcpus = arguments.next().as_deref().unwrap_or("1").parse()?;
    let extra = arguments.next().unwrap_or_default();
    let mut vm = Vm::new(VmConfig {
        memory_bytes: mib << 20,
        vcpus,
        payload: Payload::Linux {
            kernel,
            initrd,
            cmdline: format!("{DEFAULT_COMMAND_LINE} {extra}"),
        },
        console: SerialBackend::stdio()?,
        on_guest_reset: match std::env::var_os("EXIT_ON_RESET") {
            Some(_) => OnGuestReset::Exit,
            None => OnGuestReset::Restart,
        },
    })?;
    let handle = vm.handle();
    let reason = vm.run();
    let status = handle.status();
    let entered = status.first_entry_ns.unwrap_or(start) - start;
    let took = devices::clock::monotonic_ns() - start;
    eprintln!(
        "{reason:?} after {} ms, entered after {} us",
        took / 1_000_000,
        entered / 1000
    );
    for line in std::fs::read_to_string("/proc/self/smaps_rollup")?.lines() {
        if line.starts_with("Rss") || line.starts_with("Pss_Shmem") || line.starts_with("Pss_Anon")
        {
            eprintln!("{line}");
        }
    }
    eprintln!("{status:?}");
    reason?;
    Ok(())
}
