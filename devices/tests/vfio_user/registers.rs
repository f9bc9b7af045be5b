//! Registers that a server has in memory: what needs no message, that order is kept, and peers that
//! do with it what they should not.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use devices::dma::DmaSpace;
use devices::irq::IrqLine;
use devices::pci::PciFunction;
use devices::pci::shared::{SharedLayout, SharedPage};
use devices::vfio_user::message::{
    CONFIG_REGION, Capabilities, Command, FEATURE_GET, FEATURE_REGISTERS, Feature, Payload, Version,
};
use devices::vfio_user::{Client, ClientError, VfioUserFunction};

use crate::client::{good, reply};
use crate::function::{frame, open, read, received, send, write};
use crate::raw::Raw;
use crate::refusing::Refusing;
use crate::support::{Host, LIMITS, Lines, MEMORY_BYTES, Machine, eventually, memfd, memory};

// Registers of the 82540EM (its manual, chapter 13).
const STATUS: u64 = 0x8;
const ICR: u64 = 0xc0;
const IMS: u64 = 0xd0;
const IMC: u64 = 0xd8;
const RCTL: u64 = 0x100;
const TDT: u64 = 0x3818;
/// A frame was received.
const RXT0: u32 = 0x80;

/// Messages to and from the server that `what` takes.
fn messages(machine: &Machine, what: impl FnOnce(&mut VfioUserFunction)) -> (u64, u64) {
    let nic = &mut *machine.nic.lock().unwrap();
    let before = nic.counters().counts();
    what(nic);
    let after = nic.counters().counts();
    (after.sent - before.sent, after.received - before.received)
}

/// What Linux' driver does for an interrupt with a frame.
fn handle_interrupt(nic: &mut VfioUserFunction) {
    assert_ne!(read(nic, ICR) & RXT0, 0);
    write(nic, IMC, u32::MAX);
    assert_ne!(read(nic, STATUS) & 2, 0, "it has a link");
    write(nic, IMS, 0x9d);
    assert_ne!(read(nic, STATUS) & 2, 0);
}

/// Where a server has none in memory: what it is compared with.
#[test]
fn without_memory_an_interrupt_takes_five_messages_and_three_answers() {
    let mut host = Host::new("e1000");
    host.offered.function = Arc::new(Mutex::new(Refusing {
        inner: host.offered.function.clone(),
        refuses: Arc::default(),
    }));
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    host.deliver(&frame(1));
    assert_eq!(received(&machine, 0), frame(1));
    machine.lines.triggered();
    assert_eq!(messages(&machine, handle_interrupt), (5, 3));
}

#[test]
fn an_interrupt_is_handled_without_a_message() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    let nic = || machine.nic.lock().unwrap();
    // What was stored when it was opened has arrived then.
    read(&mut *nic(), STATUS);
    for n in 0..4 {
        host.deliver(&frame(n));
        assert_eq!(received(&machine, n.into()), frame(n));
        machine.lines.triggered();
        let taken = messages(&machine, handle_interrupt);
        assert_eq!(taken, (0, 0));
        let nothing = messages(&machine, |nic| {
            assert_eq!((read(nic, IMS), read(nic, ICR)), (0x9d, 0));
            write(nic, IMC, u32::MAX);
            assert_eq!(read(nic, IMS), 0);
            write(nic, IMS, 0x9d);
        });
        assert_eq!(nothing, (0, 0));
        machine.lines.unmask.write(1).unwrap();
    }
    assert!(!machine.lines.is_triggered(), "there was nothing left");
}

#[test]
fn what_comes_while_it_is_masked_interrupts_as_soon_as_it_is_not() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    let nic = || machine.nic.lock().unwrap();
    read(&mut *nic(), STATUS);
    for n in (0..8).step_by(2) {
        host.deliver(&frame(n));
        machine.lines.triggered();
        assert_ne!(read(&mut *nic(), ICR) & RXT0, 0);
        write(&mut *nic(), IMC, u32::MAX);
        machine.lines.unmask.write(1).unwrap();
        host.deliver(&frame(n + 1));
        assert_eq!(received(&machine, u64::from(n) + 1), frame(n + 1));
        assert!(!machine.lines.is_triggered());
        // One message, which is not waited for.
        let taken = messages(&machine, |nic| write(nic, IMS, 0x9d));
        assert_eq!(taken, (1, 0));
        machine.lines.triggered();
        assert_ne!(read(&mut *nic(), ICR) & RXT0, 0);
        machine.lines.unmask.write(1).unwrap();
    }
    // A cause that its guest does not clear interrupts again when it was acknowledged.
    host.deliver(&frame(9));
    machine.lines.triggered();
    machine.lines.unmask.write(1).unwrap();
    machine.lines.triggered();
}

