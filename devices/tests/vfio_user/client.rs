//! What a server can do to a client: nothing but answer, refuse, or lose it.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::vfio_user::message::{
    Command, DmaAccess, HEADER_BYTES, Header, MigData, Payload, RegionAccess, Version,
};
use devices::vfio_user::{ChannelError, Client, ClientError, Limits};

use crate::raw::{Raw, tell_tale};
use crate::support::memory;

/// For servers that answer, however busy this machine is, and for those that do not.
pub(super) const PATIENT: Limits = limits(20);
pub(super) const QUICK: Limits = limits(1);

const fn limits(seconds: u64) -> Limits {
    Limits {
        call: Duration::from_secs(seconds),
        state: Duration::from_secs(seconds),
    }
}

/// Answers a command as a good server of a small device does.
pub(super) fn good(header: &Header, payload: &[u8]) -> Vec<u8> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    match Command::from_number(header.command).unwrap() {
        Command::Version => {
            let version = Version {
                major: 0,
                minor: 1,
                capabilities: Default::default(),
            };
            version.to_bytes()
        }
        Command::DeviceGetInfo => words(&[16, 3, 9, 5]),
        Command::GetRegionInfo => {
            let size = if matches!(payload[8], 0 | 7) { 256 } else { 0 };
            words(&[32, 3, payload[8].into(), 0, size, 0, 0, 0])
        }
        Command::GetIrqInfo => words(&[16, 1, payload[8].into(), u32::from(payload[8] == 0)]),
        Command::RegionRead => {
            let mut access = RegionAccess::parse(payload).unwrap();
            access.data = vec![5; access.count as usize];
            access.to_bytes()
        }
        Command::RegionWrite => payload[..16].to_vec(),
        Command::DmaUnmap => payload.to_vec(),
        Command::DeviceFeature => [payload, &1_u64.to_le_bytes()].concat(),
        Command::MigDataRead => MigData::new(vec![1, 2, 3]).to_bytes(),
        _ => vec![],
    }
}

pub(super) fn reply(header: &Header, payload: &[u8]) -> Header {
    Header {
        flags: Header::FLAG_REPLY,
        size: (HEADER_BYTES + payload.len()) as u32,
        ..*header
    }
}

/// A server that answers well until it gets `until`, and then does something else.
pub(super) fn server<T: Send + 'static>(
    until: Command,
    strange: impl FnOnce(&mut Raw, Header, Vec<u8>) -> T + Send + 'static,
) -> (UnixStream, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut raw = Raw::new(theirs);
        loop {
            let (header, payload) = raw.receive().unwrap();
            if header.command == until as u16 {
                return strange(&mut raw, header, payload);
            }
            if !header.wants_no_reply() {
                let answer = good(&header, &payload);
                raw.send(reply(&header, &answer), &answer);
            }
        }
    });
    (ours, thread)
}

fn client(stream: UnixStream) -> Result<Client, ClientError> {
    client_with(stream, PATIENT)
}

pub(super) fn client_with(stream: UnixStream, limits: Limits) -> Result<Client, ClientError> {
    let (dma, _) = memory(1 << 20);
    Client::new(stream, dma, limits)
}

/// The client has had enough of the server: it is told so at once from now on.
pub(super) fn is_over(client: &mut Client) {
    assert!(!client.is_connected());
    let start = Instant::now();
    for _ in 0..1000 {
        assert!(matches!(
            client.region_read(0, 0, &mut [0]),
            Err(ClientError::Ended(_))
        ));
        assert!(client.post_write(0, 0, &[0]).is_err());
        assert!(client.serve().is_err());
    }
    assert!(start.elapsed() < 100 * QUICK.call, "each of them waits");
}

/// Does `strange` to a client that reads, which has to fail.
fn read_from(strange: impl FnOnce(&mut Raw, Header, Vec<u8>) + Send + 'static) -> ClientError {
    read_within(PATIENT, strange)
}

