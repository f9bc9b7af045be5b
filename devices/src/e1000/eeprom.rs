//! The serial EEPROM: 64 words behind the EECD pins (13.4.3, a 93C46 with Microwire) and the EERD
//! register (13.4.4). Its content is what section 5.6 lays out; words 0 to 63 sum to 0xBABA.

use serde::{Deserialize, Serialize};

/// Number of 16-bit words.
pub const WORDS: usize = 64;
/// What all words sum to.
pub const CHECKSUM: u16 = 0xbaba;

/// Word addresses (5.6).
pub mod word {
    /// First of three words of the Ethernet address, low byte first.
    pub const ETHERNET_ADDRESS: usize = 0x00;
    /// First of two words of the board assembly number.
    pub const PBA_NUMBER: usize = 0x08;
    /// Initialization Control Word 1.
    pub const INIT_CONTROL1: usize = 0x0a;
    /// Subsystem ID.
    pub const SUBSYSTEM_ID: usize = 0x0b;
    /// Subsystem vendor ID.
    pub const SUBSYSTEM_VENDOR_ID: usize = 0x0c;
    /// Device ID.
    pub const DEVICE_ID: usize = 0x0d;
    /// Vendor ID.
    pub const VENDOR_ID: usize = 0x0e;
    /// Initialization Control Word 2.
    pub const INIT_CONTROL2: usize = 0x0f;
    /// Initialization Control Word 3 of port A.
    pub const INIT_CONTROL3: usize = 0x24;
    /// Checksum.
    pub const CHECKSUM: usize = 0x3f;
}

/// Bits of EECD (13.4.3).
mod eecd {
    pub const SK: u32 = 1 << 0;
    pub const CS: u32 = 1 << 1;
    pub const DI: u32 = 1 << 2;
    pub const DO: u32 = 1 << 3;
    pub const FWE_DISABLED: u32 = 1 << 4;
    pub const FWE_MASK: u32 = 3 << 4;
    pub const EE_REQ: u32 = 1 << 6;
    pub const EE_GNT: u32 = 1 << 7;
    pub const EE_PRES: u32 = 1 << 8;
}

/// Bits of EERD (13.4.4).
mod eerd {
    pub const START: u32 = 1 << 0;
    pub const DONE: u32 = 1 << 4;
    pub const ADDR_SHIFT: u32 = 8;
    pub const DATA_SHIFT: u32 = 16;
}

/// Where the chip is in a Microwire command. A command begins with the first 1 clocked in after
/// chip select rose: start bit, two opcode bits, six address bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Command {
    /// No start bit yet.
    Idle,
    /// `bits` of opcode and address were clocked in to `value`.
    Address { value: u8, bits: u8 },
    /// Words go out from `address` on; `bit` is the next one, counted down; 16 is the leading 0.
    Read { address: u8, bit: u8 },
    /// A word comes in for `address`, or for all words.
    Write {
        address: Option<u8>,
        value: u16,
        bits: u8,
    },
    /// The command is complete; it is carried out when chip select falls.
    Complete(Effect),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Effect {
    None,
    /// `None` is all words.
    Store {
        address: Option<u8>,
        value: u16,
    },
}

/// The EEPROM with its pins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eeprom {
    words: Vec<u16>,
    pins: u32,
    data_out: bool,
    write_enabled: bool,
    command: Command,
    read_register: u32,
}

impl Eeprom {
    /// A chip as a PRO/1000 MT Desktop has it, with the address `mac` and these PCI IDs.
    pub fn new(mac: [u8; 6], device_id: u16, subsystem_id: u16) -> Self {
        let mut words = vec![0u16; WORDS];
        // Words 4 to 6 unused: the LEDs have their default behaviour.
        words[4..7].fill(0xffff);
        words[word::PBA_NUMBER] = 0xc0fd;
        words[word::PBA_NUMBER + 1] = 0x0001;
        // Signature 01, 32-bit base address register, full duplex, power management, and the IDs
        // below are valid.
        words[word::INIT_CONTROL1] = 0x640b;
        words[word::SUBSYSTEM_ID] = subsystem_id;
        words[word::SUBSYSTEM_VENDOR_ID] = 0x8086;
        words[word::DEVICE_ID] = device_id;
        words[word::VENDOR_ID] = 0x8086;
        // Symmetric and asymmetric PAUSE.
        words[word::INIT_CONTROL2] = 0x3000;
        // Advanced power management (wake on a magic packet) enabled.
        words[word::INIT_CONTROL3] = 0x0400;
        let mut eeprom = Self {
            words,
            pins: eecd::FWE_DISABLED,
            data_out: true,
            write_enabled: false,
            command: Command::Idle,
            read_register: 0,
        };
        eeprom.set_ethernet_address(mac);
        eeprom
    }

