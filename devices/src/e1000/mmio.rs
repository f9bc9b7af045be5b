//! Register accesses: which of them do something besides storing a value (chapter 13).
//!
//! Registers are 32 bits wide and are accessed so. A read of a part of one gives that part; a write
//! of a part is lost.

use super::E1000;
use super::regs::{
    CTRL, CTRL_EXT, EECD, EERD, FPD, ICR, ICS, IMC, IMS, MDIC, PBA, RA, RCTL, RDH, RDT, RDTR,
    RECEIVE_ADDRESSES, STATUS, TCTL, TDH, TDT, TIDV, ctrl, ctrl_ext, unalias, write_mask,
};
use super::stats;

/// KiB of packet buffer that PBA divides (13.4.16).
const PACKET_BUFFER_KIB: u32 = 64;

/// I/O space: which register IODATA reaches (13.3.1).
const IOADDR: u64 = 0;
/// I/O space: the register itself (13.3.2).
const IODATA: u64 = 4;
/// Bytes of register space.
const REGISTER_SPACE_BYTES: u32 = 0x2_0000;

impl E1000 {
    /// Reads any part of register space.
    pub(super) fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        read_by_words(offset, data, |at| match u32::try_from(at) {
            Ok(at) => self.read_register(at),
            Err(_) => u32::MAX,
        });
    }

    /// Writes register space.
    pub(super) fn write_memory(&mut self, offset: u64, data: &[u8]) {
        write_by_words(offset, data, |at, value| {
            if let Ok(at) = u32::try_from(at) {
                self.write_register(at, value);
            }
        });
    }

    /// Reads the I/O window.
    pub(super) fn read_io(&mut self, offset: u64, data: &mut [u8]) {
        read_by_words(offset, data, |at| match at {
            IOADDR => self.io_address,
            IODATA if self.io_address < REGISTER_SPACE_BYTES => {
                self.read_register(self.io_address & !3)
            }
            _ => 0,
        });
    }

    /// Writes the I/O window.
    pub(super) fn write_io(&mut self, offset: u64, data: &[u8]) {
        write_by_words(offset, data, |at, value| match at {
            IOADDR => self.io_address = value,
            IODATA if self.io_address < REGISTER_SPACE_BYTES => {
                self.write_register(self.io_address & !3, value);
            }
            _ => {}
        });
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        match unalias(offset) {
            EECD => self.eeprom.read_eecd(),
            EERD => self.eeprom.read_eerd(),
            ICR => self.read_icr(),
            ICS | IMC => 0,
            IMS => self.causes_and_mask().1,
            offset if stats::RANGE.contains(&offset) => self.regs.read_statistic(offset),
            offset => self.regs.get(offset),
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match unalias(offset) {
            CTRL => self.write_control(value),
            CTRL_EXT => {
                self.store_bits(CTRL_EXT, value);
                if value & ctrl_ext::EE_RST != 0 {
                    self.load_eeprom();
                }
            }
            EECD => self.eeprom.write_eecd(value),
            EERD => self.eeprom.write_eerd(value),
            MDIC => self.write_mdic(value),
            ICR => self.clear_causes(value),
            ICS => self.raise(value),
            IMS => self.change_interrupt_mask(value, true),
            IMC => self.change_interrupt_mask(value, false),
            PBA => {
                let receive = (value & 0x7f).min(PACKET_BUFFER_KIB);
                self.regs
                    .set(PBA, (PACKET_BUFFER_KIB - receive) << 16 | receive);
            }
            RCTL => {
                self.store_bits(RCTL, value);
                self.receive_batch();
            }
            TCTL => {
                self.store_bits(TCTL, value);
                self.transmit();
            }
            RDH => {
                self.store_bits(RDH, value);
                self.rx.held = None;
            }
            RDT => {
                self.store_bits(RDT, value);
                self.receive_batch();
            }
            RDTR => {
                self.store_bits(RDTR, value);
                if value & FPD != 0 {
                    self.flush_receive_delay();
                }
            }
            TDH => self.write_transmit_head(value),
            TDT => self.write_transmit_tail(value),
            TIDV => {
                self.store_bits(TIDV, value);
                if value & FPD != 0 {
                    self.flush_transmit_delay();
                }
            }
            STATUS => {}
            offset => {
                self.store_bits(offset, value);
                if (RA..RA + 8 * RECEIVE_ADDRESSES).contains(&offset) {
                    self.tell_stations();
                }
            }
        }
    }

    /// Stores the bits of `value` that the register at `offset` has.
    fn store_bits(&mut self, offset: u32, value: u32) {
        if let Some(mask) = write_mask(offset) {
            self.regs.set(offset, value & mask);
        }
    }

    fn write_control(&mut self, value: u32) {
        if value & ctrl::RST != 0 {
            self.software_reset();
            return;
        }
        self.store_bits(CTRL, value);
        let request = self.phy.hold_in_reset(value & ctrl::PHY_RST != 0);
        self.change_link(request);
        self.update_status();
    }
}

/// Whether a store of `bytes` bytes at `offset` of register space has the controller look at
/// descriptors: it is given some, or one of its units goes on.
pub(super) fn store_uses_memory(offset: u64, bytes: usize) -> bool {
    let end = offset.saturating_add(bytes as u64);
    let mut words = (offset & !3..end).step_by(4);
    words.any(|at| {
        let register = u32::try_from(at).map(unalias);
        matches!(register, Ok(RCTL | TCTL | RDT | TDT))
    })
}

/// Reads words with `read` and takes from them the bytes that were asked for.
fn read_by_words(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u32) {
    let mut done = 0;
    while done < data.len() {
        let at = offset.wrapping_add(done as u64);
        let lane = (at & 3) as usize;
        let bytes = read(at & !3).to_le_bytes();
        let count = (4 - lane).min(data.len() - done);
        data[done..done + count].copy_from_slice(&bytes[lane..lane + count]);
        done += count;
    }
}

/// Writes the whole words in `data` with `write`.
fn write_by_words(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32)) {
    if !offset.is_multiple_of(4) {
        return;
    }
    for (i, word) in data.chunks_exact(4).enumerate() {
        let at = offset.wrapping_add(4 * i as u64);
        write(at, u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    }
}
