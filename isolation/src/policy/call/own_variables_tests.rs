//! Hand-made code that gives kernel functions variables, and what is in them.

use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::*;
use crate::guest::btf::encode::Encoder;
use crate::guest::symbols::read_kallsyms;

const TEXT: u64 = 0xffff_ffff_c000_1000;
const DATA: u64 = 0xffff_ffff_c000_3000;
const KFREE: u64 = 0xffff_ffff_8100_0100;
const IDR_FIND: u64 = 0xffff_ffff_8100_0200;
const RHASHTABLE_DESTROY: u64 = 0xffff_ffff_8100_0300;
const SKB_QUEUE_PURGE: u64 = 0xffff_ffff_8100_0400;
const MUTEX_LOCK: u64 = 0xffff_ffff_8100_0500;
const KMEM_CACHE_FREE: u64 = 0xffff_ffff_8100_0600;

fn symbols() -> SymbolTable {
    let text = "\
ffffffff81000100 T kfree
ffffffff81000200 T idr_find
ffffffff81000300 T rhashtable_destroy
ffffffff81000400 T skb_queue_purge
ffffffff81000500 T mutex_lock
ffffffff81000600 T kmem_cache_free
ffffffffc0001000 t first\t[m]
";
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

fn types() -> Btf {
    let mut e = Encoder::new(None);
    let word = e.int("unsigned long", 8, 0);
    for (function, structure) in [
        ("idr_find", "idr"),
        ("rhashtable_destroy", "rhashtable"),
        ("skb_queue_purge", "sk_buff_head"),
        ("mutex_lock", "mutex"),
    ] {
        let to = e.structure(structure, 8, &[("n", word, 0)]);
        let pointer = e.pointer(to);
        e.function(function, word, &[("of", pointer)]);
    }
    Btf::parse(&e.bytes(), None).unwrap()
}

fn found(write: impl FnOnce(&mut CodeAssembler)) -> OwnVariables {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a);
    a.ret().unwrap();
    let bytes = a.assemble(TEXT).unwrap();
    let text = TextPart {
        at: Gva(TEXT),
        bytes: &bytes,
    };
    let data = GvaRange::new(Gva(DATA), 0x1000).unwrap();
    OwnVariables::new(&[text], &[data], &types(), &symbols(), Rules::linux())
}

#[test]
fn what_is_freed_and_what_is_asked_for_by_address_is_found() {
    let own = found(|a| {
        a.mov(rdi, ptr(DATA)).unwrap();
        a.call(KFREE).unwrap();
        a.lea(rdi, ptr(DATA + 8)).unwrap();
        a.mov(esi, 5).unwrap();
        a.call(IDR_FIND).unwrap();
        // An absolute address, sign-extended.
        a.mov(rdi, (DATA + 16).cast_signed()).unwrap();
        a.call(RHASHTABLE_DESTROY).unwrap();
        a.lea(rdi, ptr(DATA + 24)).unwrap();
        a.jmp(SKB_QUEUE_PURGE).unwrap();
    });
    assert_eq!(own.freed, BTreeSet::from([Gva(DATA)]));
    assert_eq!(own.arrays.len(), 1);
    assert_eq!(own.arrays[0].0, Gva(DATA + 8));
    assert_eq!(own.structures.len(), 1);
    assert_eq!(own.structures[0].at, Gva(DATA + 16));
    assert_eq!(own.queues, [Gva(DATA + 24)]);
}

#[test]
fn what_says_nothing_is_left_alone() {
    let own = found(|a| {
        let mut end = a.create_label();
        // Something else in between.
        a.mov(rdi, ptr(DATA)).unwrap();
        a.mov(edi, eax).unwrap();
        a.call(KFREE).unwrap();
        // The argument of a call before.
        a.mov(rdi, ptr(DATA)).unwrap();
        a.call(MUTEX_LOCK).unwrap();
        a.call(KFREE).unwrap();
        // Not a variable of the module's.
        a.mov(rdi, ptr(KFREE)).unwrap();
        a.call(KFREE).unwrap();
        // A variable by its address is not freed, and one by its content is no structure.
        a.lea(rdi, ptr(DATA)).unwrap();
        a.call(KFREE).unwrap();
        a.mov(rdi, ptr(DATA)).unwrap();
        a.call(IDR_FIND).unwrap();
        // A structure by which nothing is found.
        a.lea(rdi, ptr(DATA)).unwrap();
        a.call(MUTEX_LOCK).unwrap();
        // A variable of each processor.
        a.mov(rdi, ptr(DATA).gs()).unwrap();
        a.call(KFREE).unwrap();
        // Never come to from there.
        a.mov(rdi, ptr(DATA)).unwrap();
        a.ret().unwrap();
        a.call(KFREE).unwrap();
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(own, OwnVariables::default());
}

#[test]
fn a_branch_that_is_not_taken_is_in_nobodys_way() {
    let own = found(|a| {
        let mut end = a.create_label();
        a.mov(rdi, ptr(DATA)).unwrap();
        a.test(rdi, rdi).unwrap();
        a.je(end).unwrap();
        a.call(KFREE).unwrap();
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(own.freed, BTreeSet::from([Gva(DATA)]));
}

proptest! {
    #[test]
    fn any_bytes_are_text(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let text = TextPart { at: Gva(TEXT), bytes: &bytes };
        let data = GvaRange::new(Gva(DATA), 0x1000).unwrap();
        OwnVariables::new(&[text], &[data], &types(), &symbols(), Rules::linux());
    }
}

#[test]
fn slab_caches_that_objects_are_given_back_to_are_found() {
    let own = found(|a| {
        a.mov(rdi, ptr(DATA + 32)).unwrap();
        a.mov(rsi, rax).unwrap();
        a.call(KMEM_CACHE_FREE).unwrap();
        a.mov(rdi, ptr(DATA + 40)).unwrap();
        a.call(MUTEX_LOCK).unwrap();
    });
    assert_eq!(own.caches, BTreeSet::from([Gva(DATA + 32)]));
    assert!(own.freed.is_empty());
}
