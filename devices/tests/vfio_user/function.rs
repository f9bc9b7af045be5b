//! A card of another process as a function of this machine.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use devices::dma::DmaSpace;
use devices::nic::{NicModel, NicParts};
use devices::pci::bus::SharedFunction;
use devices::pci::config::offset;
use devices::pci::{BarSpace, PciFunction};

use crate::support::{FarEnd, Host, Lines, MAC, MEMORY_BYTES, Machine, eventually, memory, wire};

// Registers of the 82540EM (its manual, chapter 13).
const CTRL: u64 = 0x0;
const STATUS: u64 = 0x8;
const ICR: u64 = 0xc0;
const IMS: u64 = 0xd0;
const RCTL: u64 = 0x100;
const TCTL: u64 = 0x400;
const RDBAL: u64 = 0x2800;
const TDBAL: u64 = 0x3800;
const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x20_0000;
const RING: u32 = 16;

pub fn read(nic: &mut dyn PciFunction, register: u64) -> u32 {
    let mut data = [0; 4];
    nic.bar_read(0, register, &mut data);
    u32::from_le_bytes(data)
}

pub fn write(nic: &mut dyn PciFunction, register: u64, value: u32) {
    nic.bar_write(0, register, &value.to_le_bytes());
}

/// Opens the card as a driver does: rings, buffers, interrupts.
pub fn open(machine: &Machine) {
    let nic = &mut *machine.nic.lock().unwrap();
    nic.config_write(offset::COMMAND, &[0x07, 0]);
    write(nic, CTRL, 1 << 6);
    for (base, ring) in [(TDBAL, TX_RING), (RDBAL, RX_RING)] {
        write(nic, base, ring as u32);
        write(nic, base + 4, 0);
        write(nic, base + 8, RING * 16);
        write(nic, base + 0x10, 0);
        write(nic, base + 0x18, 0);
    }
    for n in 0..u64::from(RING) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&(RX_BUFFERS + n * 0x1000).to_le_bytes());
        machine.dma.write(RX_RING + n * 16, &descriptor).unwrap();
    }
    write(nic, TCTL, 1 << 1 | 1 << 3);
    write(nic, RCTL, 1 << 1 | 1 << 15);
    write(nic, RDBAL + 0x18, RING - 1);
    read(nic, ICR);
    write(nic, IMS, 0x9d);
}

pub fn send(machine: &Machine, n: u32, frame: &[u8]) {
    machine.dma.write(TX_BUFFER, frame).unwrap();
    let mut descriptor = [0; 16];
    descriptor[..8].copy_from_slice(&TX_BUFFER.to_le_bytes());
    descriptor[8..12].copy_from_slice(&(1 << 24 | 1 << 27 | frame.len() as u32).to_le_bytes());
    let at = TX_RING + u64::from(n % RING) * 16;
    machine.dma.write(at, &descriptor).unwrap();
    let nic = &mut *machine.nic.lock().unwrap();
    write(nic, TDBAL + 0x18, (n + 1) % RING);
}

/// Contents of a frame that was received in the `n`th descriptor, as soon as it was.
pub fn received(machine: &Machine, n: u64) -> Vec<u8> {
    eventually(|| {
        let mut descriptor = [0; 16];
        machine.dma.read(RX_RING + n * 16, &mut descriptor).unwrap();
        (descriptor[12] & 1 != 0).then(|| {
            let length = u16::from_le_bytes([descriptor[8], descriptor[9]]);
            let mut data = vec![0; usize::from(length) - 4];
            machine
                .dma
                .read(RX_BUFFERS + n * 0x1000, &mut data)
                .unwrap();
            data
        })
    })
}

pub fn frame(tag: u8) -> Vec<u8> {
    let mut frame = vec![tag; 100];
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

#[test]
fn a_card_of_another_process_sends_receives_and_interrupts() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    open(&machine);
    let nic = || machine.nic.lock().unwrap();
    assert_eq!(nic().bars().len(), 2);
    assert_eq!(nic().bars()[1].space, BarSpace::Io);
    for n in 0..40 {
        send(&machine, n, &frame(n as u8));
        assert_eq!(host.sent(), frame(n as u8));
    }
    machine.lines.triggered();
    // Masked until the guest has acknowledged it.
    host.deliver(&frame(0xaa));
    assert_eq!(received(&machine, 0), frame(0xaa));
    assert!(!machine.lines.is_triggered());
    machine.lines.unmask.write(1).unwrap();
    machine.lines.triggered();
    // What is acknowledged when the device is quiet triggers nothing.
    assert_ne!(read(&mut *nic(), ICR), 0);
    machine.lines.unmask.write(1).unwrap();
    assert_ne!(read(&mut *nic(), STATUS) & 2, 0);
    assert!(!machine.lines.is_triggered());
    host.deliver(&frame(0xbb));
    assert_eq!(received(&machine, 1), frame(0xbb));
    machine.lines.triggered();
}

