//! Each message that a client can send, and what else it can: nothing but an answer or the end of
//! its connection.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use devices::vfio_user::ServerEvent;
use devices::vfio_user::message::{
    Command, DmaUnmap, Header, IrqAction, IrqData, Payload, RegionAccess, RegionWrites, SetIrqs,
    Version,
};

use crate::raw::{Raw, header, tell_tale};
use crate::support::{Host, PATIENCE};

const CONFIG: u32 = 7;

pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A payload of each command that is right.
pub(super) fn samples() -> Vec<(Command, Vec<u8>)> {
    let access = |data: Vec<u8>| RegionAccess {
        offset: 0x4,
        region: CONFIG,
        count: 2,
        data,
    };
    let unmap = DmaUnmap {
        flags: 2,
        address: 0,
        size: 0,
    };
    let irqs = SetIrqs {
        action: IrqAction::Mask,
        data: IrqData::Bools(vec![false]),
        index: 0,
        start: 0,
        count: 1,
    };
    vec![
        (Command::DmaUnmap, unmap.to_bytes()),
        (Command::DeviceGetInfo, words(&[16, 0, 0, 0])),
        (Command::GetRegionInfo, words(&[32, 0, 0, 0, 0, 0, 0, 0])),
        (Command::GetRegionIoFds, words(&[16, 0, 0, 0])),
        (Command::GetIrqInfo, words(&[16, 0, 2, 0])),
        (Command::SetIrqs, irqs.to_bytes()),
        (Command::RegionRead, access(vec![]).to_bytes()),
        (Command::RegionWrite, access(vec![6, 0]).to_bytes()),
        (
            Command::RegionWriteMulti,
            RegionWrites(vec![access(vec![6, 0])]).to_bytes(),
        ),
        (Command::DeviceReset, vec![]),
        (Command::DeviceFeature, words(&[16, 1 << 16 | 2])),
    ]
}

#[test]
fn every_command_is_answered_with_its_id_and_its_layout() {
    let host = Host::new("e1000");
    let (mut raw, served) = Raw::on(&host);
    for (id, (command, payload)) in samples().into_iter().enumerate() {
        raw.send(header(command, id as u16, payload.len()), &payload);
        let (reply, answer) = raw.receive().unwrap();
        assert_eq!((reply.id, reply.command), (id as u16, command as u16));
        assert_eq!(
            reply.flags,
            Header::FLAG_REPLY,
            "{command:?}: {}",
            reply.error
        );
        let expected = match command {
            Command::DmaUnmap => payload,
            // A resettable PCI device with 9 regions and 5 kinds of interrupts.
            Command::DeviceGetInfo => words(&[16, 3, 9, 5]),
            Command::GetRegionInfo => words(&[32, 3, 0, 0, 128 << 10, 0, 0, 0]),
            Command::GetRegionIoFds => words(&[16, 0, 0, 0]),
            Command::GetIrqInfo => words(&[16, 1, 2, 0]),
            Command::RegionRead => [&payload[..], &[0, 0]].concat(),
            Command::RegionWrite => payload[..16].to_vec(),
            Command::RegionWriteMulti => words(&[1, 0]),
            Command::DeviceFeature => words(&[16, 1 << 16 | 2, 2, 0]),
            _ => vec![],
        };
        assert_eq!(answer, expected, "{command:?}");
    }
    let counts = served.server.lock().unwrap().counters().counts();
    assert_eq!(counts.received, samples().len() as u64 + 1);
}

#[test]
fn commands_and_flags_that_nobody_knows_are_refused() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    for command in [0, 14, 19, 0xffff] {
        let mut strange = header(Command::DeviceReset, 3, 0);
        strange.command = command;
        raw.send(strange, &[]);
        assert_eq!(raw.reply(), Err(libc::EOPNOTSUPP));
    }
    for flags in [1 << 5, 1 << 6, 1 << 31] {
        let mut strange = header(Command::DeviceReset, 3, 0);
        strange.flags = flags;
        raw.send(strange, &[]);
        assert_eq!(raw.reply(), Err(libc::EINVAL));
    }
    for command in [Command::DmaRead, Command::DmaWrite] {
        assert_eq!(raw.ask(command, &words(&[0, 0, 0, 0])), Err(libc::EINVAL));
    }
    raw.works();
}

