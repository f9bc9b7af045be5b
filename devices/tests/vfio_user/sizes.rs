//! Messages of every kind that are cut short, too long, or have sizes and flags that are none: what
//! a server makes of them.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use devices::vfio_user::message::{
    Command, DeviceState, DmaMap, FEATURE_MIG_STATE, FEATURE_SET, MAP_READ, MAP_WRITE, MigData,
    Payload, Version,
};

use crate::raw::{Raw, header, tell_tale};
use crate::server::{samples, words};
use crate::support::{Host, memfd};

#[test]
fn a_message_that_is_too_short_or_too_long_is_refused_and_the_next_one_answered() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    for (command, payload) in samples() {
        for cut in 0..payload.len() {
            // Features may have data or not.
            if command == Command::DeviceFeature && cut >= 8 {
                continue;
            }
            let errno = raw.ask(command, &payload[..cut]).unwrap_err();
            assert_eq!(errno, libc::EINVAL, "{command:?} of {cut} bytes");
        }
        let long = [&payload[..], &[0]].concat();
        assert_eq!(raw.ask(command, &long), Err(libc::EINVAL), "{command:?}");
        let long = [&payload[..], &[0; 70_000]].concat();
        assert_eq!(raw.ask(command, &long), Err(libc::EINVAL), "{command:?}");
    }
    raw.works();
}

/// Sizes of a message that are none: cut after each byte, and too long. Whoever calls it says what
/// is answered to the one that is right.
fn wrong_sizes(payload: &[u8]) -> Vec<Vec<u8>> {
    let cut = (0..payload.len()).map(|cut| payload[..cut].to_vec());
    let long = [1, 70_000].map(|more| [payload, &vec![0; more]].concat());
    let mut small = payload.to_vec();
    small[..4].copy_from_slice(&7_u32.to_le_bytes());
    cut.chain(long).chain([small]).collect()
}

const STRANGE_FLAGS: [u32; 3] = [1 << 5, 1 << 6, 1 << 31];

/// Sends a command that is right but for its flags.
fn with_flags(
    raw: &mut Raw,
    command: Command,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: u32,
) -> Result<Vec<u8>, i32> {
    let mut strange = header(command, 5, payload.len());
    strange.flags = flags;
    match fds {
        [] => raw.send(strange, payload),
        fds => raw.send_with(strange, payload, fds),
    }
    raw.reply()
}

#[test]
fn a_map_of_memory_that_is_short_long_or_strange_is_refused_and_its_descriptor_closed() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    let right = DmaMap {
        flags: MAP_READ | MAP_WRITE,
        offset: 0,
        address: 0x1000,
        size: 0x1000,
    };
    let payload = right.to_bytes();
    let (mut reader, writer) = tell_tale();
    let pipe = [writer.as_fd()];
    for wrong in wrong_sizes(&payload) {
        let refused = raw.ask_with(Command::DmaMap, &wrong, &pipe);
        assert_eq!(refused, Err(libc::EINVAL), "{} bytes", wrong.len());
    }
    for flags in STRANGE_FLAGS {
        let refused = with_flags(&mut raw, Command::DmaMap, &payload, &pipe, flags);
        assert_eq!(refused, Err(libc::EINVAL), "{flags:#x}");
    }
    for flags in [0, MAP_READ, MAP_WRITE, 7, u32::MAX] {
        let strange = DmaMap { flags, ..right };
        let refused = raw.ask_with(Command::DmaMap, &strange.to_bytes(), &pipe);
        assert_eq!(refused, Err(libc::EOPNOTSUPP), "{flags:#x}");
    }
    for fds in [0, 2, 32] {
        let fds = vec![writer.as_fd(); fds];
        let refused = match fds.as_slice() {
            [] => raw.ask(Command::DmaMap, &payload),
            fds => raw.ask_with(Command::DmaMap, &payload, fds),
        };
        assert_eq!(refused, Err(libc::EOPNOTSUPP));
    }
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "all copies are closed");
    let file = memfd(0x1000);
    raw.ask_with(Command::DmaMap, &payload, &[file.as_fd()])
        .unwrap();
    raw.works();
}

