//! Values that a person types: sizes, addresses, wires, disks, names.
//!
//! Each has a `FromStr` whose error is one line that says what would be right.

mod nic;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

pub use self::nic::{NetOption, NicModel, NicOption, NicSpec, PciAddress};

/// A value on the command line that cannot be used, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(String);

/// Makes a [`BadValue`].
fn bad<T>(message: impl Into<String>) -> Result<T, BadValue> {
    Err(BadValue(message.into()))
}

/// Smallest guest memory: below it no kernel gets as far as saying why it stops.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;

/// Size of a page, in bytes.
const PAGE_BYTES: u64 = 4096;

/// Guest memory in bytes, a whole number of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize(u64);

impl MemorySize {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for MemorySize {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text
            .get(digits.len()..)
            .map(str::to_ascii_uppercase)
            .as_deref()
        {
            Some("K" | "KIB") => 10,
            Some("" | "M" | "MIB") => 20,
            Some("G" | "GIB") => 30,
            _ => return bad("give a size such as 256M or 2G"),
        };
        let Some(count) = digits
            .parse::<u64>()
            .ok()
            .filter(|_| !digits.starts_with('+'))
        else {
            return bad("give a size such as 256M or 2G");
        };
        let Some(bytes) = count.checked_mul(1 << shift) else {
            return bad("no host has that much memory: give a size such as 256M or 2G");
        };
        if bytes < MIN_MEMORY_BYTES {
            return bad(format!(
                "a guest needs at least {}M",
                MIN_MEMORY_BYTES >> 20
            ));
        }
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return bad("guest memory is a whole number of 4K pages");
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1 << 20) {
            write!(f, "{}M", self.0 >> 20)
        } else {
            write!(f, "{}K", self.0 >> 10)
        }
    }
}

/// An Ethernet address of one station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address a guest gets when none is given: locally administered, and the same each time
    /// for the same name, so that a guest keeps its address and two guests on a link differ.
    pub fn for_name(name: &str) -> Self {
        // FNV-1a, 32 bits.
        let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        let [a, b, c, d] = hash.to_be_bytes();
        Self([0x02, 0xcf, a, b, c, d])
    }

    /// The address that NIC number `index` of the VM `name` gets when none is given.
    pub fn for_nic(name: &VmName, index: usize) -> Self {
        match index {
            0 => Self::for_name(name.as_str()),
            _ => Self::for_name(&format!("{name}/{index}")),
        }
    }
}

impl FromStr for MacAddress {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let mut address = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut address {
            *byte = match parts.next().map(|p| (p.len(), u8::from_str_radix(p, 16))) {
                Some((2, Ok(value))) if !text.contains('+') => value,
                _ => return bad("give six bytes in hexadecimal, such as 02:cf:00:00:00:01"),
            };
        }
        if parts.next().is_some() {
            return bad("give six bytes in hexadecimal, such as 02:cf:00:00:00:01");
        }
        if address[0] & 1 != 0 {
            return bad("this is a multicast address: make the first byte even, such as 02");
        }
        if address == [0; 6] {
            return bad("all zeros is nobody's address: try 02:cf:00:00:00:01");
        }
        Ok(Self(address))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What the NIC is plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetSpec {
    /// A TAP interface of the host, which exists already.
    Tap(String),
    /// The gateway inside this process, which needs no rights.
    User,
    /// A unix socket to another guest or a switch.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Whether this side makes the socket and waits for the other.
        listen: bool,
    },
}

/// Longest name of a network interface, without its end byte (`IFNAMSIZ`).
const MAX_INTERFACE_NAME: usize = 15;

impl FromStr for NetSpec {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        if text == "user" {
            return Ok(Self::User);
        }
        if let Some(name) = text.strip_prefix("tap=") {
            let usable = !name.is_empty()
                && name.len() <= MAX_INTERFACE_NAME
                && name
                    .bytes()
                    .all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%');
            return if usable {
                Ok(Self::Tap(name.to_owned()))
            } else {
                bad("a TAP has a name of 1 to 15 characters, such as tap=tap0")
            };
        }
        if let Some(rest) = text.strip_prefix("unix=") {
            let (path, listen) = match rest.strip_suffix(",listen") {
                Some(path) => (path, true),
                None => (rest, false),
            };
            return Ok(Self::Unix {
                path: socket_path(path)?,
                listen,
            });
        }
        bad("give user, tap=NAME or unix=PATH[,listen]")
    }
}

impl NetSpec {
    /// The socket that whoever is plugged into it makes.
    pub fn own_socket(&self) -> Option<&PathBuf> {
        match self {
            Self::Unix { path, listen: true } => Some(path),
            Self::Unix { listen: false, .. } | Self::User | Self::Tap(_) => None,
        }
    }
}

impl fmt::Display for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "tap={name}"),
            Self::User => f.write_str("user"),
            Self::Unix { path, listen } => {
                write!(
                    f,
                    "unix={}{}",
                    path.display(),
                    if *listen { ",listen" } else { "" }
                )
            }
        }
    }
}

/// Longest path of a unix socket, without its end byte (`sun_path`).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A path that a unix socket can have.
fn socket_path(path: &str) -> Result<PathBuf, BadValue> {
    if path.is_empty() {
        return bad("the socket has no path: give unix=PATH");
    }
    if path.len() > MAX_SOCKET_PATH_BYTES {
        return bad(format!(
            "a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes"
        ));
    }
    Ok(PathBuf::from(path))
}

/// A disk image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// File or block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

impl FromStr for DiskSpec {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return bad("the disk has no path: give PATH or PATH,ro");
        }
        Ok(Self {
            path: PathBuf::from(path),
            read_only,
        })
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}{}",
            self.path.display(),
            if self.read_only { ",ro" } else { "" }
        )
    }
}

/// Where the guest's serial console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialSpec {
    /// The terminal (or whatever standard input and output are).
    Stdio,
    /// A file; the guest gets no input.
    File(PathBuf),
    /// A unix socket that one client at a time may connect to.
    Unix(PathBuf),
    /// The VM's process alone, which keeps the last of it: read and typed into through its control
    /// socket.
    Control,
}

impl FromStr for SerialSpec {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        if text == "stdio" {
            return Ok(Self::Stdio);
        }
        if text == "control" {
            return Ok(Self::Control);
        }
        if let Some(path) = text.strip_prefix("file=").filter(|path| !path.is_empty()) {
            return Ok(Self::File(PathBuf::from(path)));
        }
        if let Some(path) = text.strip_prefix("unix=") {
            return Ok(Self::Unix(socket_path(path)?));
        }
        bad("give stdio, control, file=PATH or unix=PATH")
    }
}

impl fmt::Display for SerialSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Unix(path) => write!(f, "unix={}", path.display()),
            Self::Control => f.write_str("control"),
        }
    }
}

/// Longest name of a VM, in bytes.
const MAX_VM_NAME: usize = 64;

/// A VM's name: it is a folder's name as well.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmName(String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let usable = text.len() <= MAX_VM_NAME
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !usable {
            return bad(format!(
                "a name has 1 to {MAX_VM_NAME} letters, digits, '.', '_' or '-' and starts with a \
                 letter or digit"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
