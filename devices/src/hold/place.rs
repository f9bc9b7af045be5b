//! Where in a device an address is, for those that are held: each knows its BARs as they were
//! placed when it was held.

use super::DeviceAddress;
use crate::pci::registers::Description;
use crate::pci::{BarIndex, BarRange, BarSpace};

/// The BAR that `at` is in, of those at `ranges`, and the offset in it.
pub fn place(ranges: &[BarRange], at: DeviceAddress) -> Option<(BarIndex, u64)> {
    let (is_port, address) = match at {
        DeviceAddress::Memory(gpa) => (false, gpa),
        DeviceAddress::Port(port) => (true, port.into()),
    };
    ranges.iter().find_map(|range| {
        let offset = address.checked_sub(range.address)?;
        let is_in = offset < range.size_bytes && (range.space == BarSpace::Io) == is_port;
        is_in.then_some((range.bar, offset))
    })
}

/// Where a load of `bytes` bytes at `at` is, if it may overtake the stores to `waiting`: see
/// [`Description::may_overtake`].
pub fn overtaking(
    description: &Description,
    ranges: &[BarRange],
    (at, bytes): (DeviceAddress, usize),
    waiting: &mut dyn Iterator<Item = DeviceAddress>,
) -> Option<(BarIndex, u64)> {
    let registers = description.device.bar;
    let (bar, offset) = place(ranges, at).filter(|(bar, _)| *bar == registers)?;
    // A store elsewhere, to a window of I/O ports, may be to any register.
    let waiting = waiting.map(|at| match place(ranges, at) {
        Some((bar, offset)) if bar == registers => offset,
        _ => u64::MAX,
    });
    let may = description.may_overtake(offset, bytes, waiting);
    may.then_some((bar, offset))
}