/// A state is neither read nor written by one that is refused.
#[test]
fn a_piece_of_a_state_that_is_short_long_or_strange_is_refused() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    let set = |raw: &mut Raw, state: u32| {
        let payload = words(&[16, FEATURE_SET | FEATURE_MIG_STATE, state, 0]);
        raw.ask(Command::DeviceFeature, &payload).unwrap();
    };
    let read = |raw: &mut Raw| {
        let all = words(&[8 + (64 << 10), 64 << 10]);
        let reply = raw.ask(Command::MigDataRead, &all).unwrap();
        MigData::parse(&reply).unwrap().data
    };
    set(&mut raw, DeviceState::StopCopy as u32);
    let question = words(&[8 + 64, 64]);
    let mut strange = wrong_sizes(&question);
    strange.extend([words(&[8, 1]), words(&[8 + 64, 65])]);
    strange.push(words(&[u32::MAX, u32::MAX]));
    strange.push(words(&[u32::MAX, (1 << 20) + 1]));
    for wrong in &strange {
        let refused = raw.ask(Command::MigDataRead, wrong);
        assert_eq!(refused, Err(libc::EINVAL), "{} bytes", wrong.len());
    }
    for flags in STRANGE_FLAGS {
        let refused = with_flags(&mut raw, Command::MigDataRead, &question, &[], flags);
        assert_eq!(refused, Err(libc::EINVAL), "{flags:#x}");
    }
    let state = read(&mut raw);
    assert!(state.len() > 64);
    assert!(read(&mut raw).is_empty(), "it was read to its end");
    set(&mut raw, DeviceState::StopCopy as u32);
    set(&mut raw, DeviceState::Stop as u32);
    set(&mut raw, DeviceState::StopCopy as u32);
    assert!(read(&mut raw) == state, "as a whole");
    set(&mut raw, DeviceState::Resuming as u32);
    let piece = MigData::new(state.clone()).to_bytes();
    let mut wrong = wrong_sizes(&piece[..8 + 16]);
    wrong.extend(wrong_sizes(&MigData::new(vec![1; 16]).to_bytes()));
    for wrong in wrong {
        let refused = raw.ask(Command::MigDataWrite, &wrong);
        assert_eq!(refused, Err(libc::EINVAL), "{} bytes", wrong.len());
    }
    for flags in STRANGE_FLAGS {
        let refused = with_flags(&mut raw, Command::MigDataWrite, &piece, &[], flags);
        assert_eq!(refused, Err(libc::EINVAL), "{flags:#x}");
    }
    raw.ask(Command::MigDataWrite, &piece).unwrap();
    set(&mut raw, DeviceState::Running as u32);
    raw.works();
}

#[test]
fn a_version_that_is_cut_anywhere_or_has_strange_flags_ends_the_connection() {
    let host = Host::new("e1000");
    let version = Version {
        major: 0,
        minor: 1,
        capabilities: Default::default(),
    };
    let payload = version.to_bytes();
    for cut in 0..=payload.len() {
        let (mut raw, served) = Raw::silent(&host);
        let answer = raw.ask(Command::Version, &payload[..cut]);
        // What it can do need not be said.
        if cut == 4 || cut == payload.len() {
            answer.unwrap();
            raw.works();
            continue;
        }
        assert_eq!(answer, Err(libc::EINVAL), "{cut} bytes");
        assert!(raw.is_closed());
        served.gone();
    }
    for flags in STRANGE_FLAGS {
        let (mut raw, served) = Raw::silent(&host);
        let refused = with_flags(&mut raw, Command::Version, &payload, &[], flags);
        assert_eq!(refused, Err(libc::EINVAL), "{flags:#x}");
        assert!(raw.is_closed());
        served.gone();
    }
}

#[test]
fn an_argsz_that_is_too_small_is_refused() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    for (command, mut payload) in samples() {
        let has_argsz = !matches!(
            command,
            Command::RegionRead
                | Command::RegionWrite
                | Command::RegionWriteMulti
                | Command::DeviceReset
        );
        if has_argsz {
            payload[..4].copy_from_slice(&7_u32.to_le_bytes());
            assert_eq!(raw.ask(command, &payload), Err(libc::EINVAL), "{command:?}");
        }
    }
    raw.works();
}
