//! Calls.

use iced_x86::code_asm::*;

use super::*;

/// A function that calls one of the kernel.
fn calls(name: &str) -> Vec<u8> {
    made(|asm| {
        asm.call(address(name))?;
        asm.ret()
    })
}

/// What is put in place of the call, as the only way.
fn only(code: &[u8], kind: Kind, text: &str) -> Mutation {
    let mut ways = ways(code, kind, text);
    assert_eq!(ways.len(), 1, "{ways:?}");
    ways.remove(0)
}

#[test]
fn a_missing_call_is_a_nop() {
    let change = only(&calls("kfree"), Kind::MissingCall, "call kfree");
    assert_eq!(change.new, [0x0f, 0x1f, 0x44, 0x00, 0x00]);
    assert_eq!(change.new_text, "nop");
    assert_eq!(change.says, "kfree is not called");
    assert!(change.replaces_whole);
}

#[test]
fn who_does_not_go_to_a_function_for_good_returns() {
    let code = made(|asm| asm.jmp(address("register_netdev")));
    let change = only(&code, Kind::MissingCall, "jmp register_netdev");
    assert_eq!(change.new_text, "ret");
}

#[test]
fn calls_through_pointers_are_calls_and_returns_and_cold_parts_are_none() {
    let code = made(|asm| {
        asm.call(qword_ptr(rax + 0x10))?;
        asm.call(address("__x86_indirect_thunk_rax"))?;
        asm.jmp(address("driver.cold"))?;
        asm.jmp(address("__x86_return_thunk"))
    });
    assert_eq!(
        fitting(&code, Kind::MissingCall),
        ["callq *0x10(%rax)", "call __x86_indirect_thunk_rax"]
    );
}

#[test]
fn a_leak_is_a_missing_call_of_what_gives_back() {
    let code = calls("kfree");
    assert_eq!(becomes(&code, Kind::MemoryLeak, "call kfree"), ["nop"]);
    assert!(fitting(&calls("e1000_reset"), Kind::MemoryLeak).is_empty());
}

#[test]
fn a_reference_that_is_not_taken_is_returned_all_the_same() {
    let change = only(
        &calls("get_device"),
        Kind::MissingReference,
        "call get_device",
    );
    assert_eq!(change.new_text, "mov %rdi,%rax");
    assert!(change.replaces_whole);
}

#[test]
fn locks_are_not_taken_or_not_given_back() {
    let cases = [
        ("mutex_lock", "nop"),
        ("mutex_unlock", "nop"),
        ("mutex_trylock", "mov $1,%eax"),
        ("mutex_lock_interruptible", "xor %eax,%eax"),
        ("_raw_spin_lock_irqsave", "pushf; pop %rax"),
        ("_raw_spin_unlock_irqrestore", "nop"),
    ];
    for (name, new) in cases {
        let change = only(&calls(name), Kind::UnbalancedLock, &format!("call {name}"));
        assert_eq!(change.new_text, new, "{name}");
        assert!(change.replaces_whole);
    }
    for name in ["debug_object_lockdep_init", "kfree"] {
        assert!(
            fitting(&calls(name), Kind::UnbalancedLock).is_empty(),
            "{name}"
        );
    }
}

#[test]
fn interrupts_are_left_off() {
    let name = "_raw_spin_unlock_irqrestore";
    let change = only(
        &calls(name),
        Kind::InterruptsLeftOff,
        &format!("call {name}"),
    );
    assert_eq!(change.new_text, "cli");
    assert!(fitting(&calls("mutex_unlock"), Kind::InterruptsLeftOff).is_empty());
    let code = made(|asm| asm.sti());
    assert_eq!(
        becomes(&code, Kind::InterruptsLeftOff, "sti"),
        ["nop", "cli"]
    );
}

#[test]
fn an_allocation_of_any_kernel_fails() {
    let code = calls("kmem_cache_alloc_noprof");
    let change = only(
        &code,
        Kind::FailedAllocation,
        "call kmem_cache_alloc_noprof",
    );
    assert_eq!(change.new[..2], [0x31, 0xc0]);
    assert_eq!(change.new_text, "xor %eax,%eax");
    assert!(fitting(&calls("kfree"), Kind::FailedAllocation).is_empty());
}

/// How a call's result is looked at, and what it is then in place of the call.
fn error(looks: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<String> {
    let code = made(|asm| {
        asm.call(address("pci_enable_device"))?;
        looks(asm)?;
        asm.ret()
    });
    let text = "call pci_enable_device";
    if fitting(&code, Kind::ErrorReturn).is_empty() {
        return Vec::new();
    }
    becomes(&code, Kind::ErrorReturn, text)
}

#[test]
fn a_result_that_is_looked_at_is_an_error() {
    let errors = [
        "push $0xFFFFFFFFFFFFFFF4; pop %rax",
        "push $0xFFFFFFFFFFFFFFFB; pop %rax",
    ];
    let branch = |asm: &mut CodeAssembler| asm.jne(address("driver.cold"));
    let tested = error(|asm| {
        asm.test(eax, eax)?;
        branch(asm)
    });
    assert_eq!(tested, errors);
    let copied = error(|asm| {
        asm.mov(ebx, eax)?;
        asm.test(ebx, ebx)?;
        branch(asm)
    });
    assert_eq!(copied, errors);
    let pointer_or_error = error(|asm| {
        asm.cmp(rax, -4096)?;
        asm.ja(address("driver.cold"))
    });
    assert_eq!(pointer_or_error, errors);
    let pointer = error(|asm| {
        asm.test(rax, rax)?;
        branch(asm)
    });
    assert_eq!(pointer, ["xor %eax,%eax"]);
}

#[test]
fn a_result_that_nobody_looks_at_is_none() {
    let overwritten = error(|asm| {
        asm.mov(eax, ebx)?;
        asm.test(eax, eax)?;
        asm.jne(address("driver.cold"))
    });
    assert!(overwritten.is_empty());
    assert!(error(|asm| asm.test(ebx, ebx)).is_empty());
    // Which of two numbers is the larger one says of neither that it is an error.
    assert!(error(|asm| asm.cmp(eax, ebx)).is_empty());
    assert!(error(|_| Ok(())).is_empty());
}

#[test]
fn a_function_calls_itself_in_place_of_another() {
    let code = calls("e1000_reset");
    let change = only(&code, Kind::DeepRecursion, "call e1000_reset");
    assert_eq!(change.new_text, "call driver+0x0");
    assert!(change.replaces_whole);
    let own = made(|asm| asm.call(START));
    assert!(fitting(&own, Kind::DeepRecursion).is_empty());
}
