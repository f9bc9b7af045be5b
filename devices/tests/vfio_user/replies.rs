//! Replies of every kind that are wrong in their heads, sizes, contents and descriptors: what
//! becomes of a client that gets one.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Instant;

use devices::vfio_user::message::{Command, DeviceState, HEADER_BYTES, Header, IrqAction};
use devices::vfio_user::{ClientError, Limits};

use crate::client::{PATIENT, QUICK, client_with, good, is_over, reply, server};
use crate::raw::{Raw, tell_tale};

/// Each command of a client's whose reply matters.
const ASKED: [Command; 13] = [
    Command::Version,
    Command::DeviceGetInfo,
    Command::GetRegionInfo,
    Command::GetIrqInfo,
    Command::DmaMap,
    Command::DmaUnmap,
    Command::SetIrqs,
    Command::RegionRead,
    Command::RegionWrite,
    Command::DeviceReset,
    Command::DeviceFeature,
    Command::MigDataRead,
    Command::MigDataWrite,
];

/// What becomes of a client that asks `command` of a server which answers it once with what
/// `strange` does, and everything else well. It is over in bounded time; a client that says that
/// its connection has ended says so from then on.
fn asked(
    command: Command,
    limits: Limits,
    strange: impl FnOnce(&mut Raw, Header, Vec<u8>) + Send + 'static,
) -> Result<(), ClientError> {
    let (stream, thread) = server(command, move |raw, header, payload| {
        strange(raw, reply(&header, &[]), good(&header, &payload));
        while let Some((header, payload)) = raw.receive() {
            if !header.wants_no_reply() {
                let answer = good(&header, &payload);
                raw.send(reply(&header, &answer), &answer);
            }
        }
    });
    let begin = Instant::now();
    let made = client_with(stream, limits);
    let result = made.and_then(|mut client| {
        let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let region = client.dma().regions().remove(0);
        let result = match command {
            Command::DmaMap => client.dma_map(&region),
            Command::DmaUnmap => client.dma_unmap(0, 0x1000),
            Command::SetIrqs => client.set_irqs(0, IrqAction::Trigger, &[event]),
            Command::RegionRead => client.region_read(0, 0, &mut [0; 4]),
            Command::RegionWrite => client.region_write(0, 0, &[0; 4]),
            Command::DeviceReset => client.reset(),
            Command::DeviceFeature => client.set_state(DeviceState::Running),
            Command::MigDataRead => client.save().map(drop),
            Command::MigDataWrite => client.restore(&[1, 2, 3]),
            _ => Ok(()),
        };
        match result {
            Err(ClientError::Ended(_)) => is_over(&mut client),
            _ => client.region_read(0, 0, &mut [0; 4]).unwrap(),
        }
        result
    });
    assert!(begin.elapsed() < 3 * limits.call, "{command:?}");
    thread.join().unwrap();
    result
}

#[track_caller]
fn ends(command: Command, what: &str, result: Result<(), ClientError>) {
    match result {
        Err(ClientError::Ended(_) | ClientError::Unusable(_)) => {}
        other => panic!("{command:?}, {what}: {other:?}"),
    }
}

#[test]
fn a_reply_of_whatever_kind_with_a_wrong_head_ends_the_connection() {
    type Change = fn(&mut Header);
    let changes: [(&str, Change); 10] = [
        ("the next id", |header| {
            header.id = header.id.wrapping_add(1)
        }),
        ("the last id", |header| {
            header.id = header.id.wrapping_sub(1)
        }),
        ("another command", |header| {
            header.command = if header.command == 9 { 10 } else { 9 };
        }),
        ("no command", |header| header.command = 0xffff),
        ("no type", |header| header.flags = 2),
        ("no size", |header| header.size = 0),
        ("a small size", |header| header.size = 15),
        ("a large size", |header| header.size = (1 << 20) + 4097),
        ("the largest size", |header| header.size = u32::MAX),
        ("refused, of another id", |header| {
            header.flags |= Header::FLAG_ERROR;
            header.id ^= 0x8000;
        }),
    ];
    for command in ASKED {
        for (what, change) in changes {
            let result = asked(command, PATIENT, move |raw, mut header, answer| {
                header.size = (HEADER_BYTES + answer.len()) as u32;
                change(&mut header);
                raw.send(header, &answer);
            });
            ends(command, what, result);
        }
    }
}

