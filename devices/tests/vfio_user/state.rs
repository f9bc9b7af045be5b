//! States of devices: taken and put back through the socket.

use std::sync::Arc;

use devices::hold::goes_on::HoldableFunction;
use devices::hold::{DeviceAddress, HeldDevice, Holdable};
use devices::pci::PciFunction;
use devices::state::{Part, StateError};
use devices::vfio_user::FunctionError;
use devices::vfio_user::message::{
    Command, DeviceState, FEATURE_GET, FEATURE_MIG_STATE, FEATURE_PROBE, FEATURE_SET, Feature,
    MigData, MigState, Payload, RegionAccess,
};

use crate::function::{frame, open, received, send};
use crate::raw::Raw;
use crate::support::{Host, Machine};

fn set(raw: &mut Raw, state: u32) -> Result<Vec<u8>, i32> {
    let feature = Feature {
        argsz: 16,
        flags: FEATURE_SET | FEATURE_MIG_STATE,
        data: [state, 0].map(u32::to_le_bytes).concat(),
    };
    raw.ask(Command::DeviceFeature, &feature.to_bytes())
}

fn get(raw: &mut Raw) -> DeviceState {
    let feature = Feature {
        argsz: 16,
        flags: FEATURE_GET | FEATURE_MIG_STATE,
        data: vec![],
    };
    let reply = raw
        .ask(Command::DeviceFeature, &feature.to_bytes())
        .unwrap();
    MigState::parse(&reply[8..]).unwrap().0
}

fn read_config(raw: &mut Raw) -> Result<Vec<u8>, i32> {
    let read = RegionAccess {
        offset: 4,
        region: 7,
        count: 2,
        data: vec![],
    };
    let reply = raw.ask(Command::RegionRead, &read.to_bytes())?;
    Ok(reply[16..].to_vec())
}

fn write_command(raw: &mut Raw, command: u8) {
    let write = RegionAccess {
        offset: 4,
        region: 7,
        count: 2,
        data: vec![command, 0],
    };
    raw.ask(Command::RegionWrite, &write.to_bytes()).unwrap();
}

fn data(raw: &mut Raw, size: u32) -> Result<Vec<u8>, i32> {
    let question = MigData {
        argsz: 8 + size,
        size,
        data: vec![],
    };
    let reply = raw.ask(Command::MigDataRead, &question.to_bytes())?;
    Ok(MigData::parse(&reply).unwrap().data)
}

fn put(raw: &mut Raw, bytes: &[u8]) -> Result<Vec<u8>, i32> {
    raw.ask(
        Command::MigDataWrite,
        &MigData::new(bytes.to_vec()).to_bytes(),
    )
}

#[test]
fn a_function_that_is_stopped_is_not_reached_and_reaches_nothing() {
    let host = Host::new("e1000");
    let (mut raw, served) = Raw::on(&host);
    write_command(&mut raw, 7);
    let command = || {
        let mut bytes = [0; 2];
        host.offered
            .function
            .lock()
            .unwrap()
            .config_read(4, &mut bytes);
        bytes[0]
    };
    for state in [1, 3, 4] {
        set(&mut raw, state).unwrap();
        assert_eq!(get(&mut raw) as u32, state);
        assert_eq!(read_config(&mut raw), Err(libc::EBUSY));
        assert_eq!(command(), 3, "no master of the bus");
    }
    // Nothing was written: that is no state.
    assert_eq!(set(&mut raw, 2), Err(libc::EINVAL));
    assert_eq!(get(&mut raw), DeviceState::Stop);
    set(&mut raw, 2).unwrap();
    assert_eq!(read_config(&mut raw).unwrap(), [7, 0]);
    // Who goes while it is stopped leaves it as it was, but for its way to memory.
    set(&mut raw, 1).unwrap();
    drop(raw);
    served.gone();
    assert_eq!(command(), 3);
}

