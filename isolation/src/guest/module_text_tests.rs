//! Hand-made text with known instructions.

use proptest::prelude::*;

use super::*;
use crate::guest::symbols::read_kallsyms;

const TEXT: Gva = Gva(0xffff_ffff_c000_1000);

fn symbols() -> SymbolTable {
    let text = "\
ffffffff81000100 T consume_skb
ffffffff81000200 T __x86_indirect_thunk_rax
ffffffff81000300 T __x86_return_thunk
ffffffff81000340 T srso_return_thunk
ffffffff81000400 T ftrace_caller
ffffffffc0001000 t first\t[m]
ffffffffc0001040 t second\t[m]
";
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

/// `opcode` and the displacement from the end of the instruction at `at` to `target`.
fn branch(opcode: &[u8], at: u64, target: u64) -> Vec<u8> {
    let end = at + opcode.len() as u64 + 4;
    let mut code = opcode.to_vec();
    code.extend(((target as i64 - end as i64) as i32).to_le_bytes());
    code
}

/// 64 bytes of `parts`, filled up with `int3`.
fn function(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut code = parts.concat();
    assert!(code.len() <= 64);
    code.resize(64, 0xcc);
    code
}

fn scan(code: &[u8]) -> TextScan {
    TextScan::of(
        &[TextPart {
            at: TEXT,
            bytes: code,
        }],
        &symbols(),
    )
    .unwrap()
}

fn kinds(scan: &TextScan) -> Vec<(u64, SiteKind)> {
    let code = scan
        .sites()
        .iter()
        .filter(|site| site.kind != SiteKind::Trap);
    code.map(|site| (site.at.0 - TEXT.0, site.kind)).collect()
}

#[test]
fn direct_branches_are_told_apart_by_what_they_reach() {
    use Flow::{Call, ConditionalJump, Jump};
    let outside = 0xffff_ffff_8100_0000u64;
    let at = TEXT.0;
    let code = function(&[
        branch(&[0xe8], at, outside + 0x100),
        branch(&[0xe8], at + 5, outside + 0x200),
        branch(&[0x0f, 0x84], at + 10, outside + 0x100),
        branch(&[0xe8], at + 16, at),
        branch(&[0xe9], at + 21, outside + 0x340),
        branch(&[0xe9], at + 26, outside + 0x300),
        branch(&[0xe8], at + 31, outside + 0x400),
        vec![0x74, 0xfe],
        branch(&[0xe9], at + 38, outside + 0x100),
    ]);
    let scan = scan(&code);
    let direct = |flow, target, reach| SiteKind::Direct {
        flow,
        target: Gva(target),
        reach,
    };
    assert_eq!(
        kinds(&scan),
        [
            (0, direct(Call, outside + 0x100, Reach::Outside)),
            (5, direct(Call, outside + 0x200, Reach::IndirectThunk)),
            (10, direct(ConditionalJump, outside + 0x100, Reach::Outside)),
            (21, direct(Jump, outside + 0x340, Reach::ReturnThunk)),
            (26, direct(Jump, outside + 0x300, Reach::ReturnThunk)),
            (31, direct(Call, outside + 0x400, Reach::Tracer)),
            (38, direct(Jump, outside + 0x100, Reach::Outside)),
        ]
    );
    assert_eq!(scan.imports().count(), 3);
    let all = GvaRange::new(TEXT, 0x80).unwrap();
    assert_eq!(
        scan.targets_in(all).map(|t| t.0 - at).collect::<Vec<_>>(),
        [0, 36]
    );
}

#[test]
fn indirect_branches_returns_and_sensitive_instructions_are_listed() {
    let pointer = |call, at| SiteKind::Indirect { call, pointer: at };
    let code = function(&[
        vec![0xff, 0xd0],                   // call *%rax
        vec![0xff, 0x15, 0x10, 0, 0, 0],    // call *0x10(%rip)
        vec![0x0f, 0xae, 0xe8, 0xff, 0xe0], // lfence; jmp *%rax
        vec![0xc3],                         // ret
        vec![0xfa],                         // cli
        vec![0xe6, 0x80],                   // out %al, $0x80
        vec![0x0f, 0x30],                   // wrmsr
        vec![0x0f, 0x22, 0xd8],             // mov %rax, %cr3
        vec![0x0f, 0x05],                   // syscall
        vec![0x48, 0x89, 0xc3],             // mov %rax, %rbx
        vec![0x06],                         // nothing in 64-bit mode
        vec![0x9d],                         // popf
    ]);
    assert_eq!(
        kinds(&scan(&code)),
        [
            (0, pointer(true, None)),
            (2, pointer(true, Some(Gva(TEXT.0 + 0x18)))),
            (11, pointer(false, None)),
            (13, SiteKind::Return),
            (14, SiteKind::Sensitive),
            (15, SiteKind::Sensitive),
            (17, SiteKind::Sensitive),
            (19, SiteKind::Sensitive),
            (22, SiteKind::Sensitive),
            (27, SiteKind::Undecodable),
            (28, SiteKind::Sensitive),
        ]
    );
}

#[test]
fn damage_at_the_end_of_a_function_does_not_hide_the_next() {
    let mut code = function(&[]);
    code[63] = 0xe8; // The start of a call, the rest of which would be in the next function.
    code.extend(function(&[branch(
        &[0xe8],
        TEXT.0 + 64,
        0xffff_ffff_8100_0100,
    )]));
    let scan = scan(&code);
    assert_eq!(
        scan.imports()
            .map(|site| site.at.0 - TEXT.0)
            .collect::<Vec<_>>(),
        [64]
    );
}

#[test]
fn absurd_text_is_refused() {
    let code = vec![0x90; MAX_TEXT / 2 + 1];
    let part = TextPart {
        at: TEXT,
        bytes: &code,
    };
    let error = TextScan::of(&[part, part], &symbols()).unwrap_err();
    assert_eq!(error.bytes, MAX_TEXT + 2);
}

proptest! {
    #[test]
    fn random_text_is_read_without_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..400), at in any::<u64>(),
        at_text in any::<bool>(),
    ) {
        let at = if at_text { TEXT } else { Gva(at) };
        let part = TextPart { at, bytes: &bytes };
        let scan = TextScan::of(&[part], &symbols()).unwrap();
        for site in scan.sites() {
            let offset = site.at.0.checked_sub(at.0).unwrap() as usize;
            prop_assert!(offset + usize::from(site.len) <= bytes.len());
        }
        prop_assert!(scan.sites().windows(2).all(|pair| pair[0].at < pair[1].at));
    }
}
