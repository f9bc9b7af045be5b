//! Filters of system calls (seccomp(2)).
//!
//! | filter | of | what it does with a call |
//! | --- | --- | --- |
//! | machine | all threads of a VM's process or device host | what is in no list ends the process |
//! | absent | the same, and the service | some calls fail as on a kernel without them |
//! | vCPU | a vCPU's thread, on top | sockets that others could reach, locks and terminals end the process |
//! | service | the service and the guests that it starts | what nobody of ours does ends the process |
//!
//! The kernel asks all filters that a thread has, and does the strictest of what they say. A call
//! that may be made with any arguments is found in a table of the kernel's without running them;
//! `KVM_RUN`, an `ioctl`, runs them at every exit, and is the first that is looked for.
//!
//! A refused call raises `SIGSYS`, which ends the process with a line that names it
//! ([`super::refusal`]): a process that makes such a call is not ours any more, or our list has a
//! hole that somebody has to hear of. Neither is helped by an error that the caller may not look
//! at.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};

use super::calls::{ABSENT, ALLOWED, Call, FOR_JAILS, FOR_LAZY, FORBIDDEN};
use super::{Guests, Mode};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be compiled.
    #[error(transparent)]
    Compile(#[from] BackendError),
    /// The host's kernel has no seccomp.
    #[error("{0}")]
    Missing(io::Error),
    /// The kernel refuses it.
    #[error(transparent)]
    Refused(seccompiler::Error),
}

/// Rules for each system call; without any it is met whatever its arguments are.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A compiled filter.
#[derive(Debug, Clone)]
pub struct Program(Arc<BpfProgram>);

impl Program {
    fn new(rules: Rules, otherwise: SeccompAction, met: SeccompAction) -> Result<Self, Error> {
        let filter = SeccompFilter::new(rules, otherwise, met, TargetArch::x86_64)?;
        Ok(Self(Arc::new(filter.try_into()?)))
    }

    /// Adds the filter to the calling thread, for ever.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn apply_to_this_thread(&self) -> io::Result<()> {
        apply_filter(&self.0).map_err(io::Error::other)
    }

    fn apply_to_all_threads(&self) -> Result<(), Error> {
        apply_filter_all_threads(&self.0).map_err(|error| match error {
            // ENOSYS without seccomp(2), EINVAL without filters.
            seccompiler::Error::Seccomp(error)
                if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) =>
            {
                Error::Missing(error)
            }
            error => Error::Refused(error),
        })
    }
}

/// The filters of a process.
#[derive(Debug)]
pub struct Filters {
    /// Of all threads, in this order.
    all: Vec<Program>,
    vcpu: Option<Program>,
}

impl Filters {
    /// Those of a VM's process or a device host: of this very process, for it may send signals to
    /// itself only.
    ///
    /// # Errors
    /// They cannot be compiled.
    pub fn of_a_machine(mode: Mode) -> Result<Self, Error> {
        let mut all = Vec::new();
        if mode != Mode::Log {
            all.push(absent(ABSENT)?);
        }
        all.push(Program::new(
            machine()?,
            refused(mode),
            SeccompAction::Allow,
        )?);
        let vcpu = Program::new(not_of_a_vcpu()?, SeccompAction::Allow, refused(mode))?;
        Ok(Self {
            all,
            vcpu: Some(vcpu),
        })
    }

    /// Those of the service.
    ///
    /// # Errors
    /// As [`Self::of_a_machine`].
    pub fn of_the_service(mode: Mode, guests: Guests) -> Result<Self, Error> {
        let mut all = Vec::new();
        if mode != Mode::Log {
            let clone3: Vec<Call> = ABSENT
                .iter()
                .filter(|(_, number)| *number == libc::SYS_clone3)
                .copied()
                .collect();
            all.push(absent(&clone3)?);
        }
        all.push(Program::new(
            service(guests)?,
            SeccompAction::Allow,
            refused(mode),
        )?);
        Ok(Self { all, vcpu: None })
    }

    /// Adds them to all threads of the process, for ever. Returns what is for vCPUs.
    ///
    /// # Errors
    /// The kernel refuses one.
    pub fn apply_to_all_threads(self) -> Result<Option<Program>, Error> {
        for program in &self.all {
            program.apply_to_all_threads()?;
        }
        Ok(self.vcpu)
    }
}

/// What becomes of a call that is not to be made.
fn refused(mode: Mode) -> SeccompAction {
    match mode {
        Mode::Log => SeccompAction::Log,
        Mode::On | Mode::Off => SeccompAction::Trap,
    }
}

fn absent(calls: &[Call]) -> Result<Program, Error> {
    let rules = calls.iter().map(|(_, number)| (*number, Vec::new()));
    let error = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Program::new(rules.collect(), SeccompAction::Allow, error)
}

