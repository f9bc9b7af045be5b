//! Two ends of a link, and peers that do not behave.

use tempfile::TempDir;

use super::*;

struct Pair {
    directory: TempDir,
    listening: UnixLink,
    connected: UnixLink,
}

fn path(directory: &TempDir) -> PathBuf {
    directory.path().join("link.sock")
}

/// Runs what an event loop would until `done` or for ten seconds.
fn run(link: &mut UnixLink, mut done: impl FnMut(&mut UnixLink, Option<&[u8]>) -> bool) {
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let length = link.receive(&mut buffer);
        if done(link, length.map(|length| &buffer[..length])) {
            return;
        }
        if length.is_none() {
            wait(link.readable_fd(), 100);
        }
        assert!(Instant::now() < end, "nothing happened");
    }
}

fn wait(fd: RawFd, milliseconds: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, milliseconds) == 1 }
}

fn connect(link: &mut UnixLink) {
    run(link, |link, _| link.carrier());
}

fn expect_frame(link: &mut UnixLink, frame: &[u8]) {
    run(link, |_, received| match received {
        Some(received) => {
            assert_eq!(received, frame);
            true
        }
        None => false,
    });
}

impl Pair {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut listening = UnixLink::listen(&path(&directory)).unwrap();
        let connected = UnixLink::connect(&path(&directory)).unwrap();
        assert!(!listening.carrier());
        connect(&mut listening);
        assert!(connected.carrier());
        Self {
            directory,
            listening,
            connected,
        }
    }
}

/// A listening link and a peer that writes what it likes.
fn raw_peer() -> (TempDir, UnixLink, UnixStream) {
    let directory = tempfile::tempdir().unwrap();
    let mut link = UnixLink::listen(&path(&directory)).unwrap();
    let peer = UnixStream::connect(path(&directory)).unwrap();
    connect(&mut link);
    (directory, link, peer)
}

#[test]
fn frames_go_both_ways_whole_and_in_order() {
    let mut pair = Pair::new();
    for n in 1..200usize {
        let frame = vec![n as u8; n * 82];
        assert_eq!(pair.connected.send(&frame), SendOutcome::Sent);
        expect_frame(&mut pair.listening, &frame);
    }
    pair.listening.send(b"one");
    pair.listening.send(b"two");
    let mut buffer = [0; 100];
    assert_eq!(pair.connected.receive(&mut buffer), Some(3));
    assert!(
        wait(pair.connected.readable_fd(), 0),
        "a second frame is there"
    );
    assert_eq!(pair.connected.receive(&mut buffer), Some(3));
    assert_eq!(&buffer[..3], b"two");
    assert_eq!(pair.connected.receive(&mut buffer), None);
    assert!(!wait(pair.connected.readable_fd(), 0));
}

#[test]
fn a_full_link_loses_nothing_and_tells_when_there_is_room() {
    let mut pair = Pair::new();
    let frame = |n: usize| vec![n as u8; 1 + n * 997 % MAX_FRAME_BYTES];
    let (mut sent, mut received, mut full) = (0, 0, 0);
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    let total = 400;
    while received < total {
        while sent < total {
            match pair.connected.send(&frame(sent)) {
                SendOutcome::Sent => sent += 1,
                SendOutcome::Full => {
                    full += 1;
                    break;
                }
                SendOutcome::Dropped => panic!("dropped"),
            }
        }
        let writable = pair.connected.writable_fd().unwrap();
        assert_eq!(writable.signal, WritableSignal::In);
        if sent < total {
            assert!(!wait(writable.fd, 0), "there is no room yet");
        }
        while let Some(length) = pair.listening.receive(&mut buffer) {
            assert_eq!(buffer[..length], frame(received));
            received += 1;
        }
        if sent < total {
            assert!(wait(writable.fd, 1000), "there is room");
        } else {
            // The rest of the last frame goes by the event loop alone.
            pair.connected.receive(&mut buffer);
        }
    }
    assert!(full > 0);
}

#[test]
fn the_carrier_follows_the_peer() {
    let mut pair = Pair::new();
    drop(pair.listening);
    assert!(wait(pair.connected.readable_fd(), 1000));
    run(&mut pair.connected, |link, _| !link.carrier());
    assert_eq!(pair.connected.send(b"frame"), SendOutcome::Dropped);
    assert!(!path(&pair.directory).exists());
    let mut listening = UnixLink::listen(&path(&pair.directory)).unwrap();
    connect(&mut pair.connected);
    connect(&mut listening);
    assert_eq!(pair.connected.send(b"frame"), SendOutcome::Sent);
    expect_frame(&mut listening, b"frame");
    drop(pair.connected);
    run(&mut listening, |link, _| !link.carrier());
    let _again = UnixLink::connect(&path(&pair.directory)).unwrap();
    connect(&mut listening);
}

