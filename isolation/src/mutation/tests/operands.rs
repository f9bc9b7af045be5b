//! What instructions read and write.

use iced_x86::code_asm::*;

use super::*;

#[test]
fn lengths_of_copies_are_too_large() {
    let code = made(|asm| {
        asm.mov(edx, 0x40)?;
        asm.mov(esi, 0x40)?;
        asm.call(address("memcpy"))?;
        asm.mov(edx, r12d)?;
        asm.call(address("memset"))?;
        asm.mov(rdx, rax)?;
        asm.jmp(address("memcpy"))
    });
    assert_eq!(
        becomes(&code, Kind::LengthOverrun, "mov $0x40,%edx"),
        [
            "mov $0x41,%edx",
            "mov $0x80,%edx",
            "mov $0x1040,%edx",
            "mov $0x10000,%edx",
            "mov %esp,%edx"
        ]
    );
    assert_eq!(
        becomes(&code, Kind::LengthOverrun, "mov %r12d,%edx"),
        ["mov %esp,%edx"]
    );
    assert_eq!(
        becomes(&code, Kind::LengthOverrun, "mov %rax,%rdx"),
        ["lea 1(%rax),%edx", "lea 0x40(%rax),%edx", "mov %esp,%edx"]
    );
    assert_eq!(fitting(&code, Kind::LengthOverrun).len(), 3);
}

#[test]
fn counts_of_repeated_stores_are_too_large() {
    let code = made(|asm| {
        asm.mov(ecx, 9)?;
        asm.xor(eax, eax)?;
        asm.rep().stosq()?;
        asm.mov(ecx, 7)?;
        asm.call(address("memcpy"))
    });
    assert_eq!(fitting(&code, Kind::LengthOverrun), ["mov $9,%ecx"]);
    let way = &ways(&code, Kind::LengthOverrun, "mov $9,%ecx")[0];
    assert_eq!(way.new_text, "mov $0xA,%ecx");
    assert_eq!(
        way.says,
        "rep stos %rax,(%rdi) gets a length that is 1 too large"
    );
}

#[test]
fn a_length_is_what_surely_reaches_the_call() {
    let code = made(|asm| {
        let mut joined = asm.create_label();
        asm.mov(edx, 1)?;
        asm.mov(edx, 2)?;
        asm.je(joined)?;
        asm.mov(edx, 3)?;
        asm.set_label(&mut joined)?;
        asm.call(address("memcpy"))
    });
    assert!(fitting(&code, Kind::LengthOverrun).is_empty());
}

#[test]
fn parameters_are_other_values() {
    let code = made(|asm| {
        asm.xor(esi, esi)?;
        asm.mov(rdi, rbx)?;
        asm.mov(edx, 5)?;
        asm.mov(eax, 5)?;
        asm.call(address("e1000_reset"))?;
        asm.mov(rdi, rbx)?;
        asm.ret()
    });
    assert_eq!(
        fitting(&code, Kind::CorruptedParameter),
        ["xor %esi,%esi", "mov %rbx,%rdi", "mov $5,%edx"]
    );
    assert_eq!(
        becomes(&code, Kind::CorruptedParameter, "mov $5,%edx"),
        [
            "xor %edx,%edx",
            "or $0xFFFFFFFF,%edx",
            "mov $0x10000,%edx",
            "mov %rsp,%rdx",
            "mov %esp,%edx"
        ]
    );
    assert_eq!(
        becomes(&code, Kind::CorruptedParameter, "xor %esi,%esi"),
        ["mov %esp,%esi"]
    );
    assert!(fitting(&made(|asm| asm.xor(esi, esi)), Kind::CorruptedParameter).is_empty());
}

#[test]
fn assignments_are_left_out() {
    let code = made(|asm| {
        asm.mov(rbp, rsp)?;
        asm.mov(dword_ptr(rdi + 8), eax)?;
        asm.add(dword_ptr(rdi + 12), 1)?;
        asm.cmp(dword_ptr(rdi + 12), 1)?;
        asm.mov(eax, ebx)?;
        asm.lea(rax, qword_ptr(rbx + 8))?;
        asm.push(rax)?;
        asm.add(rsp, 8)?;
        asm.ret()
    });
    assert_eq!(
        fitting(&code, Kind::MissingAssignment),
        [
            "mov %eax,8(%rdi)",
            "addl $1,0xC(%rdi)",
            "mov %ebx,%eax",
            "lea 8(%rbx),%rax"
        ]
    );
    let ways = ways(&code, Kind::MissingAssignment, "mov %eax,8(%rdi)");
    assert_eq!(ways[0].new_text, "nop");
    assert!(ways[0].replaces_whole);
}

#[test]
fn initial_values_are_left_out() {
    let code = made(|asm| {
        asm.xor(eax, eax)?;
        asm.mov(ebx, 3)?;
        asm.mov(ecx, edx)?;
        asm.call(address("kfree"))?;
        asm.mov(esi, 3)?;
        asm.mov(dword_ptr(rsp + 8), 0)?;
        asm.mov(dword_ptr(rbx + 8), 0)
    });
    assert_eq!(
        fitting(&code, Kind::Initialisation),
        ["xor %eax,%eax", "mov $3,%ebx", "movl $0,8(%rsp)"]
    );
    assert_eq!(
        becomes(&code, Kind::Initialisation, "xor %eax,%eax"),
        ["nop"]
    );
}

