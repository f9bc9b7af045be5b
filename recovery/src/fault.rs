//! Faults that are put into calls of a driver on purpose, and where in a function they go.
//!
//! Which instructions a call reaches depends on its arguments and the driver's state. A [`Place`]
//! therefore stands for several instructions in order of preference: who injects tries them until
//! one is reached.

use isolation::dispatch::fault::{InstructionAt, InstructionKind};
use serde::{Deserialize, Serialize};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// A load through a NULL pointer: page fault.
    NullDereference,
    /// An undefined instruction, as `BUG()` makes one: invalid opcode.
    UndefinedInstruction,
    /// A division by zero.
    DivisionByZero,
    /// An endless loop: the call's time runs out.
    EndlessLoop,
    /// `hlt`, which only the kernel's idle loop may do.
    Halt,
}

impl FaultKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::NullDereference,
        Self::UndefinedInstruction,
        Self::DivisionByZero,
        Self::EndlessLoop,
        Self::Halt,
    ];

    /// The code that is put in place of an instruction of the driver.
    pub fn code(self) -> &'static [u8] {
        match self {
            // xor %eax,%eax; mov (%rax),%eax
            Self::NullDereference => &[0x31, 0xc0, 0x8b, 0x00],
            // ud2
            Self::UndefinedInstruction => &[0x0f, 0x0b],
            // xor %ecx,%ecx; div %ecx
            Self::DivisionByZero => &[0x31, 0xc9, 0xf7, 0xf1],
            // jmp .
            Self::EndlessLoop => &[0xeb, 0xfe],
            // hlt
            Self::Halt => &[0xf4],
        }
    }

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::NullDereference => "null_dereference",
            Self::UndefinedInstruction => "undefined_instruction",
            Self::DivisionByZero => "division_by_zero",
            Self::EndlessLoop => "endless_loop",
            Self::Halt => "halt",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Where in a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The first instruction: nothing was done yet.
    First,
    /// Half way through.
    Middle,
    /// The last instruction: all was done but returning.
    Last,
}

impl Place {
    /// All places.
    pub const ALL: [Self; 3] = [Self::First, Self::Middle, Self::Last];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Middle => "middle",
            Self::Last => "last",
        }
    }

    /// Offsets of the instructions of a function that this may mean, best first. Behind the last
    /// return compilers put code that is rarely run, which comes last.
    pub fn candidates(self, instructions: &[InstructionAt]) -> Vec<u64> {
        let live = |at: &&InstructionAt| at.kind != InstructionKind::Dead;
        let offsets: Vec<u64> = instructions
            .iter()
            .filter(live)
            .map(|at| at.offset)
            .collect();
        match self {
            Self::First => offsets
                .into_iter()
                .skip_while(|at| *at < GATE_BYTES)
                .take(1)
                .collect(),
            Self::Middle => {
                let middle = offsets.len() / 2;
                let mut order: Vec<(usize, u64)> = offsets.into_iter().enumerate().collect();
                order.sort_by_key(|(index, _)| index.abs_diff(middle));
                order.into_iter().map(|(_, at)| at).collect()
            }
            Self::Last => instructions
                .iter()
                .filter(|at| at.kind == InstructionKind::Return)
                .map(|at| at.offset)
                .collect(),
        }
    }
}

/// At the start of a function is the tracer's NOP or the gate, of which the domain's copy is never
/// patched by anybody else.
const GATE_BYTES: u64 = 5;

/// The instructions right behind each call of a kernel function, with that function's name.
pub fn after_kernel_calls(instructions: &[InstructionAt]) -> Vec<(u64, &str)> {
    instructions
        .windows(2)
        .filter_map(|pair| match &pair[0].kind {
            InstructionKind::Calls(name) => Some((pair[1].offset, name.as_str())),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(kinds: &[InstructionKind]) -> Vec<InstructionAt> {
        let at = |(index, kind): (usize, &InstructionKind)| InstructionAt {
            offset: index as u64 * 5,
            len: 5,
            kind: kind.clone(),
        };
        kinds.iter().enumerate().map(at).collect()
    }

    fn example() -> Vec<InstructionAt> {
        use InstructionKind::{Branch, Calls, Dead, Plain, Return};
        let calls = Calls("kfree".to_owned());
        function(&[
            Plain, Plain, Branch, calls, Plain, Return, Plain, Return, Dead,
        ])
    }

    #[test]
    fn the_first_place_is_behind_the_gate() {
        assert_eq!(Place::First.candidates(&example()), [5]);
    }

    #[test]
    fn the_last_place_is_a_return_and_the_middle_near_the_middle() {
        assert_eq!(Place::Last.candidates(&example()), [25, 35]);
        let middle = Place::Middle.candidates(&example());
        assert_eq!(middle[0], 20);
        assert_eq!(middle.len(), 8, "code that only traps is no place");
    }

    #[test]
    fn places_after_kernel_calls_carry_the_functions_name() {
        assert_eq!(after_kernel_calls(&example()), [(20, "kfree")]);
    }

    #[test]
    fn a_function_without_instructions_has_no_places() {
        for place in Place::ALL {
            assert!(place.candidates(&[]).is_empty());
        }
        assert!(after_kernel_calls(&[]).is_empty());
    }

    #[test]
    fn kinds_are_found_by_their_names() {
        for kind in FaultKind::ALL {
            assert_eq!(FaultKind::from_name(kind.name()), Some(kind));
            assert!(!kind.code().is_empty());
        }
        assert_eq!(FaultKind::from_name("gremlin"), None);
    }
}
