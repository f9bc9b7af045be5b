//! Functions made by hand, of which the answer is known.

mod calls;
mod flow;
mod operands;
mod properties;
mod stops;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions};

use super::*;

const START: u64 = 0xffff_ffff_c000_1000;
/// Functions of the kernel that the ones made here call.
const NAMES: [&str; 20] = [
    "memcpy",
    "kfree",
    "kmem_cache_alloc_noprof",
    "get_device",
    "mutex_lock",
    "mutex_unlock",
    "mutex_trylock",
    "mutex_lock_interruptible",
    "_raw_spin_lock_irqsave",
    "_raw_spin_unlock_irqrestore",
    "register_netdev",
    "pci_enable_device",
    "__x86_return_thunk",
    "__x86_indirect_thunk_rax",
    "__stack_chk_fail",
    "e1000_reset",
    "__fentry__",
    "driver.cold",
    "debug_object_lockdep_init",
    "memset",
];

fn address(name: &str) -> u64 {
    let index = NAMES.iter().position(|one| *one == name).unwrap();
    START + 0x0010_0000 + 0x100 * index as u64
}

fn callee(va: u64) -> Option<String> {
    NAMES
        .iter()
        .find(|name| address(name) == va)
        .map(|name| (*name).to_owned())
}

/// A function's code: `endbr64`, the tracer's NOP, and the body.
fn made(body: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut asm = CodeAssembler::new(64).unwrap();
    asm.endbr64().unwrap();
    asm.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00]).unwrap();
    body(&mut asm).unwrap();
    asm.assemble(START).unwrap()
}

fn function(code: &[u8]) -> Function<'_> {
    Function {
        name: "driver",
        start: START,
        code,
        callee: &callee,
    }
}

/// The instructions that the kind fits.
fn fitting(code: &[u8], kind: Kind) -> Vec<String> {
    let sites = sites(&function(code)).into_iter();
    sites
        .filter(|site| site.kinds.contains(&kind))
        .map(|site| site.text)
        .collect()
}

/// All ways to change the only instruction with that text.
fn ways(code: &[u8], kind: Kind, text: &str) -> Vec<Mutation> {
    let all = sites(&function(code));
    let mut found = all.iter().filter(|site| site.text == text);
    let texts: Vec<&String> = all.iter().map(|site| &site.text).collect();
    let site = found
        .next()
        .unwrap_or_else(|| panic!("no {text} in {texts:?}"));
    assert_eq!(found.next(), None, "{text} is there more than once");
    let mut ways: Vec<Mutation> = Vec::new();
    for seed in 0.. {
        let way = mutate(&function(code), kind, site.offset, seed).unwrap();
        if ways.contains(&way) {
            break;
        }
        keeps_what_is_around(code, &way);
        ways.push(way);
    }
    ways
}

/// In words, what is put in place of the only instruction with that text.
fn becomes(code: &[u8], kind: Kind, text: &str) -> Vec<String> {
    let ways = ways(code, kind, text).into_iter();
    ways.map(|way| way.new_text).collect()
}

/// The function's bytes with the change.
fn changed(code: &[u8], change: &Mutation) -> Vec<u8> {
    let at = change.offset as usize;
    let mut changed = code.to_vec();
    changed[at..at + change.new.len()].copy_from_slice(&change.new);
    changed
}

/// Where the instructions begin. Behind what is none it goes on one byte further.
fn offsets(code: &[u8]) -> Vec<usize> {
    let mut decoder = Decoder::with_ip(64, code, START, DecoderOptions::NONE);
    let mut all = Vec::new();
    while decoder.can_decode() {
        let at = decoder.position();
        all.push(at);
        if decoder.decode().is_invalid() {
            decoder.set_position(at + 1).unwrap();
        }
    }
    all
}

