//! `/dev/kvm`: whether it can be used, what it offers of what we use, and how fast it is.

use kvm_bindings as kb;
use kvm_ioctls::Kvm;

use super::report::Check;
use super::speed::{self, SecondStage, Speed};

/// What was found.
pub struct Findings {
    /// For the report.
    pub checks: Vec<Check>,
    /// Absent where no VM could be run.
    pub speed: Option<Speed>,
}

/// What a capability is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Every guest.
    Guests,
    /// Driver isolation.
    Isolation,
    /// Snapshots and commits of large guests.
    Dirty,
}

/// Name as in the kernel's `Documentation/virt/kvm/api.rst`, number, use.
const CAPABILITIES: &[(&str, u32, Use)] = &[
    ("USER_MEMORY", kb::KVM_CAP_USER_MEMORY, Use::Guests),
    ("IRQCHIP", kb::KVM_CAP_IRQCHIP, Use::Guests),
    ("SET_TSS_ADDR", kb::KVM_CAP_SET_TSS_ADDR, Use::Guests),
    ("EXT_CPUID", kb::KVM_CAP_EXT_CPUID, Use::Guests),
    ("IRQ_ROUTING", kb::KVM_CAP_IRQ_ROUTING, Use::Guests),
    ("IRQFD", kb::KVM_CAP_IRQFD, Use::Guests),
    ("IOEVENTFD", kb::KVM_CAP_IOEVENTFD, Use::Guests),
    ("IMMEDIATE_EXIT", kb::KVM_CAP_IMMEDIATE_EXIT, Use::Guests),
    ("READONLY_MEM", kb::KVM_CAP_READONLY_MEM, Use::Isolation),
    ("SYNC_REGS", kb::KVM_CAP_SYNC_REGS, Use::Isolation),
    (
        "X86_USER_SPACE_MSR",
        kb::KVM_CAP_X86_USER_SPACE_MSR,
        Use::Isolation,
    ),
    ("X86_MSR_FILTER", kb::KVM_CAP_X86_MSR_FILTER, Use::Isolation),
    (
        "MANUAL_DIRTY_LOG_PROTECT2",
        kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        Use::Dirty,
    ),
    ("DIRTY_LOG_RING", kb::KVM_CAP_DIRTY_LOG_RING, Use::Dirty),
];

/// The only version there is (`KVM_GET_API_VERSION`).
const API_VERSION: i32 = 12;

/// Opens `/dev/kvm`, asks it and runs a guest on it.
pub fn examine() -> Findings {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(check) => {
            let speed =
                Check::missing("second stage", "not measured", "make /dev/kvm usable first");
            return Findings {
                checks: vec![check, speed],
                speed: None,
            };
        }
    };
    let device = Check::good("/dev/kvm", format!("usable, API version {API_VERSION}"));
    let present = |number: u32| kvm.check_extension_raw(u64::from(number)) > 0;
    let capabilities = capabilities(&present);
    let (speed_check, speed) = match speed::measure(&kvm) {
        Ok(speed) => (second_stage(&speed), Some(speed)),
        Err(error) => {
            let advice = "this KVM cannot run a guest of ten instructions: look into the host's kernel messages, \
                          and use the lab";
            (Check::missing("second stage", error, advice), None)
        }
    };
    Findings {
        checks: vec![device, speed_check, capabilities],
        speed,
    }
}

fn open() -> Result<Kvm, Check> {
    let name = "/dev/kvm";
    let kvm = Kvm::new().map_err(|error| {
        let (found, advice) = match error.errno() {
            libc::ENOENT => (
                "there is none".into(),
                "switch on virtualisation in the firmware, load kvm_intel or kvm_amd, or use the lab",
            ),
            libc::EACCES | libc::EPERM => {
                ("no permission to open it".into(), "run as root, or join the group that owns it (often kvm)")
            }
            libc::ENXIO | libc::ENODEV => (
                "the device file is there, but no hypervisor behind it".into(),
                "load kvm_intel or kvm_amd; in a VM, ask for nested virtualisation; or use the lab",
            ),
            _ => (format!("cannot be opened: {error}"), "look into the host's kernel messages, or use the lab"),
        };
        Check::missing(name, found, advice)
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(Check::missing(
            name,
            format!("API version {other} instead of {API_VERSION}"),
            "use a Linux kernel of this century",
        )),
    }
}

fn capabilities(present: &dyn Fn(u32) -> bool) -> Check {
    let missing = |wanted: Use| -> Vec<&str> {
        CAPABILITIES
            .iter()
            .filter(|(_, number, used)| *used == wanted && !present(*number))
            .map(|(name, ..)| *name)
            .collect()
    };
    let name = "capabilities";
    let (guests, isolation, dirty) = (
        missing(Use::Guests),
        missing(Use::Isolation),
        missing(Use::Dirty),
    );
    let all = [guests.as_slice(), &isolation, &dirty].concat();
    let found = format!("missing: {}", all.join(", "));
    let advice = "use a host kernel of 5.11 or newer";
    if !guests.is_empty() {
        Check::missing(name, found, format!("no guest can run; {advice}"))
    } else if !isolation.is_empty() {
        Check::limited(
            name,
            found,
            format!("guests run, drivers cannot be isolated; {advice}"),
        )
    } else if !dirty.is_empty() {
        Check::limited(
            name,
            found,
            format!("everything runs, large guests are slower to save; {advice}"),
        )
    } else {
        Check::good(
            name,
            format!("all {} that are used are there", CAPABILITIES.len()),
        )
    }
}

fn second_stage(speed: &Speed) -> Check {
    let numbers = format!(
        "{:.1} ns a kernel instruction, {:.1} us an exit, {:.1} us a CR3 write",
        speed.ns_per_instruction,
        speed.exit_ns / 1000.0,
        speed.cr3_write_ns / 1000.0
    );
    let name = "second stage";
    match speed.second_stage {
        SecondStage::Hardware => Check::good(name, format!("in hardware ({numbers})")),
        SecondStage::Shadow => Check::limited(
            name,
            format!("shadow page tables ({numbers})"),
            "guests run, isolation is slow: switch on kvm_intel.ept or kvm_amd.npt if the processor has it",
        ),
        SecondStage::Emulated => Check::limited(
            name,
            format!("none: guest kernel mode is emulated ({numbers})"),
            "a Linux boot would take many minutes: use the lab, or a host with EPT or NPT",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::State;
    use super::*;

    #[test]
    fn missing_capabilities_are_named_and_weighed() {
        let without = |gone: &'static [u32]| capabilities(&move |number| !gone.contains(&number));
        assert_eq!(without(&[]).state, State::Good);
        let dirty = without(&[kb::KVM_CAP_DIRTY_LOG_RING]);
        assert_eq!(dirty.state, State::Limited);
        assert!(dirty.found.contains("DIRTY_LOG_RING"));
        let isolation = without(&[kb::KVM_CAP_SYNC_REGS, kb::KVM_CAP_DIRTY_LOG_RING]);
        assert!(isolation.advice.unwrap().contains("isolated"));
        assert_eq!(without(&[kb::KVM_CAP_IRQFD]).state, State::Missing);
    }
}
