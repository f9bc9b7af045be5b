//! A device host's process, and what is at the other end of its wire.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};

use cofferdam::control::client::{ANSWER_TIME, Connection};
use cofferdam::device::protocol::{
    ContextStatus, DeviceProtocol, HostStatus, Reply, Request, SwitchRecord,
};
use cofferdam::runtime_dir::RuntimeRoot;
use recovery::switch::Step;

use crate::common::place::{LIMIT, Place};
use crate::guest::{frame, wait};
use crate::nic;

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
        Self::start_as(place, place.command(), words)
    }

    /// The same; its switches wait where [`Hold`] says.
    pub fn start_held(place: &Place) -> Self {
        let mut command = place.command();
        command.env("COFFERDAM_SWITCH_WAITS", place.path("hold"));
        Self::start_as(place, command, "")
    }

    fn start_as(place: &Place, mut command: Command, words: &str) -> Self {
        let wire = place.path("wire").display().to_string();
        let child = command
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
        self.context_of(vm).unwrap()
    }

    /// The same, if there is one.
    pub fn context_of(&self, vm: &str) -> Option<ContextStatus> {
        let mut contexts = self.status().contexts.into_iter();
        contexts.find(|context| context.vm == vm)
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

/// A switch that waits at a step until this is dropped.
pub struct Hold(PathBuf);

impl Hold {
    /// The next switch of a host that was started so waits before `step`.
    pub fn at(place: &Place, step: Step) -> Self {
        let file = place.path("hold");
        std::fs::write(&file, step.to_string()).unwrap();
        Self(file)
    }

    fn reached(&self) -> PathBuf {
        self.0.with_added_extension("reached")
    }

    /// Waits until it is there.
    pub fn wait(&self) {
        wait("the step", || self.reached().exists());
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // There is none where no switch came so far.
        let _ = std::fs::remove_file(self.reached());
        let _ = std::fs::remove_file(&self.0);
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

    fn frame(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame).unwrap();
        frame
    }

    /// The text in the next frame of a guest.
    pub fn receive(&mut self) -> String {
        crate::guest::text(&self.frame())
    }

    /// The number in the next frame that has one, of a guest that numbers its frames.
    pub fn number(&mut self) -> u64 {
        loop {
            let frame = self.frame();
            if frame[12..14] == [8, 6] {
                let number = &frame[nic::NUMBER_AT..nic::NUMBER_AT + 8];
                return u64::from_le_bytes(number.try_into().unwrap());
            }
        }
    }
}