/// A change has the instruction's length, differs from it, and what is behind it is decoded as
/// before.
fn keeps_what_is_around(code: &[u8], change: &Mutation) {
    let at = change.offset as usize;
    let end = at + change.old.len();
    assert_eq!(change.new.len(), change.old.len(), "{change:?}");
    assert_eq!(code[at..end], change.old, "{change:?}");
    assert_ne!(change.new, change.old, "{change:?}");
    assert_ne!(change.new_text, change.old_text, "{change:?}");
    let mut decoder = Decoder::with_ip(64, &change.new, 0, DecoderOptions::NONE);
    assert!(decoder.iter().all(|i| !i.is_invalid()), "{change:?}");
    let behind = |code: &[u8]| -> Vec<usize> {
        let all = offsets(code.get(at..).unwrap());
        all.into_iter()
            .filter(|offset| at + offset >= end)
            .collect()
    };
    assert_eq!(behind(&changed(code, change)), behind(code), "{change:?}");
}

#[test]
fn what_is_in_front_of_the_body_and_what_never_runs_is_no_site() {
    let code = made(|asm| {
        use iced_x86::code_asm::*;
        asm.mov(eax, ebx)?;
        asm.nop_1(dword_ptr(rax))?;
        asm.call(address("__stack_chk_fail"))?;
        asm.ud2()?;
        asm.jmp(address("__x86_return_thunk"))?;
        asm.int3()
    });
    let texts: Vec<String> = sites(&function(&code))
        .into_iter()
        .map(|site| site.text)
        .collect();
    assert_eq!(texts, ["mov %ebx,%eax", "jmp __x86_return_thunk"]);
}

#[test]
fn a_call_of_the_tracer_is_no_site() {
    let mut asm = CodeAssembler::new(64).unwrap();
    asm.call(address("__fentry__")).unwrap();
    asm.ret().unwrap();
    let code = asm.assemble(START).unwrap();
    let sites = sites(&function(&code));
    let offsets: Vec<u32> = sites.iter().map(|site| site.offset).collect();
    assert_eq!(offsets, [5]);
}

#[test]
fn an_offset_in_an_instruction_is_refused_with_the_nearest_ones() {
    let code = made(|asm| {
        asm.call(address("kfree"))?;
        asm.ret()
    });
    let refused = mutate(&function(&code), Kind::Nop, 11, 0).unwrap_err();
    let near = vec![9, 14];
    assert_eq!(refused, NoMutation::NoInstruction { offset: 11, near });
    assert_eq!(
        refused.to_string(),
        "no instruction begins at offset 0xb: the nearest begin at 0x9 and 0xe"
    );
}

#[test]
fn a_kind_that_does_not_fit_is_refused_with_those_that_do() {
    let code = made(|asm| asm.ret());
    let refused = mutate(&function(&code), Kind::MissingCall, 9, 0).unwrap_err();
    let NoMutation::DoesNotFit { fits, text, .. } = &refused else {
        panic!("{refused}");
    };
    assert_eq!(text, "ret");
    assert!(fits.contains(&Kind::Halt) && !fits.contains(&Kind::MissingCall));
    assert!(refused.to_string().starts_with(
        "missing_call does not fit \"ret\" at offset 0x9: what fits is text_bit_flip, nop,"
    ));
    let tracer = mutate(&function(&code), Kind::Nop, 4, 0).unwrap_err();
    assert!(
        tracer.to_string().ends_with(": nothing of it is changed"),
        "{tracer}"
    );
}

#[test]
fn kinds_are_found_by_the_names_that_they_are_written_with() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_name(kind.name()), Some(*kind));
        assert_eq!(read(kind.name()), *kind);
        assert!(kind.sentence().ends_with('.') && !kind.source().is_empty());
    }
    assert_eq!(Kind::from_name("gremlin"), None);
    let mut names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), Kind::ALL.len());
}

/// The kind that is read from its name.
fn read(name: &str) -> Kind {
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error, StrDeserializer};
    let name: StrDeserializer<'_, Error> = name.into_deserializer();
    Kind::deserialize(name).unwrap()
}
