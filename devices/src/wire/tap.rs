//! A TAP interface of the host's kernel as a wire (Linux, Documentation/networking/tuntap.rst).
//!
//! One frame is one `read` or `write`, without any header in front. `unsafe` is here for the two
//! ioctls that make a file a TAP and an interface run.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::state::{Form, Part, StateError};

use super::{MAX_FRAME_BYTES, SendOutcome, Wire, WritableFd, WritableSignal};

/// Nothing is kept of it but its kind: the TAP is the host's.
const FORM: Form = Form {
    kind: "TAP",
    version: 1,
};

/// Longest name of an interface, without its end byte (IFNAMSIZ).
pub const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;

/// Why a TAP cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No such name is possible.
    #[error(
        "TAP {0:?}: an interface's name has 1 to {MAX_NAME_BYTES} printable characters without / and %"
    )]
    Name(String),
    /// The kernel has no TAPs.
    #[error("TAP {name}: cannot open /dev/net/tun ({source}); load the module by `modprobe tun`")]
    Device {
        /// Name of the interface.
        name: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Somebody else has it.
    #[error("TAP {0} is in use by another process; end that or choose another TAP")]
    Busy(String),
    /// It is not there, or belongs to another user.
    #[error(
        "TAP {0} does not exist or is not yours; make it by `ip tuntap add dev {0} mode tap user $USER` as root"
    )]
    NotPermitted(String),
    /// The name is of something else.
    #[error("interface {0} is not a TAP; choose another name")]
    NotATap(String),
    /// Anything else.
    #[error("TAP {name}: {source}")]
    Other {
        /// Name of the interface.
        name: String,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// A wire into a TAP interface.
///
/// While the interface is down on the host frames are lost, as on hardware. When it is deleted the
/// carrier goes, for good.
pub struct Tap {
    file: File,
    /// Readable while the TAP is, and silent when it is gone.
    readable: Epoll,
    present: bool,
}

impl Tap {
    /// Opens the TAP called `name`. One that does not exist is made, if this process may, brought
    /// up, and goes again when it is closed.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let printable = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'%';
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(printable) {
            return Err(TapError::Name(name.to_owned()));
        }
        let existed = Path::new("/sys/class/net").join(name).exists();
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|source| TapError::Device {
                name: name.to_owned(),
                source,
            })?;
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the file is /dev/net/tun and the request a whole ifreq, which TUNSETIFF reads and
        // writes.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
            return Err(attach_error(name, std::io::Error::last_os_error()));
        }
        let other = |source| TapError::Other {
            name: name.to_owned(),
            source,
        };
        if !existed {
            bring_up(name).map_err(other)?;
        }
        let readable = Epoll::new().map_err(other)?;
        let event = EpollEvent::new(EventSet::IN, 0);
        readable
            .ctl(ControlOperation::Add, file.as_raw_fd(), event)
            .map_err(other)?;
        Ok(Self {
            file,
            readable,
            present: true,
        })
    }

    /// The interface was deleted.
    fn lose(&mut self) {
        if !std::mem::replace(&mut self.present, false) {
            return;
        }
        tracing::warn!("a TAP was deleted while a guest used it: the guest has no carrier now");
        let event = EpollEvent::default();
        if let Err(error) =
            self.readable
                .ctl(ControlOperation::Delete, self.file.as_raw_fd(), event)
        {
            tracing::error!(%error, "cannot stop watching a deleted TAP");
        }
    }
}

impl Wire for Tap {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        if !self.present || frame.len() > MAX_FRAME_BYTES {
            return SendOutcome::Dropped;
        }
        loop {
            return match self.file.write(frame) {
                Ok(_) => SendOutcome::Sent,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => SendOutcome::Full,
                // The interface is down (EIO), or the frame is no frame (EINVAL). A deleted one is
                // noticed by the event loop, which watches for reading.
                Err(_) => SendOutcome::Dropped,
            };
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        while self.present {
            // One byte more than there is room for: a longer frame shows by it.
            let mut rest = [0];
            let room = buffer.len();
            let mut parts = [IoSliceMut::new(buffer), IoSliceMut::new(&mut rest)];
            match rustix::io::readv(&self.file, &mut parts) {
                Ok(0) => return None,
                Ok(length) if length <= room => return Some(length),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return None,
                Err(rustix::io::Errno::BADFD) => self.lose(),
                // The interface is down.
                Err(_) => return None,
            }
        }
        None
    }

