//! Guests that are saved with a NIC of a device host, and go on with it. The guest sends numbered
//! frames for ever, and sets its NIC up once: what goes on is the device's state.

use std::os::unix::fs::FileExt;
use std::process::{Child, Command};

use crate::common::place::{LIMIT, Place, end, finish, signal};
use crate::common::{EM_X86_64, elf};
use crate::guest::{Guest, wait};
use crate::host::{Far, Host};
use crate::nic;

const NIC: &str = "--memory 32M --nic device=nic,mac=02:00:00:00:00:01";

/// Starts the guest under this name.
pub fn start(place: &Place, name: &str) -> Child {
    let kernel = place.file("kernel", &elf(EM_X86_64, &nic::code()));
    place.start(
        name,
        &kernel,
        &format!("{NIC} --serial file={}", log(place, name)),
    )
}

fn log(place: &Place, name: &str) -> String {
    place.path(&format!("{name}.log")).display().to_string()
}

/// Frames that the guest has received, by what it prints.
pub fn received(place: &Place, name: &str) -> usize {
    let log = std::fs::read(log(place, name)).unwrap_or_default();
    log.iter().filter(|byte| **byte == nic::RECEIVED).count()
}

/// Goes on from the snapshot `dir`, under `name` if it is another one, and waits until it runs.
fn go_on(place: &Place, dir: &str, name: &str, words: &str) -> Child {
    let console = format!("file={}", log(place, name));
    let mut vm = place
        .command()
        .args([
            "run",
            "--snapshot",
            dir,
            "--name",
            name,
            "--serial",
            &console,
        ])
        .args(words.split_whitespace())
        .spawn()
        .unwrap();
    let socket = place.path(&format!("run/{name}/control.sock"));
    wait("the VM goes on", || match vm.try_wait().unwrap() {
        None => socket.exists(),
        Some(status) => panic!("{status}"),
    });
    place.wait_for(name);
    vm
}

/// The next frames at the wire carry on from `number`, which none is left out of and none comes
/// twice in. Reads so many of them.
pub fn carry_on(far: &mut Far, number: &mut u64, frames: u64) {
    for _ in 0..frames {
        let next = far.number();
        assert_eq!(next, *number + 2, "a frame was lost or came twice");
        *number = next;
    }
}

pub fn folder(place: &Place, name: &str) -> String {
    place.path(name).display().to_string()
}

#[test]
fn a_guest_with_the_turn_goes_on_from_its_snapshot_and_no_frame_is_lost_or_sent_twice() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let mut vm = start(&place, "web");
    let mut number = far.number();
    carry_on(&mut far, &mut number, 50);
    for round in 0..6 {
        let dir = folder(&place, &format!("saved-{round}"));
        let (before, mut sent) = (received(&place, "web"), 0);
        // While it goes on: nothing of it is to be seen at the wire.
        std::thread::scope(|scope| {
            let saved = scope.spawn(|| place.ask(&format!("snapshot web {dir}-live")));
            while !saved.is_finished() {
                if sent < 8 {
                    far.send(nic::MAC, "meanwhile");
                    sent += 1;
                }
                carry_on(&mut far, &mut number, 1);
            }
            saved.join().unwrap();
        });
        carry_on(&mut far, &mut number, 50);
        while received(&place, "web") < before + sent {
            carry_on(&mut far, &mut number, 1);
        }
        let stopped = std::thread::scope(|scope| {
            let stopped = scope.spawn(|| {
                place.ask(&format!("snapshot web {dir} --stop"));
                let stopped = finish(vm);
                go_on_is_told(&stopped.status);
                std::fs::remove_file(log(&place, "web")).unwrap();
                go_on(&place, &dir, "web", "")
            });
            while !stopped.is_finished() {
                carry_on(&mut far, &mut number, 1);
            }
            stopped.join().unwrap()
        });
        vm = stopped;
        carry_on(&mut far, &mut number, 50);
        assert_eq!(received(&place, "web"), 0);
        for _ in 0..20 {
            far.send(nic::MAC, "for it");
        }
        while received(&place, "web") < 20 {
            carry_on(&mut far, &mut number, 1);
        }
        assert_eq!(host.context("web").attached, round + 2);
        assert_eq!(host.status().turn.as_deref(), Some("web"));
    }
    end(&place, vm, &[".devices"]);
}