fn read_within(
    limits: Limits,
    strange: impl FnOnce(&mut Raw, Header, Vec<u8>) + Send + 'static,
) -> ClientError {
    let (stream, thread) = server(Command::RegionRead, |raw, header, payload| {
        strange(raw, header, payload);
        // Until the client has gone.
        while raw.receive().is_some() {}
    });
    let mut client = client_with(stream, limits).unwrap();
    let error = client.region_read(0, 0, &mut [0; 4]).unwrap_err();
    is_over(&mut client);
    drop(client);
    thread.join().unwrap();
    error
}

#[test]
fn a_reply_that_does_not_belong_to_the_call_ends_the_connection() {
    type Change = fn(&mut Header, &mut Vec<u8>);
    let changes: [Change; 9] = [
        |header, _| header.id = header.id.wrapping_add(1),
        |header, _| header.command = 10,
        |header, _| header.flags = 2,
        |_, payload| payload.truncate(15),
        |_, payload| payload.push(0),
        |_, payload| payload.truncate(16),
        |_, payload| payload[0] = 1,
        |_, payload| payload[8] = 1,
        |_, payload| payload[12] = 5,
    ];
    for change in changes {
        read_from(move |raw, header, payload| {
            let mut answer = good(&header, &payload);
            let mut header = reply(&header, &[]);
            change(&mut header, &mut answer);
            header.size = (HEADER_BYTES + answer.len()) as u32;
            raw.send(header, &answer);
        });
    }
}

#[test]
fn a_server_that_is_silent_or_stops_in_a_message_is_waited_for_so_long_and_no_longer() {
    let silent = |error| matches!(error, ClientError::Ended(ChannelError::Silent));
    assert!(silent(read_within(QUICK, |_, _, _| {})));
    assert!(silent(read_within(QUICK, |raw, header, _| {
        raw.0
            .write_all(&reply(&header, &[0; 20]).to_bytes()[..15])
            .unwrap();
    })));
    // A byte now and then is not an answer.
    assert!(silent(read_within(QUICK, |raw, header, payload| {
        let answer = good(&header, &payload);
        let bytes = [&reply(&header, &answer).to_bytes(), &answer[..]].concat();
        for byte in &bytes[..bytes.len() - 1] {
            std::thread::sleep(Duration::from_millis(20));
            let _ = raw.0.write_all(&[*byte]);
        }
    })));
}

#[test]
fn a_server_that_floods_does_not_keep_the_client() {
    let (stream, thread) = server(Command::RegionRead, |raw, _, _| {
        let ask = DmaAccess {
            address: 0,
            count: 8,
            data: vec![],
        };
        let payload = ask.to_bytes();
        let head = crate::raw::header(Command::DmaRead, 1, payload.len());
        let bytes = [&head.to_bytes(), &payload[..]].concat();
        while raw.0.write_all(&bytes).is_ok() {}
    });
    let mut client = client_with(stream, QUICK).unwrap();
    assert!(client.region_read(0, 0, &mut [0; 4]).is_err());
    is_over(&mut client);
    drop(client);
    thread.join().unwrap();
}

#[test]
fn sizes_and_bytes_that_are_none_end_the_connection() {
    for size in [0, 15, (1 << 20) + 4097, u32::MAX] {
        read_from(move |raw, header, _| {
            let strange = Header {
                size,
                ..reply(&header, &[])
            };
            raw.send(strange, &[]);
        });
    }
    read_from(|raw, _, _| raw.0.write_all(&[0xa5; 4000]).unwrap());
    let gone = read_from(|raw, _, _| raw.0.shutdown(std::net::Shutdown::Both).unwrap());
    assert!(matches!(gone, ClientError::Ended(ChannelError::Gone)));
}

