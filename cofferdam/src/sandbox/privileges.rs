//! Capabilities, new privileges and resources (capabilities(7), prctl(2), setrlimit(2)).
//!
//! Capabilities and Landlock's domains belong to threads, and threads run already when everything
//! is opened: the one that takes signals, the one of recovery, those of wires. Each is sent a
//! signal whose handler gives up what is to be given up, and is waited for; threads that come later
//! inherit it.
//!
//! ```text
//!   enter ──► itself        gives up
//!         ──► thread 1 ◄─── SIGRTMIN+1: its handler gives up, counts
//!         ──► thread 2 ◄─── ...
//!         ──► are there others by now? again; none: done
//! ```

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// `CAP_IPC_LOCK` of linux/capability.h.
const CAP_IPC_LOCK: u64 = 14;

/// What the processes of VMs and device hosts keep, as bits: a device of the host that is passed on
/// has guest memory locked.
pub const KEPT: u64 = 1 << CAP_IPC_LOCK;

/// All capabilities: none is given up.
pub const ALL: u64 = u64::MAX;

/// Most descriptors of a process: some ten times what one with all NICs and clients uses.
const MAX_DESCRIPTORS: u64 = 8192;

/// How often the processor is left to a thread that is to give up something before it is looked
/// after.
const THREAD_YIELDS: usize = 100;

/// How long a thread may take to give up something: it may be in the kernel, locking memory.
const THREAD_TIME: Duration = Duration::from_secs(10);

/// Between two looks at it.
const THREAD_POLL: Duration = Duration::from_micros(50);

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h: 64 bits, in two parts.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// `PF_USER_WORKER` of linux/sched.h.
const PF_USER_WORKER: u64 = 0x4000;

/// There is no ruleset.
const NO_RULESET: i32 = -1;

/// What threads are to do and how far they are, for a handler of signals.
static KEEP: AtomicU64 = AtomicU64::new(ALL);
static RULESET: AtomicI32 = AtomicI32::new(NO_RULESET);
static DONE: AtomicUsize = AtomicUsize::new(0);
static FAILED: AtomicI32 = AtomicI32::new(0);
/// What may be in the bounding set of any thread, as far as it was taken out before there was a
/// second one.
static BOUNDED: AtomicU64 = AtomicU64::new(ALL);

/// `struct __user_cap_header_struct` of capget(2).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct` of capget(2), of which there are two.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Forbids core dumps, which would hold guest memory, and bounds the number of descriptors. Threads
/// are not bounded: `RLIMIT_NPROC` counts all processes of a user.
///
/// # Errors
/// The kernel refuses it.
pub fn limit_resources() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    let now = getrlimit(Resource::Nofile);
    let bounded = |limit: Option<u64>| Some(limit.unwrap_or(u64::MAX).min(MAX_DESCRIPTORS));
    let limit = Rlimit {
        current: bounded(now.current),
        maximum: bounded(now.maximum),
    };
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// Takes all capabilities but `keep` out of the bounding set while this is the only thread: those
/// that come later inherit it, so that none of them has to make forty calls of its own. What the
/// process has it keeps until [`drop_in_each_thread`].
pub fn bound_before_threads(keep: u64) {
    if drop_from_bounding_set(ALL, keep) && is_only_thread() {
        BOUNDED.store(keep, Ordering::SeqCst);
    }
}

/// Whether this process has one thread, which is the calling one.
fn is_only_thread() -> bool {
    let tasks = std::fs::read_dir("/proc/self/task");
    tasks.is_ok_and(|tasks| tasks.count() == 1)
}

/// Takes all capabilities of `among` but `keep` out of the calling thread's bounding set; `false`
/// if it has no right to. System calls only.
fn drop_from_bounding_set(among: u64, keep: u64) -> bool {
    for capability in (0..64).filter(|bit| among & !keep & (1 << bit) != 0) {
        // SAFETY: numbers only (prctl(2)).
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            // Behind the last one that this kernel has there is none.
            // SAFETY: errno is this thread's own.
            return unsafe { *libc::__errno_location() } == libc::EINVAL;
        }
    }
    true
}