#[test]
fn any_instruction_is_left_out() {
    let code = made(|asm| {
        asm.push(rbx)?;
        asm.ret()
    });
    assert_eq!(fitting(&code, Kind::Nop), ["push %rbx", "ret"]);
    assert_eq!(becomes(&code, Kind::Nop, "push %rbx"), ["nop"]);
}

#[test]
fn another_register_is_read() {
    let code = made(|asm| {
        asm.mov(eax, ebx)?;
        asm.mov(qword_ptr(rdi), r8)?;
        asm.mov(al, byte_ptr(rdi))?;
        asm.push(rbx)
    });
    let read = becomes(&code, Kind::WrongSource, "mov %ebx,%eax");
    assert!(read.contains(&"mov %ecx,%eax".to_owned()));
    // The others are longer by their prefix.
    assert_eq!(read.len(), 6);
    let stored = becomes(&code, Kind::WrongSource, "mov %r8,(%rdi)");
    assert!(stored.iter().all(|text| text.ends_with(",(%rdi)")));
    assert_eq!(stored.len(), 14);
    assert_eq!(fitting(&code, Kind::WrongSource).len(), 2);
}

#[test]
fn another_register_is_written() {
    let code = made(|asm| {
        asm.mov(rax, qword_ptr(rdi + 8))?;
        asm.xor(ecx, ecx)?;
        asm.cmp(eax, ebx)
    });
    let loaded = becomes(&code, Kind::WrongDestination, "mov 8(%rdi),%rax");
    assert!(loaded.contains(&"mov 8(%rdi),%rbx".to_owned()) && loaded.len() == 14);
    let zeroed = becomes(&code, Kind::WrongDestination, "xor %ecx,%ecx");
    assert!(zeroed.contains(&"xor %esi,%esi".to_owned()) && zeroed.len() == 6);
    assert_eq!(fitting(&code, Kind::WrongDestination).len(), 2);
}

#[test]
fn accesses_go_to_another_address() {
    let code = made(|asm| {
        asm.mov(rax, qword_ptr(rdi + 8))?;
        asm.mov(rax, qword_ptr(rbx + rcx * 8 + 0x100))?;
        asm.mov(rax, qword_ptr(rsp + 8))?;
        asm.mov(eax, ebx)
    });
    let plain = becomes(&code, Kind::Pointer, "mov 8(%rdi),%rax");
    for text in ["mov (%rdi),%rax", "mov 0x18(%rdi),%rax", "mov 8(%rsi),%rax"] {
        assert!(plain.contains(&text.to_owned()), "{plain:?}");
    }
    let indexed = becomes(&code, Kind::Pointer, "mov 0x100(%rbx,%rcx,8),%rax");
    for text in [
        "mov 0x108(%rbx,%rcx,8),%rax",
        "mov 0x100(%rbp,%rcx,8),%rax",
        "mov 0x100(%rbx),%rax",
        "mov 0x100(%rbx,%rdx,8),%rax",
    ] {
        assert!(indexed.contains(&text.to_owned()), "{indexed:?}");
    }
    assert_eq!(fitting(&code, Kind::Pointer).len(), 2);
}

#[test]
fn stores_go_elsewhere_in_the_frame() {
    let code = made(|asm| {
        asm.mov(qword_ptr(rsp + 0x10), rax)?;
        asm.mov(rax, qword_ptr(rsp + 0x20))?;
        asm.mov(qword_ptr(rbp - 8), rax)?;
        asm.mov(qword_ptr(rdi + 8), rax)
    });
    assert_eq!(fitting(&code, Kind::StackFlip), ["mov %rax,0x10(%rsp)"]);
    let flipped = becomes(&code, Kind::StackFlip, "mov %rax,0x10(%rsp)");
    assert_eq!(flipped.len(), 7);
    assert_eq!(flipped[3], "mov %rax,0x18(%rsp)");
    let framed = made(|asm| {
        asm.mov(rbp, rsp)?;
        asm.mov(qword_ptr(rbp - 8), rax)
    });
    assert_eq!(fitting(&framed, Kind::StackFlip), ["mov %rax,-8(%rbp)"]);
}

#[test]
fn bits_of_the_code_are_flipped() {
    let code = made(|asm| asm.mov(eax, ebx));
    let ways = ways(&code, Kind::TextBitFlip, "mov %ebx,%eax");
    for way in &ways {
        let bits: u32 = way
            .old
            .iter()
            .zip(&way.new)
            .map(|(old, new)| (old ^ new).count_ones())
            .sum();
        assert_eq!(bits, 1, "{way:?}");
        assert!(!way.replaces_whole);
    }
    let texts: Vec<&str> = ways.iter().map(|way| way.new_text.as_str()).collect();
    assert!(texts.contains(&"mov %ebx,%ecx"), "{texts:?}");
}
