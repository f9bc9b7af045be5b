//! What a client's first answer takes: one message each way, and no thread that begins or ends.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_protocol::frame::{Decoder, Item, MARK, encode};
use agent_protocol::message::{Body, Call, Done};
use agent_protocol::{Client, Request, Response};
use guest_agent::server::{Powers, serve, serve_each};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// The host's end of a channel that an agent serves in a thread.
fn served(agent: OwnedFd) {
    std::thread::spawn(move || serve(File::from(agent), Powers::Nothing));
}

fn hello(id: u64) -> Vec<u8> {
    let call = Call::Hello { nonce: id };
    let request = serde_json::to_vec(&Request { id, call }).unwrap();
    [&MARK[..], &encode(&request).unwrap()].concat()
}

/// All that is in one message.
fn items(message: &[u8]) -> Vec<Item> {
    let (mut decoder, mut input) = (Decoder::new(), message);
    std::iter::from_fn(|| decoder.next(&mut input)).collect()
}

/// A channel whose messages keep their ends, an empty one among them, which is read as the end of a
/// host that closed its side of a port.
fn messages() -> (File, OwnedFd) {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    );
    let (host, agent) = pair.unwrap();
    (File::from(host), agent)
}

fn body(item: &Item) -> Body {
    match item {
        Item::Frame(payload) => serde_json::from_slice::<Response>(payload).unwrap().body,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_next_host_is_served_on_the_same_channel_at_once() {
    let (mut host, agent) = messages();
    let served = std::thread::spawn(move || serve_each(File::from(agent), Powers::Nothing));
    let mut buffer = vec![0; 1 << 16];
    let mut message = |host: &mut File| {
        let length = host.read(&mut buffer).unwrap();
        items(&buffer[..length])
    };
    for client in 1..4 {
        let ready = message(&mut host);
        assert!(matches!(body(&ready[1]), Body::Ready(_)), "{ready:?}");
        host.write_all(&hello(client)).unwrap();
        let answer = message(&mut host);
        assert!(
            matches!(body(&answer[1]), Body::Done(Done::Hello { nonce, .. }) if nonce == client),
            "{answer:?}"
        );
        // It goes.
        rustix::net::send(&host, &[], rustix::net::SendFlags::empty()).unwrap();
    }
    // The channel itself goes.
    message(&mut host);
    drop(host);
    served.join().unwrap().unwrap_err();
}

#[test]
fn each_client_is_answered_with_one_message() {
    let (mut host, agent) = messages();
    served(agent);
    let mut buffer = vec![0; 1 << 16];
    let mut message = |host: &mut File| {
        let length = host.read(&mut buffer).unwrap();
        items(&buffer[..length])
    };
    let first = message(&mut host);
    assert!(matches!(first[0], Item::Mark), "{first:?}");
    assert!(matches!(body(&first[1]), Body::Ready(_)), "{first:?}");
    for client in 1..4 {
        host.write_all(&hello(client)).unwrap();
        let answer = message(&mut host);
        assert_eq!(answer.len(), 2, "{answer:?}");
        assert_eq!(answer[0], Item::Mark);
        assert!(
            matches!(body(&answer[1]), Body::Done(Done::Hello { nonce, .. }) if nonce == client),
            "{answer:?}"
        );
    }
    // One that asks nothing is told where its answers begin all the same.
    host.write_all(&MARK).unwrap();
    assert_eq!(message(&mut host), [Item::Mark]);
}

#[test]
fn a_worker_that_waits_for_work_serves_the_next_client_and_one_that_hangs_does_not() {
    let (host, agent) = UnixStream::pair().unwrap();
    served(agent.into());
    // Which thread carries requests out is the first word.
    let worker = |client: &mut Client| {
        let stat = client.read_file("/proc/thread-self/stat").unwrap();
        let stat = String::from_utf8(stat).unwrap();
        stat.split(' ').next().unwrap().parse::<u32>().unwrap()
    };
    let next = || {
        let host = host.try_clone().unwrap();
        let mut client = Client::new(move || Ok(Box::new(host.try_clone()?)));
        client.set_limit(Duration::from_secs(60));
        client
    };
    // An answer is there before its worker waits again.
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let mut same = 0;
    while same < 3 {
        assert!(
            std::time::Instant::now() < deadline,
            "each client has another worker"
        );
        let (one, other) = (worker(&mut next()), worker(&mut next()));
        same += u32::from(one == other);
        std::thread::sleep(Duration::from_millis(5));
    }
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let mut hangs = next();
    let hanging = worker(&mut hangs);
    hangs.set_limit(Duration::from_millis(50));
    hangs.read_file(fifo.to_str().unwrap()).unwrap_err();
    let after = worker(&mut next());
    assert_ne!(after, hanging);
}
