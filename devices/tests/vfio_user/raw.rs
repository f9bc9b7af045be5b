//! A peer that says what it likes.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use devices::vfio_user::message::{Command, HEADER_BYTES, Header, Payload, Version};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::support::{Host, PATIENCE, Served};

pub struct Raw(pub UnixStream);

/// A command's header.
pub fn header(command: Command, id: u16, payload: usize) -> Header {
    Header {
        id,
        command: command as u16,
        size: (HEADER_BYTES + payload) as u32,
        flags: 0,
        error: 0,
    }
}

impl Raw {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// A client of `host` that has said nothing yet.
    pub fn silent(host: &Host) -> (Self, Served) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Self::new(ours), host.serve(theirs))
    }

    /// A client of `host`.
    pub fn on(host: &Host) -> (Self, Served) {
        let (mut raw, served) = Self::silent(host);
        raw.agree();
        (raw, served)
    }

    pub fn agree(&mut self) {
        let version = Version {
            major: 0,
            minor: 1,
            capabilities: Default::default(),
        };
        self.ask(Command::Version, &version.to_bytes()).unwrap();
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        // The peer may have had enough already.
        let _ = self.0.write_all(&[&header.to_bytes(), payload].concat());
    }

    pub fn send_with(&mut self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let bytes = [&header.to_bytes(), payload].concat();
        let mut space = vec![MaybeUninit::uninit(); 4096];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [IoSlice::new(&bytes)];
        let flags = SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(&self.0, &parts, &mut control, flags).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next message; `None` if the peer has closed.
    pub fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut bytes = [0; HEADER_BYTES];
        if let Err(error) = self.0.read_exact(&mut bytes) {
            let kind = error.kind();
            assert_ne!(kind, std::io::ErrorKind::WouldBlock, "no answer");
            return None;
        }
        let header = Header::parse(bytes).unwrap();
        let mut payload = vec![0; header.size as usize - HEADER_BYTES];
        self.0.read_exact(&mut payload).unwrap();
        Some((header, payload))
    }

    /// The reply to what was sent last.
    pub fn reply(&mut self) -> Result<Vec<u8>, i32> {
        let (header, payload) = self.receive().unwrap();
        assert!(header.is_reply());
        match header.failed() {
            Some(errno) => {
                assert!(payload.is_empty());
                Err(errno as i32)
            }
            None => Ok(payload),
        }
    }

    pub fn ask(&mut self, command: Command, payload: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(header(command, 77, payload.len()), payload);
        self.reply()
    }

    pub fn ask_with(
        &mut self,
        command: Command,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, i32> {
        self.send_with(header(command, 78, payload.len()), payload, fds);
        self.reply()
    }

    /// Whether the peer closes the connection, whatever it says before.
    pub fn is_closed(&mut self) -> bool {
        while self.receive().is_some() {}
        true
    }

    /// Whether the peer still answers.
    pub fn works(&mut self) {
        let info = [16_u32, 0, 0, 0].map(u32::to_le_bytes).concat();
        let reply = self.ask(Command::DeviceGetInfo, &info).unwrap();
        assert_eq!(reply.len(), 16);
    }
}

/// A pipe whose end tells when the other was closed.
pub fn tell_tale() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, writer.into())
}
