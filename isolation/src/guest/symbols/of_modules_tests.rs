//! Modules in the memory of a hand-made guest, in order and not.

use super::*;
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::{TestGuest, TestMemory};
use crate::guest::paging::{Entry, Levels};

const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
const HEAD: u64 = 0xffff_ffff_8200_0100;
const KALLSYMS: u64 = 0xffff_ffff_c000_0000;
/// Tables of a module, from its first byte on.
const TABLES: u64 = 0x200;
const SYMBOLS: u64 = 0x1000;
const KINDS: u64 = 0x1800;
/// So that the names end shortly before the end of a page, behind which there is nothing.
const STRINGS: u64 = 0x1fd0;

fn types() -> Btf {
    let mut e = Encoder::new(None);
    let word = e.int("long unsigned int", 8, 0);
    let half = e.int("unsigned int", 4, 0);
    let byte = e.int("char", 1, 1);
    let name = e.array(byte, 56);
    e.structure(
        "module",
        0x400,
        &[
            ("state", half, 0),
            ("list", word, 8),
            ("name", name, 24),
            ("kallsyms", word, 0x100),
        ],
    );
    e.structure(
        "mod_kallsyms",
        32,
        &[
            ("symtab", word, 0),
            ("num_symtab", half, 8),
            ("strtab", word, 16),
            ("typetab", word, 24),
        ],
    );
    Btf::parse(&e.bytes(), None).unwrap()
}

fn kernel() -> Arc<SymbolTable> {
    let mut table = SymbolTableBuilder::default();
    for (address, name) in [(HEAD - 0x100, "kmalloc"), (HEAD, LIST)] {
        let line = Line {
            address,
            kind: 'T',
            name,
            module: None,
        };
        table.add(&line).unwrap();
    }
    Arc::new(table.finish())
}

struct Guest(TestGuest);

impl Guest {
    /// A guest with modules at these addresses, in this order.
    fn new(modules: &[(u64, &str)]) -> Self {
        let mut guest = Self(TestGuest::new(Levels::Four));
        let mut links = vec![HEAD];
        links.extend(modules.iter().map(|(at, _)| at + 8));
        links.push(HEAD);
        for pair in links.windows(2) {
            guest.word(pair[0], pair[1]);
        }
        for (at, name) in modules {
            guest.word(*at, 0);
            guest.put(at + 24, format!("{name:\0<64}").as_bytes());
            guest.word(at + 0x100, at + TABLES);
            for (offset, word) in [
                (0, at + SYMBOLS),
                (8, 3),
                (16, at + STRINGS),
                (24, at + KINDS),
            ] {
                guest.word(at + TABLES + offset, word);
            }
            guest.put(at + KINDS, b"?td");
            let strings = format!("\0{name}_open\0{name}_data\0");
            guest.put(at + STRINGS, strings.as_bytes());
            let names = [0, 1, 1 + name.len() + 6];
            for (number, name) in names.into_iter().enumerate() {
                let mut symbol = vec![0; SYMBOL_BYTES];
                symbol[..4].copy_from_slice(&(name as u32).to_le_bytes());
                symbol[8..16].copy_from_slice(&(at + 16 * number as u64).to_le_bytes());
                guest.put(at + SYMBOLS + (number * SYMBOL_BYTES) as u64, &symbol);
            }
        }
        guest
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0.put(Gva(at), bytes, DATA);
    }

    fn word(&mut self, at: u64, word: u64) {
        self.put(at, &word.to_le_bytes());
    }

    fn virt(&self) -> VirtMemory<'_, TestMemory> {
        self.0.virt()
    }

    fn symbols(&self) -> Result<SymbolTable, &'static str> {
        symbols_of_modules(&self.virt(), &types(), &kernel())
    }
}

const TWO: [(u64, &str); 2] = [(KALLSYMS + 0x10_0000, "dummy"), (KALLSYMS, "e1000")];

#[test]
fn symbols_of_all_modules_come_to_those_of_the_kernel() {
    let table = Guest::new(&TWO).symbols().unwrap();
    let text: Vec<_> = table
        .iter()
        .map(|symbol| (symbol.at.0 & 0x10_00ff, symbol.kind, symbol.to_string()))
        .collect();
    let own = |at, kind, name: &str| (at, kind, name.to_owned());
    let wanted = [
        own(0, 'T', "kmalloc"),
        own(0, 'T', "modules"),
        own(0x10, 't', "e1000_open [e1000]"),
        own(0x20, 'd', "e1000_data [e1000]"),
        own(0x10_0010, 't', "dummy_open [dummy]"),
        own(0x10_0020, 'd', "dummy_data [dummy]"),
    ];
    assert_eq!(text, wanted);
    assert_eq!(table.len(), 6);
    // Whatever is asked goes to both.
    assert_eq!(table.kernel_symbol("kmalloc").unwrap().at.0, HEAD - 0x100);
    assert_eq!(table.named("e1000_open").count(), 1);
    assert_eq!(table.in_module("dummy").count(), 2);
    assert_eq!(table.in_module("none").count(), 0);
    let (symbol, offset) = table.lookup(Gva(KALLSYMS + 0x1f)).unwrap();
    assert_eq!((symbol.name, offset), ("e1000_open", 15));
    let (symbol, _) = table.lookup(Gva(HEAD - 1)).unwrap();
    assert_eq!(symbol.name, "kmalloc");
    assert_eq!(table.at(Gva(HEAD)).count(), 1);
}

#[test]
fn a_module_that_is_not_in_order_yet_is_left_out() {
    let mut guest = Guest::new(&TWO);
    guest.word(KALLSYMS, UNFORMED);
    guest.word(KALLSYMS + 0x100, 0x1234);
    let table = guest.symbols().unwrap();
    assert_eq!(table.in_module("e1000").count(), 0);
    assert_eq!(table.in_module("dummy").count(), 2);
}

#[test]
fn lists_and_tables_that_lie_are_refused_or_read_without_harm() {
    let no_end = |guest: &mut Guest| guest.word(TWO[1].0 + 8, TWO[0].0 + 8);
    let nowhere = |guest: &mut Guest| guest.word(HEAD, 0x1234);
    let below_zero = |guest: &mut Guest| guest.word(HEAD, 3);
    let too_many = |guest: &mut Guest| guest.word(KALLSYMS + TABLES + 8, u64::MAX);
    let no_kinds = |guest: &mut Guest| guest.word(KALLSYMS + TABLES + 24, u64::MAX);
    let no_strings = |guest: &mut Guest| guest.word(KALLSYMS + TABLES + 16, u64::MAX - 3);
    let far_name = |guest: &mut Guest| guest.word(KALLSYMS + SYMBOLS, u64::from(u32::MAX));
    let changes: [&dyn Fn(&mut Guest); 7] = [
        &no_end,
        &nowhere,
        &below_zero,
        &too_many,
        &no_kinds,
        &no_strings,
        &far_name,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut guest = Guest::new(&TWO);
        change(&mut guest);
        assert!(guest.symbols().is_err(), "{number}");
    }
    // Any byte of a module's own changed: an error or symbols, no panic.
    for at in (0..0x300).chain(0x1000..0x1060).step_by(3) {
        let mut guest = Guest::new(&TWO);
        guest.put(KALLSYMS + at, &[0xff]);
        let _either = guest.symbols();
    }
}
