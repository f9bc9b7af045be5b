//! What is said at a device host's socket before vfio-user is spoken there: one line each way.
//!
//! ```text
//!   guest's VMM: {"attach":{"version":1,"vm":"web","mac":"02:cf:00:00:00:01"}}
//!                with "goes_on":"e1000" besides, if the guest goes on from a snapshot
//!   device host: {"ok":{"device":"nic0","model":"e1000","mac":"02:cf:00:00:00:01","turn":true,"returned":false}}
//!                {"error":"web is attached already: ..."}, and the end of the connection
//!                {"wait":{}} every second before either, while a switch by drivers is under way
//! ```
//!
//! From the byte behind the answer on the same connection carries vfio-user, in which the client
//! speaks first. So a context is attached for exactly as long as its connection lasts: nothing is
//! left to clear away of a client that was killed between two steps, and no descriptor and no
//! second socket travel.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of what is said here.
pub const VERSION: u32 = 1;

/// Longest line, with its end, in bytes.
const MAX_LINE_BYTES: usize = 4096;

/// What a guest's VMM asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hello {
    /// The device, for a VM.
    Attach {
        /// Version of what is said here, [`VERSION`].
        version: u32,
        /// Name of the VM, which its context belongs to.
        vm: String,
        /// Ethernet address of its NIC.
        mac: String,
        /// Of a guest that goes on from a snapshot: the model of the NIC that it had, whose state
        /// the device is going to be given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        goes_on: Option<String>,
    },
}

/// What the device host answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Welcome {
    /// vfio-user from here on.
    Ok(AttachInfo),
    /// Not yet: a switch is under way in which drivers in guests have their time. Another line
    /// comes.
    Wait {},
    /// Not attached, and why, for a person.
    Error(String),
}

/// What a guest's VMM is told of the device that it has attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachInfo {
    /// Name of the device host.
    pub device: String,
    /// Model of the NIC, a name in [`devices::nic::MODELS`].
    pub model: String,
    /// The NIC's Ethernet address.
    pub mac: String,
    /// Whether the guest has the turn.
    pub turn: bool,
    /// Whether the VM was attached before and has its context again: the device goes on from where
    /// it was.
    pub returned: bool,
    /// Whether the guest's driver has to suspend the device before the turn is passed on, so that
    /// the guest has to run then.
    #[serde(default)]
    pub by_driver: bool,
}

/// Writes one line.
pub fn write_line(mut stream: &UnixStream, value: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(value).context("cannot be written as JSON")?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(())
}

/// Reads one line within `limit`, and not a byte behind it.
pub fn read_line<T: DeserializeOwned>(
    mut stream: &UnixStream,
    limit: Duration,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    let mut line = Vec::new();
    loop {
        ensure!(line.len() < MAX_LINE_BYTES, "the line is too long");
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no line within {} s", limit.as_secs());
        stream.set_read_timeout(Some(left))?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => bail!("the connection ended within a line"),
            Ok(_) if byte == *b"\n" => break,
            Ok(_) => line.extend(byte),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // What is left of the time is looked at above.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("cannot be read"),
        }
    }
    stream.set_read_timeout(None)?;
    serde_json::from_slice(&line).context("this is not what is said here")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn hello() -> Hello {
        Hello::Attach {
            version: VERSION,
            vm: "web".to_owned(),
            mac: "02:cf:00:00:00:01".to_owned(),
            goes_on: Some("e1000".to_owned()),
        }
    }

    #[test]
    fn a_line_is_read_and_nothing_behind_it() {
        let (mut a, b) = UnixStream::pair().unwrap();
        write_line(&a, &hello()).unwrap();
        a.write_all(b"rest").unwrap();
        assert_eq!(read_line::<Hello>(&b, LIMIT).unwrap(), hello());
        let mut rest = [0; 4];
        (&b).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"rest");
    }

    #[test]
    fn silence_length_ends_and_nonsense_are_refused() {
        let says = |bytes: &[u8], limit| {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(bytes).unwrap();
            a.shutdown(std::net::Shutdown::Write).unwrap();
            format!("{:#}", read_line::<Hello>(&b, limit).unwrap_err())
        };
        assert!(says(b"{\"attach\"", LIMIT).contains("ended"));
        assert!(says(&[b'x'; MAX_LINE_BYTES], LIMIT).contains("too long"));
        for nonsense in [
            &b"\n"[..],
            b"{}\n",
            b"{\"attach\":{}}\n",
            b"\xff\n",
            b"[[[[\n",
        ] {
            assert!(says(nonsense, LIMIT).contains("not what is said"));
        }
        let (_silent, b) = UnixStream::pair().unwrap();
        let error = read_line::<Hello>(&b, Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("no line"), "{error}");
    }
}