/// What may be in the calling thread's bounding set. That the others were taken out is looked at by
/// one of them: a thread that did not inherit it (joining a user namespace fills the set) has that
/// one, too. System calls only.
fn may_be_bounding() -> u64 {
    let bounded = BOUNDED.load(Ordering::SeqCst);
    let taken = bounded.trailing_ones();
    // SAFETY: numbers only (prctl(2)).
    let is_there = bounded != ALL
        && unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(taken), 0, 0, 0) } != 0;
    match is_there {
        true => ALL,
        false => bounded,
    }
}

/// Has each thread of this process give up all capabilities but `keep` (bits by number), the right
/// to get others by running a program, and access to files that `ruleset` does not give.
///
/// # Errors
/// A thread could not, or does not answer a signal.
pub fn drop_in_each_thread(keep: u64, ruleset: Option<&OwnedFd>) -> io::Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _only = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    KEEP.store(keep, Ordering::SeqCst);
    RULESET.store(
        ruleset.map_or(NO_RULESET, AsRawFd::as_raw_fd),
        Ordering::SeqCst,
    );
    FAILED.store(0, Ordering::SeqCst);
    // Glibc has the first two real-time signals, and the first of the others kicks vCPUs.
    let signal = libc::SIGRTMIN() + 1;
    handle(signal, on_signal as *const () as usize)?;
    let mut result = give_up().map_err(io::Error::from_raw_os_error);
    if result.is_ok() {
        result = ask_others(signal);
    }
    // Nobody else sends it.
    handle(signal, libc::SIG_IGN)?;
    result?;
    match FAILED.load(Ordering::SeqCst) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Sends `signal` to all other threads, until there is none that has not had it, and waits for
/// each.
fn ask_others(signal: libc::c_int) -> io::Result<()> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let mut asked = BTreeSet::from([rustix::thread::gettid().as_raw_nonzero().get()]);
    loop {
        let new = threads(&asked)?;
        if new.is_empty() {
            return Ok(());
        }
        for thread in new {
            asked.insert(thread);
            let before = DONE.load(Ordering::SeqCst);
            // SAFETY: a system call with numbers only, about a thread of this process (tgkill(2)).
            let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
            if sent == 0 {
                wait_for(thread, before)?;
            } else if io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH) {
                return Err(io::Error::last_os_error());
            }
        }
    }
}

/// Waits until `thread` has done what it was asked for, when `before` threads had, or has ended.
fn wait_for(thread: i32, before: usize) -> io::Result<()> {
    let deadline = Instant::now() + THREAD_TIME;
    let task = format!("/proc/self/task/{thread}");
    // It takes the signal as soon as it has a processor; for long, or for ever, one that works in
    // the kernel or has ended.
    for _ in 0..THREAD_YIELDS {
        if DONE.load(Ordering::SeqCst) != before {
            return Ok(());
        }
        std::thread::yield_now();
    }
    while DONE.load(Ordering::SeqCst) == before {
        if !Path::new(&task).try_exists()? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(THREAD_POLL);
    }
    Ok(())
}

/// The threads of this process that run its program, but for those of `asked`.
fn threads(asked: &BTreeSet<i32>) -> io::Result<BTreeSet<i32>> {
    let tasks = std::fs::read_dir("/proc/self/task")?;
    let mut threads = BTreeSet::new();
    for task in tasks {
        let task = task?;
        let name = task.file_name();
        let number = name.to_str().and_then(|name| name.parse::<i32>().ok());
        let number = number.filter(|number| !asked.contains(number));
        if number.is_some() && !is_of_the_kernel(&task.path()) {
            threads.extend(number);
        }
    }
    Ok(threads)
}

