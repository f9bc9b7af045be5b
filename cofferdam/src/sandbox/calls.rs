//! System calls by name: those that a machine's process and a device host make once they are set
//! up, and those that nobody of ours makes.
//!
//! The first list was written from traces of the tests of all crates (`strace -f`) and from the
//! source. What is in neither is refused as well; the second is what the service refuses, and what
//! a person is told by name.

/// A system call's name, with `SYS_` before it, and its number.
pub type Call = (&'static str, i64);

macro_rules! calls {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name)),*] };
}

/// Calls that may be made with any arguments.
pub const ALLOWED: &[Call] = calls!(
    // Descriptors.
    SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev
    SYS_preadv2 SYS_pwritev2 SYS_close SYS_close_range SYS_lseek SYS_dup SYS_dup2 SYS_dup3
    SYS_pipe SYS_pipe2 SYS_poll SYS_ppoll SYS_select SYS_pselect6 SYS_epoll_create1
    SYS_epoll_ctl SYS_epoll_wait SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2
    SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime SYS_copy_file_range SYS_sendfile
    SYS_splice
    // Files and folders; which ones is for Landlock.
    SYS_open SYS_openat SYS_openat2 SYS_stat SYS_lstat SYS_fstat SYS_newfstatat SYS_statx
    SYS_statfs SYS_fstatfs SYS_access SYS_faccessat SYS_faccessat2 SYS_readlink SYS_readlinkat
    SYS_getcwd SYS_getdents64 SYS_mkdir SYS_mkdirat SYS_rmdir SYS_unlink SYS_unlinkat
    SYS_rename SYS_renameat SYS_renameat2 SYS_ftruncate SYS_fallocate SYS_fsync SYS_fdatasync
    SYS_sync_file_range SYS_fadvise64 SYS_flock SYS_umask
    SYS_memfd_create
    // Sockets that there are; new ones are looked at.
    SYS_connect SYS_accept SYS_accept4 SYS_bind SYS_listen SYS_shutdown SYS_getsockname
    SYS_getpeername SYS_getsockopt SYS_setsockopt SYS_sendto SYS_recvfrom SYS_sendmsg
    SYS_recvmsg SYS_sendmmsg SYS_recvmmsg
    // Memory that cannot be executed.
    SYS_brk SYS_munmap SYS_mremap SYS_madvise SYS_mincore SYS_msync
    // Threads, their signals and time.
    SYS_futex SYS_futex_waitv SYS_set_robust_list SYS_get_robust_list SYS_set_tid_address SYS_rseq
    SYS_membarrier SYS_sched_yield SYS_sched_getaffinity SYS_getcpu SYS_gettid SYS_getpid
    SYS_getppid SYS_getpgrp SYS_getpgid SYS_getsid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigtimedwait
    SYS_rt_sigsuspend SYS_sigaltstack SYS_restart_syscall SYS_pause SYS_nanosleep
    SYS_clock_nanosleep SYS_clock_gettime SYS_clock_getres SYS_gettimeofday SYS_time SYS_exit
    SYS_exit_group
    // What there is.
    SYS_getrandom SYS_getrlimit SYS_getrusage SYS_times SYS_sysinfo SYS_uname SYS_capget
    // Only ever gives up more.
    SYS_seccomp
);

/// Calls that look as if this kernel did not have them: who makes them does something else then,
/// which can be looked at (`clone` in place of `clone3`, whose flags are in memory), or does
/// without (guest memory with huge pages).
pub const ABSENT: &[Call] = calls!(SYS_clone3 SYS_fsopen SYS_fsconfig SYS_fsmount);

/// Calls that only a process which was taken over would make. The service, whose guests inherit its
/// filter, refuses these.
pub const FORBIDDEN: &[Call] = calls!(
    // Other processes.
    SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_pidfd_getfd SYS_kcmp
    SYS_process_madvise SYS_perf_event_open
    // The kernel.
    SYS_init_module SYS_finit_module SYS_delete_module SYS_kexec_load SYS_kexec_file_load SYS_bpf
    SYS_reboot SYS_syslog SYS_userfaultfd SYS_io_uring_setup SYS_io_uring_enter
    SYS_io_uring_register SYS_add_key SYS_request_key SYS_keyctl SYS_personality SYS_iopl
    SYS_ioperm SYS_modify_ldt SYS_acct SYS_quotactl SYS_swapon SYS_swapoff SYS_lookup_dcookie
    SYS_sethostname SYS_setdomainname SYS_settimeofday SYS_clock_settime SYS_clock_adjtime
    SYS_adjtimex SYS_vhangup SYS_uselib SYS_nfsservctl
    // Namespaces and file systems.
    SYS_setns SYS_unshare SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_move_mount
    SYS_open_tree SYS_fspick SYS_mount_setattr SYS_open_by_handle_at SYS_name_to_handle_at
    SYS_mknod SYS_mknodat
    // Who one is.
    SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setgroups
    SYS_setfsuid SYS_setfsgid SYS_capset
);

/// Those of them that a guest's process makes before it is set up, where it is to be in a jail.
pub const FOR_JAILS: &[Call] = calls!(
    SYS_unshare SYS_mount SYS_umount2 SYS_pivot_root SYS_move_mount SYS_open_tree SYS_mount_setattr
);

/// The one that a guest's process makes at its start where it goes on from a snapshot lazily: by it
/// pages of the snapshot come when the guest is isolated.
pub const FOR_LAZY: &[Call] = calls!(SYS_userfaultfd);

/// Calls that a guest's process does not make and the service does, for it starts programs.
const OF_THE_SERVICE: &[Call] =
    calls!(SYS_execve SYS_execveat SYS_fork SYS_vfork SYS_wait4 SYS_waitid);

/// Calls of which only some are refused.
const LOOKED_AT: &[Call] = calls!(
    SYS_ioctl SYS_mmap SYS_mprotect SYS_clone SYS_socket SYS_socketpair SYS_prctl SYS_kill SYS_tgkill SYS_fcntl
    SYS_prlimit64
);

/// The name of call `number`, if it is in one of the lists. Safe in a signal handler.
pub fn name_of(number: i64) -> Option<&'static str> {
    [FORBIDDEN, OF_THE_SERVICE, LOOKED_AT, ALLOWED, ABSENT]
        .iter()
        .flat_map(|list| list.iter())
        .find(|(_, listed)| *listed == number)
        .and_then(|(name, _)| name.strip_prefix("SYS_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_in_two_lists() {
        let lists = [FORBIDDEN, OF_THE_SERVICE, LOOKED_AT, ALLOWED, ABSENT];
        let mut numbers: Vec<_> = lists.concat().iter().map(|(_, number)| *number).collect();
        let all = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), all);
        assert_eq!(name_of(libc::SYS_execve), Some("execve"));
        assert_eq!(name_of(-1), None);
    }
}
