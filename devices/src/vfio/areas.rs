//! Parts of a function's registers that the guest is given.
//!
//! Only for a function that one guest has for good: a mapping of it cannot be taken from another
//! process, and a descriptor of it is the whole device. A function that several guests have by turns
//! stays behind its host's messages ([`super::passed`]).

use std::sync::Arc;

use super::device::VfioDevice;
use super::layout::FoundMsix;
use crate::pci::areas::{BarArea, whole_pages};
use crate::pci::{BarSize, BarSpace};

/// Most areas of a function.
const MAX_AREAS: usize = 16;

/// The areas of `device`'s base address registers `bars`: what the kernel lets be mapped, without
/// the pages in which the table of MSI-X or its pending bits are, which are the guest's own. What
/// cannot be mapped is read and written for the guest.
pub fn of(device: &VfioDevice, bars: &[BarSize], msix: Option<FoundMsix>) -> Vec<Arc<BarArea>> {
    let mut areas = Vec::new();
    for bar in bars.iter().filter(|bar| bar.space != BarSpace::Io) {
        let index = usize::from(bar.bar);
        let holes = msix.map_or(Vec::new(), |msix| {
            msix.layout.ranges_in(bar.bar, msix.vectors)
        });
        for part in whole_pages(&device.mappable(index), &holes) {
            if areas.len() == MAX_AREAS {
                return areas;
            }
            let memory = device.map_part(index, &part);
            let area = memory
                .map_err(|error| error.to_string())
                .and_then(|memory| {
                    BarArea::new(bar.bar, part.start, memory).map_err(|error| error.to_string())
                });
            match area {
                Ok(area) => areas.push(area),
                Err(error) => {
                    tracing::warn!(error, device = %device.address(), bar = bar.bar, "registers are not mapped");
                }
            }
        }
    }
    areas
}
