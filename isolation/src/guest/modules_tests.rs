//! Modules laid out by hand in a make-believe guest.

use super::*;
use crate::guest::gate::FTRACE_NOP;
use crate::guest::paging::testing::TestGuest;
use crate::guest::paging::{Entry, Levels};
use crate::guest::symbols::read_kallsyms;

const BASE: u64 = 0xffff_ffff_c000_1000;

fn symbols() -> SymbolTable {
    let text = "\
ffffffffc0001000 t good\t[m]
ffffffffc0001040 t twice\t[m]
ffffffffc0001080 t twice\t[m]
ffffffffc00010c0 t m_exit\t[m]
ffffffffc0002000 d data\t[m]
ffffffffc0003000 t good\t[other]
";
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

fn guest() -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    let mut text = vec![0x90; 0xe0];
    text[..5].copy_from_slice(&FTRACE_NOP);
    guest.put(Gva(BASE), &text, 0);
    guest.put(
        Gva(BASE + 0x1000),
        &[1; 0x1800],
        Entry::WRITE | Entry::NO_EXECUTE,
    );
    guest
}

fn reported() -> Vec<(String, u64)> {
    [
        (".text", BASE),
        (".exit.text", BASE + 0xc0),
        (".data", BASE + 0x1000),
        (".bss", BASE + 0x1800),
        (".gnu.linkonce.this_module", BASE + 0x1700),
        (".init.text", BASE + 0x8000),
        (".symtab", BASE + 0x1900),
        (".data..percpu", 0x1000),
        (".nothing", BASE + 0x9000),
    ]
    .map(|(name, at)| (name.to_owned(), at))
    .to_vec()
}

fn layout(guest: &TestGuest) -> ModuleLayout {
    ModuleLayout::new("m", &reported(), None, &guest.virt()).unwrap()
}

#[test]
fn sections_end_at_the_next_or_where_the_mapping_does() {
    let guest = guest();
    let layout = layout(&guest);
    let seen: Vec<_> = layout
        .sections
        .iter()
        .map(|s| {
            (
                s.name.as_str(),
                s.range.first().0 - BASE,
                s.range.len_bytes(),
                s.writable,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (".text", 0, 0xc0, false),
            (".exit.text", 0xc0, 0xf40, false),
            (".data", 0x1000, 0x700, true),
            (".gnu.linkonce.this_module", 0x1700, 0x100, true),
            (".bss", 0x1800, 0x1800, true),
        ]
    );
    assert_eq!(
        layout.data().map(|s| s.name.as_str()).collect::<Vec<_>>(),
        [".data", ".bss"]
    );
    assert_eq!(layout.text().count(), 2);
    assert_eq!(layout.section_at(Gva(BASE + 0x2fff)).unwrap().name, ".bss");
    assert!(layout.section_at(Gva(BASE + 0x3000)).is_none());
}

#[test]
fn functions_are_found_by_name_in_their_module_only() {
    let guest = guest();
    let layout = layout(&guest);
    let text = layout.read_text(&guest.virt()).unwrap();
    let symbols = symbols();
    let scan = text.scan(&symbols).unwrap();
    let find = |name| layout.find_gate(name, &text, &scan, &symbols);
    assert_eq!(find("good").unwrap().gate, Gva(BASE));
    assert_eq!(find("twice"), Err(NoGate::Ambiguous { count: 2 }));
    assert_eq!(find("absent"), Err(NoGate::NotFound));
    assert_eq!(find("data"), Err(NoGate::NotFound));
    assert!(matches!(find("m_exit"), Err(NoGate::NoNop { .. })));
    let data = Gva(BASE + 0x1000);
    let outside = Err(NoGate::OutsideText { at: data });
    assert_eq!(layout.gate_at(data, &text, &scan, &symbols), outside);
    let second = Gva(BASE + 0x80);
    assert!(matches!(
        layout.gate_at(second, &text, &scan, &symbols),
        Err(NoGate::NoNop { .. })
    ));
}

#[test]
fn text_that_is_writable_or_not_executable_is_refused() {
    let guest = guest();
    let lie = [(".text".to_owned(), BASE + 0x1000)];
    let error = ModuleLayout::new("m", &lie, None, &guest.virt()).unwrap_err();
    assert!(matches!(error, ModuleError::NotText { section } if section == ".text"));
    let error = ModuleLayout::new("m", &[], None, &guest.virt()).unwrap_err();
    assert!(matches!(error, ModuleError::NoSections(_)));
    let many = vec![(".text".to_owned(), BASE); MAX_SECTIONS + 1];
    let error = ModuleLayout::new("m", &many, None, &guest.virt()).unwrap_err();
    assert!(matches!(error, ModuleError::TooManySections(_)));
}

#[test]
fn a_file_that_is_none_is_refused() {
    let guest = guest();
    let error = ModuleLayout::new("m", &reported(), Some(b"no ELF"), &guest.virt()).unwrap_err();
    assert!(matches!(error, ModuleError::File(_)));
}