#[test]
fn a_load_behind_a_store_sees_what_it_did() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    read(&mut *machine.nic.lock().unwrap(), STATUS);
    // A descriptor that is to be fetched delays nothing.
    send(&machine, 0, &frame(1));
    let taken = messages(&machine, |nic| assert_ne!(read(nic, STATUS) & 2, 0));
    assert_eq!(taken, (0, 0));
    // Anything else is done before the load is answered: ICS sets a cause, RST takes the link.
    let taken = messages(&machine, |nic| {
        read(nic, ICR);
        write(nic, 0xc8, 1 << 16);
        assert_ne!(read(nic, ICR) & 1 << 16, 0);
    });
    assert_eq!(taken, (2, 1));
    let taken = messages(&machine, |nic| {
        write(nic, IMS, 0x1);
        write(nic, 0, 1 << 26);
        write(nic, IMC, 0);
        assert_eq!(read(nic, IMS), 0, "the reset came behind the store before");
        assert_eq!(read(nic, STATUS) & 2, 0);
    });
    assert_eq!(taken, (3, 1), "what is behind the reset goes behind it");
    let taken = messages(&machine, |nic| {
        write(nic, RCTL, 0);
        write(nic, TDT, 0);
        read(nic, STATUS);
    });
    assert_eq!(taken, (3, 1));
    // A part of a register goes by a message.
    let taken = messages(&machine, |nic| nic.bar_read(0, STATUS, &mut [0; 2]));
    assert_eq!(taken, (1, 1));
}

/// A client of `host` that has registers in memory.
fn sharing(host: &Host) -> (Client, SharedLayout, SharedPage, crate::support::Served) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let served = host.serve(theirs);
    let (dma, _) = memory(MEMORY_BYTES);
    let mut client = Client::new(ours, dma, LIMITS).unwrap();
    let (layout, page) = client.shared_registers().unwrap().unwrap();
    (client, layout, page, served)
}

fn ask(client: &mut Client, register: u64) -> u32 {
    let mut data = [0; 4];
    client.region_read(0, register, &mut data).unwrap();
    u32::from_le_bytes(data)
}

#[test]
fn whoever_had_the_memory_before_changes_nothing() {
    let host = Host::new("e1000");
    let (mut client, _, old, served) = sharing(&host);
    old.unmask(0x4);
    assert_eq!(ask(&mut client, IMS), 0x4);
    // It may ask again, and has other memory then.
    let (_, new) = client.shared_registers().unwrap().unwrap();
    assert_eq!(new.causes_and_mask().1, 0x4, "with what was there");
    assert!(old.has_ended() && !new.has_ended());
    old.store(0x1, 0x1);
    assert_eq!(ask(&mut client, IMS), 0x4);
    client.disconnect();
    served.gone();
    assert!(new.has_ended());
    new.store(u32::MAX, u32::MAX);
    let (mut next, _, page, _served) = sharing(&host);
    assert_eq!(ask(&mut next, IMS), 0x4, "as the client left it");
    new.mask(u32::MAX);
    assert_eq!(page.causes_and_mask().1, 0x4);
    next.reset().unwrap();
    assert_eq!(page.causes_and_mask().1, 0);
}

#[test]
fn a_client_that_writes_what_it_likes_harms_its_own_interrupts_alone() {
    let host = Host::new("e1000");
    let (mut client, layout, page, _served) = sharing(&host);
    page.store(u32::MAX, u32::MAX);
    page.set(0, u32::MAX);
    assert_eq!(ask(&mut client, IMS), layout.bits);
    assert_eq!(ask(&mut client, ICR), layout.bits);
    // What is shown there is not what the device goes by.
    assert_ne!(ask(&mut client, STATUS), u32::MAX);
    let state = client.save().unwrap();
    page.store(0, 0);
    client.restore(&state).unwrap();
    assert_eq!(ask(&mut client, IMS), layout.bits);
    let seed = std::cell::Cell::new(1_u32);
    for _ in 0..2000 {
        seed.set(
            seed.get()
                .wrapping_mul(1_664_525)
                .wrapping_add(1_013_904_223),
        );
        page.store(seed.get(), seed.get().rotate_left(9));
        host.deliver(&frame(1));
        assert_eq!(ask(&mut client, ICR) & !layout.bits, 0);
    }
}

