//! Symbol lists, sane and not.

use proptest::prelude::*;

use super::*;
use crate::guest::addr::{Gva, GvaRange};

const TEXT: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000100 T consume_skb
ffffffff81000200 t cleanup
not a symbol
ffffffff81000300 T
ffffffffc0001000 t dummy_xmit\t[dummy]
ffffffffc0001070 t dummy_setup\t[dummy]
ffffffffc0001100 t cleanup\t[dummy]
ffffffffc0002000 t cleanup\t[e1000]
";

fn table() -> SymbolTable {
    read_kallsyms(TEXT.as_bytes(), |_| true).unwrap()
}

#[test]
fn what_is_written_is_what_was_read() {
    let table = table();
    let mut text = Vec::new();
    table.write(&mut text).unwrap();
    let again = read_kallsyms(text.as_slice(), |_| true).unwrap();
    assert!(again.iter().eq(table.iter()));
}

#[test]
fn lines_are_symbols_or_skipped() {
    assert_eq!(
        Line::parse("ffffffffc0001000 t dummy_xmit\t[dummy]"),
        Some(Line {
            address: 0xffff_ffff_c000_1000,
            kind: 't',
            name: "dummy_xmit",
            module: Some("dummy")
        })
    );
    for bad in [
        "",
        "x",
        "12 t",
        "12 tt f",
        "12 t f [m",
        "12 t f m",
        "12 t f [m] x",
        "g t f",
    ] {
        assert_eq!(Line::parse(bad), None, "{bad:?}");
    }
    assert_eq!(table().len(), 9);
}

#[test]
fn addresses_find_the_symbol_before_them_with_module_and_offset() {
    let table = table();
    let (symbol, offset) = table.lookup(Gva(0xffff_ffff_c000_1043)).unwrap();
    assert_eq!(
        (symbol.to_string().as_str(), offset),
        ("dummy_xmit [dummy]", 0x43)
    );
    let (symbol, _) = table.lookup(Gva(0xffff_ffff_8100_0004)).unwrap();
    assert_eq!(symbol.name, "_stext");
    assert_eq!(table.at(Gva(0xffff_ffff_8100_0000)).count(), 2);
    assert_eq!(
        table.lookup(Gva(0x1234)),
        None,
        "absolute symbols name no address"
    );
}

#[test]
fn names_find_all_their_symbols() {
    let table = table();
    let owners: Vec<_> = table.named("cleanup").map(|symbol| symbol.module).collect();
    assert_eq!(owners, [None, Some("dummy"), Some("e1000")]);
    assert_eq!(
        table.kernel_symbol("cleanup").unwrap().at,
        Gva(0xffff_ffff_8100_0200)
    );
    assert_eq!(table.kernel_symbol("dummy_xmit"), None);
    assert_eq!(table.named("nothing").count(), 0);
    let names: Vec<_> = table.in_module("dummy").map(|symbol| symbol.name).collect();
    assert_eq!(names, ["dummy_xmit", "dummy_setup", "cleanup"]);
}

#[test]
fn extents_end_at_the_next_symbol_or_the_section() {
    let table = table();
    let text = GvaRange::new(Gva(0xffff_ffff_c000_1000), 0x180).unwrap();
    let extent = |at| table.extent(Gva(at), text).map(|range| range.len_bytes());
    assert_eq!(extent(0xffff_ffff_c000_1000), Some(0x70));
    assert_eq!(extent(0xffff_ffff_c000_1100), Some(0x80));
    assert_eq!(extent(0xffff_ffff_c000_2000), None);
}

#[test]
fn only_wanted_symbols_are_kept() {
    let table = read_kallsyms(TEXT.as_bytes(), |line| line.module == Some("dummy")).unwrap();
    assert_eq!(table.len(), 3);
}

#[test]
fn hidden_addresses_are_an_error() {
    let text = "0000000000000000 T _stext\n0000000000000000 t f [m]\n";
    assert!(matches!(
        read_kallsyms(text.as_bytes(), |_| true),
        Err(SymbolsError::Hidden)
    ));
}

#[test]
fn a_line_without_end_costs_no_memory() {
    let mut text = vec![b'f'; 1 << 20];
    text.extend_from_slice(b"\nffffffff81000000 T _stext\n");
    let table = read_kallsyms(text.as_slice(), |_| true).unwrap();
    assert_eq!(table.len(), 1);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let lines = bytes.split(|byte| *byte == b'\n').count();
        if let Ok(table) = read_kallsyms(bytes.as_slice(), |_| true) {
            prop_assert!(table.len() <= lines);
        }
    }

    #[test]
    fn lookups_agree_with_a_plain_search(
        mut list in prop::collection::vec((1u64..50, 0usize..6), 0..40),
        probes in prop::collection::vec(0u64..60, 10),
    ) {
        let names = ["a", "b", "ab", "ba", "abc", "c"];
        let mut builder = SymbolTableBuilder::default();
        for (address, name) in &list {
            let line = Line { address: *address, kind: 't', name: names[*name], module: None };
            builder.add(&line).unwrap();
        }
        let table = builder.finish();
        list.sort_by_key(|(address, _)| *address);
        for at in probes {
            let nearest = list.iter().map(|(a, _)| *a).filter(|a| *a <= at).max();
            let expected = nearest.and_then(|near| list.iter().find(|(a, _)| *a == near));
            let found = table.lookup(Gva(at)).map(|(symbol, offset)| (symbol.name, offset));
            prop_assert_eq!(found, expected.map(|(a, name)| (names[*name], at - a)));
        }
        for (index, name) in names.iter().enumerate() {
            let found: Vec<u64> = table.named(name).map(|symbol| symbol.at.0).collect();
            let expected: Vec<u64> =
                list.iter().filter(|(_, n)| *n == index).map(|(a, _)| *a).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
