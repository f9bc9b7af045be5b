//! Whatever a guest says about itself is read without harm: its types (BTF), its symbols
//! (`/proc/kallsyms`) and its page tables. The first byte says which; every answer is asked for
//! everything it offers.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run -s none guest_knowledge` from the repository's root.

#![no_main]

use isolation::guest::addr::Gva;
use isolation::guest::btf::{Btf, Kind};
use isolation::guest::paging::{AddressSpace, VirtMemory};
use isolation::guest::symbols::read_kallsyms;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory that the tables are in, in bytes.
const MEMORY: usize = 16 << 12;

fuzz_target!(|input: &[u8]| {
    let Some((which, data)) = input.split_first() else { return };
    match which % 3 {
        0 => types(data),
        1 => symbols(data),
        _ => page_tables(data),
    }
});

fn types(data: &[u8]) {
    let Ok(types) = Btf::parse(data, None) else { return };
    for id in types.ids() {
        types.type_name(id);
        types.size_of(id);
        types.pointee(id);
        types.is_const(id);
        types.names_of(id);
        types.find_member(id, "a");
        match types.resolve(id) {
            Some((_, Kind::Struct { members, .. } | Kind::Union { members, .. })) => {
                for member in members.iter() {
                    types.string(member.name_at);
                }
            }
            Some(_) | None => {}
        }
        let name = types.name(id).to_owned();
        types.find_struct(&name);
        types.find_function(&name);
        types.enum_value(&name);
    }
}

fn symbols(data: &[u8]) {
    let Ok(table) = read_kallsyms(data, |_| true) else { return };
    for symbol in table.iter() {
        // Address 0 is that of absolute symbols.
        let found = table.lookup(symbol.at).is_some() == (symbol.at != Gva(0));
        assert!(found, "a symbol is not found at its own address");
        assert!(table.named(symbol.name).next().is_some(), "a symbol is not found by its name");
    }
}

fn page_tables(data: &[u8]) {
    let Some((registers, words)) = data.split_first_chunk::<24>() else { return };
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| registers[at + i]));
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]) else { return };
    // Each entry of the input goes to a place of its own choice.
    for entry in words.chunks_exact(10) {
        let place = usize::from(u16::from_le_bytes([entry[0], entry[1]])) * 8 % MEMORY;
        let _ = memory.write_slice(&entry[2..], GuestAddress(place as u64));
    }
    let (cr3, at) = (word(0) & 0xf000, Gva(word(8)));
    let space = AddressSpace::from_registers(cr3, word(16), word(16) >> 32, word(16) as u8);
    let _ = space.walk(&memory, at);
    let virt = VirtMemory { space, memory: &memory };
    let mut buffer = [0; 0x2100];
    let _ = virt.read(at, &mut buffer);
}