#[test]
fn states_go_where_they_fit_and_are_refused_elsewhere() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    write_command(&mut raw, 7);
    assert_eq!(data(&mut raw, 64), Err(libc::EINVAL), "it runs");
    assert_eq!(put(&mut raw, &[1]), Err(libc::EINVAL), "it runs");
    set(&mut raw, 3).unwrap();
    assert_eq!(put(&mut raw, &[1]), Err(libc::EINVAL), "it is read");
    let short = [8_u32, 64].map(u32::to_le_bytes).concat();
    assert_eq!(raw.ask(Command::MigDataRead, &short), Err(libc::EINVAL));
    let mut state = Vec::new();
    loop {
        let piece = data(&mut raw, 100).unwrap();
        state.extend(&piece);
        if piece.len() < 100 {
            break;
        }
    }
    assert!(state.len() > 200);
    set(&mut raw, 2).unwrap();
    write_command(&mut raw, 0);
    // Back, in pieces.
    set(&mut raw, 4).unwrap();
    for piece in state.chunks(77) {
        put(&mut raw, piece).unwrap();
    }
    set(&mut raw, 1).unwrap();
    assert_eq!(read_config(&mut raw), Err(libc::EBUSY));
    set(&mut raw, 2).unwrap();
    assert_eq!(read_config(&mut raw).unwrap(), [7, 0]);
    // One that was changed is found, and only a reset helps.
    set(&mut raw, 4).unwrap();
    let at = state.len() / 2;
    state[at] ^= 1;
    put(&mut raw, &state).unwrap();
    let refused = set(&mut raw, 2);
    assert_eq!(refused, Err(libc::EINVAL));
    if get(&mut raw) == DeviceState::Error {
        assert_eq!(set(&mut raw, 2), Err(libc::EINVAL));
        assert_eq!(read_config(&mut raw), Err(libc::EBUSY));
    }
    raw.ask(Command::DeviceReset, &[]).unwrap();
    assert_eq!(get(&mut raw), DeviceState::Running);
    assert_eq!(read_config(&mut raw).unwrap(), [0, 0]);
    // More than any state has.
    set(&mut raw, 4).unwrap();
    let piece = vec![0; 1 << 20];
    let refused = (0..20).find_map(|_| put(&mut raw, &piece).err());
    assert_eq!(refused, Some(libc::EFBIG));
}

#[test]
fn features_are_probed_and_strange_ones_refused() {
    let host = Host::new("e1000");
    let (mut raw, _served) = Raw::on(&host);
    let mut ask = |flags: u32, data: &[u8]| {
        let feature = Feature {
            argsz: 16,
            flags,
            data: data.to_vec(),
        };
        raw.ask(Command::DeviceFeature, &feature.to_bytes())
            .map(|reply| reply[8..].to_vec())
    };
    assert_eq!(ask(FEATURE_GET | 1, &[]), Ok(vec![1, 0, 0, 0, 0, 0, 0, 0]));
    for good in [
        FEATURE_GET | 1,
        FEATURE_GET | 2,
        FEATURE_SET | 2,
        FEATURE_GET | FEATURE_SET | 2,
    ] {
        assert_eq!(ask(FEATURE_PROBE | good, &[]), Ok(vec![]));
    }
    for (bad, errno) in [
        (FEATURE_PROBE | FEATURE_SET | 1, libc::EINVAL),
        (FEATURE_GET | FEATURE_SET | 2, libc::EINVAL),
        (2, libc::EINVAL),
        (FEATURE_GET | 1 << 20 | 2, libc::EINVAL),
        (FEATURE_GET | 6, libc::ENOTTY),
        (FEATURE_GET, libc::ENOTTY),
    ] {
        assert_eq!(ask(bad, &[]), Err(errno), "{bad:#x}");
    }
    for state in [0, 5, 6, 7, 8, u32::MAX] {
        let state = [state, 0].map(u32::to_le_bytes).concat();
        assert_eq!(ask(FEATURE_SET | 2, &state), Err(libc::EINVAL));
    }
}

