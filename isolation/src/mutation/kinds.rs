//! The table of kinds: what goes wrong, and who injected or counted such faults before.

use serde::{Deserialize, Serialize};

const FGFT: &str =
    "Kadav, Renzelmann, Swift: Fine-Grained Fault Tolerance using Device Checkpoints, ASPLOS 2013";
const FGFT_SWFIT: &str = "Kadav, Renzelmann, Swift: Fine-Grained Fault Tolerance using Device Checkpoints, ASPLOS 2013; \
     Durães, Madeira: Emulation of Software Faults: A Field Data Study and a Practical Approach, IEEE TSE 32(11), 2006";
const RIO: &str = "Chen, Ng et al.: The Rio File Cache: Surviving Operating System Crashes, ASPLOS 1996; \
     Swift, Bershad, Levy: Improving the Reliability of Commodity Operating Systems, SOSP 2003";
const CHOU: &str = "Chou et al.: An Empirical Study of Operating Systems Errors, SOSP 2001";
const LKDTM: &str = "Linux, Documentation/fault-injection/provoke-crashes";
const LINUX: &str =
    "Linux, Documentation/fault-injection/fault-injection, Available fault injection capabilities";
const OWN: &str = "Cofferdam";

/// Declares [`Kind`] and its table, of which each row is a kind, its name, what goes wrong, and the
/// source.
macro_rules! kinds {
    ($($kind:ident $name:literal $source:ident $sentence:literal)*) => {
        /// What is changed about an instruction.
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(rename_all = "snake_case")]
        pub enum Kind {
            $(#[doc = $sentence] $kind,)*
        }

        impl Kind {
            /// All kinds, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// Its name on the command line and in reports.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// What goes wrong, in one sentence.
            pub fn sentence(self) -> &'static str {
                match self {
                    $(Self::$kind => $sentence,)*
                }
            }

            /// The publication or document that faults of this kind come from.
            pub fn source(self) -> &'static str {
                match self {
                    $(Self::$kind => $source,)*
                }
            }
        }
    };
}

kinds! {
    LengthOverrun "length_overrun" FGFT
        "A copy or fill is longer than the driver asked for."
    LoopBound "loop_bound" FGFT
        "A loop runs to another bound."
    OffByOne "off_by_one" FGFT
        "A comparison is off by one: its constant, or whether equal counts."
    MissingAssignment "missing_assignment" FGFT_SWFIT
        "A variable, a field or a register keeps its old value."
    MissingCall "missing_call" FGFT_SWFIT
        "A function is not called."
    CorruptedParameter "corrupted_parameter" FGFT_SWFIT
        "A function is called with another value for one of its parameters."
    FlippedCondition "flipped_condition" FGFT
        "A condition is taken for its opposite."
    TextBitFlip "text_bit_flip" RIO
        "One bit of the instruction is flipped."
    WrongSource "wrong_source" RIO
        "An instruction reads another register."
    WrongDestination "wrong_destination" RIO
        "An instruction writes another register."
    Pointer "pointer" RIO
        "An access goes to another address: its base, index or displacement is changed."
    Initialisation "initialisation" RIO
        "A local variable is not initialised."
    Branch "branch" RIO
        "A branch is never taken, or always."
    Nop "nop" RIO
        "An instruction is left out."
    StackFlip "stack_flip" RIO
        "A value is stored elsewhere in the stack frame: one bit of the displacement is flipped."
    InterruptsLeftOff "interrupts_left_off" CHOU
        "Interrupts are not enabled again."
    UnbalancedLock "unbalanced_lock" CHOU
        "A lock is not taken, or not given back."
    MemoryLeak "memory_leak" CHOU
        "Memory or a reference is not given back."
    MissingReference "missing_reference" OWN
        "A reference is not taken, so that the object may be freed while it is in use."
    FailedAllocation "failed_allocation" LINUX
        "An allocation fails."
    ErrorReturn "error_return" LINUX
        "A function whose result is looked at is not called and seems to have failed."
    EndlessLoop "endless_loop" LKDTM
        "An endless loop: the call's time runs out."
    WildJump "wild_jump" OWN
        "Execution goes on at a wild address."
    SmashedReturn "smashed_return" LKDTM
        "The function returns to a wrong address."
    DeepRecursion "deep_recursion" LKDTM
        "The function calls itself in place of another one, until the stack is full."
    NullDereference "null_dereference" LKDTM
        "A load through a NULL pointer: page fault."
    UndefinedInstruction "undefined_instruction" LKDTM
        "An undefined instruction, as BUG() makes one: invalid opcode."
    DivisionByZero "division_by_zero" OWN
        "A division by zero."
    Halt "halt" OWN
        "An instruction that only the kernel's idle loop may run: hlt."
}

impl Kind {
    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}
