//! General registers of every size.

use iced_x86::Register;

/// A general register in its four sizes: 64, 32, 16 and 8 bits.
type Sizes = [Register; 4];

macro_rules! sizes {
    ($($q:ident $d:ident $w:ident $b:ident)*) => {
        &[$([Register::$q, Register::$d, Register::$w, Register::$b]),*]
    };
}

/// All, by number.
const ALL: &[Sizes] = sizes! {
    RAX EAX AX AL
    RCX ECX CX CL
    RDX EDX DX DL
    RBX EBX BX BL
    RSP ESP SP SPL
    RBP EBP BP BPL
    RSI ESI SI SIL
    RDI EDI DI DIL
    R8 R8D R8W R8L
    R9 R9D R9W R9L
    R10 R10D R10W R10L
    R11 R11D R11W R11L
    R12 R12D R12W R12L
    R13 R13D R13W R13L
    R14 R14D R14W R14L
    R15 R15D R15W R15L
};

/// Registers of a function's parameters (System V ABI for x86-64, section 3.2.3).
pub(super) const PARAMETERS: [Register; 6] = [
    Register::RDI,
    Register::RSI,
    Register::RDX,
    Register::RCX,
    Register::R8,
    Register::R9,
];

/// The part of `register` that has the size of `like`; both are general registers.
pub(super) fn sized(register: Register, like: Register) -> Option<Register> {
    let size = size(like)?;
    let row = ALL.iter().find(|row| row.contains(&register))?;
    row.get(size).copied()
}

/// All other general registers of the same size, but for the stack pointer.
pub(super) fn others(register: Register) -> impl Iterator<Item = Register> {
    let size = size(register);
    ALL.iter()
        .filter_map(move |row| row.get(size?).copied())
        .filter(move |other| *other != register && other.full_register() != Register::RSP)
}

/// Whether the register is a general one. The second bytes of four of them are none.
pub(super) fn is_general(register: Register) -> bool {
    size(register).is_some()
}

fn size(register: Register) -> Option<usize> {
    let row = ALL.iter().find(|row| row.contains(&register))?;
    row.iter().position(|part| *part == register)
}
