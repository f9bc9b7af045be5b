//! What a vCPU is (CPUID) and how it starts (registers, local APIC).

pub(crate) mod compatible;
pub(crate) mod cpuid;
pub(crate) mod leaves;
mod probe;
pub(crate) mod regs;
mod xstate;