/// A condition on the low half of argument `index`, which is all that the kernel looks at in an
/// `int`.
fn low(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
}

/// Argument `index` is one of `values`.
fn one_of(index: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rules = values
        .iter()
        .map(|value| SeccompRule::new(vec![low(index, SeccompCmpOp::Eq, *value)?]));
    rules.collect()
}

/// Of the bits `mask` of argument `index`, those of `value` are set and no other.
fn bits(index: u8, mask: u64, value: u64) -> Result<Vec<SeccompRule>, BackendError> {
    let condition = low(index, SeccompCmpOp::MaskedEq(mask), value)?;
    Ok(vec![SeccompRule::new(vec![condition])?])
}

/// A constant of the C library as the kernel sees it: no sign is extended.
const fn number(value: i32) -> u64 {
    value.cast_unsigned() as u64
}

/// The part of an `ioctl` request that says whose it is (`_IOC_TYPE` of asm-generic/ioctl.h).
const IOCTL_TYPE: u64 = 0xff00;
/// `KVMIO` of linux/kvm.h.
const KVM: u64 = 0xae00;
/// `VFIO_TYPE` of linux/vfio.h.
const VFIO: u64 = 0x3b00;
/// `UFFDIO_REGISTER`, `UFFDIO_UNREGISTER`, `UFFDIO_WAKE` and `UFFDIO_COPY` of linux/userfaultfd.h:
/// what is done with a descriptor that was opened before.
const USERFAULT: [u64; 4] = [0xc020_aa00, 0x8010_aa01, 0x8010_aa02, 0xc028_aa03];
/// `TUNSETIFF` of linux/if_tun.h.
const TUNSETIFF: u64 = 0x4004_54ca;
/// `TCGETS2` and the three `TCSETS2` of asm-generic/ioctls.h, which newer C libraries use.
const TERMIOS2: [u64; 4] = [0x802c_542a, 0x402c_542b, 0x402c_542c, 0x402c_542d];

/// Requests to descriptors, terminals and TAPs: among those of terminals not `TIOCSTI`, which types
/// for the user.
const REQUESTS: [u64; 11] = [
    libc::FIONBIO,
    libc::FIOCLEX,
    libc::FIONCLEX,
    libc::FIONREAD,
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TIOCGPGRP,
    libc::TIOCGWINSZ,
    TUNSETIFF,
];

/// `PR_GET_AUXV` of linux/prctl.h, by which `rustix` learns the size of pages.
const PR_GET_AUXV: u64 = 0x4155_5856;

/// Options of `prctl`: names of threads and mappings, huge pages, and what only gives up more.
const OPTIONS: [u64; 9] = [
    PR_GET_AUXV,
    number(libc::PR_SET_NAME),
    number(libc::PR_GET_NAME),
    number(libc::PR_SET_THP_DISABLE),
    number(libc::PR_GET_THP_DISABLE),
    number(libc::PR_SET_NO_NEW_PRIVS),
    number(libc::PR_GET_NO_NEW_PRIVS),
    number(libc::PR_GET_SECCOMP),
    number(libc::PR_SET_VMA),
];

/// Commands of `fcntl`: not those that have signals sent to a process of one's choice (`F_SETOWN`).
const COMMANDS: [u64; 16] = [
    number(libc::F_DUPFD),
    number(libc::F_DUPFD_CLOEXEC),
    number(libc::F_GETFD),
    number(libc::F_SETFD),
    number(libc::F_GETFL),
    number(libc::F_SETFL),
    number(libc::F_GETLK),
    number(libc::F_SETLK),
    number(libc::F_SETLKW),
    number(libc::F_OFD_GETLK),
    number(libc::F_OFD_SETLK),
    number(libc::F_OFD_SETLKW),
    number(libc::F_GETPIPE_SZ),
    number(libc::F_SETPIPE_SZ),
    number(libc::F_ADD_SEALS),
    number(libc::F_GET_SEALS),
];

