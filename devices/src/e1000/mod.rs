//! Intel 82540EM, the PRO/1000 MT Desktop adapter (PCI 8086:100e), as the stock Linux `e1000`
//! driver uses it.
//!
//! After Intel's *PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual*
//! (8254x); section numbers in this directory are its. Not there: MSI and the PCI-X capability (the
//! stock driver uses INTx), wake-up packets, packet buffer diagnostics, TBI (fibre) mode,
//! collisions.
//!
//! ```text
//!            configuration space            registers: mmio, regs, stats
//!                    │                      ┌──────────┼──────────┬──────────┐
//!   guest ───────────┤                     tx ──packet──► wire    rx ◄─ filter, rx_checksum ◄─ wire
//!                    │                      └── loopback ────────►┘
//!            INTx ◄── interrupts ◄── causes, timers        link ◄── phy, wire carrier
//! ```
//!
//! Time and system calls: sending happens in the register write, receiving in the event loop
//! (`events`). A register access makes no system call but for an interrupt line that changes, a
//! timer that is armed (at most once for each time it fires), a frame that is sent, and a kick of
//! the event loop when it has to watch something else. Interrupt delays below 16 us are taken as
//! none (`timers`).

#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod bench;
mod checksum;
mod eeprom;
mod events;
mod filter;
mod headers;
mod hold;
mod interrupts;
mod link;
mod mmio;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod ops;
mod packet;
mod phy;
mod regs;
mod ring;
mod rx;
mod rx_checksum;
mod shared;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod timers;
mod tx;
mod tx_descriptor;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::eeprom::Eeprom;
use self::events::Interest;
pub use self::hold::HoldableE1000;
use self::interrupts::InterruptLine;
use self::packet::Transmitter;
use self::phy::Phy;
use self::regs::{RA, RAH_AV, RegisterFile};
use self::rx::Receiver;
pub use self::state::{E1000State, Moment, RingMemory};
use self::timers::{Timer, Timers};
use crate::dma::DmaSpace;
use crate::irq::IrqLine;
use crate::moments::Moments;
use crate::pci::config::{Command, ConfigError, ConfigSpace, InterruptPin, PciIdentity, Status};
use crate::pci::shared::{SharedPage, SharesRegisters};
use crate::pci::{BarIndex, BarRange, BarSize, BarSpace, PciFunction};
use crate::rate_limit::RateLimit;
use crate::state::{Part, StateError};
use crate::wire::Wire;

const DEVICE_ID: u16 = 0x100e;
/// PRO/1000 MT Desktop adapter.
const SUBSYSTEM_ID: u16 = 0x001e;

/// Memory base address register: 128 KiB of registers (4.1).
const BAR_MEMORY: BarIndex = 0;
/// I/O base address register: IOADDR and IODATA.
const BAR_IO: BarIndex = 2;
/// Offset of the power management capability (4.1.3).
const POWER_MANAGEMENT: u16 = 0xdc;
/// Offset of its control/status register.
const PMCSR: u16 = POWER_MANAGEMENT + 4;
const PMCSR_POWER_STATE: u16 = 3;

/// Why a controller cannot be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gave no event or timer descriptor.
    #[error("the NIC cannot get a descriptor for its events: {0}")]
    Descriptor(#[from] std::io::Error),
    /// Configuration space does not fit.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A saved state is none that this controller can be in.
    #[error("the saved NIC state is damaged")]
    InvalidState,
    /// What was done cannot be taken back without what was done since.
    #[error("the NIC's rings or control registers were used meanwhile (register {0:#x})")]
    UsedMeanwhile(u32),
}

/// What a controller is made with.
#[derive(Debug, Clone)]
pub struct E1000Config {
    /// Ethernet address in the EEPROM.
    pub mac: [u8; 6],
    /// How long autonegotiation takes from carrier to link. Hardware takes seconds, and the driver
    /// waits for it; 0 has the link up in the register write that asks for it.
    pub autonegotiation: Duration,
}

impl E1000Config {
    /// A controller with the address `mac` whose link comes up at once.
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            autonegotiation: Duration::ZERO,
        }
    }
}