#[test]
fn a_reply_of_whatever_kind_that_is_cut_short_ends_the_connection_or_the_call() {
    for command in ASKED {
        // The connection ends after so many bytes of it.
        let whole = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(HEADER_BYTES));
        let mut cut = 0;
        while cut < whole.load(std::sync::atomic::Ordering::SeqCst) {
            let length = whole.clone();
            let result = asked(command, PATIENT, move |raw, mut header, answer| {
                let size = HEADER_BYTES + answer.len();
                length.store(size, std::sync::atomic::Ordering::SeqCst);
                header.size = size as u32;
                let bytes = [&header.to_bytes(), &answer[..]].concat();
                raw.0.write_all(&bytes[..cut]).unwrap();
                raw.0.shutdown(std::net::Shutdown::Both).unwrap();
            });
            ends(command, &format!("{cut} bytes"), result);
            cut += 1;
        }
        // It stays open, and no more comes.
        let result = asked(command, QUICK, |raw, mut header, answer| {
            header.size = (HEADER_BYTES + answer.len() + 1) as u32;
            raw.send(header, &answer);
            // Long enough for the client to have had enough.
            while raw.0.write_all(&[]).is_ok() && !raw.is_closed() {}
        });
        ends(command, "a byte too few", result);
    }
}

#[test]
fn a_reply_of_whatever_kind_whose_contents_are_short_or_long_is_no_answer() {
    // Others have nothing in their replies that is looked at.
    let read = [
        Command::Version,
        Command::DeviceGetInfo,
        Command::GetRegionInfo,
        Command::GetIrqInfo,
        Command::DmaUnmap,
        Command::RegionRead,
        Command::RegionWrite,
        Command::MigDataRead,
    ];
    for command in ASKED {
        for (less, more) in [(1, 0), (2, 0), (7, 0), (usize::MAX, 0), (0, 1), (0, 70_000)] {
            let result = asked(command, PATIENT, move |raw, mut header, mut answer| {
                answer.truncate(answer.len().saturating_sub(less));
                answer.resize(answer.len() + more, 0xff);
                header.size = (HEADER_BYTES + answer.len()) as u32;
                raw.send(header, &answer);
            });
            if less > 0 && read.contains(&command) {
                ends(command, &format!("{less} fewer"), result);
            }
        }
    }
}

#[test]
fn a_refusal_of_whatever_kind_is_that_calls_error() {
    for command in ASKED {
        for errno in [0, 22, u32::MAX] {
            let result = asked(command, PATIENT, move |raw, mut header, _| {
                header.flags |= Header::FLAG_ERROR;
                header.error = errno;
                raw.send(header, &[]);
            });
            match result {
                Err(ClientError::Refused {
                    command: of,
                    errno: told,
                }) => assert_eq!((of, told), (command, errno)),
                // Some servers have fewer than they say.
                Ok(()) => assert!(matches!(
                    command,
                    Command::GetRegionInfo | Command::GetIrqInfo
                )),
                other => panic!("{command:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn descriptors_with_a_reply_of_whatever_kind_are_closed() {
    for command in ASKED {
        for count in [1, 33, 200] {
            let (mut reader, writer) = tell_tale();
            let result = asked(command, PATIENT, move |raw, mut header, answer| {
                header.size = (HEADER_BYTES + answer.len()) as u32;
                raw.send_with(header, &answer, &vec![writer.as_fd(); count]);
            });
            assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
            result.unwrap_or_else(|error| panic!("{command:?}, {count}: {error}"));
        }
    }
}
