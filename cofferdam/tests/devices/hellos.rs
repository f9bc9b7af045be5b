//! Whoever comes to the device's socket: said nothing, too much, nonsense; and clients that cannot
//! be.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::common::place::{LIMIT, Place};
use crate::guest::{Guest, connect, wait};
use crate::host::Host;

#[test]
fn nonsense_at_the_devices_socket_is_answered_and_harms_nobody() {
    let place = Place::new();
    let host = Host::start(&place, "");
    let mut left = Guest::boot(&place, "left", 1);
    let socket = place.path("run/.devices/nic/device.sock");
    let says = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        // What it did not read may end the connection.
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    let hello = |version: u32, vm: &str, mac: &str| {
        format!("{{\"attach\":{{\"version\":{version},\"vm\":\"{vm}\",\"mac\":\"{mac}\"}}}}\n")
    };
    for (bytes, answer) in [
        (b"\n".to_vec(), "not what is said here"),
        (b"".to_vec(), "ended"),
        (b"GET / HTTP/1.1\r\n".to_vec(), "not what is said here"),
        (vec![b'x'; 5000], ""),
        (
            hello(2, "x", "02:00:00:00:00:07").into_bytes(),
            "version 1 and not 2",
        ),
        (
            hello(1, "../x", "02:00:00:00:00:07").into_bytes(),
            "a name has",
        ),
        (hello(1, "x", "01:00:00:00:00:07").into_bytes(), "multicast"),
        (
            hello(1, "x", "02:00:00:00:00:01").into_bytes(),
            "is that of left",
        ),
    ] {
        let said = says(&bytes);
        assert!(said.contains(answer), "{said}");
        assert!(
            answer.is_empty() || said.starts_with("{\"error\":"),
            "{said}"
        );
    }
    // vfio-user that is none: the connection ends, and the context is free again.
    for bytes in [
        &[0; 16][..],
        &[0xff; 64],
        b"garbage that is long enough for a header",
    ] {
        let (mut stream, _) = connect(&place, "hostile", 9).unwrap();
        stream.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        wait("its end", || !host.context("hostile").connected);
    }
    let silent: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    assert_ne!(left.ring(), 0);
    assert_eq!(host.status().turn.as_deref(), Some("left"));
    drop(silent);
    wait("a place", || connect(&place, "after", 10).is_ok());
}

#[test]
fn one_client_for_each_vm_one_address_for_each_and_as_many_as_there_are_slots() {
    let place = Place::new();
    let host = Host::start(&place, "--slots 2");
    let left = Guest::boot(&place, "left", 1);
    let refused = |vm: &str, mac, says: &str| {
        let error = format!("{:#}", connect(&place, vm, mac).unwrap_err());
        assert!(error.contains(says), "{error}");
    };
    refused("left", 1, "busy");
    refused("other", 1, "is that of left");
    let right = Guest::boot(&place, "right", 2);
    refused("other", 3, "2 slots are taken");
    drop(right);
    wait("right's end", || !host.context("right").connected);
    let other = Guest::boot(&place, "other", 3);
    assert_eq!(host.status().contexts.len(), 2);
    refused("right", 2, "slots are taken");
    drop(left);
    host.await_turn(Some("other"));
    // The address of one that has gone may be another's.
    let renamed = Guest::boot(&place, "renamed", 1);
    assert!(!renamed.info.returned);
    drop((other, renamed));
    let error = format!("{:#}", connect(&Place::new(), "x", 1).unwrap_err());
    assert!(error.contains("no device host named"), "{error}");
}

/// Another model is served in the same way: a VM attaches it and passes it on.
#[test]
fn a_virtio_card_is_served_too() {
    let place = Place::new();
    let host = Host::start(&place, "--model virtio");
    let kernel = place.idle_kernel();
    let vm = place.start("vm", &kernel, "--memory 32M --nic device=nic");
    host.await_turn(Some("vm"));
    assert_eq!(host.context("vm").dma_bytes, 32 << 20);
    let (_stream, info) = connect(&place, "other", 3).unwrap();
    assert_eq!((info.model.as_str(), info.turn), ("virtio", false));
    assert_eq!(host.switch("other").from.as_deref(), Some("vm"));
    host.switch("vm");
    crate::common::place::end(&place, vm, &[".devices"]);
    host.await_turn(Some("other"));
}
