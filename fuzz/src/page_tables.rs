//! Whatever a guest's page tables and control registers are, they are walked without harm. An
//! input is registers, then entries, each with the place that it goes to.

use isolation::guest::addr::Gva;
use isolation::guest::paging::{AddressSpace, VirtMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory that the tables are in, in bytes.
const MEMORY: usize = 16 << 12;

/// One input.
pub fn run(data: &[u8]) {
    let Some((registers, words)) = data.split_first_chunk::<24>() else {
        return;
    };
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| registers[at + i]));
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]) else {
        return;
    };
    for entry in words.chunks_exact(10) {
        let place = usize::from(u16::from_le_bytes([entry[0], entry[1]])) * 8 % MEMORY;
        let _ = memory.write_slice(&entry[2..], GuestAddress(place as u64));
    }
    let (cr3, at) = (word(0) & 0xf000, Gva(word(8)));
    let space = AddressSpace::from_registers(cr3, word(16), word(16) >> 32, word(16) as u8);
    let _ = space.walk(&memory, at);
    let virt = VirtMemory {
        space,
        memory: &memory,
    };
    let mut buffer = [0; 0x2100];
    let _ = virt.read(at, &mut buffer);
}