#[test]
fn what_cannot_be_read_on_from_ends_the_connection() {
    let host = Host::new("e1000");
    let sizes = [0, 15, (1 << 20) + 4097, u32::MAX];
    let headers = sizes.map(|size| Header {
        size,
        ..header(Command::DeviceReset, 1, 0)
    });
    let types = [1, 2, 15].map(|flags| Header {
        flags,
        ..header(Command::DeviceReset, 1, 0)
    });
    for strange in headers.into_iter().chain(types) {
        let (mut raw, served) = Raw::on(&host);
        raw.send(strange, &[]);
        assert!(raw.is_closed(), "{strange:?}");
        served.gone();
    }
}

#[test]
fn a_command_that_wants_no_reply_gets_none_and_is_done_in_order() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    for value in 0..=8_u8 {
        let write = RegionAccess {
            offset: 0x3c,
            region: CONFIG,
            count: 1,
            data: vec![value],
        };
        // The last one is outside: it fails in silence.
        let write = match value {
            8 => RegionAccess {
                region: 99,
                ..write
            },
            _ => write,
        };
        let payload = write.to_bytes();
        let mut posted = header(Command::RegionWrite, 1, payload.len());
        posted.flags = Header::FLAG_NO_REPLY;
        raw.send(posted, &payload);
    }
    let read = RegionAccess {
        offset: 0x3c,
        region: CONFIG,
        count: 1,
        data: vec![],
    };
    let reply = raw.ask(Command::RegionRead, &read.to_bytes()).unwrap();
    assert_eq!(reply[16..], [7]);
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    for count in [1, 2, 33, 200] {
        let (mut reader, writer) = tell_tale();
        let fds = vec![writer.as_fd(); count];
        let result = raw.ask_with(Command::DeviceGetInfo, &words(&[16, 0, 0, 0]), &fds);
        assert_eq!(result, Err(libc::EINVAL));
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "all copies are closed");
    }
    raw.works();
}

