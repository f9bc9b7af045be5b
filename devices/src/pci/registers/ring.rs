//! Rings of descriptors: where they are, and which memory a device reaches with what it was last
//! told to do, which is its rings and what their descriptors point to.

use std::ops::Range;

use super::description::Description;
use super::description::entries::{Descriptor, RingPlace};
use super::{Access, RegisterAccess, RegisterCheckpoint};
use crate::dma::DmaSpace;

/// Largest ring, in bytes: what a length register of 20 bits can say.
pub(super) const MAX_RING: u32 = 1 << 20;
/// Most descriptors that are looked at in all: drivers have some thousands at most, and somebody
/// waits meanwhile.
const MOST_DESCRIPTORS: usize = 16_384;

impl RingPlace {
    /// The registers by which it is found.
    fn registers(&self) -> [u32; 4] {
        [self.base_low, self.base_high, self.length, self.control]
    }

    /// Address and length of the ring, if the device uses it.
    pub fn in_use(&self, access: &mut Access<'_>) -> Option<(u64, usize)> {
        self.by_values(&mut |offset| access.read(offset))
    }

    /// The same, by the values of registers.
    fn by_values(&self, value: &mut dyn FnMut(u32) -> u32) -> Option<(u64, usize)> {
        if value(self.control) & self.enable != self.enable {
            return None;
        }
        let (low, high) = (value(self.base_low), value(self.base_high));
        let length = value(self.length);
        let address = u64::from(high) << 32 | u64::from(low);
        (length <= MAX_RING).then_some((address, length as usize))
    }
}

impl Description {
    /// What a device reaches that runs, in guest physical addresses, as far as it has been told by
    /// now; more than that, where a descriptor has something else in place of an address. `None`
    /// where the descriptors are not described or cannot be read, or are more than are looked at.
    pub fn reached_now(
        &self,
        registers: &mut dyn RegisterAccess,
        memory: &DmaSpace,
    ) -> Option<Vec<Range<u64>>> {
        let mut access = Access(registers);
        self.reached(&mut |offset| access.read(offset), memory)
    }

    /// What a device reaches that runs, before and after a store to its registers: at which offset,
    /// and what, if it is of four bytes.
    pub fn reached_after(
        &self,
        registers: &mut dyn RegisterAccess,
        memory: &DmaSpace,
        (at, stored): (u64, Option<u32>),
    ) -> Option<Vec<Range<u64>>> {
        let mut all = self.reached_now(registers, memory)?;
        let mut finds = self.ring.iter().flat_map(RingPlace::registers);
        if let Some(stored) = stored
            && finds.any(|register| u64::from(register) == at)
        {
            let mut access = Access(registers);
            let mut value = |offset| match u64::from(offset) == at {
                true => stored,
                false => access.read(offset),
            };
            all.extend(self.reached(&mut value, memory)?);
        }
        Some(all)
    }

    /// What a device reaches that goes on from `saved`.
    pub fn reached_by(
        &self,
        saved: &RegisterCheckpoint,
        memory: &DmaSpace,
    ) -> Option<Vec<Range<u64>>> {
        let mut value = |offset| {
            let mut registers = self.register.iter().zip(&saved.registers);
            let found = registers.find(|(one, _)| one.offset == offset);
            // A description has none of a ring that it does not save.
            found.map_or(0, |(_, (_, values))| values.first().copied().unwrap_or(0))
        };
        self.reached(&mut value, memory)
    }

    fn reached(
        &self,
        value: &mut dyn FnMut(u32) -> u32,
        memory: &DmaSpace,
    ) -> Option<Vec<Range<u64>>> {
        let (mut all, mut descriptors) = (Vec::new(), 0);
        for ring in &self.ring {
            let descriptor = ring.descriptor.as_ref()?;
            let Some((address, bytes)) = ring.by_values(value).filter(|(_, bytes)| *bytes > 0)
            else {
                continue;
            };
            descriptors += bytes / descriptor.bytes as usize;
            if descriptors > MOST_DESCRIPTORS {
                return None;
            }
            let mut contents = vec![0; bytes];
            memory.read(address, &mut contents).ok()?;
            all.push(address..address.checked_add(bytes as u64)?);
            descriptor.buffers(&contents, &mut all);
        }
        Some(all)
    }
}