#[test]
fn a_card_goes_on_at_another_server_from_its_state() {
    let (first, second) = (Host::new("e1000"), Host::new("e1000"));
    let (machine, _served) = Machine::on(&first);
    open(&machine);
    send(&machine, 0, &frame(1));
    assert_eq!(first.sent(), frame(1));
    machine.lines.triggered();
    let state = machine.nic.lock().unwrap().save().unwrap();
    send(&machine, 1, &frame(2));
    assert_eq!(first.sent(), frame(2), "it runs on");
    let (other, _other) = Machine::on(&second);
    let mut memory = vec![0; crate::support::MEMORY_BYTES as usize];
    machine.dma.read(0, &mut memory).unwrap();
    other.dma.write(0, &memory).unwrap();
    other.nic.lock().unwrap().restore(&state).unwrap();
    // The descriptor that the first one sent after its state was taken is still to be sent here.
    let sent = second.far_end.lock().unwrap().from_nic.len();
    assert_eq!(sent, 0, "its tail is not");
    second.deliver(&frame(3));
    assert_eq!(received(&other, 0), frame(3));
    send(&other, 1, &frame(4));
    assert_eq!(second.sent(), frame(4));
    assert_eq!(
        other.nic.lock().unwrap().decoded(),
        machine.nic.lock().unwrap().decoded()
    );
    let foreign = other
        .nic
        .lock()
        .unwrap()
        .restore(&first.offered.function.lock().unwrap().save().unwrap());
    assert!(foreign.is_err());
}

/// Where the guest has the card's registers.
const BAR: u64 = 0xfeb0_0000;

fn load(held: &mut dyn HeldDevice, register: u64) -> u32 {
    let mut data = [0; 4];
    held.read(DeviceAddress::Memory(BAR + register), &mut data);
    u32::from_le_bytes(data)
}

/// As a call of an isolated driver that has reset its card, and then fails.
#[test]
fn a_card_elsewhere_is_put_back_as_it_was_when_a_call_reached_it() {
    const CTRL: u64 = 0;
    const REGISTERS: [u64; 7] = [CTRL, 0x100, 0x400, 0x2800, 0x3800, 0x3810, 0x3818];
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    for n in 0..3 {
        send(&machine, n, &frame(n as u8));
        assert_eq!(host.sent(), frame(n as u8));
    }
    let description = {
        let mut nic = machine.nic.lock().unwrap();
        nic.config_write(0x10, &(BAR as u32).to_le_bytes());
        nic.description().unwrap().unwrap()
    };
    let holdable = HoldableFunction::new(machine.nic.clone(), Some(Arc::new(description)));
    let held = holdable.hold(&mut |held| {
        assert!(held.owns(BAR) && !held.owns(BAR - 1));
        let before = REGISTERS.map(|register| load(held, register));
        let rings = held.memory();
        let ring = rings.iter().find(|(at, _)| *at == 0x2_0000).unwrap().0;
        let descriptor = || {
            let mut descriptor = [0; 16];
            machine.dma.read(ring, &mut descriptor).unwrap();
            descriptor
        };
        let sent = descriptor();
        for _ in 0..3 {
            held.checkpoint();
            let reset = (1u32 << 26).to_le_bytes();
            held.write(DeviceAddress::Memory(BAR + CTRL), &reset);
            machine.dma.write(ring, &[0xff; 16]).unwrap();
            assert_ne!(REGISTERS.map(|register| load(held, register)), before);
            held.restore().unwrap();
            assert_eq!(REGISTERS.map(|register| load(held, register)), before);
            assert_eq!(descriptor(), sent);
        }
        held.withhold_interrupts(true);
        held.withhold_interrupts(false);
    });
    held.unwrap();
    // It goes on as if nothing had been.
    for n in 3..40 {
        send(&machine, n, &frame(n as u8));
        assert_eq!(host.sent(), frame(n as u8));
    }
    host.deliver(&frame(0xaa));
    assert_eq!(received(&machine, 0), frame(0xaa));
    machine.lines.triggered();
    // One that has gone gives no state, and is said to be lost.
    machine.nic.lock().unwrap().disconnect("a test");
    let gone = holdable.hold(&mut |held| {
        held.checkpoint();
        held.restore().unwrap_err();
    });
    gone.unwrap();
}

fn memory_of(machine: &Machine) -> Vec<u8> {
    let mut memory = vec![0; crate::support::MEMORY_BYTES as usize];
    machine.dma.read(0, &mut memory).unwrap();
    memory
}