#[test]
fn versions_are_agreed_on_or_the_connection_ends() {
    let host = Host::new("e1000");
    let json = |text: &str| [&[0, 0, 1, 0][..], text.as_bytes(), &[0]].concat();
    let good = [
        vec![0, 0, 1, 0],
        vec![0, 0, 9, 0],
        json("{}"),
        json(r#"{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true},"x":[1]}}"#),
    ];
    for payload in good {
        let (mut raw, served) = Raw::silent(&host);
        let reply = raw.ask(Command::Version, &payload).unwrap();
        let version = Version::parse(&reply).unwrap();
        assert_eq!((version.major, version.minor), (0, 1));
        let event = served.events.recv_timeout(PATIENCE).unwrap();
        assert_eq!(event, ServerEvent::Negotiated);
        assert_eq!(
            raw.ask(Command::Version, &payload),
            Err(libc::EINVAL),
            "twice"
        );
        raw.works();
    }
    let deep = format!("{}{}", "[".repeat(2000), "]".repeat(2000));
    let long = format!("{{\"x\":\"{}\"}}", "x".repeat(5000));
    let bad = [
        vec![],
        vec![0, 0, 1],
        vec![1, 0, 0, 0],
        vec![0, 0, 1, 0, b'{', b'}'],
        json("{"),
        json(r#"{"capabilities":{"max_msg_fds":-1}}"#),
        json(r#"{"capabilities":7}"#),
        json(&deep),
        json(&long),
    ];
    for payload in bad {
        let (mut raw, served) = Raw::silent(&host);
        assert_eq!(raw.ask(Command::Version, &payload), Err(libc::EINVAL));
        assert!(raw.is_closed());
        served.gone();
    }
    let (mut raw, served) = Raw::silent(&host);
    raw.send(header(Command::DeviceReset, 1, 0), &[]);
    assert!(raw.is_closed(), "no version at first");
    served.gone();
}

#[test]
fn accesses_outside_of_regions_are_refused() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    let strange = [
        (0, 128 << 10, 4),
        (0, (128 << 10) - 2, 4),
        (0, u64::MAX, 4),
        (0, 0, 0),
        (0, 0, (64 << 10) + 1),
        (0, 0, u32::MAX),
        (3, 0, 1),
        (2, 64, 1),
        (CONFIG, 256, 1),
        (9, 0, 1),
        (u32::MAX, 0, 1),
    ];
    for (region, offset, count) in strange {
        let read = RegionAccess {
            offset,
            region,
            count,
            data: vec![],
        };
        let refused = raw.ask(Command::RegionRead, &read.to_bytes());
        assert_eq!(
            refused,
            Err(libc::EINVAL),
            "{region} {offset:#x} {count:#x}"
        );
        let write = RegionAccess {
            data: vec![0; count.min(1 << 17) as usize],
            ..read
        };
        let refused = raw.ask(Command::RegionWrite, &write.to_bytes());
        assert_eq!(
            refused,
            Err(libc::EINVAL),
            "{region} {offset:#x} {count:#x}"
        );
    }
    // All of a region at once is what its registers are one by one.
    let read = |offset, count| RegionAccess {
        offset,
        region: CONFIG,
        count,
        data: vec![],
    };
    let whole = raw
        .ask(Command::RegionRead, &read(0, 256).to_bytes())
        .unwrap();
    for at in 0..256 {
        let byte = raw
            .ask(Command::RegionRead, &read(at, 1).to_bytes())
            .unwrap();
        assert_eq!(byte[16], whole[16 + at as usize]);
    }
}

#[test]
fn interrupts_that_cannot_be_set_are_refused() {
    let host = Host::new("virtio");
    let (mut raw, _served) = Raw::on(&host);
    let (none, bools, eventfds) = (1, 2, 4);
    let (mask, unmask, trigger) = (8, 16, 32);
    let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    // SAFETY: open until the end of the test.
    let event = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&event)) };
    let (_reader, pipe) = tell_tale();
    let pipe = pipe.as_fd();
    let cases: [(&[u32], &[BorrowedFd<'_>], i32); 22] = [
        (&[20, none | trigger, 5, 0, 0], &[], libc::EINVAL),
        (&[20, none | trigger, 0, 0, 2], &[], libc::EINVAL),
        (&[20, none | trigger, 0, 1, 1], &[], libc::EINVAL),
        (&[20, none | trigger, 2, 1, 0], &[], libc::EINVAL),
        (&[20, none | mask, 0, 0, 0], &[], libc::EINVAL),
        (&[20, none | trigger, 2, u32::MAX, 1], &[], libc::EINVAL),
        (&[20, none | trigger, 2, 1, u32::MAX], &[], libc::EINVAL),
        (&[20, none | eventfds | trigger, 0, 0, 1], &[], libc::EINVAL),
        (&[20, none | trigger | mask, 0, 0, 1], &[], libc::EINVAL),
        (&[20, trigger, 0, 0, 1], &[], libc::EINVAL),
        (&[20, none, 0, 0, 1], &[], libc::EINVAL),
        (&[20, none | trigger | 64, 0, 0, 1], &[], libc::EINVAL),
        (&[20, bools | trigger, 0, 0, 1], &[], libc::EINVAL),
        (&[20, eventfds | trigger, 2, 0, 3], &[event], libc::EINVAL),
        (
            &[20, eventfds | trigger, 2, 0, 1],
            &[event, event],
            libc::EINVAL,
        ),
        (
            &[20, eventfds | trigger, 0, 0, 1],
            &[event, event],
            libc::EINVAL,
        ),
        (&[20, eventfds | trigger, 0, 0, 1], &[pipe], libc::EINVAL),
        (&[20, none | trigger, 0, 0, 1], &[event], libc::EINVAL),
        (&[20, eventfds | mask, 0, 0, 1], &[event], libc::ENOTTY),
        (&[20, none | mask, 2, 0, 1], &[], libc::ENOTTY),
        (&[20, eventfds | unmask, 2, 0, 1], &[event], libc::ENOTTY),
        (&[20, eventfds | trigger, 1, 0, 1], &[event], libc::EINVAL),
    ];
    for (payload, fds, errno) in cases {
        let result = match fds {
            [] => raw.ask(Command::SetIrqs, &words(payload)),
            fds => raw.ask_with(Command::SetIrqs, &words(payload), fds),
        };
        assert_eq!(result, Err(errno), "{payload:?}");
    }
    let off = words(&[20, none | trigger, 3, 0, 0]);
    raw.ask(Command::SetIrqs, &off).unwrap();
}

#[test]
fn a_message_that_never_ends_and_a_version_that_never_comes_end_the_connection() {
    let host = Host::new("e1000");
    let limited = |limit: Duration| {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let served = host.serve_with(theirs, |server| server.set_limit(limit));
        (Raw::new(ours), served)
    };
    let (mut raw, served) = limited(Duration::from_millis(50));
    assert!(raw.is_closed());
    assert!(served.gone().contains("silent"));
    let (mut raw, served) = limited(Duration::from_secs(2));
    raw.agree();
    // A byte now and then does not make it faster.
    let bytes = header(Command::DeviceGetInfo, 1, 10_000).to_bytes();
    for byte in bytes.iter().chain(&[0; 64]) {
        std::thread::sleep(Duration::from_millis(5));
        raw.0.write_all(&[*byte]).unwrap();
    }
    assert!(raw.is_closed());
    assert!(served.gone().contains("silent"));
    // One that is quiet between messages stays.
    let (mut raw, _served) = limited(Duration::from_secs(1));
    raw.agree();
    std::thread::sleep(Duration::from_millis(1500));
    raw.works();
}

#[test]
fn a_client_that_takes_no_replies_is_cut_off_and_the_card_goes_on_meanwhile() {
    let host = Host::new("e1000");
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let served = host.serve_with(theirs, |server| server.set_limit(Duration::from_secs(2)));
    let mut raw = Raw::new(ours);
    raw.agree();
    let read = RegionAccess {
        offset: 0,
        region: 0,
        count: 0x8000,
        data: vec![],
    };
    let payload = read.to_bytes();
    raw.0.set_nonblocking(true).unwrap();
    let message = [
        &header(Command::RegionRead, 1, payload.len()).to_bytes(),
        &payload[..],
    ]
    .concat();
    for _ in 0..10_000 {
        if raw.0.write_all(&message).is_err() {
            break;
        }
    }
    // The loop has time for others.
    host.deliver(&[0xff; 60]);
    let taken = || host.far_end.lock().unwrap().to_nic.is_empty().then_some(());
    crate::support::eventually(taken);
    served.gone();
}

#[test]
fn random_bytes_harm_nobody() {
    let host = Host::new("e1000");
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..300 {
        let (mut raw, _served) = Raw::silent(&host);
        if round % 3 > 0 {
            raw.agree();
        }
        for _ in 0..20 {
            let length = (random() % 64) as usize;
            let payload: Vec<u8> = (0..length).map(|_| random() as u8).collect();
            let mut head = header(Command::Version, random() as u16, length);
            head.command = (random() % 20) as u16;
            if round % 3 == 2 {
                head.flags = (random() as u32) & 0x31;
            }
            raw.send(head, &payload);
        }
        let noise: Vec<u8> = (0..200).map(|_| random() as u8).collect();
        let _ = raw.0.write_all(&noise);
        drop(raw);
    }
    let (mut raw, _served) = Raw::on(&host);
    raw.works();
}

#[test]
fn what_a_client_gives_to_no_purpose_is_not_kept() {
    let host = Host::new("e1000");
    let (mut raw, served) = Raw::on(&host);
    let (mut reader, writer) = tell_tale();
    // Descriptors with a message that never becomes whole.
    raw.send_with(header(Command::DmaMap, 1, 32), &[], &[writer.as_fd()]);
    drop(writer);
    drop(raw);
    served.gone();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}
