//! The PHY: a Marvell M88E1011 as integrated in the 82540EM, reached through MDIC (13.4.7).
//!
//! Register numbers and bits are those of IEEE 802.3 clause 22 and of the manual's PHY chapter
//! (13.4.7.1). The PHY has no clock of its own: `link.rs` tells it when the carrier changes and
//! when autonegotiation is over.

use serde::{Deserialize, Serialize};

/// Address at which the PHY answers.
pub const PHY_ADDRESS: u32 = 1;

const REGISTERS: usize = 32;

/// PHY registers.
pub mod reg {
    /// PHY Control.
    pub const PCTRL: usize = 0;
    /// PHY Status.
    pub const PSTATUS: usize = 1;
    /// PHY Identifier, high half.
    pub const PID1: usize = 2;
    /// PHY Identifier, low half.
    pub const PID2: usize = 3;
    /// Autonegotiation Advertisement.
    pub const ANA: usize = 4;
    /// Link Partner Ability.
    pub const LPA: usize = 5;
    /// Autonegotiation Expansion.
    pub const ANE: usize = 6;
    /// Next Page Transmit.
    pub const NPT: usize = 7;
    /// 1000BASE-T Control.
    pub const GCON: usize = 9;
    /// 1000BASE-T Status.
    pub const GSTATUS: usize = 10;
    /// Extended Status.
    pub const ESTATUS: usize = 15;
    /// PHY Specific Control.
    pub const PSCON: usize = 16;
    /// PHY Specific Status.
    pub const PSSTAT: usize = 17;
    /// PHY Interrupt Status.
    pub const PINTS: usize = 19;
    /// Extended PHY Specific Control 1.
    pub const EPSCON1: usize = 20;
    /// PHY Receive Error Counter.
    pub const PREC: usize = 21;
    /// LED Control.
    pub const LED: usize = 24;
}

mod pctrl {
    pub const RESET: u16 = 1 << 15;
    pub const LOOPBACK: u16 = 1 << 14;
    pub const SPEED_LSB: u16 = 1 << 13;
    pub const AUTONEG: u16 = 1 << 12;
    pub const POWER_DOWN: u16 = 1 << 11;
    pub const ISOLATE: u16 = 1 << 10;
    pub const RESTART_AUTONEG: u16 = 1 << 9;
    pub const FULL_DUPLEX: u16 = 1 << 8;
    pub const SPEED_MSB: u16 = 1 << 6;
}

mod pstatus {
    /// 100 and 10 Mb/s in both duplexes, extended status, preamble suppression, autonegotiation and
    /// extended capability.
    pub const ABILITIES: u16 = 0x7949;
    pub const AUTONEG_COMPLETE: u16 = 1 << 5;
    pub const LINK: u16 = 1 << 2;
}

/// What the link partner, a gigabit switch port, advertises: acknowledge, both kinds of PAUSE, 100
/// and 10 Mb/s in both duplexes, IEEE 802.3.
const PARTNER_ABILITY: u16 = 0x4de1;
/// The partner's 1000BASE-T abilities as they show in GSTATUS.
const PARTNER_GIGABIT: u16 = 0x0c00;

/// Link speed in Mb/s, numbered as in CTRL and STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speed {
    /// 10 Mb/s.
    Mb10 = 0,
    /// 100 Mb/s.
    Mb100 = 1,
    /// 1000 Mb/s.
    Mb1000 = 2,
}

/// What a register write asks of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkRequest {
    /// Nothing.
    None,
    /// Look at the link again: mode bits changed.
    Evaluate,
    /// The link goes down and comes up anew.
    Restart,
}

/// The PHY.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phy {
    registers: Vec<u16>,
    link: bool,
    /// Link was lost since PSTATUS was read (the link bit latches low).
    link_lost: bool,
    autoneg_complete: bool,
    /// What this side advertised (ANA, GCON) when autonegotiation was last over.
    advertised: (u16, u16),
    /// Held in reset by CTRL.PHY_RST.
    held_in_reset: bool,
}

impl Default for Phy {
    fn default() -> Self {
        Self {
            registers: Self::power_on(),
            link: false,
            link_lost: true,
            autoneg_complete: false,
            advertised: (0, 0),
            held_in_reset: false,
        }
    }
}

