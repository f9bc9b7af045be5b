//! Parts of the server's registers that are memory, which the guest reaches by itself.

use std::sync::Arc;

use super::FunctionError;
use super::shape::Shape;
use crate::pci::areas::{BarArea, BarMemory, whole_pages};
use crate::pci::msix::MsixLayout;
use crate::pci::{BarIndex, BarSpace};
use crate::vfio_user::client::Client;

/// Most areas of a function, and most bytes of them: the kernel keeps something for each page. What
/// is beyond goes by messages.
const MAX_AREAS: usize = 16;
const MAX_BYTES: u64 = 1 << 30;

/// The areas of the function behind `client`: what its server lets be mapped, in whole pages and
/// without the table of MSI-X, which this machine has to see.
///
/// # Errors
/// The server says what cannot be. A file that cannot be mapped is none.
pub fn of(client: &Client, shape: &Shape) -> Result<Vec<Arc<BarArea>>, FunctionError> {
    let mut areas = Vec::new();
    let mut left = MAX_BYTES;
    for bar in shape.bars.iter().filter(|bar| bar.space != BarSpace::Io) {
        let index = usize::from(bar.bar);
        let region = client.regions().get(index);
        let Some((region, file)) = region.zip(client.region_file(index)) else {
            continue;
        };
        let parts = region.mappable();
        let parts = parts.map_err(|_| FunctionError::Unusable("a region has impossible areas"))?;
        for part in whole_pages(&parts, &table_in(shape, bar.bar)) {
            let bytes = part.end - part.start;
            if areas.len() == MAX_AREAS {
                return Ok(areas);
            }
            if bytes > left {
                // A smaller one may have room.
                continue;
            }
            let offset = region.offset.checked_add(part.start);
            let offset =
                offset.ok_or(FunctionError::Unusable("a region is nowhere in its file"))?;
            let memory = BarMemory::of_file(file.clone(), offset, bytes as usize);
            let area = memory
                .map_err(|error| error.to_string())
                .and_then(|memory| {
                    BarArea::new(bar.bar, part.start, memory).map_err(|error| error.to_string())
                });
            match area {
                Ok(area) => {
                    left -= bytes;
                    areas.push(area);
                }
                Err(error) => tracing::warn!(
                    error,
                    bar = bar.bar,
                    offset = part.start,
                    "registers of a device's server are not mapped"
                ),
            }
        }
    }
    Ok(areas)
}

/// Where the table of MSI-X is in a register. Its pending bits are the server's.
fn table_in(shape: &Shape, bar: BarIndex) -> Vec<std::ops::Range<u64>> {
    let Some(msix) = shape.msix else {
        return Vec::new();
    };
    let layout = MsixLayout {
        bar: msix.bar,
        table_offset: msix.table_offset,
        pba_bar: msix.bar,
        pba_offset: msix.table_offset,
    };
    layout.ranges_in(bar, msix.count)
}
