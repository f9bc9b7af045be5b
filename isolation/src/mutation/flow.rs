//! Changes of where execution goes: comparisons, branches, loops, returns.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::change::Change;
use super::listing::{Insn, Listing, Role, is_near};
use super::operands::{constant, with_constant};
use super::registers::{is_general, sized};
use super::{loops, text};

/// `call` and `jmp` with a displacement of four bytes.
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;
/// Their length in bytes.
const NEAR: usize = 5;
/// How far a wild jump goes, in bytes: out of every function, and mostly not to an instruction's
/// start.
const WILD: [i32; 8] = [
    0x0010_0123,
    -0x0010_0123,
    0x0100_0123,
    -0x0100_0123,
    0x1000_0123,
    -0x1000_0123,
    0x4000_0123,
    -0x4000_0123,
];
/// Instructions between dropping a register and the return, at most.
const EPILOGUE: usize = 12;

pub(super) fn flipped_condition(insn: &Insn) -> Vec<Change> {
    let mut changed = insn.i;
    if changed.condition_code() == ConditionCode::None {
        return Vec::new();
    }
    changed.negate_condition_code();
    let says = format!(
        "goes by {:?} in place of {:?}",
        changed.condition_code(),
        insn.i.condition_code()
    );
    Change::to(&changed, says).into_iter().collect()
}

pub(super) fn off_by_one(listing: &Listing<'_>, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    if i.mnemonic() == Mnemonic::Cmp {
        let Some((operand, value)) = constant(i) else {
            return Vec::new();
        };
        return [1, -1]
            .into_iter()
            .filter_map(|by| {
                let other = value.checked_add(by)?;
                let changed = with_constant(i, operand, other)?;
                Change::to(
                    &changed,
                    format!("compares with {other} in place of {value}"),
                )
            })
            .collect();
    }
    swapped_equality(listing, insn).into_iter().collect()
}

/// The instruction with the condition of which only equality counts differently: `<` and `<=`, `>`
/// and `>=`.
fn swapped_equality(listing: &Listing<'_>, insn: &Insn) -> Option<Change> {
    use ConditionCode::{a, ae, b, be, g, ge, l, le};
    // The condition is in the lowest four bits of the opcode (Intel SDM volume 2D, appendix
    // B.1.4.7).
    let (flip, to) = match insn.i.condition_code() {
        l => (2, le),
        le => (2, l),
        g => (2, ge),
        ge => (2, g),
        b => (4, be),
        be => (4, b),
        a => (4, ae),
        ae => (4, a),
        _ => return None,
    };
    let mut bytes = listing.bytes(insn).to_vec();
    let is_prefix = |byte: &u8| matches!(byte, 0x40..=0x4f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let first = bytes.iter().position(|byte| !is_prefix(byte))?;
    let two = bytes.get(first) == Some(&0x0f);
    let opcode = bytes.get_mut(first.checked_add(usize::from(two))?)?;
    *opcode ^= flip;
    Some(Change {
        bytes,
        says: format!("goes by {to:?} in place of {:?}", insn.i.condition_code()),
        whole: false,
    })
}

pub(super) fn loop_bound(listing: &Listing<'_>, index: usize, insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    if i.mnemonic() != Mnemonic::Cmp || !decides_loop(listing, index) {
        return Vec::new();
    }
    if let Some((operand, bound)) = constant(i) {
        let bounds = [
            bound.checked_mul(2),
            bound.checked_add(16),
            Some(i64::from(i8::MAX)),
            Some(0),
        ];
        return bounds
            .into_iter()
            .flatten()
            .filter(|other| *other != bound)
            .filter_map(|other| {
                let changed = with_constant(i, operand, other)?;
                Change::to(
                    &changed,
                    format!("the loop's bound is {other} in place of {bound}"),
                )
            })
            .collect();
    }
    let bound = i.op1_register();
    if i.op1_kind() != OpKind::Register || !is_general(bound) {
        return Vec::new();
    }
    let stack = sized(Register::RSP, bound).and_then(|stack| {
        let mut changed = *i;
        changed.try_set_op_register(1, stack).ok()?;
        Change::to(
            &changed,
            format!("the loop's bound is {stack:?} in place of {bound:?}"),
        )
    });
    stack.into_iter().collect()
}