#[test]
fn a_card_whose_server_has_gone_is_not_there_until_it_is_back_with_its_state() {
    let host = Host::new("e1000");
    let (machine, served) = Machine::on(&host);
    open(&machine);
    send(&machine, 0, &frame(1));
    assert_eq!(host.sent(), frame(1));
    machine.lines.triggered();
    served.server.lock().unwrap().disconnect();
    assert!(served.server.lock().unwrap().has_ended());
    served.gone();
    assert!(host.offered.dma.regions().is_empty());
    {
        let nic = &mut *machine.nic.lock().unwrap();
        assert_eq!(read(nic, STATUS), u32::MAX);
        let mut ids = [0; 4];
        nic.config_read(offset::VENDOR_ID, &mut ids);
        assert_eq!(ids, [0xff; 4]);
        write(nic, TCTL, 0);
        assert!(!nic.is_connected());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _served = host.serve(theirs);
        nic.reconnect(ours).unwrap();
        assert!(nic.is_connected());
        // The write that vanished is the one thing that did not happen.
        assert_eq!(read(nic, TCTL), 1 << 1 | 1 << 3);
    }
    host.deliver(&frame(2));
    assert_eq!(received(&machine, 0), frame(2));
    machine.lines.triggered();
    send(&machine, 1, &frame(3));
    assert_eq!(host.sent(), frame(3));
}

#[test]
fn a_machine_that_is_gone_has_its_memory_and_its_interrupts_taken_back() {
    let host = Host::new("e1000");
    let (machine, served) = Machine::on(&host);
    open(&machine);
    assert_eq!(host.offered.dma.regions().len(), 1);
    let file = Arc::downgrade(&machine.file);
    drop(machine);
    served.gone();
    assert!(host.offered.dma.regions().is_empty());
    // Frames for the machine that was there reach nobody, and the next one.
    host.deliver(&frame(1));
    assert!(file.upgrade().is_none());
    let (next, _served) = Machine::on(&host);
    open(&next);
    host.deliver(&frame(2));
    assert_eq!(received(&next, 0), frame(2));
    next.lines.triggered();
}

/// A card in this process, with the same memory as one elsewhere.
fn card_here(dma: &DmaSpace) -> (SharedFunction, Arc<Mutex<FarEnd>>) {
    let (wire, far_end, _frames) = wire();
    let lines = Lines::new(0);
    let parts = NicParts {
        mac: MAC,
        wire,
        dma: dma.clone(),
        intx: lines,
        vectors: &mut |_| Err("none".to_owned()),
    };
    let nic = NicModel::from_name("e1000").unwrap().make(parts).unwrap();
    (nic.function, far_end)
}

#[test]
fn a_card_elsewhere_answers_as_one_here() {
    // Registers in which nothing happens by time.
    const REGISTERS: [u64; 20] = [
        0x0028, 0x0038, 0x00d0, 0x00d8, 0x0100, 0x0410, 0x1000, 0x2800, 0x2804, 0x2808, 0x2820,
        0x282c, 0x3800, 0x3804, 0x3808, 0x3828, 0x5000, 0x5200, 0x5400, 0x5604,
    ];
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    let (dma, _file) = memory(MEMORY_BYTES);
    let (here, here_far) = card_here(&dma);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut there = machine.nic.lock().unwrap();
    let mut here = here.lock().unwrap();
    for step in 0..5000 {
        let what = random();
        let register = REGISTERS[(random() % REGISTERS.len() as u64) as usize];
        let offset = register + if what & 0x700 == 0 { random() % 4 } else { 0 };
        let width = [1, 2, 4, 8][if what & 0x7000 == 0 {
            (what >> 20) as usize % 4
        } else {
            2
        }];
        let value = random().to_le_bytes();
        let config = (random() % 0x40) as u16;
        match what % 8 {
            0..4 => {
                here.bar_write(0, offset, &value[..width]);
                there.bar_write(0, offset, &value[..width]);
            }
            4 => {
                here.config_write(config, &value[..width.min(4)]);
                there.config_write(config, &value[..width.min(4)]);
                assert_eq!(here.decoded(), there.decoded());
            }
            5 => {
                let (mut ours, mut theirs) = ([0; 4], [1; 4]);
                here.config_read(config, &mut ours);
                there.config_read(config, &mut theirs);
                assert_eq!(
                    ours, theirs,
                    "step {step}: configuration space at {config:#x}"
                );
            }
            _ => {
                let (mut ours, mut theirs) = ([0; 8], [1; 8]);
                here.bar_read(0, offset, &mut ours[..width]);
                there.bar_read(0, offset, &mut theirs[..width]);
                assert_eq!(ours[..width], theirs[..width], "step {step}: {offset:#x}");
            }
        }
    }
    here.reset();
    there.reset();
    for at in (0..0x6000)
        .step_by(4)
        .filter(|at| !(0xc0..0xc8).contains(at) && *at != 8)
    {
        let (mut ours, mut theirs) = ([0; 4], [1; 4]);
        here.bar_read(0, at, &mut ours);
        there.bar_read(0, at, &mut theirs);
        assert_eq!(ours, theirs, "after a reset: {at:#x}");
    }
    assert!(here_far.lock().unwrap().from_nic.is_empty());
}