fn go_on_is_told(status: &std::process::ExitStatus) {
    assert!(status.success(), "{status}");
}

#[test]
fn a_parked_guest_goes_on_parked_and_has_its_turn_later() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let mut left = Guest::boot(&place, "left", 9);
    let vm = start(&place, "web");
    wait("it sends", || {
        host.context("web").frames.sent_without_carrier > 0
    });
    let dir = folder(&place, "saved");
    place.ask(&format!("snapshot web {dir} --stop"));
    assert!(finish(vm).status.success());
    let vm = go_on(&place, &dir, "web", "");
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    left.await_link(true);
    left.send(crate::host::FAR, "of the other one");
    assert_eq!(far.receive(), "of the other one");
    host.switch("web");
    let mut number = far.number();
    carry_on(&mut far, &mut number, 50);
    far.send(nic::MAC, "for it");
    while received(&place, "web") == 0 {
        carry_on(&mut far, &mut number, 1);
    }
    // And of one that is paused. Nobody else is there when it goes on, so it has the turn before it
    // runs.
    place.ask("pause web");
    let paused = folder(&place, "paused");
    place.ask(&format!("snapshot web {paused}"));
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    place.ask("resume web");
    host.switch("web");
    number = last_sent(&place, "paused");
    while far.number() < number + 100 {}
    signal(&vm, libc::SIGTERM);
    finish(vm);
    host.await_turn(Some("left"));
    left.send(crate::host::FAR, "behind all of the first");
    while far.receive() != "behind all of the first" {}
    drop(left);
    wait("left's end", || !host.context("left").connected);
    let vm = go_on(&place, &paused, "web", "");
    // It is where it was saved: the frame in its memory was sent or not.
    let next = far.number();
    assert!([number, number + 2].contains(&next), "{number}, {next}");
    number = next;
    carry_on(&mut far, &mut number, 50);
    end(&place, vm, &[".devices"]);
}

/// The last number that the saved guest has put into a frame's buffer.
fn last_sent(place: &Place, dir: &str) -> u64 {
    let image = std::fs::File::open(place.path(dir).join("memory.image")).unwrap();
    let number = |buffer: u64| {
        let mut number = [0; 8];
        let at = 0x23_0000 + buffer * 2048 + nic::NUMBER_AT as u64;
        image.read_exact_at(&mut number, at).unwrap();
        u64::from_le_bytes(number)
    };
    // Every other frame has one.
    (0..8).step_by(2).map(number).max().unwrap()
}

/// Of what the device writes nothing is told to this process.
#[test]
fn a_diff_has_what_the_device_has_written() {
    let place = Place::new();
    let _host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let vm = start(&place, "web");
    far.number();
    let path = |name: &str| folder(&place, name);
    place.ask(&format!("snapshot web {}", path("full")));
    // Its ring has eight descriptors.
    for _ in 0..8 {
        far.send(nic::MAC, "written by the device alone");
    }
    while received(&place, "web") < 8 {
        far.number();
    }
    std::thread::scope(|scope| {
        let dir = format!("{} --diff {}", path("diff"), path("full"));
        let place = &place;
        let saved = scope.spawn(move || place.ask(&format!("snapshot web {dir}")));
        while !saved.is_finished() {
            far.number();
        }
    });
    place.ask(&format!(
        "snapshot merge {} {}",
        path("diff"),
        path("whole")
    ));
    let has = |name: &str| {
        let image = std::fs::File::open(place.path(name).join("memory.image")).unwrap();
        let mut bytes = vec![0; image.metadata().unwrap().len() as usize];
        image.read_exact_at(&mut bytes, 0).unwrap();
        memchr::memmem::find_iter(&bytes, "written by the device alone").count()
    };
    assert_eq!((has("full"), has("diff"), has("whole")), (0, 8, 8));
    end(&place, vm, &[".devices"]);
}

#[test]
fn a_clone_has_an_address_and_a_place_of_its_own() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let vm = start(&place, "web");
    let mut number = far.number();
    carry_on(&mut far, &mut number, 20);
    let dir = folder(&place, "saved");
    place.ask(&format!("snapshot web {dir}"));
    let twin = go_on(&place, &dir, "twin", "");
    let (web, other) = (host.context("web"), host.context("twin"));
    assert!(web.connected && other.connected);
    assert_ne!(web.mac, other.mac);
    assert_eq!((web.turn, other.turn), (true, false));
    host.switch("twin");
    while received(&place, "twin") == 0 {
        far.send(mac_of(&other.mac), "for the twin");
        far.number();
    }
    signal(&twin, libc::SIGTERM);
    finish(twin);
    // The same one a second time, by its address and by its name.
    let words = format!("--snapshot {dir} --name third --nic device=nic,mac=02:00:00:00:00:01");
    refused(
        &place,
        &words,
        "its address 02:00:00:00:00:01 is that of web",
    );
    refused(&place, &format!("--snapshot {dir}"), "web");
    end(&place, vm, &[".devices"]);
}

