//! What a vCPU is (CPUID) and how it starts (registers, local APIC).

pub(crate) mod cpuid;
pub(crate) mod regs;
pub(crate) mod state;