#[test]
fn a_peer_found_gone_while_sending_is_told_to_the_event_loop() {
    let mut pair = Pair::new();
    let mut buffer = [0; 10];
    assert_eq!(pair.connected.receive(&mut buffer), None);
    drop(pair.listening);
    assert_eq!(pair.connected.send(b"frame"), SendOutcome::Dropped);
    assert!(!pair.connected.carrier());
    assert!(wait(pair.connected.readable_fd(), 0));
}

#[test]
fn connecting_may_come_before_listening() {
    let directory = tempfile::tempdir().unwrap();
    let mut connected = UnixLink::connect(&path(&directory)).unwrap();
    assert!(!connected.carrier());
    let mut listening = UnixLink::listen(&path(&directory)).unwrap();
    connect(&mut connected);
    connect(&mut listening);
    assert!(!wait(connected.readable_fd(), 0), "its timer is quiet");
}

#[test]
fn a_frame_that_comes_byte_by_byte_is_put_together() {
    let (_directory, mut link, mut peer) = raw_peer();
    let mut buffer = [0; 100];
    let bytes = [&5u32.to_be_bytes()[..], b"hello", &1u32.to_be_bytes(), b"!"].concat();
    for byte in &bytes[..bytes.len() - 6] {
        assert_eq!(link.receive(&mut buffer), None);
        peer.write_all(&[*byte]).unwrap();
    }
    peer.write_all(&bytes[bytes.len() - 6..]).unwrap();
    expect_frame(&mut link, b"hello");
    expect_frame(&mut link, b"!");
}

#[test]
fn a_length_that_no_frame_has_ends_the_connection() {
    for length in [0, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
        let (directory, mut link, mut peer) = raw_peer();
        peer.write_all(&length.to_be_bytes()).unwrap();
        run(&mut link, |link, received| {
            assert_eq!(received, None);
            !link.carrier()
        });
        assert!(matches!(peer.read(&mut [0]), Ok(0)));
        // The next peer is welcome.
        let _next = UnixStream::connect(path(&directory)).unwrap();
        connect(&mut link);
    }
}

#[test]
fn a_frame_too_long_for_the_nic_is_dropped_and_the_next_arrives() {
    let (_directory, mut link, mut peer) = raw_peer();
    let long = [
        &200u32.to_be_bytes()[..],
        &[1; 200],
        &3u32.to_be_bytes(),
        b"abc",
    ]
    .concat();
    peer.write_all(&long).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(link.receive(&mut buffer), Some(3));
}

#[test]
fn a_path_that_cannot_be_used_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(
        UnixLink::listen(&file),
        Err(LinkError::NotASocket(_))
    ));
    assert!(matches!(
        UnixLink::listen(&file.join("x")),
        Err(LinkError::Io { .. })
    ));
    assert!(matches!(
        UnixLink::connect(&file.join("x")),
        Err(LinkError::Io { .. })
    ));
    let long = directory.path().join("x".repeat(200));
    assert!(matches!(
        UnixLink::connect(&long),
        Err(LinkError::Io { .. })
    ));
    let _first = UnixLink::listen(&path(&directory)).unwrap();
    assert!(matches!(
        UnixLink::listen(&path(&directory)),
        Err(LinkError::Busy(_))
    ));
}

#[test]
fn a_socket_left_behind_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(path(&directory)).unwrap());
    assert!(path(&directory).exists());
    UnixLink::listen(&path(&directory)).unwrap();
    assert!(!path(&directory).exists());
}

/// A process that listened was saved with a peer, and another one goes on.
#[test]
fn a_restored_link_shows_a_carrier_while_its_peer_comes_back_and_no_longer_if_it_does_not() {
    let mut pair = Pair::new();
    let state = pair.listening.save().unwrap();
    assert!(pair.connected.carrier());
    drop(pair.listening);
    let mut again = UnixLink::listen(&path(&pair.directory)).unwrap();
    assert!(!again.carrier());
    again.restore(&state).unwrap();
    // From here to where the peer is back there is no moment without.
    run(&mut again, |link, _| {
        assert!(link.carrier());
        let mut buffer = [0; MAX_FRAME_BYTES];
        while pair.connected.receive(&mut buffer).is_some() {}
        link.stream.is_some()
    });
    pair.connected.send(b"a frame");
    expect_frame(&mut again, b"a frame");
    // A peer that goes is seen to go; one that never comes back, too.
    drop(pair.connected);
    run(&mut again, |link, _| !link.carrier());
    drop(again);
    let mut alone = UnixLink::listen(&path(&pair.directory)).unwrap();
    alone.restore(&state).unwrap();
    assert!(alone.carrier());
    run(&mut alone, |link, _| !link.carrier());
    // One that had no peer is not waited for.
    let none = alone.save().unwrap();
    alone.restore(&none).unwrap();
    assert!(!alone.carrier());
}
