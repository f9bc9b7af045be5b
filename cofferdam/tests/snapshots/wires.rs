//! Guests on wires of the host that go on in another process: they plug in again, and no two of
//! them into one place.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::place::{LIMIT, Place, end, finish};
use crate::common::{EM_X86_64, elf};
use crate::filled::wait_until;
use crate::{go_on, nic};

/// A guest that sends and receives, on this wire.
pub fn start(place: &Place, name: &str, wire: &str) -> std::process::Child {
    let kernel = place.file("nic", &elf(EM_X86_64, &nic::code()));
    let mac = "02:00:00:00:00:01";
    let log = place.path(&format!("{name}.log")).display().to_string();
    let words = format!("--memory 32M --net {wire} --nic e1000 --mac {mac} --serial file={log}");
    place.start(name, &kernel, &words)
}

/// Frames that the guest has received, by what it prints.
fn received(place: &Place, name: &str) -> usize {
    let log = std::fs::read(place.path(&format!("{name}.log")));
    log.map_or(0, |log| {
        log.iter().filter(|byte| **byte == nic::RECEIVED).count()
    })
}

/// The other end of a guest's cable.
pub struct Peer(UnixStream);

impl Peer {
    fn accept(listener: &UnixListener) -> Self {
        listener.set_nonblocking(true).unwrap();
        let mut stream = None;
        wait_until("the guest plugs in", || {
            stream = listener.accept().ok();
            stream.is_some()
        });
        Self::of(stream.unwrap().0)
    }

    pub fn connect(path: &Path) -> Self {
        let mut stream = None;
        wait_until("the guest listens", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        Self::of(stream.unwrap())
    }

    fn of(stream: UnixStream) -> Self {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    /// The next frame; `None` when the guest has unplugged.
    fn frame(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).ok()?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame).ok()?;
        Some(frame)
    }

    /// Number of the next ARP request.
    pub fn number(&mut self) -> Option<u64> {
        loop {
            let frame = self.frame()?;
            assert_eq!(frame.len(), nic::FRAME_BYTES);
            if frame[12..14] == [8, 6] {
                let number = &frame[nic::NUMBER_AT..nic::NUMBER_AT + 8];
                return Some(u64::from_le_bytes(number.try_into().unwrap()));
            }
        }
    }

    /// The next requests, which are numbered by twos.
    #[track_caller]
    fn follow(&mut self, last: &mut u64, count: usize) {
        for _ in 0..count {
            let number = self.number().unwrap();
            assert_eq!(number, *last + 2);
            *last = number;
        }
    }

    /// Reads until the guest has unplugged, and gives the number that came last.
    fn until_it_ends(mut self, mut last: u64) -> u64 {
        while let Some(number) = self.number() {
            assert_eq!(number, last + 2);
            last = number;
        }
        last
    }

    /// Sends a frame to all.
    pub fn send(&mut self) {
        let mut frame = vec![0xff; 12];
        frame.resize(nic::FRAME_BYTES, 0x11);
        let length = (frame.len() as u32).to_be_bytes();
        self.0.write_all(&[&length[..], &frame].concat()).unwrap();
    }
}

#[test]
fn a_guest_on_a_unix_wire_plugs_in_again_on_either_end() {
    for listens in [false, true] {
        let place = Place::new();
        let cable = place.path("cable");
        let listener = (!listens).then(|| UnixListener::bind(&cable).unwrap());
        let role = if listens { ",listen" } else { "" };
        let plug = || match &listener {
            Some(listener) => Peer::accept(listener),
            None => Peer::connect(&cable),
        };
        let mut vm = start(&place, "one", &format!("unix={}{role}", cable.display()));
        let mut peer = plug();
        let mut last = peer.number().unwrap();
        for round in 0..3 {
            peer.follow(&mut last, 20);
            let dir = place.path(&format!("s{round}")).display().to_string();
            // The snapshot must not wait for a peer that does not read.
            let words = ["snapshot", "one", &dir, "--stop"];
            let asks = place.command().args(words).spawn().unwrap();
            let ends = std::thread::spawn(move || peer.until_it_ends(last));
            assert!(finish(asks).status.success());
            assert!(finish(vm).status.success());
            last = ends.join().unwrap();
            let log = place.path("one.log");
            std::fs::write(&log, b"").unwrap();
            let lazily = if round == 1 { " --lazy" } else { "" };
            let words = format!("--snapshot {dir} --serial file={}{lazily}", log.display());
            vm = go_on(&place, &words);
            peer = plug();
            // What was on its way into the card when the guest ended may come from it now. What a
            // guest that listens sends before its peer is back is lost.
            let next = peer.number().unwrap();
            assert!(
                next >= last && next.is_multiple_of(2),
                "{next} after {last}"
            );
            assert!(listens || next <= last + 2, "{next} after {last}");
            last = next;
            peer.follow(&mut last, 20);
            // And it receives.
            peer.send();
            let reads = std::thread::spawn(move || {
                peer.follow(&mut last, 60);
                (peer, last)
            });
            wait_until("it receives", || received(&place, "one") > 0);
            (peer, last) = reads.join().unwrap();
        }
        end(&place, vm, &[]);
    }
}