/// Whether it is a thread that the kernel runs for this process, as KVM's that splits large pages:
/// it takes no signals.
fn is_of_the_kernel(task: &Path) -> bool {
    // The ninth field, the seventh behind the name in parentheses (proc_pid_stat(5)). Without it
    // the thread has ended.
    let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
    let flags = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(6));
    let flags = flags.and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_USER_WORKER != 0)
}

fn handle(signal: libc::c_int, handler: usize) -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler is a function that takes a signal's
    // number and calls only what is safe in one, or SIG_IGN.
    let failed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut()) != 0
    };
    match failed {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

extern "C" fn on_signal(_signal: libc::c_int) {
    // SAFETY: errno is this thread's own, and whoever was interrupted may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    if let Err(error) = give_up() {
        FAILED.store(error, Ordering::SeqCst);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    DONE.fetch_add(1, Ordering::SeqCst);
}

/// What one thread does. System calls only: it may be a handler of a signal. An error is an
/// `errno`.
fn give_up() -> Result<(), i32> {
    // SAFETY: numbers only; the last argument of each is not used (prctl(2)).
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    let keep = KEEP.load(Ordering::SeqCst);
    if keep != ALL {
        drop_capabilities(keep)?;
    }
    let ruleset = RULESET.load(Ordering::SeqCst);
    if ruleset != NO_RULESET {
        // SAFETY: numbers only; the descriptor is open, as the caller of `drop_in_each_thread`
        // waits (landlock(7)).
        check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0) })?;
    }
    Ok(())
}

fn drop_capabilities(keep: u64) -> Result<(), i32> {
    // The bounding set needs a right that an ordinary user has not, who has no capabilities either.
    drop_from_bounding_set(may_be_bounding(), keep);
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: numbers only; kernels before 4.3 have no such set (prctl(2)).
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) };
    let mut header = CapabilityHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: the header says that there are two parts of data, which the kernel writes
    // (capget(2)).
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    for (index, part) in data.iter_mut().enumerate() {
        let keep = (keep >> (32 * index)) as u32;
        part.permitted &= keep;
        part.effective = part.permitted;
        part.inheritable = 0;
    }
    // SAFETY: as above; the kernel reads both.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

fn check(result: libc::c_long) -> Result<(), i32> {
    match result {
        // SAFETY: errno is this thread's own.
        -1 => Err(unsafe { *libc::__errno_location() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the calling thread's bounding set has `CAP_CHOWN`, the first capability.
    fn has_chown() -> bool {
        // SAFETY: numbers only (prctl(2)).
        unsafe { libc::prctl(libc::PR_CAPBSET_READ, 0, 0, 0, 0) == 1 }
    }

    /// In threads of their own, whose sets go with them.
    fn in_a_thread<T: Send + 'static>(work: fn() -> T) -> T {
        std::thread::spawn(work).join().unwrap()
    }

    #[test]
    fn that_a_bounding_set_was_emptied_before_is_looked_at_by_each_thread() {
        // There are other threads, which keep theirs.
        in_a_thread(|| bound_before_threads(KEPT));
        assert_eq!(BOUNDED.load(Ordering::SeqCst), ALL);
        assert_eq!(in_a_thread(may_be_bounding), ALL);
        // One that has a full set all the same does not believe it.
        BOUNDED.store(KEPT, Ordering::SeqCst);
        let (before, at_first, dropped, after, at_last) = in_a_thread(|| {
            let (before, at_first) = (has_chown(), may_be_bounding());
            let dropped = drop_from_bounding_set(at_first, KEPT);
            (before, at_first, dropped, has_chown(), may_be_bounding())
        });
        BOUNDED.store(ALL, Ordering::SeqCst);
        let expected = |is_there| if is_there { ALL } else { KEPT };
        assert_eq!(at_first, expected(before));
        assert_eq!(after, before && !dropped);
        assert_eq!(at_last, expected(after));
    }
}
