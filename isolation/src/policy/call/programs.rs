//! Code that the kernel has made while it ran: BPF programs, for which there are no names when a
//! module is isolated.
//!
//! Inline functions call them by a pointer, with what they are to look at and with their
//! instructions (`__bpf_prog_run`, include/linux/filter.h). The instructions are part of the
//! program's structure, which also has the pointer.

use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

/// Where a `struct bpf_prog` has what is called, and its instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Programs {
    function: u64,
    instructions: u64,
}

impl Programs {
    /// `None` for a kernel without BPF, or with other programs.
    pub(super) fn new(types: &Btf) -> Option<Self> {
        let program = types.find_struct("bpf_prog")?;
        let offset = |name| {
            let member = types.find_member(program, name)?;
            Some(u64::from(member.bit_offset / 8))
        };
        Some(Self {
            function: offset("bpf_func")?,
            instructions: offset("insnsi")?,
        })
    }

    /// Whether a program that is called with `second` as its second argument begins at `va`.
    pub(super) fn is_called<M: GuestPhys>(
        self,
        virt: VirtMemory<'_, M>,
        va: u64,
        second: u64,
    ) -> bool {
        let program = second.checked_sub(self.instructions);
        let at = program.and_then(|program| Gva(program).checked_add(self.function));
        at.and_then(|at| virt.read_u64(at).ok()) == Some(va)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::paging::{Entry, Levels};

    #[test]
    fn a_program_is_told_by_its_instructions_and_nothing_else_is() {
        let mut e = Encoder::new(None);
        let word = e.int("unsigned long", 8, 0);
        let instructions = e.array(word, 0);
        let part = e.structure("", 0, &[("insnsi", instructions, 0)]);
        let either = e.composite(5, "", 0, &[("", part, 0)]);
        let members = [("len", word, 0), ("bpf_func", word, 8), ("", either, 32)];
        e.structure("bpf_prog", 32, &members);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let programs = Programs::new(&types).unwrap();
        let (program, code) = (0xffff_c900_0000_1000_u64, 0xffff_ffff_c000_0648_u64);
        let mut guest = TestGuest::new(Levels::Four);
        let flags = Entry::WRITE | Entry::NO_EXECUTE;
        guest.put(Gva(program), &[0; 64], flags);
        guest.put(Gva(program + 8), &code.to_le_bytes(), flags);
        let virt = guest.virt();
        assert!(programs.is_called(virt, code, program + 32));
        for (va, second) in [
            (code + 4, program + 32),
            (code, program + 40),
            (code, program),
            (code, 0),
            (code, u64::MAX),
            (0, program + 0x3000),
        ] {
            assert!(!programs.is_called(virt, va, second), "{va:#x} {second:#x}");
        }
    }

    #[test]
    fn kernels_without_programs_have_none() {
        let types = Btf::parse(&Encoder::new(None).bytes(), None).unwrap();
        assert_eq!(Programs::new(&types), None);
    }
}
