//! What a server's function looks like, as far as the VMM has to know: read once, and compared when
//! it comes back.

use crate::pci::config::{BAR_COUNT, ConfigSpace, PciIdentity, offset};
use crate::pci::{BarIndex, BarSize, BarSpace};
use crate::vfio_user::client::{Client, ClientError};
use crate::vfio_user::message::{CONFIG_REGION, INTX, MSIX};

use super::FunctionError;

/// Bytes of configuration space that the guest is shown.
pub const CONFIG_BYTES: usize = 256;

const CAPABILITY_MSIX: u8 = 0x11;
/// Capabilities that work without the VMM's help, and MSI-X: power management, PCI-X, vendor's own,
/// PCI Express, MSI-X, advanced features (PCI Code and ID Assignment 1.11, section 2). MSI is not
/// among them.
const SHOWN: [u8; 6] = [0x01, 0x07, 0x09, 0x10, CAPABILITY_MSIX, 0x13];
/// Most capabilities that fit.
const MAX_CAPABILITIES: usize = 48;

/// Where MSI-X is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixPlace {
    /// Offset of the capability.
    pub capability: u16,
    /// Number of vectors.
    pub count: u16,
    /// Register that has the table.
    pub bar: BarIndex,
    /// Byte offset of the table in it.
    pub table_offset: u32,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub identity: PciIdentity,
    pub bars: Vec<BarSize>,
    pub msix: Option<MsixPlace>,
    pub has_intx: bool,
    /// Sizes of the regions behind the base address registers, which may be smaller than those.
    pub region_bytes: [u64; BAR_COUNT],
    /// Capabilities that there are: offset and ID, in the order of the list.
    capabilities: Vec<(u8, u8)>,
}

impl Shape {
    pub fn read(client: &mut Client) -> Result<Self, FunctionError> {
        let mut bytes = [0; CONFIG_BYTES];
        let config = client.regions().get(CONFIG_REGION as usize);
        if config.is_none_or(|region| region.size < CONFIG_BYTES as u64) {
            return Err(FunctionError::Unusable("it has no configuration space"));
        }
        client.region_read(CONFIG_REGION, 0, &mut bytes)?;
        if bytes[usize::from(offset::HEADER_TYPE)] & 0x7f != 0 {
            return Err(FunctionError::Unusable("it is no endpoint"));
        }
        let mut shape = Self {
            identity: identity(&bytes),
            bars: Vec::new(),
            msix: None,
            has_intx: client.irq_count(INTX) > 0
                && (1..=4).contains(&bytes[usize::from(offset::INTERRUPT_PIN)]),
            region_bytes: [0; BAR_COUNT],
            capabilities: capabilities(&bytes),
        };
        shape.find_bars(client, &bytes)?;
        shape.find_msix(client, &bytes)?;
        Ok(shape)
    }

    fn find_bars(&mut self, client: &Client, bytes: &[u8]) -> Result<(), FunctionError> {
        let mut upper_half = false;
        for index in 0..BAR_COUNT {
            if std::mem::take(&mut upper_half) {
                continue;
            }
            let size = client.regions().get(index).map_or(0, |region| region.size);
            if size == 0 {
                continue;
            }
            let low = bytes[usize::from(offset::BAR0) + 4 * index];
            let (space, least) = match low & 0b111 {
                low if low & 1 == 1 => (BarSpace::Io, 4),
                0b100 => (BarSpace::Memory64, 16),
                _ => (BarSpace::Memory32, 16),
            };
            upper_half = space == BarSpace::Memory64;
            let size_bytes = size.max(least).checked_next_power_of_two();
            let size_bytes = size_bytes.ok_or(FunctionError::Unusable("a region has no size"))?;
            self.region_bytes[index] = size;
            self.bars.push(BarSize {
                bar: index as BarIndex,
                space,
                size_bytes,
            });
        }
        Ok(())
    }