    /// Puts an Ethernet address into the first three words, and the checksum of all.
    pub fn set_ethernet_address(&mut self, mac: [u8; 6]) {
        for (i, pair) in mac.chunks_exact(2).enumerate() {
            self.words[word::ETHERNET_ADDRESS + i] = u16::from_le_bytes([pair[0], pair[1]]);
        }
        self.words[word::CHECKSUM] = 0;
        let sum = self.words.iter();
        let sum = sum.fold(0u16, |sum, word| sum.wrapping_add(*word));
        self.words[word::CHECKSUM] = CHECKSUM.wrapping_sub(sum);
    }

    /// Whether a saved chip can be one.
    pub fn is_valid(&self) -> bool {
        self.words.len() == WORDS
    }

    /// Ethernet address in the first three words.
    pub fn ethernet_address(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        for (i, pair) in mac.chunks_exact_mut(2).enumerate() {
            pair.copy_from_slice(&self.word(word::ETHERNET_ADDRESS + i).to_le_bytes());
        }
        mac
    }

    fn word(&self, address: usize) -> u16 {
        self.words.get(address).copied().unwrap_or(0xffff)
    }

    /// Reads EECD.
    pub fn read_eecd(&self) -> u32 {
        let mut value = self.pins | eecd::EE_PRES;
        if self.pins & eecd::EE_REQ != 0 {
            value |= eecd::EE_GNT;
        }
        if self.data_out {
            value |= eecd::DO;
        }
        value
    }

    /// Writes EECD: the pins change, and with them the chip.
    pub fn write_eecd(&mut self, value: u32) {
        let old = self.pins;
        self.pins = value & (eecd::SK | eecd::CS | eecd::DI | eecd::FWE_MASK | eecd::EE_REQ);
        let selected = self.pins & eecd::CS != 0;
        if !selected {
            if old & eecd::CS != 0 {
                self.deselect();
            }
            return;
        }
        if old & eecd::CS == 0 {
            // Ready, as after each write: writes take no time here.
            self.data_out = true;
            self.command = Command::Idle;
        }
        if old & eecd::SK == 0 && self.pins & eecd::SK != 0 {
            self.clock(self.pins & eecd::DI != 0);
        }
    }

    fn deselect(&mut self) {
        if let Command::Complete(Effect::Store { address, value }) = self.command
            && self.write_enabled
        {
            match address {
                Some(address) => self.words[usize::from(address) % WORDS] = value,
                None => self.words.fill(value),
            }
        }
        self.command = Command::Idle;
        self.data_out = true;
    }

    /// A rising edge of the clock with `input` at the data pin.
    fn clock(&mut self, input: bool) {
        self.command = match self.command {
            Command::Idle if input => Command::Address { value: 0, bits: 0 },
            Command::Idle => Command::Idle,
            Command::Address { value, bits } => {
                let value = value << 1 | u8::from(input);
                if bits < 7 {
                    Command::Address {
                        value,
                        bits: bits + 1,
                    }
                } else {
                    self.decode(value)
                }
            }
            Command::Read { address, bit } => {
                let bit = bit.wrapping_sub(1) & 0xf;
                self.data_out = self.word(usize::from(address)) >> bit & 1 != 0;
                if bit == 0 {
                    Command::Read {
                        address: address.wrapping_add(1) % WORDS as u8,
                        bit: 16,
                    }
                } else {
                    Command::Read { address, bit }
                }
            }
            Command::Write {
                address,
                value,
                bits,
            } => {
                let value = value << 1 | u16::from(input);
                if bits < 15 {
                    Command::Write {
                        address,
                        value,
                        bits: bits + 1,
                    }
                } else {
                    Command::Complete(Effect::Store { address, value })
                }
            }
            complete @ Command::Complete(_) => complete,
        };
    }

    /// Eight bits came in: two of opcode, six of address or extended opcode.
    fn decode(&mut self, value: u8) -> Command {
        let address = value & 0x3f;
        match value >> 6 {
            0b10 => {
                self.data_out = false;
                Command::Read { address, bit: 16 }
            }
            0b01 => Command::Write {
                address: Some(address),
                value: 0,
                bits: 0,
            },
            0b11 => Command::Complete(Effect::Store {
                address: Some(address),
                value: 0xffff,
            }),
            _ => match address >> 4 {
                0b11 => {
                    self.write_enabled = true;
                    Command::Complete(Effect::None)
                }
                0b00 => {
                    self.write_enabled = false;
                    Command::Complete(Effect::None)
                }
                0b10 => Command::Complete(Effect::Store {
                    address: None,
                    value: 0xffff,
                }),
                _ => Command::Write {
                    address: None,
                    value: 0,
                    bits: 0,
                },
            },
        }
    }