impl Phy {
    fn power_on() -> Vec<u16> {
        let mut registers = vec![0; REGISTERS];
        registers[reg::PCTRL] = pctrl::AUTONEG | pctrl::FULL_DUPLEX | pctrl::SPEED_MSB;
        registers[reg::PID1] = 0x0141;
        registers[reg::PID2] = 0x0c24;
        registers[reg::ANA] = 0x0de1;
        registers[reg::NPT] = 0x2001;
        registers[reg::GCON] = 0x0300;
        registers[reg::ESTATUS] = 0x3000;
        registers[reg::PSCON] = 0x0068;
        registers[reg::EPSCON1] = 0x0d60;
        registers[reg::LED] = 0x4100;
        registers
    }

    /// Whether a saved PHY can be one.
    pub fn is_valid(&self) -> bool {
        self.registers.len() == REGISTERS
    }

    /// Reads register `number` (0 to 31) through MDIO.
    pub fn read(&mut self, number: u32) -> u16 {
        let number = number as usize % REGISTERS;
        match number {
            reg::PSTATUS => {
                let link = self.link && !std::mem::take(&mut self.link_lost);
                pstatus::ABILITIES
                    | if link { pstatus::LINK } else { 0 }
                    | if self.autoneg_complete {
                        pstatus::AUTONEG_COMPLETE
                    } else {
                        0
                    }
            }
            reg::LPA if self.autoneg_complete => PARTNER_ABILITY,
            // Partner can autonegotiate, page received.
            reg::ANE if self.autoneg_complete => 0x0003,
            // Both receivers fine; the partner's abilities.
            reg::GSTATUS if self.link && self.speed() == Speed::Mb1000 => 0x3000 | PARTNER_GIGABIT,
            reg::PSSTAT => self.specific_status(),
            reg::PINTS => std::mem::take(&mut self.registers[reg::PINTS]),
            _ => self.registers[number],
        }
    }

    /// Writes register `number` (0 to 31) through MDIO.
    pub fn write(&mut self, number: u32, value: u16) -> LinkRequest {
        let number = number as usize % REGISTERS;
        match number {
            reg::PCTRL => return self.write_control(value),
            reg::PSTATUS
            | reg::PID1
            | reg::PID2
            | reg::LPA
            | reg::ANE
            | reg::GSTATUS
            | reg::ESTATUS
            | reg::PSSTAT
            | reg::PINTS
            | reg::PREC => {}
            _ => self.registers[number] = value,
        }
        LinkRequest::None
    }

    fn write_control(&mut self, value: u16) -> LinkRequest {
        let old = self.registers[reg::PCTRL];
        let new = value & !(pctrl::RESET | pctrl::RESTART_AUTONEG) & 0xffc0;
        self.registers[reg::PCTRL] = new;
        let changed = old ^ new;
        let restart = value & pctrl::RESET != 0
            || changed & (pctrl::AUTONEG | pctrl::POWER_DOWN | pctrl::ISOLATE) != 0
            || value & pctrl::RESTART_AUTONEG != 0 && new & pctrl::AUTONEG != 0;
        if restart {
            LinkRequest::Restart
        } else if changed != 0 {
            LinkRequest::Evaluate
        } else {
            LinkRequest::None
        }
    }

    fn specific_status(&self) -> u16 {
        if !self.link {
            return 0;
        }
        let duplex = if self.full_duplex() { 1 << 13 } else { 0 };
        // Speed in bits 15:14; speed and duplex resolved, link in real time, cable under 50 m.
        (self.speed() as u16) << 14 | duplex | 1 << 11 | 1 << 10
    }

    /// CTRL.PHY_RST was set or cleared.
    pub fn hold_in_reset(&mut self, held: bool) -> LinkRequest {
        if held == self.held_in_reset {
            return LinkRequest::None;
        }
        self.held_in_reset = held;
        if held {
            self.registers = Self::power_on();
        }
        LinkRequest::Restart
    }

    /// Whether transmitted frames come back (PCTRL bit 14).
    pub fn loopback(&self) -> bool {
        !self.held_in_reset && self.registers[reg::PCTRL] & pctrl::LOOPBACK != 0
    }

    /// Whether the PHY can have a link at all.
    pub fn active(&self) -> bool {
        !self.held_in_reset
            && self.registers[reg::PCTRL] & (pctrl::POWER_DOWN | pctrl::ISOLATE) == 0
    }