    fn find_msix(&mut self, client: &Client, bytes: &[u8]) -> Result<(), FunctionError> {
        let mut all = self.capabilities.iter();
        let Some(&(at, _)) = all.find(|(_, id)| *id == CAPABILITY_MSIX) else {
            return Ok(());
        };
        let at = usize::from(at);
        let Some(&[_, _, low, high, t0, t1, t2, t3]) = bytes[at..].first_chunk() else {
            return Err(FunctionError::Unusable("its MSI-X capability is cut off"));
        };
        let count = (u16::from_le_bytes([low, high]) & 0x7ff) + 1;
        let table = u32::from_le_bytes([t0, t1, t2, t3]);
        let (bar, table_offset) = ((table & 7) as BarIndex, table & !7);
        let end = u64::from(table_offset) + 16 * u64::from(count);
        let room = self.region_bytes.get(usize::from(bar));
        if room.is_none_or(|room| end > *room) {
            return Err(FunctionError::Unusable("its vector table is in no region"));
        }
        if client.irq_count(MSIX) >= u32::from(count) {
            self.msix = Some(MsixPlace {
                capability: at as u16,
                count,
                bar,
                table_offset,
            });
        }
        Ok(())
    }

    /// A configuration space of its own for what is placed and enabled here.
    pub fn config(&self) -> Result<ConfigSpace, FunctionError> {
        let mut config = ConfigSpace::new(self.identity);
        for bar in &self.bars {
            config.add_bar(bar.bar, bar.space, bar.size_bytes)?;
        }
        Ok(config)
    }

    /// Bytes of configuration space that are shown in place of the server's: the list of
    /// capabilities without those that are hidden, no expansion ROM, no interrupt pin that leads
    /// nowhere, a single function.
    pub fn shown_otherwise(&self) -> Vec<(u16, u8)> {
        let mut bytes = vec![(offset::HEADER_TYPE, 0)];
        bytes.extend((0..4).map(|n| (offset::EXPANSION_ROM + n, 0)));
        bytes.push((offset::INTERRUPT_PIN, u8::from(self.has_intx)));
        let mut link = offset::CAPABILITIES_POINTER;
        for (at, id) in self.shown_capabilities() {
            bytes.push((link, at));
            bytes.push((at.into(), id));
            link = u16::from(at) + 1;
        }
        bytes.push((link, 0));
        bytes
    }

    /// Whether there is any capability that is shown.
    pub fn shows_capabilities(&self) -> bool {
        self.shown_capabilities().next().is_some()
    }

    fn shown_capabilities(&self) -> impl Iterator<Item = (u8, u8)> + '_ {
        let shown = |id: &u8| SHOWN.contains(id) && (*id != CAPABILITY_MSIX || self.msix.is_some());
        self.capabilities
            .iter()
            .copied()
            .filter(move |(_, id)| shown(id))
    }
}

fn identity(bytes: &[u8; CONFIG_BYTES]) -> PciIdentity {
    let word = |at: u16| {
        let at = usize::from(at);
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    };
    let class =
        u32::from(word(offset::REVISION_ID)) | u32::from(word(offset::REVISION_ID + 2)) << 16;
    PciIdentity {
        vendor_id: word(offset::VENDOR_ID),
        device_id: word(offset::DEVICE_ID),
        revision_id: class as u8,
        class_code: class >> 8,
        subsystem_vendor_id: word(offset::SUBSYSTEM_VENDOR_ID),
        subsystem_id: word(offset::SUBSYSTEM_ID),
    }
}

/// Offset and ID of each capability. A list that goes in circles ends.
fn capabilities(bytes: &[u8; CONFIG_BYTES]) -> Vec<(u8, u8)> {
    let mut found: Vec<(u8, u8)> = Vec::new();
    if bytes[usize::from(offset::STATUS)] & 0x10 == 0 {
        return found;
    }
    let mut at = bytes[usize::from(offset::CAPABILITIES_POINTER)] & !3;
    while at >= 0x40 && found.len() < MAX_CAPABILITIES && found.iter().all(|one| one.0 != at) {
        found.push((at, bytes[usize::from(at)]));
        at = bytes[usize::from(at) + 1] & !3;
    }
    found
}

impl From<ClientError> for FunctionError {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}
