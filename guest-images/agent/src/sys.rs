//! System calls that have no safe wrapper elsewhere, and clocks. The only `unsafe` of the agent.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use agent_protocol::Stamp;
use agent_protocol::message::Ipv4;
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Now, on both clocks.
pub fn stamp() -> Stamp {
    Stamp {
        mono_ns: nanoseconds(clock_gettime(ClockId::Monotonic)),
        real_ns: nanoseconds(clock_gettime(ClockId::Realtime)),
    }
}

/// Sets the real time.
pub fn set_time(real_ns: u64) -> io::Result<()> {
    let seconds = i64::try_from(real_ns / 1_000_000_000)
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: (real_ns % 1_000_000_000) as _,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

fn nanoseconds(time: Timespec) -> u64 {
    let (seconds, rest) = (
        u64::try_from(time.tv_sec).unwrap_or(0),
        u64::try_from(time.tv_nsec).unwrap_or(0),
    );
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// Whether a signal has asked this process to come to its end ([`hear_of_signals`]).
static IS_ASKED_TO_END: AtomicBool = AtomicBool::new(false);

/// From now on `SIGINT` and `SIGTERM` end nothing by themselves: [`is_asked_to_end`] tells of them.
/// System calls that wait go on waiting.
pub fn hear_of_signals() -> io::Result<()> {
    extern "C" fn note(_: libc::c_int) {
        IS_ASKED_TO_END.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: all zeros is a valid `sigaction`, the handler only stores to an atomic, and the
        // old action is not asked for.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether one of the signals of [`hear_of_signals`] has come.
pub fn is_asked_to_end() -> bool {
    IS_ASKED_TO_END.load(Ordering::Relaxed)
}

/// Makes the program start with no signal blocked: std lets it inherit the mask of the thread that
/// starts it, and a shell that has `SIGCHLD` blocked waits for ever for its children.
pub fn start_with_signals_free(command: &mut Command) {
    let free = || {
        // SAFETY: sigemptyset initialises the set before it is used, and the old mask is not asked
        // for.
        let done = unsafe {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut())
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec only a system call is made.
    unsafe { command.pre_exec(free) };
}

/// Makes the program start in the root directory `root` and there in `directory`.
pub fn start_in(command: &mut Command, root: Option<String>, directory: Option<String>) {
    if root.is_none() && directory.is_none() {
        return;
    }
    let enter = move || {
        if let Some(root) = &root {
            rustix::process::chroot(root.as_str())?;
            rustix::process::chdir("/")?;
        }
        if let Some(directory) = &directory {
            rustix::process::chdir(directory.as_str())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made; rustix puts such paths on the
    // stack, and for one too long for that it allocates, which glibc allows after fork.
    unsafe { command.pre_exec(enter) };
}

/// Signals that end or concern process 1. They are blocked, for [`wait_signal`] to take.
pub const INIT_SIGNALS: [i32; 5] = [
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

fn init_signal_set() -> libc::sigset_t {
    // SAFETY: sigemptyset initialises the whole set, and the signal numbers are valid.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in INIT_SIGNALS {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// Blocks [`INIT_SIGNALS`] in this thread. What it starts inherits that: see
/// [`start_with_signals_free`].
pub fn block_init_signals() {
    let set = init_signal_set();
    // SAFETY: the set is initialised, the old one is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
}

/// Waits for one of [`INIT_SIGNALS`].
pub fn wait_signal() -> io::Result<i32> {
    let set = init_signal_set();
    let mut signal = 0;
    // SAFETY: both pointers are to live variables.
    match unsafe { libc::sigwait(&set, &mut signal) } {
        0 => Ok(signal),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// `struct ifreq` with the interface's name and nothing else.
fn request(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is integers and arrays of them: all zero is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = interface.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "this is no interface's name",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

fn control<T>(socket: &OwnedFd, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller in this file passes the structure that the request number is documented
    // to take.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn inet_socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?)
}

fn inet_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: both are plain integers, sockaddr_in is no larger than sockaddr, and all zero is
    // valid.
    unsafe {
        let mut storage: libc::sockaddr = std::mem::zeroed();
        let inet = std::ptr::from_mut(&mut storage).cast::<libc::sockaddr_in>();
        (*inet).sin_family = libc::AF_INET as libc::sa_family_t;
        (*inet).sin_addr.s_addr = u32::from(address).to_be();
        storage
    }
}

/// Brings an interface up or down (`SIOCSIFFLAGS`).
pub fn set_link(interface: &str, up: bool) -> io::Result<()> {
    let socket = inet_socket()?;
    let mut request = request(interface)?;
    control(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let bit = libc::IFF_UP as libc::c_short;
    request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
    control(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Gives an interface its hardware address (`SIOCSIFHWADDR`).
pub fn set_mac(interface: &str, mac: [u8; 6]) -> io::Result<()> {
    let mut request = request(interface)?;
    // SAFETY: sockaddr is integers and an array of them: all zero is a value of it.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    control(&inet_socket()?, libc::SIOCSIFHWADDR, &mut request)
}

/// Gives an interface its address (`SIOCSIFADDR`, `SIOCSIFNETMASK`).
pub fn set_address(interface: &str, address: Ipv4) -> io::Result<()> {
    let socket = inet_socket()?;
    let mut request = request(interface)?;
    request.ifr_ifru.ifru_addr = inet_address(address.address);
    control(&socket, libc::SIOCSIFADDR, &mut request)?;
    let mask = u32::MAX
        .checked_shl(32 - u32::from(address.prefix.min(32)))
        .unwrap_or(0);
    request.ifr_ifru.ifru_netmask = inet_address(mask.into());
    control(&socket, libc::SIOCSIFNETMASK, &mut request)
}

/// Makes a gateway the default route (`SIOCADDRT`). One that is there already is no error.
pub fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: rtentry is integers and pointers: all zero is a value of it.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = inet_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = inet_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = inet_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    match control(&inet_socket()?, libc::SIOCADDRT, &mut route) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Interface flags and IPv4 addresses of all interfaces, by name (`getifaddrs`).
pub fn interface_addresses() -> io::Result<Vec<(String, u32, Option<Ipv4>)>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: the pointer is to a live variable; on success it holds a list that is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: each element of the list is valid until freeifaddrs, its name is a C string, and an
    // address of family AF_INET is a sockaddr_in.
    unsafe {
        while let Some(entry) = next.as_ref() {
            let name = CStr::from_ptr(entry.ifa_name)
                .to_string_lossy()
                .into_owned();
            let inet = |address: *mut libc::sockaddr| {
                let is_inet = address
                    .as_ref()
                    .is_some_and(|a| i32::from(a.sa_family) == libc::AF_INET);
                is_inet
                    .then(|| u32::from_be((*address.cast::<libc::sockaddr_in>()).sin_addr.s_addr))
            };
            let ipv4 = inet(entry.ifa_addr).map(|address| Ipv4 {
                address: address.into(),
                prefix: inet(entry.ifa_netmask).map_or(32, |mask| mask.count_ones() as u8),
            });
            found.push((name, entry.ifa_flags, ipv4));
            next = entry.ifa_next;
        }
        libc::freeifaddrs(list);
    }
    Ok(found)
}

/// A socket that becomes readable when the kernel reports a change of any interface or its
/// addresses.
pub fn link_events() -> io::Result<OwnedFd> {
    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    let groups = (libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR) as u32;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Requests of KVM without an argument (`linux/kvm.h`).
const KVM_CREATE_VM: libc::Ioctl = 0xae01;
const KVM_CREATE_VCPU: libc::Ioctl = 0xae41;
const KVM_CREATE_IRQCHIP: libc::Ioctl = 0xae60;

/// A virtual machine of `/dev/kvm`.
pub fn kvm_create_machine(kvm: &File) -> io::Result<OwnedFd> {
    kvm_request(kvm.as_fd(), KVM_CREATE_VM).and_then(owned)
}

/// Gives a machine its interrupt controllers, so that its vCPUs have local APICs.
pub fn kvm_create_interrupt_controller(machine: &OwnedFd) -> io::Result<()> {
    kvm_request(machine.as_fd(), KVM_CREATE_IRQCHIP).map(drop)
}

/// A machine's first vCPU.
pub fn kvm_create_vcpu(machine: &OwnedFd) -> io::Result<OwnedFd> {
    kvm_request(machine.as_fd(), KVM_CREATE_VCPU).and_then(owned)
}

fn kvm_request(file: BorrowedFd<'_>, number: libc::Ioctl) -> io::Result<libc::c_int> {
    // SAFETY: the three requests take a plain number, zero here, and touch no memory of this
    // process.
    match unsafe { libc::ioctl(file.as_raw_fd(), number, 0) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

fn owned(descriptor: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: both requests whose answer comes here return a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_its_address() {
        let found = interface_addresses().unwrap();
        let loopback = Ipv4 {
            address: Ipv4Addr::LOCALHOST,
            prefix: 8,
        };
        assert!(
            found
                .iter()
                .any(|(name, _, ipv4)| name == "lo" && *ipv4 == Some(loopback)),
            "{found:?}"
        );
    }

    #[test]
    fn programs_start_with_no_signal_blocked() {
        let start = || {
            block_init_signals();
            let mut command = Command::new("cat");
            start_with_signals_free(command.arg("/proc/self/status"));
            command.output().unwrap()
        };
        // A thread's mask is its own.
        let output = std::thread::spawn(start).join().unwrap();
        let status = String::from_utf8(output.stdout).unwrap();
        let blocked = status.lines().find(|line| line.starts_with("SigBlk:"));
        assert_eq!(blocked, Some("SigBlk:\t0000000000000000"));
    }

    #[test]
    fn names_that_are_none_are_refused_before_the_kernel_sees_them() {
        for name in ["", "longer-than-fifteen", "a\0b"] {
            assert_eq!(
                set_link(name, true).unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }
}