#[test]
fn a_second_guest_on_the_same_unix_wire_is_refused_and_the_first_goes_on() {
    let place = Place::new();
    let cable = place.path("cable");
    let wire = format!("unix={},listen", cable.display());
    let vm = start(&place, "one", &wire);
    let mut peer = Peer::connect(&cable);
    let mut last = peer.number().unwrap();
    let dir = place.path("s").display().to_string();
    let asks = place
        .command()
        .args(["snapshot", "one", &dir])
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LIMIT;
    let mut asks = asks;
    while asks.try_wait().unwrap().is_none() {
        peer.follow(&mut last, 1);
        assert!(Instant::now() < deadline);
    }
    let log = place.path("log").display().to_string();
    for name in ["one", "two"] {
        let words = format!("run --snapshot {dir} --name {name} --serial file={log}");
        let says = match name {
            "one" => "one",
            _ => "another process listens on",
        };
        place.ask_refused(&words, says);
        assert!(cable.exists());
        assert_eq!(place.left(), ["one"]);
        peer.follow(&mut last, 20);
    }
    // Elsewhere it goes on.
    let other = place.path("other");
    let words = format!(
        "--snapshot {dir} --name two --serial file={log} --net unix={},listen",
        other.display()
    );
    let two = go_on(&place, &words);
    let mut its = Peer::connect(&other);
    let mut number = its.number().unwrap();
    its.follow(&mut number, 20);
    peer.follow(&mut last, 20);
    end(&place, two, &["one"]);
    peer.follow(&mut last, 20);
    end(&place, vm, &[]);
}

/// A TAP of the host, as long as this lives.
struct Tap(String);

impl Tap {
    /// Skipped where there can be none.
    fn new(test: &str) -> Option<Self> {
        let tap = Self(format!("coff{}", std::process::id() % 1_000_000));
        let ip = |words: &str| {
            let output = Command::new("ip").args(words.split(' ')).output();
            output.is_ok_and(|output| output.status.success())
        };
        let name = &tap.0;
        if !ip(&format!("tuntap add dev {name} mode tap")) || !ip(&format!("link set {name} up")) {
            skipped::skip(test, "this process may not make TAPs");
            return None;
        }
        Some(tap)
    }

    /// Frames that came out of the guest.
    fn frames(&self) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/rx_packets", self.0);
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    #[track_caller]
    fn carries(&self) {
        let before = self.frames();
        wait_until("frames come out of the guest", || {
            self.frames() > before + 20
        });
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let words = ["tuntap", "del", "dev", &self.0, "mode", "tap"];
        let _ = Command::new("ip").args(words).output();
    }
}

#[test]
fn a_guest_on_a_tap_plugs_in_again_and_a_second_one_is_refused() {
    let test = "snapshots::wires::a_guest_on_a_tap_plugs_in_again_and_a_second_one_is_refused";
    let Some(tap) = Tap::new(test) else { return };
    let place = Place::new();
    let vm = start(&place, "one", &format!("tap={}", tap.0));
    tap.carries();
    let dir = place.path("s").display().to_string();
    place.ask(&format!("snapshot one {dir}"));
    let log = place.path("log").display().to_string();
    let two = format!("run --snapshot {dir} --name two --serial file={log}");
    place.ask_refused(&two, "is in use by another process");
    assert_eq!(place.left(), ["one"]);
    tap.carries();
    end(&place, vm, &[]);
    let quiet = tap.frames();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(tap.frames(), quiet);
    let twin = go_on(&place, &two["run ".len()..]);
    place.wait_for("two");
    tap.carries();
    end(&place, twin, &[]);
}
