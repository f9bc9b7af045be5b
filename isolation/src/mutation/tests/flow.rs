//! Comparisons, branches and returns.

use iced_x86::code_asm::*;

use super::*;

/// A loop whose condition is at its end, and another that is left from its top.
fn loops() -> Vec<u8> {
    made(|asm| {
        let (mut first, mut second, mut out) =
            (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut first)?;
        asm.add(ecx, 1)?;
        asm.cmp(ecx, 0x10)?;
        asm.jb(first)?;
        asm.set_label(&mut second)?;
        asm.cmp(r8, r9)?;
        asm.je(out)?;
        asm.add(r8, 8)?;
        asm.jmp(second)?;
        asm.set_label(&mut out)?;
        asm.cmp(edx, 3)?;
        asm.jle(address("driver.cold"))?;
        asm.ret()
    })
}

#[test]
fn bounds_are_those_of_loops() {
    let code = loops();
    assert_eq!(
        fitting(&code, Kind::LoopBound),
        ["cmp $0x10,%ecx", "cmp %r9,%r8"]
    );
    assert_eq!(
        becomes(&code, Kind::LoopBound, "cmp $0x10,%ecx"),
        ["cmp $0x20,%ecx", "cmp $0x7F,%ecx", "cmp $0,%ecx"]
    );
    let ways = ways(&code, Kind::LoopBound, "cmp %r9,%r8");
    assert_eq!(ways[0].new_text, "cmp %rsp,%r8");
    assert!(!ways[0].replaces_whole);
}

#[test]
fn a_branch_to_rare_code_that_comes_back_is_no_loop() {
    let code = made(|asm| {
        let (mut rare, mut rarer) = (asm.create_label(), asm.create_label());
        let (mut back, mut on) = (asm.create_label(), asm.create_label());
        asm.cmp(eax, 1)?;
        asm.je(rare)?;
        asm.set_label(&mut back)?;
        asm.cmp(ecx, 1)?;
        asm.je(rarer)?;
        asm.set_label(&mut on)?;
        asm.ret()?;
        asm.set_label(&mut rare)?;
        asm.mov(edx, 1)?;
        asm.jmp(back)?;
        asm.set_label(&mut rarer)?;
        asm.cmp(edx, 1)?;
        asm.jne(on)?;
        asm.ret()
    });
    assert!(fitting(&code, Kind::LoopBound).is_empty());
}

#[test]
fn comparisons_are_off_by_one() {
    let code = loops();
    assert_eq!(
        becomes(&code, Kind::OffByOne, "cmp $3,%edx"),
        ["cmp $4,%edx", "cmp $2,%edx"]
    );
    assert_eq!(
        becomes(&code, Kind::OffByOne, "jle driver.cold"),
        ["jl driver.cold"]
    );
    assert_eq!(
        becomes(&code, Kind::OffByOne, "jb driver+0x9"),
        ["jbe driver+0x9"]
    );
    assert!(!fitting(&code, Kind::OffByOne).contains(&"cmp %r9,%r8".to_owned()));
}

#[test]
fn every_order_is_swapped_with_the_one_that_equality_makes_of_it() {
    let code = made(|asm| {
        asm.setl(r9b)?;
        asm.setg(al)?;
        asm.cmovb(r8, r9)?;
        asm.cmova(eax, ecx)?;
        asm.cmovae(ax, word_ptr(r8))?;
        asm.setge(byte_ptr(rsi + 2))?;
        asm.cmovbe(rax, rdx)
    });
    let cases = [
        ("setl %r9b", "setle %r9b"),
        ("setg %al", "setge %al"),
        ("cmovb %r9,%r8", "cmovbe %r9,%r8"),
        ("cmova %ecx,%eax", "cmovae %ecx,%eax"),
        ("cmovae (%r8),%ax", "cmova (%r8),%ax"),
        ("setge 2(%rsi)", "setg 2(%rsi)"),
        ("cmovbe %rdx,%rax", "cmovb %rdx,%rax"),
    ];
    for (old, new) in cases {
        assert_eq!(becomes(&code, Kind::OffByOne, old), [new]);
    }
}

#[test]
fn a_constant_at_the_end_of_its_range_goes_one_way() {
    let code = made(|asm| asm.cmp(ecx, 127));
    assert_eq!(
        becomes(&code, Kind::OffByOne, "cmp $0x7F,%ecx"),
        ["cmp $0x7E,%ecx"]
    );
}

#[test]
fn conditions_are_flipped() {
    let code = loops();
    assert_eq!(
        becomes(&code, Kind::FlippedCondition, "jle driver.cold"),
        ["jg driver.cold"]
    );
    assert_eq!(
        becomes(&code, Kind::FlippedCondition, "jb driver+0x9"),
        ["jae driver+0x9"]
    );
    assert_eq!(fitting(&code, Kind::FlippedCondition).len(), 3);
}

#[test]
fn branches_are_never_taken_or_always() {
    let code = loops();
    assert_eq!(
        becomes(&code, Kind::Branch, "jle driver.cold"),
        ["nop", "jmp driver.cold"]
    );
    assert_eq!(
        becomes(&code, Kind::Branch, "jb driver+0x9"),
        ["nop", "jmp driver+0x9"]
    );
    assert_eq!(fitting(&code, Kind::Branch).len(), 3);
    let whole: Vec<bool> = ways(&code, Kind::Branch, "jle driver.cold")
        .iter()
        .map(|way| way.replaces_whole)
        .collect();
    assert_eq!(whole, [true, false]);
}

#[test]
fn wild_jumps_leave_the_function() {
    let code = made(|asm| {
        asm.mov(eax, 1)?;
        asm.call(address("kfree"))?;
        asm.ret()
    });
    assert_eq!(
        fitting(&code, Kind::WildJump),
        ["mov $1,%eax", "call kfree"]
    );
    for (text, opcode) in [("mov $1,%eax", 0xe9), ("call kfree", 0xe8)] {
        let ways = ways(&code, Kind::WildJump, text);
        assert_eq!(ways.len(), 8);
        for way in ways {
            let mut decoder = Decoder::with_ip(64, &way.new, START, DecoderOptions::NONE);
            let target = decoder.decode().near_branch_target();
            assert!(target.abs_diff(START) >= 1 << 20 && way.replaces_whole);
            assert_eq!(way.new[0], opcode);
        }
    }
}

#[test]
fn returns_go_to_a_wrong_address() {
    let code = made(|asm| {
        asm.pop(rax)?;
        asm.call(address("kfree"))?;
        asm.pop(rbx)?;
        asm.pop(r12)?;
        asm.jmp(address("__x86_return_thunk"))?;
        asm.ret()
    });
    assert_eq!(
        fitting(&code, Kind::SmashedReturn),
        ["pop %rbx", "pop %r12", "jmp __x86_return_thunk"]
    );
    assert_eq!(becomes(&code, Kind::SmashedReturn, "pop %r12"), ["nop"]);
    assert_eq!(
        becomes(&code, Kind::SmashedReturn, "jmp __x86_return_thunk"),
        ["push $0; ret"]
    );
}