    /// Reads EERD.
    pub fn read_eerd(&self) -> u32 {
        self.read_register
    }

    /// Writes EERD: a read is over at once.
    pub fn write_eerd(&mut self, value: u32) {
        let address = value >> eerd::ADDR_SHIFT & 0xff;
        self.read_register = address << eerd::ADDR_SHIFT;
        if value & eerd::START != 0 {
            let data = u32::from(self.word(address as usize));
            self.read_register |= data << eerd::DATA_SHIFT | eerd::DONE;
        }
    }

    /// Deselects the chip and forgets EERD, as a reset of the controller does. The words stay.
    pub fn reset_interface(&mut self) {
        self.pins = eecd::FWE_DISABLED;
        self.data_out = true;
        self.command = Command::Idle;
        self.read_register = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

    fn chip() -> Eeprom {
        Eeprom::new(MAC, 0x100e, 0x001e)
    }

    /// Drives the pins as a driver does.
    struct Bus<'a>(&'a mut Eeprom);

    impl Bus<'_> {
        fn select(&mut self) {
            self.0.write_eecd(eecd::EE_REQ);
            self.0.write_eecd(eecd::EE_REQ | eecd::CS);
        }

        fn deselect(&mut self) {
            self.0.write_eecd(eecd::EE_REQ);
            self.0.write_eecd(0);
        }

        fn out(&mut self, value: u16, count: u32) {
            for bit in (0..count).rev() {
                let data = if value >> bit & 1 != 0 { eecd::DI } else { 0 };
                let pins = eecd::EE_REQ | eecd::CS | data;
                self.0.write_eecd(pins);
                self.0.write_eecd(pins | eecd::SK);
                self.0.write_eecd(pins);
            }
        }

        fn input(&mut self) -> u16 {
            let mut value = 0;
            for _ in 0..16 {
                self.0.write_eecd(eecd::EE_REQ | eecd::CS | eecd::SK);
                value = value << 1 | u16::from(self.0.read_eecd() & eecd::DO != 0);
                self.0.write_eecd(eecd::EE_REQ | eecd::CS);
            }
            value
        }
    }

    #[test]
    fn words_sum_to_the_checksum_by_pins_and_by_register() {
        let mut eeprom = chip();
        let (mut by_pins, mut by_register) = (0u16, 0u16);
        for address in 0..WORDS as u16 {
            let mut bus = Bus(&mut eeprom);
            bus.select();
            bus.out(0b110, 3);
            bus.out(address, 6);
            by_pins = by_pins.wrapping_add(bus.input());
            bus.deselect();
            eeprom.write_eerd(u32::from(address) << 8 | 1);
            assert_eq!(eeprom.read_eerd() & 0x10, 0x10);
            by_register = by_register.wrapping_add((eeprom.read_eerd() >> 16) as u16);
        }
        assert_eq!((by_pins, by_register), (CHECKSUM, CHECKSUM));
        assert_eq!(eeprom.ethernet_address(), MAC);
    }

    #[test]
    fn reading_on_gives_the_next_words() {
        let mut eeprom = chip();
        let mut bus = Bus(&mut eeprom);
        bus.select();
        bus.out(0b110, 3);
        bus.out(62, 6);
        let words = [bus.input(), bus.input(), bus.input()];
        assert_eq!(words, [eeprom.words[62], eeprom.words[63], eeprom.words[0]]);
    }

    #[test]
    fn a_write_needs_write_enable() {
        let mut eeprom = chip();
        let old = eeprom.words[0x20];
        for (enable, expected) in [(false, old), (true, 0xabcd)] {
            let mut bus = Bus(&mut eeprom);
            if enable {
                bus.select();
                bus.out(0b10011, 5);
                bus.out(0, 4);
                bus.deselect();
            }
            bus.select();
            bus.out(0b101, 3);
            bus.out(0x20, 6);
            bus.out(0xabcd, 16);
            bus.deselect();
            bus.select();
            assert_ne!(
                bus.0.read_eecd() & eecd::DO,
                0,
                "a chip that is done shows ready"
            );
            bus.deselect();
            assert_eq!(eeprom.words[0x20], expected);
        }
    }

    #[test]
    fn access_is_granted_to_who_asks() {
        let mut eeprom = chip();
        assert_eq!(eeprom.read_eecd() & eecd::EE_GNT, 0);
        eeprom.write_eecd(eecd::EE_REQ);
        assert_ne!(eeprom.read_eecd() & eecd::EE_GNT, 0);
    }
}
