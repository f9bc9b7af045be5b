//! A card of another process as a function of this machine.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use devices::pci::config::offset;
use devices::pci::{BarSpace, PciFunction};

use crate::support::{Host, Machine, eventually};

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

fn read(nic: &mut dyn PciFunction, register: u64) -> u32 {
    let mut data = [0; 4];
    nic.bar_read(0, register, &mut data);
    u32::from_le_bytes(data)
}

fn write(nic: &mut dyn PciFunction, register: u64, value: u32) {
    nic.bar_write(0, register, &value.to_le_bytes());
}

/// Opens the card as a driver does: rings, buffers, interrupts.
fn open(machine: &Machine) {
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

fn send(machine: &Machine, n: u32, frame: &[u8]) {
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
fn received(machine: &Machine, n: u64) -> Vec<u8> {
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

fn frame(tag: u8) -> Vec<u8> {
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