/// Whether the branch that goes by the comparison at `index` goes on with a loop or leaves one.
fn decides_loop(listing: &Listing<'_>, index: usize) -> bool {
    use Mnemonic::{Lea, Mov};
    // Neither changes what the comparison found.
    let between = |insn: &Insn| {
        insn.role == Role::Nop || insn.role == Role::Plain && matches!(insn.i.mnemonic(), Mov | Lea)
    };
    let passed = listing
        .behind(index)
        .take_while(|insn| !insn.joined && between(insn))
        .count();
    let branch = index.saturating_add(passed).saturating_add(1);
    let insn = listing.insns.get(branch);
    insn.is_some_and(|insn| !insn.joined && insn.i.is_jcc_short_or_near())
        && loops::decides(listing, branch)
}

pub(super) fn branch(insn: &Insn) -> Vec<Change> {
    let i = &insn.i;
    if !i.is_jcc_short_or_near() {
        return Vec::new();
    }
    let code = match i.len() {
        2 => Code::Jmp_rel8_64,
        _ => Code::Jmp_rel32_64,
    };
    let always = Instruction::with_branch(code, i.near_branch_target());
    let always = always.ok().and_then(|mut always| {
        always.set_ip(i.ip());
        Change::to(&always, "the branch is always taken")
    });
    let never = Change::whole(&[], "the branch is never taken");
    [Some(never), always].into_iter().flatten().collect()
}

pub(super) fn wild_jump(insn: &Insn) -> Vec<Change> {
    let (opcode, does) = match insn.role {
        Role::Call(_) => (CALL, "calls"),
        _ => (JMP, "jumps"),
    };
    WILD.into_iter()
        .map(|far| {
            let way = if far < 0 { "back" } else { "ahead" };
            let says = format!("{does} {:#x} bytes {way}", far.unsigned_abs());
            Change::whole(&near(opcode, far), says)
        })
        .collect()
}

pub(super) fn deep_recursion(listing: &Listing<'_>, insn: &Insn) -> Vec<Change> {
    let calls = matches!(insn.role, Role::Call(_)) && is_near(&insn.i);
    let end = insn.offset.saturating_add(NEAR);
    let Some(back) = i32::try_from(end).ok().and_then(i32::checked_neg) else {
        return Vec::new();
    };
    if !calls {
        return Vec::new();
    }
    let says = format!("{} calls itself", listing.function.name);
    vec![Change::whole(&near(CALL, back), says)]
}

pub(super) fn smashed_return(listing: &Listing<'_>, index: usize, insn: &Insn) -> Vec<Change> {
    match insn.role {
        // push $0; ret
        Role::Return => vec![Change::whole(&[0x6a, 0x00, 0xc3], "returns to address 0")],
        Role::Plain if insn.i.mnemonic() == Mnemonic::Pop && before_return(listing, index) => {
            let says = format!(
                "{} is left out: the function returns to a value of its frame",
                text::of(listing, &insn.i)
            );
            vec![Change::whole(&[], says)]
        }
        _ => Vec::new(),
    }
}

/// Whether nothing but a return comes behind the instruction.
fn before_return(listing: &Listing<'_>, index: usize) -> bool {
    let behind = listing.behind(index).take(EPILOGUE);
    let mut behind = behind.skip_while(|insn| matches!(insn.role, Role::Plain | Role::Nop));
    behind.next().is_some_and(|insn| insn.role == Role::Return)
}

/// A call or jump to what is `far` behind it.
fn near(opcode: u8, far: i32) -> Vec<u8> {
    [&[opcode], far.to_le_bytes().as_slice()].concat()
}
