use std::io::Write;

use super::*;

#[test]
fn patience_ends_with_a_peer_that_says_nothing_and_not_before() {
    let (stream, _peer) = UnixStream::pair().unwrap();
    let channel = Channel::new(stream).unwrap();
    let limit = Duration::from_millis(250);
    let (begin, mut patience) = (Instant::now(), Patience::new(limit));
    let waited = channel.wait(&mut patience);
    assert!(matches!(waited, Err(ChannelError::Silent)), "{waited:?}");
    assert!(begin.elapsed() >= limit);
    let again = channel.wait(&mut patience);
    assert!(matches!(again, Err(ChannelError::Silent)), "{again:?}");
}

#[test]
fn patience_ends_with_a_peer_that_sends_without_end_and_not_while_the_machine_stands_still() {
    let (stream, mut peer) = UnixStream::pair().unwrap();
    peer.write_all(&[0]).unwrap();
    let channel = Channel::new(stream).unwrap();
    // There is always something to read: what counts is what is done with it.
    let mut patience = Patience::new(SLICE);
    std::thread::sleep(SLICE);
    let waited = channel.wait(&mut patience);
    assert!(matches!(waited, Err(ChannelError::Silent)), "{waited:?}");
    let mut patience = Patience::new(2 * SLICE);
    std::thread::sleep(3 * SLICE);
    channel.wait(&mut patience).unwrap();
}

#[test]
fn of_what_nobody_takes_so_much_is_kept_and_no_more() {
    let (stream, mut peer) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(stream).unwrap();
    let mut message = vec![0; READ_BYTES];
    let header = Header {
        id: 0,
        command: 0,
        size: READ_BYTES as u32,
        flags: 0,
        error: 0,
    };
    message[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    let mut received = 0;
    let error = loop {
        peer.write_all(&message).unwrap();
        match channel.fill() {
            Ok(true) => received += message.len(),
            other => break other,
        }
        assert!(received <= MAX_RECEIVED_BYTES + READ_BYTES);
        assert!(channel.buffer.len() <= MAX_RECEIVED_BYTES + READ_BYTES);
    };
    assert!(
        matches!(error, Err(ChannelError::Violation(_))),
        "{error:?}"
    );
    // What was received is still there, and with it taken there is room again.
    let mut taken = 0;
    while let Some(message) = channel.next().unwrap() {
        taken += HEADER_BYTES + message.payload.len();
    }
    assert_eq!(taken, received);
    assert!(channel.fill().unwrap());
}
