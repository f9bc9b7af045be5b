//! The messages. Byte strings are base64 text in JSON; times are nanoseconds of the guest's clocks.

use std::net::Ipv4Addr;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Largest piece of output, of a file or of a list in one message, in bytes before encoding.
pub const CHUNK: usize = 64 << 10;

/// A byte string.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD
            .decode(text)
            .map(Bytes)
            .map_err(serde::de::Error::custom)
    }
}

/// One moment on the guest's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// `CLOCK_MONOTONIC` in nanoseconds: time since boot.
    pub mono_ns: u64,
    /// `CLOCK_REALTIME` in nanoseconds since 1970.
    pub real_ns: u64,
}

/// Host to agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host, repeated in every response. Not 0.
    pub id: u64,
    /// What is asked.
    pub call: Call,
}

/// Agent to host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// The request's id, or 0 for [`Body::Ready`] and for a request that could not be read.
    pub id: u64,
    /// When the agent had read the request.
    pub received: Stamp,
    /// When the agent had this answer.
    pub sent: Stamp,
    /// The answer.
    pub body: Body,
}

/// What the host may ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// First call of a client. Everything an earlier client had started is killed.
    Hello {
        /// Repeated in the answer, so that an old answer is not mistaken for a new one.
        nonce: u64,
    },
    /// Nothing but the time stamps.
    Ping,
    /// Runs a program; [`Body::Stdout`] and [`Body::Stderr`] come before [`Done::Exec`].
    Exec(Exec),
    /// Sends a signal to the process group of a running [`Call::Exec`].
    Kill {
        /// Id of the exec request.
        target: u64,
        /// Signal number.
        signal: i32,
    },
    /// `finit_module(2)` or `init_module(2)`.
    LoadModule {
        /// Where the module is.
        source: ModuleSource,
        /// Parameters as on a command line.
        params: String,
    },
    /// `delete_module(2)`.
    RemoveModule {
        /// Name as in `/proc/modules`.
        name: String,
    },
    /// Lines of `/proc/kallsyms`; [`Body::Symbols`] come before [`Done::Symbols`].
    Symbols(SymbolFilter),
    /// Where the sections of loaded modules lie, and their state.
    Modules {
        /// Only this one; all otherwise.
        name: Option<String>,
    },
    /// All network interfaces.
    Interfaces,
    /// Brings an interface up or down.
    SetLink {
        /// Name of the interface.
        interface: String,
        /// Up, or down.
        up: bool,
    },
    /// Gives an interface its IPv4 address.
    SetAddress {
        /// Name of the interface.
        interface: String,
        /// The address; replaces the one it has.
        address: Ipv4,
        /// Default route by this gateway.
        gateway: Option<Ipv4Addr>,
    },
    /// Sets `CLOCK_REALTIME`, which has stood still while the guest was not there. Other clocks go
    /// on where they were.
    SetTime {
        /// Nanoseconds since 1970.
        real_ns: u64,
    },
    /// Gives an interface another hardware address, address and default route: to a copy of a guest
    /// that is on one wire with others.
    Readdress {
        /// Name of the interface.
        interface: String,
        /// Hardware address. An interface whose driver does not take one while it is up is brought
        /// down and up.
        mac: Option<[u8; 6]>,
        /// Address in place of the one it has.
        address: Option<Ipv4>,
        /// Default route by this gateway.
        gateway: Option<Ipv4Addr>,
    },
    /// Kernel messages; [`Body::Kmsg`] come before [`Done::Kmsg`].
    Kmsg {
        /// First sequence number wanted.
        since: u64,
    },
    /// A file's content; [`Body::File`] come before [`Done::File`].
    ReadFile {
        /// Path in the guest.
        path: String,
        /// Where to begin, in bytes.
        offset: u64,
        /// At most so many bytes.
        limit: u64,
    },
    /// Writes a file.
    WriteFile {
        /// Path in the guest.
        path: String,
        /// The bytes.
        data: Bytes,
        /// After what is there, or in place of it.
        append: bool,
        /// Permission bits of a file that is made.
        mode: u32,
    },
    /// Removes and inserts a NIC's driver and puts the interface back, timing every step.
    RestartDriver(RestartDriver),
    /// Powers off. The answer comes before it.
    PowerOff,
    /// Reboots. The answer comes before it.
    Reboot,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments. A program without `/` is looked for in `PATH`.
    pub argv: Vec<String>,
    /// Environment, added to the agent's.
    pub env: Vec<(String, String)>,
    /// Working directory, inside `root`.
    pub cwd: Option<String>,
    /// `chroot` before anything else.
    pub root: Option<String>,
    /// Standard input, closed after it.
    pub stdin: Bytes,
    /// The whole process group is killed after this time.
    pub limit_ms: Option<u64>,
}

/// Where a module's bytes are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModuleSource {
    /// A name: found under `/lib/modules`, with what it depends on loaded first.
    Name(String),
    /// A file in the guest.
    Path(String),
    /// The bytes.
    Image(Bytes),
}

/// Which symbols are wanted: those which fulfil every part that is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SymbolFilter {
    /// Name begins so.
    pub prefix: Option<String>,
    /// Belongs to this module; `""` for the kernel itself.
    pub module: Option<String>,
    /// Name is one of these.
    pub names: Option<Vec<String>>,
    /// Belongs to a module, whichever. Agents that do not know this send the kernel's as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub of_modules: bool,
}

