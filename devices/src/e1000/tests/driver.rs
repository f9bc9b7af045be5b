//! A small driver: sets rings up as the Linux driver does and uses them.

use crate::e1000::E1000Config;
use crate::e1000::bench::{Bench, MAC};
use crate::e1000::regs::*;

pub const MEMORY_BYTES: usize = 4 << 20;
const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
const RX_BUFFERS: u64 = 0x10_0000;
pub const TX_BUFFERS: u64 = 0x20_0000;
/// Distance of receive buffers, in bytes.
const RX_BUFFER_BYTES: u64 = 0x4000;

/// Command bits of transmit descriptors.
pub const EOP: u32 = 1 << 24;
pub const RS: u32 = 1 << 27;
pub const TSE: u32 = 1 << 26;
pub const DEXT: u32 = 1 << 29;
pub const VLE: u32 = 1 << 30;
pub const IDE: u32 = 1 << 31;
pub const DATA: u32 = DEXT | 1 << 20;
/// Packet options: insert IP and TCP/UDP checksum.
pub const IXSM_TXSM: u32 = 3 << 8;

/// A descriptor that the controller wrote back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub data: Vec<u8>,
    pub status: u8,
    pub errors: u8,
    pub special: u16,
}

pub struct Driver {
    pub bench: Bench,
    pub rx_count: u32,
    pub tx_count: u32,
    rx_next: u32,
    tx_next: u32,
}

impl Driver {
    /// A controller that was probed and opened, with small rings and receive buffers of 2 KiB.
    pub fn new() -> Self {
        Self::with_rings(16, 16)
    }

    pub fn with_rings(rx_count: u32, tx_count: u32) -> Self {
        let bench = Bench::new(MEMORY_BYTES, E1000Config::new(MAC)).unwrap();
        let mut driver = Self {
            bench,
            rx_count,
            tx_count,
            rx_next: 0,
            tx_next: 0,
        };
        driver.open();
        driver
    }

    /// The same driver on a controller that was restored from this one's state.
    pub fn twin(&self) -> Self {
        let bench = self.bench.twin(&mut vec![0; MEMORY_BYTES]).unwrap();
        Self { bench, ..*self }
    }

    pub fn open(&mut self) {
        let bench = &mut self.bench;
        bench.set_bits(CTRL, ctrl::SLU);
        bench.write(TDBAL, TX_RING as u32);
        bench.write(TDLEN, self.tx_count * 16);
        bench.write(TDH, 0);
        bench.write(TDT, 0);
        bench.write(TCTL, tctl::EN | tctl::PSP);
        bench.write(RDBAL, RX_RING as u32);
        bench.write(RDLEN, self.rx_count * 16);
        bench.write(RDH, 0);
        bench.write(RDT, 0);
        bench.write(RCTL, rctl::EN | rctl::BAM);
        self.rx_next = 0;
        self.tx_next = 0;
        for i in 0..self.rx_count {
            let mut descriptor = [0; 16];
            let buffer = RX_BUFFERS + u64::from(i) * RX_BUFFER_BYTES;
            descriptor[..8].copy_from_slice(&buffer.to_le_bytes());
            self.bench
                .dma
                .write(RX_RING + u64::from(i) * 16, &descriptor)
                .unwrap();
        }
        self.bench.write(RDT, self.rx_count - 1);
        self.bench.read(ICR);
        self.bench.write(IMS, 0x9d);
    }

    /// Puts one descriptor at the tail, without telling the controller.
    pub fn queue(&mut self, descriptor: [u8; 16]) {
        let at = TX_RING + u64::from(self.tx_next) * 16;
        self.bench.dma.write(at, &descriptor).unwrap();
        self.tx_next = (self.tx_next + 1) % self.tx_count;
    }

    /// Puts `data` at `buffer` and a descriptor for it at the tail.
    pub fn queue_data(&mut self, buffer: u64, data: &[u8], lower: u32, upper: u32) {
        self.bench.dma.write(buffer, data).unwrap();
        self.queue(descriptor(buffer, lower | data.len() as u32, upper));
    }

    /// Tells the controller the tail.
    pub fn ring(&mut self) {
        self.bench.write(TDT, self.tx_next);
    }

    /// Sends a frame with one legacy descriptor.
    pub fn send(&mut self, frame: &[u8]) {
        self.queue_data(TX_BUFFERS, frame, EOP | RS, 0);
        self.ring();
    }

    /// Status of the transmit descriptor at `index`.
    pub fn tx_status(&self, index: u32) -> u8 {
        let mut status = [0];
        self.bench
            .dma
            .read(TX_RING + u64::from(index) * 16 + 12, &mut status)
            .unwrap();
        status[0]
    }

    pub fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.bench.far_end().from_nic)
    }

    /// Takes the next packet from the ring and gives its descriptors back.
    pub fn receive(&mut self) -> Option<Received> {
        let mut packet = Vec::new();
        loop {
            let at = RX_RING + u64::from(self.rx_next) * 16;
            let mut descriptor = [0; 16];
            self.bench.dma.read(at, &mut descriptor).unwrap();
            if descriptor[12] & 1 == 0 {
                assert!(packet.is_empty(), "a packet without an end");
                return None;
            }
            let buffer = RX_BUFFERS + u64::from(self.rx_next) * RX_BUFFER_BYTES;
            let length = usize::from(u16::from_le_bytes([descriptor[8], descriptor[9]]));
            let start = packet.len();
            packet.resize(start + length, 0);
            self.bench.dma.read(buffer, &mut packet[start..]).unwrap();
            self.bench.dma.write(at + 8, &[0; 8]).unwrap();
            let returned = self.rx_next;
            self.rx_next = (self.rx_next + 1) % self.rx_count;
            self.bench.write(RDT, returned);
            if descriptor[12] & 2 != 0 {
                return Some(Received {
                    data: packet,
                    status: descriptor[12],
                    errors: descriptor[13],
                    special: u16::from_le_bytes([descriptor[14], descriptor[15]]),
                });
            }
        }
    }
}

pub fn descriptor(buffer: u64, lower: u32, upper: u32) -> [u8; 16] {
    let mut descriptor = [0; 16];
    descriptor[..8].copy_from_slice(&buffer.to_le_bytes());
    descriptor[8..12].copy_from_slice(&lower.to_le_bytes());
    descriptor[12..].copy_from_slice(&upper.to_le_bytes());
    descriptor
}

/// A frame to all with `length` bytes that count up.
pub fn broadcast(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|i| i as u8).collect();
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}