/// A server that has registers in memory, and says of them what `answer` gives.
fn serve(answer: Vec<u8>, files: Vec<File>) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut raw = Raw::new(theirs);
        while let Some((header, payload)) = raw.receive() {
            if header.wants_no_reply() {
                continue;
            }
            match Command::from_number(header.command).unwrap() {
                Command::Version => {
                    let version = Version {
                        major: 0,
                        minor: 1,
                        capabilities: Capabilities {
                            shared_registers: true,
                            ..Default::default()
                        },
                    };
                    let payload = version.to_bytes();
                    raw.send(reply(&header, &payload), &payload);
                }
                Command::DeviceFeature if files.is_empty() => {
                    raw.send(reply(&header, &answer), &answer);
                }
                Command::DeviceFeature => {
                    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                    raw.send_with(reply(&header, &answer), &answer, &fds);
                }
                command => {
                    let mut payload = good(&header, &payload);
                    if command == Command::RegionRead && payload[8] == CONFIG_REGION as u8 {
                        // An endpoint without capabilities.
                        payload[16..].fill(0);
                    }
                    raw.send(reply(&header, &payload), &payload);
                }
            }
        }
    });
    (ours, thread)
}

fn answer(layout: &SharedLayout) -> Vec<u8> {
    let feature = Feature {
        argsz: Feature::BYTES,
        flags: FEATURE_GET | FEATURE_REGISTERS,
        data: layout.to_bytes(),
    };
    feature.to_bytes()
}

fn layout() -> SharedLayout {
    SharedLayout {
        bar: 0,
        causes: 0x10,
        set_mask: 0x14,
        clear_mask: 0x18,
        bits: 0xff,
        values: vec![0x20],
        late: vec![],
    }
}

#[test]
fn a_server_that_says_of_it_what_cannot_be_is_left() {
    let good = answer(&layout());
    let mut other = good.clone();
    other[8] = 9;
    let page = || vec![memfd(4096)];
    for (answer, files) in [
        (good[..good.len() - 1].to_vec(), page()),
        (other, page()),
        (good.clone(), vec![]),
        (good.clone(), vec![memfd(4096), memfd(4096)]),
    ] {
        let (stream, thread) = serve(answer, files);
        let mut client = Client::new(stream, DmaSpace::empty(), LIMITS).unwrap();
        let refused = client.shared_registers();
        assert!(matches!(refused, Err(ClientError::Ended(_))), "{refused:?}");
        assert!(!client.is_connected());
        thread.join().unwrap();
    }
    // A file that cannot be used is none, and everything goes by messages.
    for file in [memfd(0), File::open("/proc/self/exe").unwrap()] {
        let (stream, thread) = serve(good.clone(), vec![file]);
        let mut client = Client::new(stream, DmaSpace::empty(), LIMITS).unwrap();
        assert!(client.shared_registers().unwrap().is_none());
        drop(client);
        thread.join().unwrap();
    }
}

#[test]
fn memory_that_its_server_cuts_off_reads_as_nothing() {
    let file = memfd(4096);
    let (stream, thread) = serve(answer(&layout()), vec![file.try_clone().unwrap()]);
    let client = Client::new(stream, DmaSpace::empty(), LIMITS).unwrap();
    let lines = Lines::new(0);
    let intx: Arc<dyn IrqLine> = lines.clone();
    let mut function = VfioUserFunction::new(client, intx, &mut |_| Ok(lines.clone())).unwrap();
    let value = |function: &mut VfioUserFunction| {
        let mut data = [1; 4];
        function.bar_read(0, 0x20, &mut data);
        u32::from_le_bytes(data)
    };
    let page = SharedPage::of_file(&file).unwrap();
    page.set(0, 77);
    // The first one goes to the server, which answers so.
    assert_eq!(value(&mut function), 0x0505_0505);
    assert_eq!(value(&mut function), 77);
    file.set_len(0).unwrap();
    eventually(|| (value(&mut function) == 0).then_some(()));
    function.bar_write(0, 0x14, &[0xff; 4]);
    assert!(function.is_connected());
    drop(function);
    thread.join().unwrap();
}