/// An IPv4 address with its prefix length, as in `10.0.2.15/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits of the network, at most 32.
    pub prefix: u8,
}

impl std::fmt::Display for Ipv4 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl std::str::FromStr for Ipv4 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let prefix = prefix.parse().ok().filter(|p| *p <= 32)?;
            Some(Ipv4 {
                address: address.parse().ok()?,
                prefix,
            })
        };
        parse().ok_or_else(|| {
            format!("{text:?} is no IPv4 address with prefix length, such as 10.0.2.15/24")
        })
    }
}

impl Serialize for Ipv4 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ipv4 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A driver restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestartDriver {
    /// Module name, such as `e1000`.
    pub module: String,
    /// Parameters for the insertion.
    pub params: String,
    /// The interface it makes, such as `eth0`.
    pub interface: String,
    /// The address to give back.
    pub address: Ipv4,
    /// Default route to give back.
    pub gateway: Option<Ipv4Addr>,
    /// Also wait for the carrier.
    pub wait_carrier: bool,
    /// For each wait, in milliseconds.
    pub limit_ms: u64,
}

/// One step of a driver restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which one.
    pub step: StepName,
    /// When it began.
    pub begin: Stamp,
    /// When it was done.
    pub end: Stamp,
}

/// The steps of a driver restart, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepName {
    /// `delete_module`.
    Remove,
    /// `finit_module`: holds the driver's probe.
    Insert,
    /// The interface is there.
    Interface,
    /// Address set.
    Address,
    /// Interface up (and the route set).
    Up,
    /// The interface has a carrier.
    Carrier,
}

/// What an answer holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// The agent has just started. Not an answer to a request: id 0.
    Ready(AgentInfo),
    /// Part of a program's standard output.
    Stdout(Bytes),
    /// Part of a program's standard error.
    Stderr(Bytes),
    /// Part of the symbols.
    Symbols(Vec<Symbol>),
    /// Part of the kernel messages.
    Kmsg(Vec<KmsgRecord>),
    /// Part of a file.
    File(Bytes),
    /// The last answer to a request that succeeded.
    Done(Done),
    /// The last answer to a request that failed.
    Error(AgentError),
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    /// To [`Call::Hello`].
    Hello {
        /// From the request.
        nonce: u64,
        /// Who answers.
        agent: AgentInfo,
    },
    /// To calls with no other result.
    Ok,
    /// To [`Call::Exec`].
    Exec(ExecEnd),
    /// To [`Call::LoadModule`] and [`Call::RemoveModule`]: when the system call began and ended.
    Module {
        /// Before the system call.
        begin: Stamp,
        /// After it.
        end: Stamp,
    },
    /// To [`Call::Symbols`]: how many there were.
    Symbols(u64),
    /// To [`Call::Modules`].
    Modules(Vec<Module>),
    /// To [`Call::Interfaces`].
    Interfaces(Vec<Interface>),
    /// To [`Call::Kmsg`]: the sequence number to ask for next.
    Kmsg {
        /// First sequence number not yet seen.
        next: u64,
    },
    /// To [`Call::ReadFile`].
    File {
        /// Whether the file ended within the limit.
        eof: bool,
    },
    /// To [`Call::RestartDriver`].
    Restart(Vec<Step>),
}

/// Which agent this is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub version: u32,
    /// `/proc/sys/kernel/random/boot_id`: another one after a reboot.
    pub boot_id: String,
    /// Kernel release.
    pub kernel: String,
    /// Process id of the agent.
    pub pid: u32,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecEnd {
    /// Exit status.
    Exited(i32),
    /// Killed by this signal.
    Signaled(i32),
    /// Killed by the agent because its time was up.
    TimeLimit,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentError {
    /// What was tried and what happened, one line.
    pub message: String,
    /// The system's error number, if there was one.
    pub errno: Option<i32>,
}

/// A line of `/proc/kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// Guest virtual address.
    pub address: u64,
    /// Type letter as `nm` prints it.
    pub kind: char,
    /// The name.
    pub name: String,
    /// The module, or none for the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// A loaded module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Size of its memory in bytes (`coresize`).
    pub size: u64,
    /// Reference count; none where the kernel cannot unload.
    pub refcnt: Option<i64>,
    /// `live`, `coming` or `going`.
    pub state: String,
    /// Names of the modules that use it.
    pub holders: Vec<String>,
    /// Section name and guest virtual address.
    pub sections: Vec<(String, u64)>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Kernel's index of it.
    pub index: u32,
    /// `IFF_*` flags.
    pub flags: u32,
    /// Link detected; none while the interface is down.
    pub carrier: Option<bool>,
    /// `operstate`.
    pub operstate: String,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// MAC address as text.
    pub mac: String,
    /// Module of its driver.
    pub driver: Option<String>,
    /// IPv4 addresses.
    pub ipv4: Vec<Ipv4>,
    /// IPv6 addresses with prefix length, as text.
    pub ipv6: Vec<String>,
    /// Every counter of `/sys/class/net/*/statistics`.
    pub statistics: Vec<(String, u64)>,
}

/// A kernel message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KmsgRecord {
    /// Sequence number.
    pub seq: u64,
    /// Priority: facility and level as in syslog.
    pub priority: u32,
    /// Microseconds since boot.
    pub time_us: u64,
    /// The text.
    pub text: String,
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
