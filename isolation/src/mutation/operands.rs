//! Changes of what an instruction reads and writes.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::change::Change;
use super::listing::{Insn, Listing, Role, is_copy, is_write, op0_access};
use super::names;
use super::registers::{PARAMETERS, is_general, others, sized};
use super::text;

/// A length that no structure of a driver has, in bytes.
const LONG: i32 = 64 << 10;

/// The general register, in full, that the instruction sets as its first operand.
fn sets(i: &Instruction) -> Option<Register> {
    let register = first_register(i)?;
    is_write(op0_access(i)).then(|| register.full_register())
}

fn first_register(i: &Instruction) -> Option<Register> {
    let is_register = i.op_count() > 0 && i.op0_kind() == OpKind::Register;
    let register = is_register.then(|| i.op0_register())?;
    is_general(register).then_some(register)
}

/// The operand that is a constant.
pub(super) fn constant(i: &Instruction) -> Option<(u32, i64)> {
    let last = i.op_count().checked_sub(1)?;
    let value = i.try_immediate(last).ok()?;
    Some((last, value.cast_signed()))
}

/// The instruction with another constant.
pub(super) fn with_constant(i: &Instruction, operand: u32, value: i64) -> Option<Instruction> {
    let mut changed = *i;
    changed.try_set_immediate_i64(operand, value).ok()?;
    // One that does not fit was cut off.
    let fits = changed.try_immediate(operand).ok()?.cast_signed() == value;
    fits.then_some(changed)
}

/// `xor %eax,%eax` and the like.
fn is_zeroing(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Xor | Mnemonic::Sub)
        && i.op1_kind() == OpKind::Register
        && first_register(i) == Some(i.op1_register())
}

/// The operand in memory, unless it is that of a whole string.
fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|operand| i.op_kind(operand) == OpKind::Memory)
}

pub(super) fn length_overrun(listing: &Listing<'_>, index: usize, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    let Some(register) = sets(i) else {
        return Vec::new();
    };
    let user = listing.user(index, register);
    let copy = user.and_then(|user| match &user.role {
        Role::Call(Some(name)) | Role::TailCall(Some(name)) => {
            (names::length_register(name) == Some(register)).then(|| name.clone())
        }
        Role::Plain if is_copy(&user.i) => Some(text::of(listing, &user.i)),
        _ => None,
    });
    let Some(copy) = copy else { return Vec::new() };
    let Some(half) = sized(register, Register::EAX) else {
        return Vec::new();
    };
    let more = |by: i64| format!("{copy} gets a length that is {by} too large");
    let mut changes = Vec::new();
    match (i.mnemonic(), constant(i)) {
        (Mnemonic::Mov, Some((operand, length))) => {
            changes.extend([1, 64, 4096].into_iter().filter_map(|by| {
                let longer = with_constant(i, operand, length.checked_add(by)?)?;
                Change::to(&longer, more(by))
            }));
        }
        (Mnemonic::Mov, None) if i.op1_kind() == OpKind::Register => {
            changes.extend([1, 64].into_iter().filter_map(|by| {
                let from = MemoryOperand::with_base_displ(i.op1_register().full_register(), by);
                let mut sum = Instruction::with2(Code::Lea_r32_m, half, from).ok()?;
                sum.set_ip(i.ip());
                Change::to(&sum, more(by))
            }));
        }
        (Mnemonic::Lea, _) if !i.is_ip_rel_memory_operand() => {
            changes.extend([1, 64, 4096].into_iter().filter_map(|by| {
                let mut longer = *i;
                let displacement = i.memory_displacement64();
                longer.set_memory_displacement64(displacement.wrapping_add(i64::cast_unsigned(by)));
                Change::to(&longer, more(by))
            }));
        }
        _ => {}
    }
    changes.extend(constant_into(half, LONG, i, || {
        format!("{copy} gets the length {LONG}")
    }));
    changes.extend(stack_pointer_into(half, i, || {
        format!("{copy} gets the lower half of the stack pointer for a length")
    }));
    changes
}

pub(super) fn corrupted_parameter(listing: &Listing<'_>, index: usize, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    let called = |register| match &listing.user(index, register)?.role {
        Role::Call(name) | Role::TailCall(name) => {
            Some(name.clone().unwrap_or_else(|| "a function".to_owned()))
        }
        _ => None,
    };
    let found = sets(i).and_then(|register| {
        let parameter = PARAMETERS.iter().position(|one| *one == register)?;
        Some((register, parameter.saturating_add(1), called(register)?))
    });
    let Some((register, parameter, name)) = found else {
        return Vec::new();
    };
    let Some(half) = sized(register, Register::EAX) else {
        return Vec::new();
    };
    let says = |value: &str| format!("{name} gets {value} for its parameter {parameter}");
    let is_zero = is_zeroing(i)
        || i.mnemonic() == Mnemonic::Mov && constant(i).is_some_and(|(_, value)| value == 0);
    let zero = Instruction::with2(Code::Xor_rm32_r32, half, half);
    let ones = Instruction::with2(Code::Or_rm32_imm8, half, -1);
    let all = [
        (!is_zero)
            .then(|| whole(zero.ok()?, i, || says("0")))
            .flatten(),
        ones.ok().and_then(|i2| whole(i2, i, || says("0xffffffff"))),
        constant_into(half, LONG, i, || says("0x10000")),
        stack_pointer_into(register, i, || says("the stack pointer")),
        stack_pointer_into(half, i, || says("the lower half of the stack pointer")),
    ];
    all.into_iter().flatten().collect()
}

