//! The link: wire carrier, PHY and autonegotiation on one side, STATUS.LU and the link status
//! change interrupt on the other (8.6 and 13.4.2).
//!
//! ```text
//!   wire carrier ──► PHY: powered, out of reset ──► autonegotiation (a delay) ──► PHY link
//!                         PCTRL loopback ─────────────────────────────────────►  PHY link
//!   PHY link and CTRL.SLU ──► STATUS.LU;  any change of it ──► ICR.LSC
//!   PHY link, no loopback ──► what the port at the other end sees, unless it is held
//! ```

use super::E1000;
use super::phy::LinkRequest;
use super::regs::{CTRL, MDIC, RCTL, STATUS, ctrl, icr, mdic, rctl, status};
use super::timers::Timer;

impl E1000 {
    /// Whether the MAC has a link.
    pub(super) fn link_up(&self) -> bool {
        self.regs.is_set(STATUS, status::LU)
    }

    /// Whether transmitted frames come back instead of going to the wire: PHY loopback, or a
    /// loopback mode of RCTL (13.4.22).
    pub(super) fn in_loopback(&self) -> bool {
        self.phy.loopback() || self.regs.get(RCTL) & rctl::LBM_MASK != 0
    }

    /// Carries out what a PHY register write asked for.
    pub(super) fn change_link(&mut self, request: LinkRequest) {
        match request {
            LinkRequest::None => {}
            LinkRequest::Evaluate => self.update_link(),
            LinkRequest::Restart => {
                self.timers.stop(Timer::Autonegotiation);
                self.phy.set_autoneg_complete(false);
                self.phy.set_link(false);
                self.show_link();
                self.update_status();
                self.update_link();
            }
        }
    }

    /// Brings the PHY's link and STATUS in line with carrier and settings; begins autonegotiation
    /// where it is due.
    pub(super) fn update_link(&mut self) {
        let carrier = self.wire.carrier() && !self.cable_pulled;
        let usable = self.phy.active() && (carrier || self.phy.loopback());
        if !usable {
            self.timers.stop(Timer::Autonegotiation);
            self.phy.set_autoneg_complete(false);
        } else if self.phy.autonegotiates() && !self.phy.autoneg_complete() && !self.phy.loopback()
        {
            match self.autonegotiation_ns {
                0 => self.phy.set_autoneg_complete(true),
                ns => self.timers.start_if_idle(Timer::Autonegotiation, ns),
            }
        }
        let up = usable
            && (!self.phy.autonegotiates() || self.phy.autoneg_complete() || self.phy.loopback());
        self.phy.set_link(up);
        self.show_link();
        self.update_status();
    }

    /// Keeps the link as the port at the other end sees it, whatever becomes of the PHY meanwhile,
    /// until [`E1000::let_link_go`]. The guest sees its own link as it is.
    ///
    /// For the time in which one driver takes another one's place, or in which a call may still be
    /// taken back: a driver powers the PHY down or resets it, and a switch that sees the link go
    /// waits for half a minute before it forwards again.
    pub fn hold_link(&mut self) {
        self.link_missed &= self.link_held;
        self.link_held = true;
    }

    /// Lets the far end see the PHY's link as it is; a loss that is over by now only if `missed`.
    pub fn let_link_go(&mut self, missed: bool) {
        self.link_held = false;
        if std::mem::take(&mut self.link_missed) && missed && self.shown_link {
            self.shown_link = false;
            self.wire.nic_link(false);
        }
        self.show_link();
    }

    /// Lets the far end see the PHY's link.
    pub(super) fn show_link(&mut self) {
        let up = self.phy.link() && !self.phy.loopback();
        if self.link_held {
            self.link_missed |= !up;
        } else if up != self.shown_link {
            self.shown_link = up;
            self.wire.nic_link(up);
        }
    }

    /// The autonegotiation timer ran out.
    pub(super) fn finish_autonegotiation(&mut self) {
        self.phy.set_autoneg_complete(true);
        self.update_link();
    }

    /// Recomputes STATUS; a link that came or went sets LSC.
    pub(super) fn update_status(&mut self) {
        let old = self.regs.get(STATUS);
        let control = self.regs.get(CTRL);
        let up = control & ctrl::SLU != 0 && self.phy.link();
        let speed = if control & ctrl::FRCSPD != 0 {
            control >> ctrl::SPEED_SHIFT & 3
        } else {
            self.phy.speed() as u32
        };
        let full_duplex = if control & ctrl::FRCDPX != 0 {
            control & ctrl::FD != 0
        } else {
            self.phy.full_duplex()
        };
        let new = speed << status::SPEED_SHIFT
            | (self.phy.speed() as u32) << status::ASDV_SHIFT
            | if up { status::LU } else { 0 }
            | if full_duplex { status::FD } else { 0 };
        self.set_status(new);
        if (old ^ new) & status::LU != 0 {
            tracing::debug!("e1000: link is {}", if up { "up" } else { "down" });
            self.raise(icr::LSC);
            if up {
                // Descriptors may have been queued while there was no link.
                self.kick();
            }
        }
    }

    /// Writes MDIC: the access is over at once.
    pub(super) fn write_mdic(&mut self, value: u32) {
        let number = value >> mdic::REGADD_SHIFT & 0x1f;
        let address = value >> mdic::PHYADD_SHIFT & 0x1f;
        let mut result = (value | mdic::READY) & !mdic::ERROR;
        let mut request = LinkRequest::None;
        match value & mdic::OP_MASK {
            _ if address != super::phy::PHY_ADDRESS => result |= mdic::ERROR,
            mdic::OP_WRITE => request = self.phy.write(number, value as u16),
            mdic::OP_READ => {
                result = result & !0xffff | u32::from(self.phy.read(number));
            }
            _ => result |= mdic::ERROR,
        }
        self.regs.set(MDIC, result);
        self.change_link(request);
        if value & mdic::INTERRUPT != 0 {
            self.raise(icr::MDAC);
        }
    }
}