/// The controller. See the module's text.
pub struct E1000 {
    config: ConfigSpace,
    regs: RegisterFile,
    /// Where some of them are while another process has them as well.
    shared: Option<SharedPage>,
    eeprom: Eeprom,
    phy: Phy,
    tx: Transmitter,
    rx: Receiver,
    line: InterruptLine,
    timers: Timers,
    /// Register that the I/O window shows.
    io_address: u32,
    autonegotiation_ns: u64,
    dma: DmaSpace,
    intx: Arc<dyn IrqLine>,
    wire: Box<dyn Wire>,
    /// What the far end sees of the PHY's link.
    shown_link: bool,
    /// The far end goes on seeing what it saw last.
    link_held: bool,
    /// The PHY's link went while it was held.
    link_missed: bool,
    /// The host has pulled the cable, see [`E1000::set_cable`].
    cable_pulled: bool,
    kick_fd: EventFd,
    /// A kick is on its way.
    kicked: bool,
    /// What the event loop watches.
    watched: Interest,
    complaints: RateLimit,
    /// When the guest took interrupts: read ICR while the line was asserted.
    interrupts_taken: Arc<Moments>,
}

impl fmt::Debug for E1000 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("E1000")
            .field("mac", &self.eeprom.ethernet_address())
            .field("link_up", &self.link_up())
            .finish_non_exhaustive()
    }
}

impl E1000 {
    /// A controller just powered on, with its descriptors unknown to any event loop yet.
    pub fn new(
        config: E1000Config,
        dma: DmaSpace,
        intx: Arc<dyn IrqLine>,
        wire: Box<dyn Wire>,
    ) -> Result<Self, Error> {
        Self::with_clock(config, dma, intx, wire, false)
    }

    /// As [`E1000::new`], with a clock that stands still if asked for.
    fn with_clock(
        config: E1000Config,
        dma: DmaSpace,
        intx: Arc<dyn IrqLine>,
        wire: Box<dyn Wire>,
        manual_clock: bool,
    ) -> Result<Self, Error> {
        let mut nic = Self {
            config: configuration_space()?,
            regs: RegisterFile::power_on(),
            shared: None,
            eeprom: Eeprom::new(config.mac, DEVICE_ID, SUBSYSTEM_ID),
            phy: Phy::default(),
            tx: Transmitter::default(),
            rx: Receiver::default(),
            line: InterruptLine::default(),
            timers: Timers::new(manual_clock)?,
            io_address: 0,
            autonegotiation_ns: u64::try_from(config.autonegotiation.as_nanos())
                .unwrap_or(u64::MAX),
            dma,
            intx,
            wire,
            shown_link: false,
            link_held: false,
            link_missed: false,
            cable_pulled: false,
            kick_fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            kicked: false,
            watched: Interest::default(),
            complaints: RateLimit::default(),
            interrupts_taken: Arc::default(),
        };
        nic.load_eeprom();
        nic.update_link();
        Ok(nic)
    }

    /// The memory that the controller reaches.
    pub fn memory(&self) -> &DmaSpace {
        &self.dma
    }

    /// When the guest took interrupts of this controller.
    pub fn interrupts_taken(&self) -> Arc<Moments> {
        Arc::clone(&self.interrupts_taken)
    }

    /// Has `mac` be the address in the EEPROM, as on a card that was made with it. A driver that
    /// runs keeps the one that it has read until it is given another one.
    pub fn set_address(&mut self, mac: [u8; 6]) {
        self.eeprom.set_ethernet_address(mac);
    }

    /// Pulls the network cable, or plugs it in again, whatever is at its other end.
    pub fn set_cable(&mut self, plugged: bool) {
        self.cable_pulled = !plugged;
        self.update_link();
        self.settle();
    }

    /// Whether the controller may use the bus: bus mastering enabled, not in a sleep state.
    fn dma_allowed(&self) -> bool {
        self.config.command().contains(Command::BUS_MASTER) && !self.asleep()
    }

    fn asleep(&self) -> bool {
        self.config.u16_at(PMCSR) & PMCSR_POWER_STATE != 0
    }

    /// Whether there would be a register at the memory address `address` if the controller were not
    /// asleep.
    pub fn sleeps_at(&self, address: u64) -> bool {
        let is_there = |range: &BarRange| {
            let offset = address.checked_sub(range.address);
            range.space != BarSpace::Io && offset.is_some_and(|offset| offset < range.size_bytes)
        };
        self.asleep() && self.config.decoded().iter().any(is_there)
    }

    /// Takes over what the EEPROM has for registers: the station address (5.6.1).
    fn load_eeprom(&mut self) {
        let [a, b, c, d, e, f] = self.eeprom.ethernet_address();
        self.regs.set(RA, u32::from_le_bytes([a, b, c, d]));
        self.regs
            .set(RA + 4, RAH_AV | u32::from(u16::from_le_bytes([e, f])));
        self.tell_stations();
    }