    fn carrier(&self) -> bool {
        self.present
    }

    fn save(&self) -> Result<Option<Part>, StateError> {
        Part::new(FORM, &()).map(Some)
    }

    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        state.as_ref().map_or(Ok(()), |part| part.open(FORM))
    }

    fn readable_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.file.as_raw_fd(),
            signal: WritableSignal::Out,
        })
    }
}

fn attach_error(name: &str, source: std::io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EPERM) => TapError::NotPermitted(name),
        Some(libc::EINVAL) => TapError::NotATap(name),
        _ => TapError::Other { name, source },
    }
}

/// Brings the interface `name` up: sets IFF_UP (netdevice(7)).
///
/// # Errors
/// There is none, or this process may not.
pub fn bring_up(name: &str) -> std::io::Result<()> {
    // SAFETY: no pointers are involved.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made above and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut request = interface_request(name);
    // SAFETY: a whole ifreq, which SIOCGIFFLAGS reads and writes.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: a whole ifreq, which SIOCSIFFLAGS reads.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// A request about the interface `name`, which has at most [`MAX_NAME_BYTES`] bytes.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: an ifreq is plain data; all zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(MAX_NAME_BYTES))
    {
        *to = from as libc::c_char;
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TAP of our own, where this process may make one.
    fn tap(name: &str) -> Option<Tap> {
        match Tap::open(name) {
            Ok(tap) => Some(tap),
            Err(TapError::NotPermitted(_) | TapError::Device { .. }) => {
                let test = format!("devices::wire::tap ({name})");
                skipped::skip(&test, "this process may not make TAPs");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn impossible_names_are_refused() {
        for name in ["", "a name", "tap%d", "a/b", "sixteen-letters0", "täp"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
        }
    }

    #[test]
    fn a_tap_is_made_used_once_and_goes_when_closed() {
        let Some(tap) = tap("cofftest0") else { return };
        assert!(tap.carrier());
        assert!(matches!(Tap::open("cofftest0"), Err(TapError::Busy(_))));
        drop(tap);
        assert!(!Path::new("/sys/class/net/cofftest0").exists());
    }

    #[test]
    fn an_interface_that_is_no_tap_is_refused() {
        if tap("cofftest1").is_none() {
            return;
        }
        assert!(matches!(Tap::open("lo"), Err(TapError::NotATap(_))));
    }

    #[test]
    fn frames_of_the_host_arrive_and_long_ones_are_dropped() {
        let Some(mut tap) = tap("cofftest2") else {
            return;
        };
        // Out of the interface as the host's network stack sends: a packet socket on it.
        let index = std::fs::read_to_string("/sys/class/net/cofftest2/ifindex").unwrap();
        let frame =
            |length: usize| [&[0xff; 12][..], &[0x88, 0xb5], &vec![7; length - 14]].concat();
        let long = frame(1500);
        let short = frame(90);
        send_raw(index.trim().parse().unwrap(), &long);
        send_raw(index.trim().parse().unwrap(), &short);
        let mut buffer = [0; 1400];
        // The host's own announcements (IPv6) may come first.
        let mut seen = Vec::new();
        while let Some(length) = tap.receive(&mut buffer) {
            seen.push(buffer[..length].to_vec());
        }
        assert!(seen.contains(&short));
        assert!(
            seen.iter().all(|frame| frame.len() < 1000),
            "a long frame was cut short"
        );
        assert_eq!(tap.send(&short), SendOutcome::Sent);
    }

    fn send_raw(index: i32, frame: &[u8]) {
        // SAFETY: no pointers are involved.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was made above and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: plain data.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index;
        // SAFETY: buffer and address with their lengths.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(
            sent,
            frame.len() as isize,
            "{}",
            std::io::Error::last_os_error()
        );
    }
}