#[test]
fn a_call_that_is_refused_is_that_calls_error_and_no_more() {
    for errno in [0, 22, u32::MAX] {
        let (stream, thread) = server(Command::RegionRead, move |raw, header, _| {
            let refusal = Header {
                flags: Header::FLAG_REPLY | Header::FLAG_ERROR,
                error: errno,
                ..reply(&header, &[])
            };
            raw.send(refusal, &[]);
            let (header, payload) = raw.receive().unwrap();
            let answer = good(&header, &payload);
            raw.send(reply(&header, &answer), &answer);
        });
        let mut client = client(stream).unwrap();
        let mut data = [0; 4];
        match client.region_read(0, 0, &mut data) {
            Err(error @ ClientError::Refused { errno: told, .. }) => {
                assert_eq!(told, errno);
                assert!(!error.to_string().is_empty());
            }
            other => panic!("{other:?}"),
        }
        client.region_read(0, 0, &mut data).unwrap();
        assert_eq!(data, [5; 4]);
        thread.join().unwrap();
    }
}

/// Of what it sends nothing is taken while posted writes wait for it to read them.
#[test]
fn a_server_that_floods_and_reads_nothing_is_given_up_before_it_fills_memory() {
    const FLOOD: usize = 16 << 20;
    let (stream, thread) = server(Command::RegionWrite, |raw, _, _| {
        let payload = [0; 4096];
        let mut head = crate::raw::header(Command::DmaWrite, 1, payload.len());
        head.flags = Header::FLAG_NO_REPLY;
        let bytes = [&head.to_bytes(), &payload[..]].concat();
        let mut sent = 0;
        while sent < FLOOD && raw.0.write_all(&bytes).is_ok() {
            sent += bytes.len();
        }
        sent
    });
    let mut client = client(stream).unwrap();
    let error = loop {
        if let Err(error) = client.post_write(0, 0, &[1, 2, 3, 4]) {
            break error;
        }
    };
    assert!(error.to_string().contains("sends without end"), "{error}");
    is_over(&mut client);
    drop(client);
    assert!(thread.join().unwrap() < FLOOD);
}

#[test]
fn a_posted_write_is_not_waited_for_and_may_be_refused() {
    let (stream, thread) = server(Command::RegionRead, |raw, header, payload| {
        // As one server does although no reply was wanted.
        let refused = Header {
            id: header.id.wrapping_sub(1),
            command: Command::RegionWrite as u16,
            flags: Header::FLAG_REPLY | Header::FLAG_ERROR,
            error: 22,
            ..reply(&header, &[])
        };
        raw.send(refused, &[]);
        let answer = good(&header, &payload);
        raw.send(reply(&header, &answer), &answer);
    });
    let mut client = client(stream).unwrap();
    for _ in 0..100 {
        client.post_write(0, 0, &[1, 2, 3, 4]).unwrap();
    }
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    assert_eq!(client.counters().counts().posted, 100);
    thread.join().unwrap();
}