/// `mov $value,%register` in place of the instruction.
fn constant_into(
    register: Register,
    value: i32,
    old: &Instruction,
    says: impl FnOnce() -> String,
) -> Option<Change> {
    whole(
        Instruction::with2(Code::Mov_r32_imm32, register, value).ok()?,
        old,
        says,
    )
}

/// `mov %rsp,%register` in place of the instruction.
fn stack_pointer_into(
    register: Register,
    old: &Instruction,
    says: impl FnOnce() -> String,
) -> Option<Change> {
    let stack = sized(Register::RSP, register)?;
    let code = match register.size() {
        8 => Code::Mov_rm64_r64,
        _ => Code::Mov_rm32_r32,
    };
    whole(Instruction::with2(code, register, stack).ok()?, old, says)
}

/// Another instruction in place of the old one.
fn whole(mut new: Instruction, old: &Instruction, says: impl FnOnce() -> String) -> Option<Change> {
    new.set_ip(old.ip());
    Change::to(&new, says()).map(|change| Change {
        whole: true,
        ..change
    })
}

pub(super) fn missing_assignment(listing: &Listing<'_>, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    if insn.role != Role::Plain || i.is_stack_instruction() {
        return Vec::new();
    }
    let into_memory = has_memory(i) && i.op0_kind() == OpKind::Memory && is_write(op0_access(i));
    use Mnemonic::{Lea, Mov, Movsx, Movsxd, Movzx};
    let moves = matches!(i.mnemonic(), Mov | Movzx | Movsx | Movsxd | Lea) || is_zeroing(i);
    let into_register = moves
        && sets(i).is_some_and(|register| {
            // A frame is no variable.
            !matches!(register, Register::RSP)
                && (register, i.op1_register()) != (Register::RBP, Register::RSP)
        });
    if !into_memory && !into_register {
        return Vec::new();
    }
    vec![Change::whole(
        &[],
        format!("{} is left out", text::of(listing, i)),
    )]
}

pub(super) fn initialisation(listing: &Listing<'_>, index: usize, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    let is_mov = i.mnemonic() == Mnemonic::Mov && constant(i).is_some();
    let local = is_mov && i.op0_kind() == OpKind::Memory && listing.in_frame(i);
    let register = (is_mov || is_zeroing(i)) && sets(i).is_some();
    let first = register && listing.at_the_beginning(index);
    if insn.role != Role::Plain || !(local || first) {
        return Vec::new();
    }
    vec![Change::whole(
        &[],
        format!("{} is left out", text::of(listing, i)),
    )]
}

pub(super) fn wrong_source(insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    let register = |operand: &u32| {
        i.try_op_register(*operand).is_ok_and(is_general) && i.op_kind(*operand) == OpKind::Register
    };
    let Some(operand) = (1..i.op_count()).find(register) else {
        return Vec::new();
    };
    let Ok(old) = i.try_op_register(operand) else {
        return Vec::new();
    };
    if insn.role != Role::Plain {
        return Vec::new();
    }
    others(old)
        .filter_map(|new| {
            let mut changed = *i;
            changed.try_set_op_register(operand, new).ok()?;
            Change::to(&changed, format!("reads {new:?} in place of {old:?}"))
        })
        .collect()
}

pub(super) fn wrong_destination(insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    let Some(old) = first_register(i).filter(|_| sets(i).is_some()) else {
        return Vec::new();
    };
    if insn.role != Role::Plain {
        return Vec::new();
    }
    others(old)
        .filter_map(|new| {
            let mut changed = *i;
            changed.try_set_op_register(0, new).ok()?;
            if is_zeroing(i) {
                changed.try_set_op_register(1, new).ok()?;
            }
            Change::to(&changed, format!("writes {new:?} in place of {old:?}"))
        })
        .collect()
}

pub(super) fn pointer(listing: &Listing<'_>, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    if !has_memory(i) || listing.in_frame(i) {
        return Vec::new();
    }
    let (base, at) = (i.memory_base(), i.memory_index());
    let mut changes: Vec<Change> = flipped_displacements(i, 3).collect();
    if is_general(base) {
        changes.extend(others(base).filter_map(|new| {
            let mut changed = *i;
            changed.set_memory_base(new);
            Change::to(
                &changed,
                format!("the address is based on {new:?} in place of {base:?}"),
            )
        }));
    }
    if at != Register::None {
        let mut changed = *i;
        changed.set_memory_index(Register::None);
        changed.set_memory_index_scale(1);
        changes.extend(Change::to(
            &changed,
            format!("the index {at:?} is not added"),
        ));
        changes.extend(others(at).filter_map(|new| {
            let mut changed = *i;
            changed.set_memory_index(new);
            Change::to(&changed, format!("the index is {new:?} in place of {at:?}"))
        }));
    }
    changes
}

pub(super) fn stack_flip(listing: &Listing<'_>, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    let stores = has_memory(i) && i.op0_kind() == OpKind::Memory && is_write(op0_access(i));
    if !stores || !listing.in_frame(i) {
        return Vec::new();
    }
    flipped_displacements(i, 0).collect()
}

/// The instruction with one bit of its displacement flipped, from `lowest` on: far enough to be
/// elsewhere, and near enough to be in memory.
fn flipped_displacements(i: &Instruction, lowest: u32) -> impl Iterator<Item = Change> {
    let highest = match i.memory_displ_size() {
        0 => lowest,
        1 => 7,
        _ => 12,
    };
    (lowest..highest).filter_map(|bit| {
        let mut changed = *i;
        let displacement = i.memory_displacement64() ^ 1_u64.checked_shl(bit)?;
        changed.set_memory_displacement64(displacement);
        Change::to(
            &changed,
            format!("bit {bit} of the displacement is flipped"),
        )
    })
}