/// Flags of `clone` that make namespaces.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// What the process of a VM or a device host does.
fn machine() -> Result<Rules, BackendError> {
    let plain = ALLOWED.iter().chain(ABSENT);
    let mut rules: Rules = plain.map(|(_, number)| (*number, Vec::new())).collect();
    let mut ioctl = bits(1, IOCTL_TYPE, KVM)?;
    ioctl.extend(bits(1, IOCTL_TYPE, VFIO)?);
    ioctl.extend(one_of(1, &USERFAULT)?);
    ioctl.extend(one_of(1, &REQUESTS)?);
    ioctl.extend(one_of(1, &TERMIOS2)?);
    let own = u64::from(std::process::id());
    let executable = number(libc::PROT_EXEC);
    let unix = number(libc::AF_UNIX);
    // With a null pointer limits are read.
    let no_new_limit = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.extend([
        (libc::SYS_ioctl, ioctl),
        (libc::SYS_mmap, bits(2, executable, 0)?),
        (libc::SYS_mprotect, bits(2, executable, 0)?),
        (libc::SYS_clone, thread_only()?),
        (libc::SYS_socket, one_of(0, &[unix])?),
        (libc::SYS_socketpair, one_of(0, &[unix])?),
        (libc::SYS_prctl, one_of(0, &OPTIONS)?),
        (libc::SYS_fcntl, one_of(1, &COMMANDS)?),
        (libc::SYS_kill, one_of(0, &[own])?),
        (libc::SYS_tgkill, one_of(0, &[own])?),
        (
            libc::SYS_prlimit64,
            vec![SeccompRule::new(vec![no_new_limit])?],
        ),
    ]);
    Ok(rules)
}

/// `clone` that makes a thread of this process.
fn thread_only() -> Result<Vec<SeccompRule>, BackendError> {
    let thread = number(libc::CLONE_THREAD);
    bits(0, thread | number(NAMESPACES), thread)
}

/// What the thread of a vCPU leaves to others.
fn not_of_a_vcpu() -> Result<Rules, BackendError> {
    let mut requests = vec![TUNSETIFF, libc::TCSETS, libc::TCSETSW, libc::TCSETSF];
    requests.extend(&TERMIOS2[1..]);
    Ok(Rules::from([
        (libc::SYS_bind, Vec::new()),
        (libc::SYS_listen, Vec::new()),
        (libc::SYS_socketpair, Vec::new()),
        (libc::SYS_flock, Vec::new()),
        (libc::SYS_ioctl, one_of(1, &requests)?),
    ]))
}

/// `__X32_SYSCALL_BIT` of asm/unistd.h: the same calls by other numbers, where the kernel has them.
const X32: i64 = 0x4000_0000;

/// What the service and its guests do not.
fn service(guests: Guests) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let is_made = |call: &Call| {
        FOR_LAZY.contains(call) || (guests == Guests::Jailed && FOR_JAILS.contains(call))
    };
    let refused = FORBIDDEN.iter().filter(|call| !is_made(call));
    for (_, number) in refused.filter(|(_, n)| *n != libc::SYS_capset) {
        rules.insert(*number, Vec::new());
        rules.insert(*number | X32, Vec::new());
    }
    // Each namespace by itself: a filter looks whether bits are as given, not whether any is set.
    for namespace in (0..32)
        .map(|bit| 1_u64 << bit)
        .filter(|bit| bit & number(NAMESPACES) != 0)
    {
        for call in [libc::SYS_clone, libc::SYS_clone | X32] {
            rules
                .entry(call)
                .or_default()
                .extend(bits(0, namespace, namespace)?);
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_filters_can_be_compiled_and_are_short_enough_for_the_kernel() {
        for mode in [Mode::On, Mode::Log] {
            for filters in [
                Filters::of_a_machine(mode),
                Filters::of_the_service(mode, Guests::Free),
                Filters::of_the_service(mode, Guests::Jailed),
            ] {
                let filters = filters.unwrap();
                for program in filters.all.iter().chain(&filters.vcpu) {
                    // BPF_MAXINSNS of linux/bpf_common.h.
                    assert!(program.0.len() < 4096);
                }
            }
        }
    }

    #[test]
    fn the_service_refuses_all_but_what_jails_and_lazy_guests_are_made_with() {
        let [free, jailed] = [Guests::Free, Guests::Jailed].map(|guests| service(guests).unwrap());
        for call in FOR_JAILS {
            assert!(FORBIDDEN.contains(call) && free.contains_key(&call.1));
            assert!(!jailed.contains_key(&call.1));
        }
        for call in FOR_LAZY {
            assert!(FORBIDDEN.contains(call) && !machine().unwrap().contains_key(&call.1));
            assert!(!free.contains_key(&call.1) && !jailed.contains_key(&call.1));
        }
        for number in [
            libc::SYS_setns,
            libc::SYS_ptrace,
            libc::SYS_chroot,
            libc::SYS_clone,
        ] {
            assert!(jailed.contains_key(&number));
        }
    }

    #[test]
    fn a_forbidden_call_is_not_allowed_by_any_way() {
        let rules = machine().unwrap();
        for (name, number) in FORBIDDEN {
            assert!(!rules.contains_key(number), "{name}");
        }
        assert!(!rules.contains_key(&libc::SYS_execve));
    }
}