impl Descriptor {
    /// Adds what the descriptors of a ring point to.
    fn buffers(&self, ring: &[u8], to: &mut Vec<Range<u64>>) {
        for one in ring.chunks_exact(self.bytes as usize) {
            for &at in &self.addresses {
                let address = one.get(at as usize..).and_then(<[u8]>::first_chunk);
                let Some(address) = address.map(|bytes| u64::from_le_bytes(*bytes)) else {
                    continue;
                };
                // 0 is one that is not used.
                if address != 0 {
                    to.push(address..address.saturating_add(self.buffer_bytes.into()));
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::dma::tests::two_parts;

    const TEXT: &str = r#"
        schema = 1
        [device]
        name = "ring"
        version = 1
        vendor = 0x8086
        device = 1
        bar = 0
        bytes = 0x100
        [[ring]]
        name = "one"
        base_low = 0
        base_high = 4
        length = 8
        control = 12
        enable = 2
        descriptor = { bytes = 16, addresses = [0, 8], buffer_bytes = 2048 }
        [[register]]
        name = "all"
        offset = 0
        [[register]]
        name = "high"
        offset = 4
        [[register]]
        name = "length"
        offset = 8
        [[register]]
        name = "control"
        offset = 12
    "#;

    struct Registers(HashMap<u32, u32>);

    impl RegisterAccess for Registers {
        fn load(&mut self, offset: u32) -> u32 {
            self.0.get(&offset).copied().unwrap_or(0)
        }
        fn store(&mut self, offset: u32, value: u32) {
            self.0.insert(offset, value);
        }
        fn load_config(&mut self, _offset: u16, data: &mut [u8]) {
            data.copy_from_slice(&[0x86, 0x80, 1, 0][..data.len()]);
        }
        fn store_config(&mut self, _offset: u16, _data: &[u8]) {}
    }

    #[test]
    fn a_device_reaches_its_rings_and_what_their_descriptors_point_to() {
        let (_file, space) = two_parts();
        let description = Description::parse(TEXT).unwrap();
        // Two descriptors at 0x1000: one with an address, one with two.
        space.write(0x1000, &0x2000u64.to_le_bytes()).unwrap();
        space.write(0x1010, &0x3000u64.to_le_bytes()).unwrap();
        space.write(0x1018, &u64::MAX.to_le_bytes()).unwrap();
        let mut registers = Registers([(0, 0x1000), (8, 32), (12, 2)].into());
        let reached = vec![
            0x1000..0x1020,
            0x2000..0x2800,
            0x3000..0x3800,
            u64::MAX..u64::MAX,
        ];
        let now = description.reached_now(&mut registers, &space);
        assert_eq!(now.as_ref(), Some(&reached));
        let saved = description.read_state(&mut registers, None).unwrap();
        assert_eq!(description.reached_by(&saved, &space), now);
        // One that a store turns on, and one that it moves.
        registers.store(12, 0);
        let on = description.reached_after(&mut registers, &space, (12, Some(2)));
        assert_eq!(on.as_ref(), Some(&reached));
        registers.store(12, 2);
        space.write(0x2800, &0x5000u64.to_le_bytes()).unwrap();
        let moved = description.reached_after(&mut registers, &space, (0, Some(0x2800)));
        let moved = moved.unwrap();
        assert!(moved.starts_with(&reached) && moved.contains(&(0x5000..0x5800)));
        let other = description.reached_after(&mut registers, &space, (0x80, Some(1)));
        assert_eq!(other.as_ref(), Some(&reached));
        // More descriptors than anybody waits for.
        registers.store(8, MAX_RING);
        assert_eq!(description.reached_now(&mut registers, &space), None);
        registers.store(8, 32);
        // A ring that is not used, and one that is nowhere.
        registers.store(12, 0);
        assert_eq!(
            description.reached_now(&mut registers, &space),
            Some(vec![])
        );
        registers.store(12, 2);
        registers.store(4, 0x7000_0000);
        assert_eq!(description.reached_now(&mut registers, &space), None);
    }

    #[test]
    fn without_a_descriptors_form_nothing_is_said() {
        let (_file, space) = two_parts();
        let text: Vec<_> = TEXT
            .lines()
            .filter(|line| !line.contains("descriptor"))
            .collect();
        let description = Description::parse(&text.join("\n")).unwrap();
        let mut registers = Registers(HashMap::new());
        assert_eq!(description.reached_now(&mut registers, &space), None);
        for wrong in ["bytes = 4", "addresses = [9]", "buffer_bytes = 0"] {
            let key = wrong.split('=').next().unwrap().trim();
            let text = TEXT.replace(
                match key {
                    "bytes" => "bytes = 16",
                    "addresses" => "addresses = [0, 8]",
                    _ => "buffer_bytes = 2048",
                },
                wrong,
            );
            assert!(Description::parse(&text).is_err(), "{wrong}");
        }
    }
}
