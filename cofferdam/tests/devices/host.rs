//! A device host's process, and what is at the other end of its wire.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Child;

use cofferdam::control::client::{ANSWER_TIME, Connection};
use cofferdam::device::protocol::{
    ContextStatus, DeviceProtocol, HostStatus, Reply, Request, SwitchRecord,
};
use cofferdam::runtime_dir::RuntimeRoot;

use crate::common::place::{LIMIT, Place};
use crate::guest::{frame, wait};

/// The address of the far end of the wire.
pub const FAR: [u8; 6] = [2, 0, 0, 0, 0, 0xfa];

/// A device host called "nic", which ends with it.
pub struct Host {
    pub child: Child,
    root: RuntimeRoot,
}

impl Host {
    /// Serves an e1000 on a unix socket called "wire".
    pub fn start(place: &Place, words: &str) -> Self {
        let wire = place.path("wire").display().to_string();
        let child = place
            .command()
            .args(["device", "serve", "nic", "--net"])
            .arg(format!("unix={wire},listen"))
            .args(words.split_whitespace())
            .spawn()
            .unwrap();
        let root = RuntimeRoot::new(place.path("run")).devices();
        let host = Self { child, root };
        wait("the device host", || {
            let socket = place.path("run/.devices/nic/control.sock");
            UnixStream::connect(socket).is_ok()
        });
        host
    }

    pub fn ask(&self, request: &Request) -> anyhow::Result<Reply> {
        let host = self.root.find(Some(&"nic".parse()?))?;
        Connection::<DeviceProtocol>::to(&host, ANSWER_TIME)?.ask(request)
    }

    pub fn status(&self) -> HostStatus {
        match self.ask(&Request::Status {}).unwrap() {
            Reply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    pub fn context(&self, vm: &str) -> ContextStatus {
        let status = self.status();
        let mut contexts = status.contexts.into_iter();
        contexts.find(|context| context.vm == vm).unwrap()
    }

    pub fn switch(&self, to: &str) -> SwitchRecord {
        match self.ask(&Request::Switch { to: to.to_owned() }).unwrap() {
            Reply::Switched(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until this VM has the turn.
    pub fn await_turn(&self, vm: Option<&str>) {
        wait("the turn", || self.status().turn.as_deref() == vm);
    }

    /// Descriptors and threads of the process.
    pub fn resources(&self) -> (usize, usize) {
        let count = |what: &str| {
            let folder = format!("/proc/{}/{what}", self.child.id());
            std::fs::read_dir(folder).unwrap().count()
        };
        (count("fd"), count("task"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The far end of the wire.
pub struct Far(UnixStream);

impl Far {
    pub fn connect(place: &Place) -> Self {
        let stream = UnixStream::connect(place.path("wire")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    pub fn send(&mut self, to: [u8; 6], text: &str) {
        let frame = frame(to, FAR, text);
        let length = (frame.len() as u32).to_be_bytes();
        self.0.write_all(&[&length[..], &frame].concat()).unwrap();
    }

    /// The text in the next frame of a guest.
    pub fn receive(&mut self) -> String {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame).unwrap();
        crate::guest::text(&frame)
    }
}
