//! The configuration space that a guest sees of a function of the host.
//!
//! The guest's header is ours: its command register, base address registers and interrupt line say
//! nothing to the function but what [`super::function`] passes on. Of the function's capabilities
//! the guest sees those that need nothing of the host: power management (whose states are shown,
//! and not those of the function), PCI Express without its link, and MSI-X. Everything behind the
//! first 256 bytes is hidden, and the expansion ROM.
//!
//! What the function says is believed no more than what a guest says.

use super::address::PciAddress;
use super::error::VfioError;
use crate::pci::config::{
    BAR_COUNT, CONFIG_SPACE_BYTES, ConfigError, ConfigSpace, InterruptPin, PciIdentity, Status,
    offset,
};
use crate::pci::msix::{Msix, MsixLayout};
use crate::pci::{BarIndex, BarSpace};

/// Capability IDs (PCI Code and ID Assignment, section 2).
mod id {
    pub const POWER_MANAGEMENT: u8 = 0x01;
    pub const EXPRESS: u8 = 0x10;
    pub use crate::pci::msix::CAPABILITY_ID as MSIX;
}

/// Most capabilities that fit into configuration space: they are at multiples of four.
const MAX_CAPABILITIES: usize = 48;
/// First byte that a capability can be at.
const FIRST_CAPABILITY: u8 = 0x40;

/// Bytes of the capability of power management (PCI Power Management 1.2, section 3.2).
const POWER_BYTES: usize = 8;
/// PMCSR behind the two header bytes.
const PMCSR: usize = 2;
/// Power state, of PMCSR.
const POWER_STATE: u16 = 0x3;

/// PCI Express (PCI Express 3.0, section 7.8), counted from behind the two header bytes.
mod express {
    pub const BYTES_V1: usize = 20;
    pub const BYTES_V2: usize = 60;
    pub const CAPABILITIES: usize = 0;
    pub const DEVICE_CAPABILITIES: usize = 2;
    pub const DEVICE_CONTROL: usize = 6;
    pub const LINK_CAPABILITIES: usize = 10;
    pub const DEVICE_CAPABILITIES_2: usize = 34;
    pub const DEVICE_CONTROL_2: usize = 38;
    /// Of the capabilities register: version.
    pub const VERSION: u16 = 0xf;
    /// Of the capabilities register: kind of port; an endpoint integrated into the root complex,
    /// which bus 0 is of.
    pub const INTEGRATED_ENDPOINT: u16 = 9 << 4;
    /// Of the device capabilities: it can be reset alone. The guest would wait for it.
    pub const FUNCTION_RESET: u32 = 1 << 28;
    /// Of the device control register: all but the reset.
    pub const CONTROL_WRITABLE: u16 = 0x7fff;
    /// Of the second device capabilities: which completion time-outs there are.
    pub const COMPLETION_TIMEOUT: u32 = 0x1f;
}

/// Most base address registers' bytes that are counted on: they lie in the guest's windows.
const MAX_BAR_BYTES: u64 = 1 << 36;

/// A configuration space for the guest.
#[derive(Debug)]
pub struct GuestView {
    /// As at power-on.
    pub config: ConfigSpace,
    /// Where MSI-X is, if the function has it.
    pub msix: Option<FoundMsix>,
    /// Where PMCSR is, if there is power management.
    pub pmcsr: Option<u16>,
    /// Whether the function has an interrupt pin.
    pub has_pin: bool,
}

/// MSI-X of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundMsix {
    /// Number of vectors.
    pub vectors: u16,
    /// Where its table is.
    pub layout: MsixLayout,
    /// Where the capability is.
    pub capability: u16,
}

/// The function's own configuration space.
pub struct HostView<'a> {
    /// Its first bytes.
    pub bytes: &'a [u8; CONFIG_SPACE_BYTES],
    /// Bytes that each of its base address registers decodes; 0 for none.
    pub bars: [u64; BAR_COUNT],
}