#[test]
fn a_server_reaches_what_it_was_told_of_by_messages_too() {
    let (dma, file) = memory(1 << 20);
    let (stream, thread) = server(Command::RegionRead, |raw, header, payload| {
        let mut ask = |command, address, count, data: &[u8]| {
            let access = DmaAccess {
                address,
                count,
                data: data.to_vec(),
            };
            let bytes = access.to_bytes();
            raw.ask(command, &bytes)
                .map(|reply| DmaAccess::parse(&reply).unwrap().data)
        };
        assert_eq!(
            ask(Command::DmaWrite, 0x1000, 4, b"abcd"),
            Ok(b"abcd"[..0].to_vec())
        );
        assert_eq!(ask(Command::DmaRead, 0x1001, 2, &[]), Ok(b"bc".to_vec()));
        for (address, count) in [
            (1 << 20, 1),
            ((1 << 20) - 1, 2),
            (u64::MAX, 2),
            (0x8000, 0x1001),
        ] {
            assert_eq!(
                ask(Command::DmaRead, address, count, &[]),
                Err(libc::EINVAL)
            );
        }
        assert_eq!(ask(Command::DmaWrite, 0, 4, b"abc"), Err(libc::EINVAL));
        assert_eq!(ask(Command::DmaRead, 0, 4, b"abcd"), Err(libc::EINVAL));
        assert_eq!(ask(Command::RegionRead, 0, 4, &[]), Err(libc::EOPNOTSUPP));
        let answer = good(&header, &payload);
        raw.send(reply(&header, &answer), &answer);
        raw.ask(Command::DmaRead, &[0; 16]).unwrap();
    });
    let mut client = Client::new(stream, dma.clone(), PATIENT).unwrap();
    // Of its memory, 36 KiB.
    let part = devices::dma::DmaRegion {
        address: 0,
        len: 0x9000,
        file,
        offset: 0,
    };
    client.dma_map(&part).unwrap();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    let mut seen = [0; 4];
    dma.read(0x1000, &mut seen).unwrap();
    assert_eq!(&seen, b"abcd");
    // Also while nothing is asked of the server.
    crate::support::eventually(|| {
        let served = client.serve();
        match thread.is_finished() {
            true => Some(()),
            false => {
                served.unwrap();
                None
            }
        }
    });
    thread.join().unwrap();
}

#[test]
fn a_server_that_cannot_be_used_is_refused() {
    type Change = fn(&mut Vec<u8>);
    let cases: [(Command, Change); 8] = [
        (Command::Version, |answer| answer[0] = 1),
        (Command::Version, |answer| answer[2] = 9),
        (Command::Version, |answer| {
            *answer.last_mut().unwrap() = b'x'
        }),
        (Command::DeviceGetInfo, |answer| answer[4] = 1),
        (Command::DeviceGetInfo, |answer| answer[8] = 3),
        (Command::DeviceGetInfo, |answer| answer[11] = 0xff),
        (Command::GetRegionInfo, |answer| answer[8] = 9),
        (Command::GetIrqInfo, |answer| answer[8] = 9),
    ];
    for (command, change) in cases {
        let (stream, thread) = server(command, move |raw, header, payload| {
            let mut answer = good(&header, &payload);
            change(&mut answer);
            raw.send(reply(&header, &answer), &answer);
            assert!(raw.is_closed());
        });
        assert!(client(stream).is_err());
        thread.join().unwrap();
    }
}

#[test]
fn descriptors_that_a_server_sends_are_closed() {
    let (mut reader, writer) = tell_tale();
    let (stream, thread) = server(Command::RegionRead, move |raw, header, payload| {
        let answer = good(&header, &payload);
        raw.send_with(reply(&header, &answer), &answer, &vec![writer.as_fd(); 100]);
    });
    let mut client = client(stream).unwrap();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    thread.join().unwrap();
    assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
}

#[test]
fn an_answer_that_nobody_asked_for_ends_the_connection() {
    let (stream, thread) = server(Command::RegionRead, |raw, header, payload| {
        let answer = good(&header, &payload);
        raw.send(reply(&header, &answer), &answer);
        raw.send(reply(&header, &answer), &answer);
        assert!(raw.is_closed());
    });
    let mut client = client(stream).unwrap();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    crate::support::eventually(|| client.serve().err());
    is_over(&mut client);
    thread.join().unwrap();
}

#[test]
fn states_are_read_and_written() {
    let (stream, thread) = server(Command::DeviceReset, |raw, header, _| {
        raw.send(reply(&header, &[]), &[]);
    });
    let mut client = client(stream).unwrap();
    assert!(client.can_migrate().unwrap());
    assert_eq!(client.save().unwrap(), [1, 2, 3]);
    client.restore(&[0; 3000]).unwrap();
    client.dma_unmap(0, 0x1000).unwrap();
    client.reset().unwrap();
    thread.join().unwrap();
}
