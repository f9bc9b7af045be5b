//! A guest's VMM, and others who want something, at a device host.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::hello::{Hello, VERSION, Welcome, read_line, write_line};
use super::protocol::{DeviceProtocol, Reply, Request, SWITCH_TIME};
use crate::control::client::{ANSWER_TIME as ASK_TIME, Connection};
use crate::options::{MacAddress, VmName};
use crate::runtime_dir::RuntimeRoot;

pub use super::hello::AttachInfo;

/// How long a device host may take to attach somebody, or to say again that it will.
const ATTACH_TIME: Duration = Duration::from_secs(10);

/// Asks the device host `name` for something; `root` is that of the VMs.
///
/// # Errors
/// There is no such device host, it does not answer, or it refuses.
pub fn ask(root: &RuntimeRoot, name: &VmName, request: &Request) -> anyhow::Result<Reply> {
    let host = root.devices().find(Some(name))?;
    Connection::<DeviceProtocol>::to(&host, ASK_TIME)?.ask(request)
}

/// Attaches the NIC of `vm`, with the address `mac`, to the device host `name`; `root` is that of
/// the VMs. vfio-user is spoken over what comes back, in the client's role, and the NIC is attached
/// for as long as it is open. A guest that goes on from a snapshot says with a NIC of which model.
///
/// # Errors
/// There is no such device host, it does not answer, or it refuses: the VM is attached already, no
/// slot is free, the address is another VM's, the model is another one.
pub fn attach(
    root: &RuntimeRoot,
    name: &VmName,
    (vm, mac): (&VmName, MacAddress),
    goes_on: Option<&str>,
) -> anyhow::Result<(UnixStream, AttachInfo)> {
    let host = root.devices().find(Some(name))?;
    let path = host.paths.device_socket();
    let cannot = || format!("cannot reach the device host {name} at {}", path.display());
    let flags = SocketFlags::CLOEXEC;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).with_context(cannot)?;
    // Before it connects: a process that is stopped accepts nobody, and its queue may be full.
    set_socket_timeout(&socket, Timeout::Send, Some(ATTACH_TIME)).with_context(cannot)?;
    let address = SocketAddrUnix::new(&path).with_context(cannot)?;
    connect(&socket, &address).with_context(cannot)?;
    let stream = UnixStream::from(socket);
    let hello = Hello::Attach {
        version: VERSION,
        vm: vm.to_string(),
        mac: mac.to_string(),
        goes_on: goes_on.map(str::to_owned),
    };
    write_line(&stream, &hello).with_context(cannot)?;
    let deadline = Instant::now() + SWITCH_TIME + ATTACH_TIME;
    let mut welcome = Welcome::Wait {};
    while let Welcome::Wait {} = welcome
        && Instant::now() < deadline
    {
        welcome = read_line(&stream, ATTACH_TIME)
            .with_context(|| format!("the device host {name} does not answer"))?;
    }
    stream.set_write_timeout(None).with_context(cannot)?;
    match welcome {
        Welcome::Ok(info) => Ok((stream, info)),
        Welcome::Wait {} => bail!("the device host {name} is busy with a switch that does not end"),
        Welcome::Error(error) => bail!("the device host {name} does not attach {vm}: {error}"),
    }
}
