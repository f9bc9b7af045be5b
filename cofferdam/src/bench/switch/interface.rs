//! What comes in at an interface of the host, of whoever is at the other end of its cable: a packet
//! socket (packet(7)). `unsafe` is here for what no library of ours has of it.

use std::io::{Error, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use devices::clock::monotonic_ns;
use devices::wire::tap::bring_up;

/// Bytes of a frame that are looked at.
const HEAD_BYTES: usize = 64;

/// A packet socket at one interface, which hears all that comes there.
pub struct Interface {
    socket: OwnedFd,
}

impl Interface {
    /// At the interface `name`, which is brought up.
    ///
    /// # Errors
    /// There is none, or this process may not listen there.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let folder = format!("/sys/class/net/{name}");
        let index = std::fs::read_to_string(format!("{folder}/ifindex"))
            .with_context(|| format!("the host has no interface {name:?}: `ip link` shows them"))?;
        let index = index.trim().parse()?;
        bring_up(name).with_context(|| format!("cannot bring {name} up: this needs root"))?;
        Self::at(index).with_context(|| {
            format!("cannot listen at {name}: this needs root, and the module af_packet")
        })
    }

    fn at(index: i32) -> Result<Self, Error> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Without a protocol it hears nothing until it is at its interface.
        // SAFETY: no pointers are involved.
        let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if socket < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the descriptor was made above and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: plain data, of which all zeros is a valid value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index;
        // SAFETY: an address with its length, which is only read.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound < 0 {
            return Err(Error::last_os_error());
        }
        let membership = libc::packet_mreq {
            mr_ifindex: index,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        // SAFETY: a value with its length, which is only read.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const membership).cast(),
                size_of::<libc::packet_mreq>() as u32,
            )
        };
        match set < 0 {
            true => Err(Error::last_os_error()),
            false => Ok(Self { socket }),
        }
    }

    /// Waits for a frame for at most `limit`.
    pub fn wait(&self, limit: Duration) -> Result<(), Error> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut wait = [PollFd::new(&self.socket, PollFlags::IN)];
        let limit = limit.try_into().map_err(|_| ErrorKind::InvalidInput)?;
        match poll(&mut wait, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The sender of the next frame, and when the kernel had it, on the monotonic clock. `None`
    /// where none is there.
    pub fn next(&self) -> Result<Option<([u8; 6], u64)>, Error> {
        let mut head = [0; HEAD_BYTES];
        match rustix::io::read(&self.socket, &mut head) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = head;
        let ago = since(self.socket_time()?);
        let at_ns = monotonic_ns().saturating_sub(u64::try_from(ago.as_nanos()).unwrap_or(0));
        Ok(Some(([a, b, c, d, e, f], at_ns)))
    }

    /// When the frame that was read last came, on the clock of the day.
    fn socket_time(&self) -> Result<Duration, Error> {
        /// The kernel's `SIOCGSTAMPNS_OLD` (include/uapi/asm-generic/sockios.h).
        const SIOCGSTAMPNS: libc::c_ulong = 0x8907;
        let socket: BorrowedFd<'_> = rustix::fd::AsFd::as_fd(&self.socket);
        let mut at = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the request writes one timespec, as 64-bit kernels define it.
        let told = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSTAMPNS, &raw mut at) };
        if told < 0 {
            return Err(Error::last_os_error());
        }
        let (seconds, nanoseconds) = (at.tv_sec.max(0), at.tv_nsec.clamp(0, 999_999_999));
        Ok(Duration::new(seconds as u64, nanoseconds as u32))
    }
}

/// How long ago `at` was; no time at all where the clock of the day was set back.
fn since(at: Duration) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().saturating_sub(at)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn frames_are_heard_with_their_time() {
        use std::net::UdpSocket;
        let interface = match Interface::open("lo") {
            Ok(interface) => interface,
            Err(error) => {
                return skipped::skip("bench::switch::interface", &format!("{error:#}"));
            }
        };
        let before = monotonic_ns();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket
            .send_to(b"heard", socket.local_addr().unwrap())
            .unwrap();
        let (from, at_ns) = loop {
            interface.wait(Duration::from_millis(20)).unwrap();
            if let Some(seen) = interface.next().unwrap()
                && seen.1 >= before
            {
                break seen;
            }
        };
        // The loopback interface's.
        assert_eq!(from, [0; 6]);
        assert!(at_ns <= monotonic_ns());
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        let error = Interface::open("nowhere0").err().unwrap();
        assert!(error.to_string().contains("nowhere0"), "{error}");
    }
}