#[test]
fn vectors_are_routed_here_and_triggered_there() {
    let host = Host::new("virtio");
    let (machine, _served) = Machine::on(&host);
    let mut nic = machine.nic.lock().unwrap();
    // The capability of MSI-X, by the list that the guest sees.
    let byte = |nic: &mut dyn PciFunction, at: u16| {
        let mut data = [0];
        nic.config_read(at, &mut data);
        data[0]
    };
    let mut at = u16::from(byte(&mut *nic, offset::CAPABILITIES_POINTER));
    while byte(&mut *nic, at) != 0x11 {
        at = u16::from(byte(&mut *nic, at + 1));
        assert_ne!(at, 0, "it has MSI-X");
    }
    let table = 0x4000;
    let route = |machine: &Machine| machine.lines.routes.lock().unwrap().clone();
    nic.config_write(at + 2, &0xc000_u16.to_le_bytes());
    for vector in 0..3 {
        let entry = table + 16 * vector;
        nic.bar_write(0, entry, &0xfee0_0000_u32.to_le_bytes());
        nic.bar_write(0, entry + 8, &(0x40 + vector as u32).to_le_bytes());
        nic.bar_write(0, entry + 12, &0_u32.to_le_bytes());
    }
    assert_eq!(route(&machine), [None; 3], "the function is masked");
    nic.config_write(at + 2, &0x8000_u16.to_le_bytes());
    assert_eq!(route(&machine)[2].unwrap().data, 0x42);
    nic.bar_write(0, table + 16 + 12, &1_u32.to_le_bytes());
    assert_eq!(route(&machine)[1], None);
    let mut control = [0; 4];
    nic.bar_read(0, table + 16 + 12, &mut control);
    assert_eq!(control, [1, 0, 0, 0]);
    // What the function signals reaches this machine.
    drop(nic);
    let vectors = host.offered.interrupts.vectors();
    vectors.trigger(2);
    eventually(|| machine.lines.vectors[2].read().ok());
    assert!(!machine.lines.is_triggered());
    // Back to the line: what is signalled meanwhile waits for the vectors.
    machine
        .nic
        .lock()
        .unwrap()
        .config_write(at + 2, &0_u16.to_le_bytes());
    vectors.trigger(0);
    host.offered.interrupts.line().set_level(true);
    machine.lines.triggered();
    assert!(machine.lines.vectors[0].read().is_err());
    machine
        .nic
        .lock()
        .unwrap()
        .config_write(at + 2, &0x8000_u16.to_le_bytes());
    eventually(|| machine.lines.vectors[0].read().ok());
    // The same routes and vectors with a server that is new.
    let before = route(&machine);
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.nic.lock().unwrap().disconnect("it is tested");
    let _served = host.serve(theirs);
    machine.nic.lock().unwrap().reconnect(ours).unwrap();
    assert_eq!(route(&machine), before);
    vectors.trigger(2);
    eventually(|| machine.lines.vectors[2].read().ok());
}

#[test]
fn another_function_is_not_the_one_that_was_there() {
    let (first, second) = (Host::new("e1000"), Host::new("virtio"));
    let (machine, _served) = Machine::on(&first);
    let mut nic = machine.nic.lock().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let served = second.serve(theirs);
    assert!(nic.reconnect(ours).is_err());
    assert!(!nic.is_connected());
    served.gone();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let _served = first.serve(theirs);
    nic.reconnect(ours).unwrap();
    assert!(nic.is_connected());
}

#[test]
fn a_function_keeps_the_line_that_its_server_drives() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    let Machine { nic, lines, .. } = machine;
    let kept = Arc::downgrade(&lines);
    drop(lines);
    assert!(kept.upgrade().is_some(), "the irqfd would be gone");
    drop(nic);
    assert!(kept.upgrade().is_none());
}
