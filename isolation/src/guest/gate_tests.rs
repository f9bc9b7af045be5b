//! Entries of every form.

use proptest::prelude::*;

use super::*;
use crate::guest::module_text::TextPart;
use crate::guest::symbols::read_kallsyms;

const FUNCTION: Gva = Gva(0xffff_ffff_c000_1000);

fn symbols() -> SymbolTable {
    let text = "\
ffffffffc0000100 t helper\t[m]
ffffffffc0000800 T ftrace_caller
ffffffffc0000900 t ftrace_trampoline\t[__builtin__ftrace]
ffffffffc0001000 t function\t[m]
";
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

fn classify_bytes(code: &[u8]) -> Result<GateSite, NoGate> {
    let symbols = symbols();
    let scan = TextScan::of(
        &[TextPart {
            at: FUNCTION,
            bytes: code,
        }],
        &symbols,
    )
    .unwrap();
    classify(FUNCTION, code, &scan, &symbols)
}

fn with_body(head: &[u8]) -> Vec<u8> {
    let mut code = head.to_vec();
    code.resize(32, 0x90);
    code
}

fn call(target: u64) -> Vec<u8> {
    let displacement = (target as i64 - (FUNCTION.0 + 5) as i64) as i32;
    with_body(&[&[CALL], displacement.to_le_bytes().as_slice()].concat())
}

#[test]
fn a_gate_replaces_the_ftrace_nop() {
    let site = classify_bytes(&with_body(&FTRACE_NOP)).unwrap();
    assert_eq!((site.gate, site.endbr), (FUNCTION, false));
    assert_eq!(site.return_gate().0 - FUNCTION.0, 2);
    assert_eq!(site.body().0 - FUNCTION.0, 5);
    let gate = GatePorts {
        entry: 0xe0,
        returning: 0xe1,
    }
    .bytes();
    assert_eq!(gate, [0xe6, 0xe0, 0xe6, 0xe1, 0x90]);
    assert_eq!(classify_bytes(&with_body(&gate)), Err(NoGate::Gated));
}

#[test]
fn endbr64_stays_in_front_of_the_gate() {
    let site = classify_bytes(&with_body(&[ENDBR64.as_slice(), &FTRACE_NOP].concat())).unwrap();
    assert_eq!((site.gate.0 - FUNCTION.0, site.endbr), (4, true));
}

#[test]
fn what_cannot_be_gated_says_why() {
    let traced = |name: &str| {
        Err(NoGate::Traced {
            tracer: name.into(),
        })
    };
    assert_eq!(
        classify_bytes(&call(0xffff_ffff_c000_0800)),
        traced("ftrace_caller")
    );
    assert_eq!(
        classify_bytes(&call(0xffff_ffff_c000_0900)),
        traced("ftrace_trampoline")
    );
    assert_eq!(
        classify_bytes(&call(0xffff_ffff_c000_0a00)),
        traced("0xffffffffc0000a00")
    );
    let begins = |code: &[u8]| match classify_bytes(code) {
        Err(NoGate::NoNop { begins }) => begins,
        other => panic!("{other:?}"),
    };
    assert!(begins(&call(0xffff_ffff_c000_0100)).starts_with("call"));
    assert_eq!(begins(&with_body(&[0x48, 0x85, 0xf6])), "test %rsi,%rsi");
    assert_eq!(classify_bytes(&with_body(&[INT3])), Err(NoGate::Breakpoint));
    assert_eq!(
        classify_bytes(&FTRACE_NOP[..3]),
        Err(NoGate::TooShort { bytes: 3 })
    );
    assert_eq!(classify_bytes(&[]), Err(NoGate::TooShort { bytes: 0 }));
}

#[test]
fn a_branch_between_the_gates_bytes_is_found() {
    let mut code = with_body(&FTRACE_NOP);
    code[5..7].copy_from_slice(&[0xeb, 0xfb]); // jmp to +2
    let target = Gva(FUNCTION.0 + 2);
    assert_eq!(
        classify_bytes(&code),
        Err(NoGate::BranchIntoGate { target })
    );
    code[5..7].copy_from_slice(&[0xeb, 0xf9]); // jmp to +0: a call of the function again
    assert!(classify_bytes(&code).is_ok());
    code[5..7].copy_from_slice(&[0xeb, 0xfe]); // jmp to +5
    assert!(classify_bytes(&code).is_ok());
}

proptest! {
    #[test]
    fn only_the_nop_is_ever_gated(mut code in prop::collection::vec(any::<u8>(), 0..24), head in 0usize..3) {
        let heads: [&[u8]; 3] = [&[], &ENDBR64, &FTRACE_NOP];
        code.splice(..0, heads[head].iter().copied());
        if let Ok(site) = classify_bytes(&code) {
            let from = (site.gate.0 - FUNCTION.0) as usize;
            prop_assert_eq!(&code[from..from + GATE_BYTES], FTRACE_NOP.as_slice());
            prop_assert!(from == 0 || code.starts_with(&ENDBR64));
        }
    }
}
