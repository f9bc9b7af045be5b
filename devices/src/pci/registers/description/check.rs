//! Whether a description contradicts itself or the specifications.

use std::ops::Range;

use super::entries::{ConfigField, Descriptor, Mdio, Reset, RingPlace, Station, Untouched, Why};
use super::{Checked, Description, PHY_REGISTERS, check_answers, wrong};

/// Most entries of one kind.
const MAX_ENTRIES: usize = 512;
/// Most registers in all.
const MAX_REGISTERS: u32 = 4096;
/// Longest wait for a field of configuration space to take effect, in microseconds.
const MAX_SETTLE_US: u64 = 100_000;
/// Bytes of conventional configuration space.
const CONFIG_BYTES: u16 = 256;
/// Longest descriptor of a ring, in bytes.
const MAX_DESCRIPTOR: u32 = 128;
/// Most memory that a descriptor's address is of, in bytes.
const MAX_BUFFER: u32 = 1 << 20;

/// Whether all entries of a description go together.
///
/// # Errors
/// The first that does not.
pub(super) fn check(description: &Description) -> Checked {
    let device = &description.device;
    let lengths = [
        description.config.len(),
        description.before.len(),
        description.ring.len(),
        description.register.len(),
        description.after.len(),
        description.untouched.len(),
        description.lost.len(),
        description.flush.len(),
        description.withheld.len(),
    ];
    if lengths.into_iter().any(|length| length > MAX_ENTRIES) {
        return wrong(&device.name, "too many entries");
    }
    if device.bar > 5 {
        return wrong(&device.name, "there are base address registers 0 to 5");
    }
    check_config(&description.config)?;
    check_places(description)?;
    check_lost(description)?;
    check_withheld(description)?;
    check_stores(description)?;
    check_flushes(description)?;
    check_standing_still(description)?;
    if let Some(reset) = &description.reset {
        check_reset(description, reset)?;
    }
    if let Some(station) = &description.station {
        check_station(description, station)?;
    }
    for ring in &description.ring {
        check_ring(description, ring)?;
    }
    if let Some(mdio) = &description.mdio {
        check_phy(description, mdio)?;
    }
    let parked = description.parked.as_ref();
    parked.map_or(Ok(()), |parked| check_answers::check(parked, description))
}

fn check_config(fields: &[ConfigField]) -> Checked {
    for (index, field) in fields.iter().enumerate() {
        let aligned = matches!(field.bytes, 1 | 2 | 4)
            && field.offset.is_multiple_of(u16::from(field.bytes))
            && field.offset < CONFIG_BYTES;
        if !aligned {
            return wrong(&field.name, "no aligned field of configuration space");
        }
        if field.settle_us > MAX_SETTLE_US {
            return wrong(&field.name, "it takes too long to settle");
        }
        let earlier = &fields[..index];
        if earlier.iter().any(|other| other.name == field.name) {
            return wrong(&field.name, "it is there twice");
        }
    }
    Ok(())
}

/// Registers of the state and those that are left alone are the device's, and each is one of them.
fn check_places(description: &Description) -> Checked {
    let mut taken: Vec<(&str, Range<u32>, bool)> = Vec::new();
    let saved = description.register.iter();
    let saved = saved.map(|one| (one.name.as_str(), one.offset, one.count, true));
    let left = description.untouched.iter();
    let left = left.map(|one| (one.name.as_str(), one.offset, one.count, false));
    let mut total = 0u32;
    for (name, offset, count, is_saved) in saved.chain(left) {
        if count == 0 || !description.has(offset, count) {
            return wrong(name, "no aligned registers of this device");
        }
        total = total.saturating_add(count);
        if total > MAX_REGISTERS {
            return wrong(name, "too many registers");
        }
        let range = offset..offset + 4 * count;
        for (other, others, other_saved) in &taken {
            if range.start < others.end && others.start < range.end {
                return wrong(name, "its registers are another's too");
            }
            if *other == name && is_saved && *other_saved {
                return wrong(name, "it is there twice");
            }
        }
        taken.push((name, range, is_saved));
    }
    Ok(())
}

/// What counts lost frames is cleared by reading, so that each is counted once.
fn check_lost(description: &Description) -> Checked {
    for (index, lost) in description.lost.iter().enumerate() {
        let clears = |left: &Untouched| {
            let behind = lost.offset.checked_sub(left.offset);
            left.why == Why::ReadClears && behind.is_some_and(|behind| behind / 4 < left.count)
        };
        if !description.has(lost.offset, 1) || !description.untouched.iter().any(clears) {
            return wrong(&lost.register, "no register that reading clears");
        }
        let earlier = &description.lost[..index];
        if earlier.iter().any(|other| other.offset == lost.offset) {
            return wrong(&lost.register, "it is there twice");
        }
    }
    Ok(())
}