impl HostView<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0xff)
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// What a guest is shown.
    ///
    /// # Errors
    /// The function is a bridge, or contradicts itself.
    pub fn for_guest(&self, address: PciAddress) -> Result<GuestView, VfioError> {
        let unfit = |why| Err(VfioError::Unfit(address, why));
        if self.byte(offset::HEADER_TYPE.into()) & 0x7f != 0 {
            return unfit("it is a bridge");
        }
        let class = self.u32(offset::REVISION_ID.into());
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: self.u16(offset::VENDOR_ID.into()),
            device_id: self.u16(offset::DEVICE_ID.into()),
            revision_id: class as u8,
            class_code: class >> 8,
            subsystem_vendor_id: self.u16(offset::SUBSYSTEM_VENDOR_ID.into()),
            subsystem_id: self.u16(offset::SUBSYSTEM_ID.into()),
        });
        self.add_bars(&mut config)?;
        let has_pin = self.byte(offset::INTERRUPT_PIN.into()) != 0;
        if has_pin {
            // Its own device number in the guest has one function, whose pin is the first.
            config.set_interrupt_pin(InterruptPin::A);
        }
        let (mut msix, mut pmcsr) = (None, None);
        for at in self.capabilities() {
            match self.byte(at.into()) {
                id::POWER_MANAGEMENT => {
                    self.add_power(at, &mut config)?;
                    pmcsr = Some(u16::from(at) + 2 + PMCSR as u16);
                }
                id::EXPRESS => self.add_express(at, &mut config)?,
                id::MSIX => {
                    let Some(found) = self.msix(at) else {
                        return unfit("its MSI-X table is nowhere");
                    };
                    msix = Some(found);
                    let (body, writable) = Msix::capability(found.vectors, found.layout);
                    config.add_capability_at(at.into(), id::MSIX, &body, &writable)?;
                }
                _ => {}
            }
        }
        Ok(GuestView {
            config,
            msix,
            pmcsr,
            has_pin,
        })
    }

    fn add_bars(&self, config: &mut ConfigSpace) -> Result<(), ConfigError> {
        let mut index = 0;
        while index < BAR_COUNT {
            let bytes = self.bars[index];
            let bar = index as BarIndex;
            index += 1;
            if bytes == 0 {
                continue;
            }
            if bytes > MAX_BAR_BYTES {
                return Err(ConfigError::BarSize(bytes));
            }
            let low = self.u32(usize::from(offset::BAR0) + 4 * usize::from(bar));
            let space = match low & 0b111 {
                io if io & 1 == 1 => BarSpace::Io,
                0b100 => {
                    index += 1;
                    BarSpace::Memory64
                }
                _ => BarSpace::Memory32,
            };
            config.add_bar(bar, space, bytes)?;
        }
        Ok(())
    }

    /// Where the capabilities are that a guest is shown, each kind once, in rising order.
    fn capabilities(&self) -> Vec<u8> {
        let mut found: Vec<u8> = Vec::new();
        let status = Status::from_bits_retain(self.u16(offset::STATUS.into()));
        if !status.contains(Status::CAPABILITIES_LIST) {
            return found;
        }
        let mut at = self.byte(offset::CAPABILITIES_POINTER.into()) & !3;
        for _ in 0..MAX_CAPABILITIES {
            if at < FIRST_CAPABILITY {
                break;
            }
            let kind = self.byte(at.into());
            let known = [id::POWER_MANAGEMENT, id::EXPRESS, id::MSIX].contains(&kind);
            let has_one = found.iter().any(|other| self.byte((*other).into()) == kind);
            if known && !has_one {
                found.push(at);
            }
            at = self.byte(usize::from(at) + 1) & !3;
        }
        found.sort_unstable();
        found
    }

    /// The bytes of a capability behind its header.
    fn body(&self, at: u8, bytes: usize) -> Option<Vec<u8>> {
        let start = usize::from(at) + 2;
        Some(self.bytes.get(start..start + bytes - 2)?.to_vec())
    }

    fn add_power(&self, at: u8, config: &mut ConfigSpace) -> Result<(), ConfigError> {
        let missing = ConfigError::Capability {
            offset: at.into(),
            len: POWER_BYTES,
        };
        let mut body = self.body(at, POWER_BYTES).ok_or(missing)?;
        // No PME, which needs a line of the host, and awake.
        let capabilities = u16::from_le_bytes([body[0], body[1]]) & 0x07ff;
        body[..2].copy_from_slice(&capabilities.to_le_bytes());
        let status = u16::from_le_bytes([body[PMCSR], body[PMCSR + 1]]);
        // Whether registers outlive a sleep stays.
        let status = status & 1 << 3;
        body[PMCSR..PMCSR + 2].copy_from_slice(&status.to_le_bytes());
        body[PMCSR + 2..].fill(0);
        let mut writable = vec![0; PMCSR];
        writable.extend(POWER_STATE.to_le_bytes());
        config.add_capability_at(at.into(), id::POWER_MANAGEMENT, &body, &writable)
    }

    fn add_express(&self, at: u8, config: &mut ConfigSpace) -> Result<(), ConfigError> {
        let capabilities = self.u16(usize::from(at) + 2 + express::CAPABILITIES);
        let bytes = match capabilities & express::VERSION {
            0 | 1 => express::BYTES_V1,
            _ => express::BYTES_V2,
        };
        let missing = ConfigError::Capability {
            offset: at.into(),
            len: bytes,
        };
        let own = self.body(at, bytes).ok_or(missing)?;
        let mut body = vec![0; own.len()];
        let mut writable = vec![0; own.len()];
        put16(
            &mut body,
            express::CAPABILITIES,
            capabilities & express::VERSION | express::INTEGRATED_ENDPOINT,
        );
        let device = get32(&own, express::DEVICE_CAPABILITIES) & !express::FUNCTION_RESET;
        put32(&mut body, express::DEVICE_CAPABILITIES, device);
        let control = express::DEVICE_CONTROL..express::LINK_CAPABILITIES - 2;
        body[control.clone()].copy_from_slice(&own[control]);
        put16(
            &mut writable,
            express::DEVICE_CONTROL,
            express::CONTROL_WRITABLE,
        );
        if bytes == express::BYTES_V2 {
            let timeouts =
                get32(&own, express::DEVICE_CAPABILITIES_2) & express::COMPLETION_TIMEOUT;
            put32(&mut body, express::DEVICE_CAPABILITIES_2, timeouts);
            let timeouts = express::COMPLETION_TIMEOUT as u16;
            put16(&mut writable, express::DEVICE_CONTROL_2, timeouts);
        }
        config.add_capability_at(at.into(), id::EXPRESS, &body, &writable)
    }

    fn msix(&self, at: u8) -> Option<FoundMsix> {
        let at = usize::from(at);
        self.body(at as u8, 12)?;
        let vectors = (self.u16(at + 2) & 0x7ff) + 1;
        let place = |at: usize, bytes: u64| {
            let value = self.u32(at);
            let (bar, offset) = (value & 0b111, value & !0b111);
            let end = u64::from(offset) + bytes;
            let has = self.bars.get(bar as usize)?;
            (end <= *has).then_some((bar as BarIndex, offset))
        };
        let (bar, table_offset) = place(at + 4, u64::from(vectors) * 16)?;
        let (pba_bar, pba_offset) = place(at + 8, u64::from(vectors).div_ceil(64) * 8)?;
        Some(FoundMsix {
            vectors,
            layout: MsixLayout {
                bar,
                table_offset,
                pba_bar,
                pba_offset,
            },
            capability: at as u16,
        })
    }
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u32::from_le_bytes(value)
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()) {
        *to = from;
    }
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()) {
        *to = from;
    }
}

#[cfg(test)]
mod tests;
