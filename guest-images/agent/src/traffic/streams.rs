//! TCP streams, checked byte by byte.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Instant;

use agent_protocol::traffic::TrafficResult;
use crc::{CRC_32_CKSUM, Crc};

use super::contents::{fill_stream, wrong_bytes};
use super::{Time, ns};

const ECHO_PORT: u16 = 7;
const DISCARD_PORT: u16 = 9;
const SOURCE_PORT: u16 = 19;

/// Bytes of one write or read.
const PIECE_BYTES: usize = 32 << 10;

/// Length of the answer of the discard service, at most.
const MAX_ANSWER_BYTES: u64 = 64;

/// The checksum that POSIX's `cksum` prints.
static CKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_CKSUM);

/// To the peer and back.
pub fn echo(peer: Ipv4Addr, time: Time) -> TrafficResult {
    run(peer, time, ECHO_PORT, |stream, result| {
        let mut out = stream.try_clone()?;
        let writer = thread::spawn(move || write_for(&mut out, time, |_| {}));
        let read = read_all(stream, result);
        let Ok(written) = writer.join() else {
            return Err(io::Error::other("the writing thread panicked"));
        };
        result.bytes_to_peer = written?;
        read?;
        expect(result.bytes_from_peer == result.bytes_to_peer, || {
            format!(
                "{} bytes went out and {} came back",
                result.bytes_to_peer, result.bytes_from_peer
            )
        })
    })
}

/// To the peer, which answers with the checksum of what it got.
pub fn sink(peer: Ipv4Addr, time: Time) -> TrafficResult {
    run(peer, time, DISCARD_PORT, |stream, result| {
        let mut digest = CKSUM.digest();
        let mut out = stream.try_clone()?;
        let sent = write_for(&mut out, time, |piece| digest.update(piece))?;
        // POSIX: the length follows, least significant byte first, without leading zeros.
        let bytes = sent.to_le_bytes();
        let used = 8 - sent.leading_zeros() as usize / 8;
        digest.update(&bytes[..used]);
        let mine = format!("{} {sent}", digest.finalize());
        let mut theirs = String::new();
        stream.take(MAX_ANSWER_BYTES).read_to_string(&mut theirs)?;
        result.bytes_to_peer = sent;
        expect(theirs.trim() == mine, || {
            format!(
                "checksum and length: ours {mine}, the peer's {}",
                theirs.trim()
            )
        })
    })
}

/// From the peer.
pub fn source(peer: Ipv4Addr, time: Time) -> TrafficResult {
    run(peer, time, SOURCE_PORT, |stream, result| {
        let start = Instant::now();
        let mut piece = vec![0; PIECE_BYTES];
        while time.goes_on(start) {
            let count = read_some(stream, &mut piece, result)?;
            expect(count > 0, || "the peer ended its stream".to_owned())?;
            result.corrupted += wrong_lines(result.bytes_from_peer, &piece[..count]);
            result.bytes_from_peer += count as u64;
        }
        Ok(())
    })
}

/// Connects, does `work` and puts the time and the error, if any, into the result.
fn run(
    peer: Ipv4Addr,
    time: Time,
    port: u16,
    work: impl FnOnce(&mut TcpStream, &mut TrafficResult) -> io::Result<()>,
) -> TrafficResult {
    let mut result = TrafficResult::default();
    let start = Instant::now();
    let done = TcpStream::connect_timeout(&SocketAddr::from((peer, port)), time.patience).and_then(
        |mut stream| {
            stream.set_read_timeout(Some(time.stream_patience))?;
            stream.set_write_timeout(Some(time.stream_patience))?;
            work(&mut stream, &mut result)
        },
    );
    result.elapsed_ns = ns(start.elapsed());
    result.error = done.err().map(|error| error.to_string());
    result
}

fn expect(holds: bool, otherwise: impl FnOnce() -> String) -> io::Result<()> {
    if holds {
        Ok(())
    } else {
        Err(io::Error::other(otherwise()))
    }
}

/// Writes the stream for `time` and ends it. Returns how much it was.
fn write_for(stream: &mut TcpStream, time: Time, mut seen: impl FnMut(&[u8])) -> io::Result<u64> {
    let start = Instant::now();
    let mut piece = vec![0; PIECE_BYTES];
    let mut offset = 0;
    while time.goes_on(start) {
        fill_stream(offset, &mut piece);
        stream.write_all(&piece)?;
        seen(&piece);
        offset += piece.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(offset)
}

/// Reads what there is, and takes note of how long there was nothing.
fn read_some(
    stream: &mut TcpStream,
    piece: &mut [u8],
    result: &mut TrafficResult,
) -> io::Result<usize> {
    let start = Instant::now();
    let count = loop {
        match stream.read(piece) {
            // A signal ends what waits with a time limit, whatever its handler asks for (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            count => break count,
        }
    };
    let silence = ns(start.elapsed());
    let longest = result.longest_silence_ns.unwrap_or_default();
    result.longest_silence_ns = Some(longest.max(silence));
    count
}

/// Reads the stream to its end and checks it.
fn read_all(stream: &mut TcpStream, result: &mut TrafficResult) -> io::Result<()> {
    let (mut piece, mut scratch) = (vec![0; PIECE_BYTES], Vec::new());
    loop {
        let count = read_some(stream, &mut piece, result)?;
        if count == 0 {
            return Ok(());
        }
        result.corrupted += wrong_bytes(result.bytes_from_peer, &piece[..count], &mut scratch);
        result.bytes_from_peer += count as u64;
    }
}

/// Number of bytes that are not what the source service sends from byte `offset` on: lines of 15
/// hexadecimal digits that count from zero.
fn wrong_lines(offset: u64, data: &[u8]) -> u64 {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut wrong = 0;
    for (at, byte) in (offset..).zip(data) {
        let (line, place) = (at / 16, at % 16);
        let right = match place {
            15 => b'\n',
            _ => DIGITS[(line >> (4 * (14 - place)) & 0xf) as usize],
        };
        wrong += u64::from(*byte != right);
    }
    wrong
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn source_lines_are_counted_from_zero() {
        let lines = b"000000000000000\n000000000000001\n";
        assert_eq!(wrong_lines(0, lines), 0);
        assert_eq!(wrong_lines(16, &lines[16..]), 0);
        assert_eq!(wrong_lines(16, &lines[..16]), 1);
    }

    #[test]
    fn nobody_there_is_told() {
        // Port 9 of the loopback address: nobody listens there on a machine that builds this.
        let result = sink(Ipv4Addr::LOCALHOST, Time::of(Duration::from_millis(10)));
        assert!(result.error.is_some());
    }
}