/// What guests do not reach is nothing that is known of the device.
fn check_withheld(description: &Description) -> Checked {
    let device = &description.device;
    for one in &description.withheld {
        let end = one.offset.checked_add(one.bytes);
        let end =
            end.filter(|end| one.bytes > 0 && (one.bar != device.bar || *end <= device.bytes));
        if end.is_none() || one.bar > 5 {
            return wrong(&one.name, "it is no part of this device");
        }
        let saved = description.register.iter();
        let saved = saved.map(|known| (known.offset, known.count));
        let left = description.untouched.iter();
        let left = left.map(|known| (known.offset, known.count));
        let mut known = saved
            .chain(left)
            .map(|(at, count)| (at, 4 * count as usize));
        if known.any(|(at, bytes)| description.withholds(device.bar, at.into(), bytes)) {
            return wrong(&one.name, "it has registers that are described");
        }
    }
    Ok(())
}

fn check_stores(description: &Description) -> Checked {
    for store in description.before.iter().chain(&description.after) {
        if !description.has(store.offset, 1) {
            return wrong(&store.register, "no aligned register of this device");
        }
    }
    Ok(())
}

fn check_flushes(description: &Description) -> Checked {
    for flush in &description.flush {
        let known = |offset: &u32| description.has(*offset, 1);
        if flush.past.len() > MAX_ENTRIES || !known(&flush.offset) || !flush.past.iter().all(known)
        {
            return wrong(&flush.register, "no aligned register of this device");
        }
        if flush.past.contains(&flush.offset) {
            return wrong(&flush.register, "a store to it changes what it shows");
        }
    }
    Ok(())
}

/// The bits that make the device stand still, and where it shows that it does.
fn check_standing_still(description: &Description) -> Checked {
    for quiet in &description.quiet {
        // One by itself, whose whole value goes back.
        let mut registers = description.register.iter();
        let saved =
            registers.any(|one| (one.offset, one.count, one.keep) == (quiet.offset, 1, u32::MAX));
        let is_there = |offset| description.has(offset, 1);
        if !saved || quiet.through.is_some_and(|offset| !is_there(offset)) {
            return wrong(&quiet.register, "it is not saved whole");
        }
    }
    if let Some(idle) = &description.idle
        && (!description.has(idle.offset, 1) || idle.wait_us > MAX_SETTLE_US)
    {
        return wrong("idle", "no such register, or too long a wait");
    }
    Ok(())
}

fn check_reset(description: &Description, reset: &Reset) -> Checked {
    let places = [reset.offset, reset.done_offset];
    if places.iter().any(|at| !description.has(*at, 1))
        || reset.wait_us > MAX_SETTLE_US
        || reset.zero.iter().any(|at| !description.saves(*at))
    {
        return wrong(&reset.register, "no such register, or too long a wait");
    }
    Ok(())
}

fn check_station(description: &Description, station: &Station) -> Checked {
    let saved = |offset: u32| {
        let mut registers = description.register.iter();
        registers.any(|one| one.offsets().any(|at| at == offset))
    };
    if !saved(station.low) || !saved(station.high) {
        return wrong("station", "its registers are not saved");
    }
    Ok(())
}

fn check_ring(description: &Description, ring: &RingPlace) -> Checked {
    for offset in [ring.base_low, ring.base_high, ring.length, ring.control] {
        let mut registers = description.register.iter();
        if !registers.any(|one| one.offset == offset) {
            return wrong(&ring.name, "its registers are not saved");
        }
    }
    if ring.descriptor.as_ref().is_some_and(|one| !is_valid(one)) {
        return wrong(&ring.name, "its descriptors are none");
    }
    Ok(())
}

fn is_valid(descriptor: &Descriptor) -> bool {
    let end = |at: &u32| at.checked_add(8);
    let within = |at: &u32| end(at).is_some_and(|end| end <= descriptor.bytes);
    (8..=MAX_DESCRIPTOR).contains(&descriptor.bytes)
        && (1..=MAX_BUFFER).contains(&descriptor.buffer_bytes)
        && descriptor.addresses.len() <= 8
        && descriptor.addresses.iter().all(within)
}

fn check_phy(description: &Description, mdio: &Mdio) -> Checked {
    if !description.has(mdio.register, 1) || mdio.phy >= 32 {
        return wrong("mdio", "no such register or PHY");
    }
    for (index, phy) in mdio.saved.iter().enumerate() {
        let earlier = &mdio.saved[..index];
        if phy.number >= PHY_REGISTERS {
            return wrong(&phy.name, "a PHY has registers 0 to 31");
        }
        if earlier.iter().any(|other| other.number == phy.number) {
            return wrong(&phy.name, "it is there twice");
        }
    }
    Ok(())
}