    /// Whether the link waits for autonegotiation.
    pub fn autonegotiates(&self) -> bool {
        self.registers[reg::PCTRL] & pctrl::AUTONEG != 0
    }

    /// Whether autonegotiation is over.
    pub fn autoneg_complete(&self) -> bool {
        self.autoneg_complete
    }

    /// Autonegotiation began (`false`) or is over (`true`).
    pub fn set_autoneg_complete(&mut self, complete: bool) {
        if complete && !self.autoneg_complete {
            self.advertised = (self.registers[reg::ANA], self.registers[reg::GCON]);
        }
        self.autoneg_complete = complete;
    }

    /// Whether the link is up.
    pub fn link(&self) -> bool {
        self.link
    }

    /// The link came up or went down.
    pub fn set_link(&mut self, up: bool) {
        if self.link && !up {
            self.link_lost = true;
        }
        self.link = up;
    }

    /// Speed of the link: forced, or the best that both sides can.
    pub fn speed(&self) -> Speed {
        let control = self.registers[reg::PCTRL];
        if control & pctrl::AUTONEG != 0 {
            let (ana, gcon) = self.advertised;
            if gcon & 0x0300 != 0 {
                Speed::Mb1000
            } else if ana & 0x0180 != 0 {
                Speed::Mb100
            } else {
                Speed::Mb10
            }
        } else if control & pctrl::SPEED_MSB != 0 {
            Speed::Mb1000
        } else if control & pctrl::SPEED_LSB != 0 {
            Speed::Mb100
        } else {
            Speed::Mb10
        }
    }

    /// Whether the link is full duplex.
    pub fn full_duplex(&self) -> bool {
        if !self.autonegotiates() {
            return self.registers[reg::PCTRL] & pctrl::FULL_DUPLEX != 0;
        }
        let (ana, gcon) = self.advertised;
        match self.speed() {
            Speed::Mb1000 => gcon & 0x0200 != 0,
            Speed::Mb100 => ana & 0x0100 != 0,
            Speed::Mb10 => ana & 0x0040 != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_bit_latches_low_until_it_is_read() {
        let mut phy = Phy::default();
        phy.set_link(true);
        assert_eq!(phy.read(1) & pstatus::LINK, 0, "link was down before");
        assert_ne!(phy.read(1) & pstatus::LINK, 0);
        phy.set_link(false);
        phy.set_link(true);
        assert_eq!(phy.read(1) & pstatus::LINK, 0, "a flap shows once");
        assert_ne!(phy.read(1) & pstatus::LINK, 0);
    }

    #[test]
    fn identifiers_and_status_cannot_be_written() {
        let mut phy = Phy::default();
        for number in [1, 2, 3, 5, 10, 15, 17] {
            let before = phy.read(number);
            phy.write(number, 0xffff);
            assert_eq!(phy.read(number), before);
        }
        assert_eq!((phy.read(2), phy.read(3) & 0xfff0), (0x0141, 0x0c20));
    }

    #[test]
    fn forced_and_negotiated_speed_and_duplex() {
        let mut phy = Phy::default();
        let negotiate = |phy: &mut Phy| {
            phy.set_autoneg_complete(false);
            phy.set_autoneg_complete(true);
            (phy.speed(), phy.full_duplex())
        };
        assert_eq!(negotiate(&mut phy), (Speed::Mb1000, true));
        phy.write(9, 0);
        assert_eq!(phy.speed(), Speed::Mb1000, "until it is negotiated again");
        assert_eq!(negotiate(&mut phy), (Speed::Mb100, true));
        phy.write(4, 0x0081);
        assert_eq!(negotiate(&mut phy), (Speed::Mb100, false));
        phy.write(0, 0x0100);
        assert_eq!((phy.speed(), phy.full_duplex()), (Speed::Mb10, true));
    }

    #[test]
    fn reset_and_restart_bits_clear_themselves() {
        let mut phy = Phy::default();
        assert_eq!(phy.write(0, 0x9340), LinkRequest::Restart);
        assert_eq!(phy.read(0), 0x1140);
        assert_eq!(phy.write(0, 0x1140), LinkRequest::None);
        assert_eq!(phy.write(0, 0x5140), LinkRequest::Evaluate);
        assert!(phy.loopback());
    }
}