fn mac_of(text: &str) -> [u8; 6] {
    text.parse::<cofferdam::options::MacAddress>().unwrap().0
}

/// `run` with these words must fail with one line that says this.
#[track_caller]
fn refused(place: &Place, words: &str, says: &str) {
    place.ask_refused(&format!("run {words}"), says);
}

#[test]
fn what_cannot_go_on_is_refused_and_harms_nobody() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut far = Far::connect(&place);
    let vm = start(&place, "web");
    let mut number = far.number();
    let dir = folder(&place, "saved");
    let track = format!("snapshot web {} --track", folder(&place, "tracked"));
    place.ask_refused(&track, "without --track");
    place.ask(&format!("snapshot web {dir} --stop"));
    assert!(finish(vm).status.success());
    let from = format!("--snapshot {dir}");
    refused(&place, &format!("{from} --lazy"), "without --lazy");
    refused(
        &place,
        &format!("{from} --nic vfio=0000:00:02.0"),
        "cannot become another one",
    );
    refused(
        &place,
        &format!("{from} --nic device=nobody"),
        "no device host",
    );
    let mut other = Other::start(&place, "other", "virtio");
    let words = format!("{from} --nic device=other");
    refused(
        &place,
        &words,
        "was saved with a NIC of the model e1000, and this is a virtio",
    );
    other.end();
    // Somebody else is in its place.
    let held = Guest::boot(&place, "web", 1);
    refused(&place, &from, "a VM named web is attached");
    drop(held);
    wait("web's end", || !host.context("web").connected);
    host.await_turn(None);
    let held = Guest::boot(&place, "another", 1);
    refused(
        &place,
        &from,
        "its address 02:00:00:00:00:01 is that of another",
    );
    drop(held);
    wait("its end", || !host.context("another").connected);
    host.await_turn(None);
    // One of the same model may have another name.
    let mut other = Other::start(&place, "other", "e1000");
    let vm = go_on(&place, &dir, "web", "--nic device=other");
    wait("it is answered", || received(&place, "web") > 50);
    other.end();
    // With nobody who has its device it goes on without it, and is not saved.
    wait("the end of its device", || {
        let again = place
            .command()
            .args(["snapshot", "web"])
            .arg(place.path("late"))
            .output();
        let error = String::from_utf8(again.unwrap().stderr).unwrap();
        error.contains("the device's server has gone")
    });
    assert!(!place.path("late").exists());
    assert_eq!(place.status_of("web")["state"], "running");
    signal(&vm, libc::SIGTERM);
    finish(vm);
    let vm = go_on(&place, &dir, "web", "");
    host.await_turn(Some("web"));
    while far.number() < number + 20 {}
    number = far.number();
    carry_on(&mut far, &mut number, 50);
    // The device's part of it is under the same sums as all others.
    let state = place.path("saved/devices.state");
    let bytes = std::fs::read(&state).unwrap();
    end(&place, vm, &[".devices"]);
    for at in [bytes.len() / 3, bytes.len() / 2, bytes.len() - 9] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        std::fs::write(&state, &flipped).unwrap();
        refused(&place, &from, "devices.state");
        std::fs::write(&state, &bytes[..at]).unwrap();
        refused(&place, &from, "devices.state");
    }
}

/// One more device host, whose wire is the gateway.
struct Other(Child);

impl Other {
    fn start(place: &Place, name: &str, model: &str) -> Self {
        let mut command: Command = place.command();
        let words = ["device", "serve", name, "--net", "user", "--model", model];
        let child = command.args(words).spawn().unwrap();
        let socket = place.path(&format!("run/.devices/{name}/control.sock"));
        wait("the other device host", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        Self(child)
    }

    fn end(&mut self) {
        signal(&self.0, libc::SIGTERM);
        let begun = std::time::Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LIMIT);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
