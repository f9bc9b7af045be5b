//! `cofferdam debug` as a process: what it says of images, whole and damaged, and how it ends.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use isolation::fault_image::{MANIFEST_FILE, MEMORY_FILE};
use rustix::process::{Pid, Signal, kill_process};

#[path = "../src/debug/tests/image.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod image;

fn debug(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
    command.arg("debug").arg(dir);
    command
}

/// What it says on standard error, in a line, when it fails.
fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn an_image_is_summed_up_and_a_damaged_one_is_refused_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("driver-driver_entry-0001");
    std::fs::create_dir(&path).unwrap();
    image::image(&path);
    let output = debug(&path).arg("--check").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("driver_entry+0x10 [driver]"));
    let output = debug(&path).arg("--json").output().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["fault"]["entry"], "driver_entry");
    // The directory above has one.
    let above = refused(&mut debug(dir.path()));
    assert!(above.contains("driver-driver_entry-0001"), "{above}");
    let memory = path.join(MEMORY_FILE);
    let mut bytes = std::fs::read(&memory).unwrap();
    bytes[5 * 4096] ^= 1;
    std::fs::write(&memory, &bytes).unwrap();
    let changed = refused(debug(&path).arg("--check"));
    assert!(changed.contains(MEMORY_FILE), "{changed}");
    bytes.truncate(4096);
    std::fs::write(&memory, &bytes).unwrap();
    let cut = refused(&mut debug(&path));
    assert!(cut.contains("instead of"), "{cut}");
    std::fs::write(path.join(MANIFEST_FILE), "{").unwrap();
    let cut = refused(&mut debug(&path));
    assert!(cut.contains(MANIFEST_FILE), "{cut}");
    for nothing in ["/nonexistent", "/dev/null", "/proc/self"] {
        let text = refused(&mut debug(Path::new(nothing)));
        assert!(text.contains("is no image of a fault"), "{text}");
    }
}

/// Starts to listen, and waits until it does.
fn listening(dir: &Path, socket: &Path) -> Child {
    let mut child = debug(dir)
        .arg("--listen")
        .arg(socket)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("gdb -ex")));
    child
}

#[test]
fn gdbs_are_served_one_after_the_other_until_a_signal_and_the_socket_goes() {
    let dir = tempfile::tempdir().unwrap();
    image::image(dir.path());
    let socket = dir.path().join("socket");
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = listening(dir.path(), &socket);
        // A second one does not take its place.
        let text = debug(dir.path()).arg("--listen").arg(&socket).output();
        let text = String::from_utf8(text.unwrap().stderr).unwrap();
        assert!(text.contains("somebody listens"), "{text}");
        for _ in 0..3 {
            let mut gdb = UnixStream::connect(&socket).unwrap();
            gdb.write_all(b"noise$?#3f").unwrap();
            let mut answer = [0; 5];
            gdb.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"+$T05");
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert!(child.wait().unwrap().success());
        assert!(!socket.exists());
    }
    // What is there and no socket stays.
    std::fs::write(&socket, "mine").unwrap();
    let text = debug(dir.path()).arg("--listen").arg(&socket).output();
    let text = String::from_utf8(text.unwrap().stderr).unwrap();
    assert!(text.contains("no socket"), "{text}");
    assert_eq!(std::fs::read(&socket).unwrap(), b"mine");
}