/// As while a snapshot is taken: what comes meanwhile waits, and nothing of it is in memory.
#[test]
fn a_card_elsewhere_that_is_stopped_writes_no_memory_and_is_the_same_when_it_goes_on() {
    let host = Host::new("e1000");
    let (machine, served) = Machine::on(&host);
    open(&machine);
    send(&machine, 0, &frame(1));
    assert_eq!(host.sent(), frame(1));
    machine.nic.lock().unwrap().stop().unwrap();
    let before = memory_of(&machine);
    host.deliver(&frame(2));
    let state = machine.nic.lock().unwrap().save().unwrap();
    // It is stopped still, and what is attached anew would not be.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let anew = machine.nic.lock().unwrap().reconnect(ours);
    assert!(matches!(anew, Err(FunctionError::Stopped)), "{anew:?}");
    drop(theirs);
    assert_eq!(machine.nic.lock().unwrap().save().unwrap(), state);
    let waits = host.far_end.lock().unwrap().to_nic.len();
    assert_eq!((waits, memory_of(&machine) == before), (1, true));
    machine.nic.lock().unwrap().go_on();
    assert_eq!(received(&machine, 0), frame(2));
    send(&machine, 1, &frame(3));
    assert_eq!(host.sent(), frame(3));
    // What comes for a guest that ends with it is not lost in memory that is gone.
    machine.nic.lock().unwrap().stop().unwrap();
    host.deliver(&frame(4));
    machine.nic.lock().unwrap().disconnect("a test");
    served.gone();
    assert_eq!(host.far_end.lock().unwrap().to_nic.len(), 1);
    let gone = machine.nic.lock().unwrap().stop();
    assert!(matches!(gone, Err(FunctionError::Gone)), "{gone:?}");
}

#[test]
fn a_state_that_was_changed_cut_or_is_of_another_version_or_card_is_refused() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    let state = machine.nic.lock().unwrap().save().unwrap();
    let refused = |state: &Part| machine.nic.lock().unwrap().restore(state).unwrap_err();
    // Whatever is between: what the server is given, and what is kept here.
    let bytes = postcard::to_stdvec(&state).unwrap();
    let mut tried = 0;
    for at in (0..bytes.len() * 8).step_by((bytes.len() / 16) | 1) {
        let mut flipped = bytes.clone();
        flipped[at / 8] ^= 1 << (at % 8);
        if let Ok(flipped) = postcard::from_bytes(&flipped) {
            refused(&flipped);
            tried += 1;
        }
    }
    assert!(tried > 50, "{tried}");
    let mut json = serde_json::to_value(&state).unwrap();
    json["version"] = 2.into();
    let error = refused(&serde_json::from_value(json).unwrap());
    assert!(matches!(error, StateError::Damaged(_)), "{error}");
    // The same of the part that goes to the server.
    let (raw, _raw_served) = Raw::on(&host);
    let mut raw = raw;
    let inner = host.offered.function.lock().unwrap().save().unwrap();
    let whole = postcard::to_stdvec(&inner).unwrap();
    let mut give = |bytes: &[u8]| {
        raw.ask(Command::DeviceReset, &[]).unwrap();
        set(&mut raw, DeviceState::Resuming as u32).unwrap();
        put(&mut raw, bytes).unwrap();
        set(&mut raw, DeviceState::Running as u32)
    };
    for at in (0..whole.len() * 8).step_by((whole.len() / 16) | 1) {
        let mut flipped = whole.clone();
        flipped[at / 8] ^= 1 << (at % 8);
        assert_eq!(give(&flipped), Err(libc::EINVAL), "bit {at}");
    }
    for end in (0..whole.len()).step_by((whole.len() / 40) | 1) {
        assert_eq!(give(&whole[..end]), Err(libc::EINVAL), "cut at {end}");
    }
    let other = Host::new("virtio");
    let other = other.offered.function.lock().unwrap().save().unwrap();
    assert_eq!(
        give(&postcard::to_stdvec(&other).unwrap()),
        Err(libc::EINVAL)
    );
    give(&whole).unwrap();
}