    /// Tells the wire which addresses pass the receive filter exactly.
    fn tell_stations(&mut self) {
        let stations: Vec<_> = filter::stations(&self.regs).collect();
        self.wire.stations(&stations);
    }

    /// CTRL.RST: everything but configuration space, PHY and EEPROM content (14.7).
    fn software_reset(&mut self) {
        for timer in [
            Timer::Throttle,
            Timer::ReceiveDelay,
            Timer::ReceiveAbsolute,
            Timer::TransmitDelay,
            Timer::TransmitAbsolute,
        ] {
            self.timers.stop(timer);
        }
        self.set_registers(self.regs.after_reset());
        self.reset_units();
        let request = self.phy.hold_in_reset(false);
        self.change_link(request);
        self.update_status();
        // The link did not change while somebody was looking.
        self.clear_causes(u32::MAX);
    }

    fn reset_units(&mut self) {
        self.tx.reset();
        self.rx.held = None;
        self.eeprom.reset_interface();
        self.io_address = 0;
        self.line.last_assertion_ns = None;
        self.load_eeprom();
        self.update_interrupt();
    }

    /// Everything but configuration space.
    fn hardware_reset(&mut self) {
        self.timers.stop_all();
        self.set_registers(RegisterFile::power_on());
        self.phy = Phy::default();
        self.show_link();
        self.reset_units();
        self.update_link();
        self.clear_causes(u32::MAX);
    }

    /// Logs something that the guest did wrong, rate-limited.
    fn complain(&mut self, what: fmt::Arguments) {
        if let Some(suppressed) = self.complaints.permit() {
            tracing::warn!(suppressed, "e1000: {what}");
        }
    }
}

/// Configuration space of the 82540EM (4.1).
fn configuration_space() -> Result<ConfigSpace, ConfigError> {
    let mut config = ConfigSpace::new(PciIdentity {
        vendor_id: 0x8086,
        device_id: DEVICE_ID,
        revision_id: 2,
        class_code: 0x02_0000,
        subsystem_vendor_id: 0x8086,
        subsystem_id: SUBSYSTEM_ID,
    });
    config.set_power_on_status(Status::MHZ_66 | Status::DEVSEL_MEDIUM);
    config.add_bar(BAR_MEMORY, BarSpace::Memory32, 128 << 10)?;
    config.add_bar(BAR_IO, BarSpace::Io, 64)?;
    config.set_interrupt_pin(InterruptPin::A);
    // Version 2, device-specific initialization, PME from D0, D3hot and D3cold; power state and
    // PME enable can be written.
    let capabilities = 0xc822u16.to_le_bytes();
    let body = [capabilities[0], capabilities[1], 0, 0, 0, 0];
    config.add_capability_at(POWER_MANAGEMENT, 0x01, &body, &[0, 0, 0x03, 0x01])?;
    Ok(config)
}

impl PciFunction for E1000 {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let pending = self.line.asserted;
        self.config.set_interrupt_status(pending);
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let slept = self.asleep();
        let could_dma = self.dma_allowed();
        self.config.write(offset, data);
        if slept && !self.asleep() {
            // D3hot to D0 resets the function (PCI Power Management 1.1, 5.4.1).
            self.hardware_reset();
        }
        self.drive_line();
        if self.dma_allowed() && !could_dma {
            self.transmit();
            self.receive_batch();
        }
        self.settle();
    }

    fn decoded(&self) -> Vec<BarRange> {
        // A sleeping function answers configuration accesses only.
        if self.asleep() {
            Vec::new()
        } else {
            self.config.decoded()
        }
    }

    fn bars(&self) -> Vec<BarSize> {
        self.config.bars()
    }

    fn shares_registers(&mut self) -> Option<&mut dyn SharesRegisters> {
        Some(self)
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        match bar {
            BAR_MEMORY => self.read_memory(offset, data),
            BAR_IO => self.read_io(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        match bar {
            BAR_MEMORY => self.write_memory(offset, data),
            BAR_IO => self.write_io(offset, data),
            _ => {}
        }
        self.settle();
    }

    fn reset(&mut self) {
        (self.line.withheld, self.line.frozen) = (false, false);
        self.config.reset();
        self.hardware_reset();
        self.drive_line();
        self.settle();
    }

    fn save(&self) -> Result<Part, StateError> {
        self.save_part()
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.restore_part(state)
    }
}
