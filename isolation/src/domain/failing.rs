//! A call at its fault, before anything of it is taken back: what there is to see for who wants to
//! keep it.
//!
//! What is shown is the driver as it would be without a domain. Return addresses on the stack that
//! lead to the monitor's stubs and trampolines are those of the callers, and calls in the driver's
//! text lead to the kernel functions that they are for. So a debugger can follow the stack across
//! the crossings.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::Domain;
use super::monitor::CrossingFrame;
use super::view::{Page, Pfn};
use super::violation::Violation;

/// A call that has broken a rule.
#[derive(Debug)]
pub struct Failing<'a> {
    /// What it did. What became of parts that were published is not known yet.
    pub violation: &'a Violation,
    /// General registers of whoever ran, the driver or a kernel function that it had called. Where
    /// the function had returned they are as its caller would have got them.
    pub regs: kvm_regs,
    /// Whether the function, or one that the kernel had called back, had returned.
    pub returned: bool,
    /// CR2 of the private VM.
    pub cr2: u64,
    /// Control registers and segments of the guest's vCPU.
    pub sregs: &'a kvm_sregs,
    /// General registers at the entry of the call.
    pub entry: kvm_regs,
    /// Where the function would have returned to.
    pub return_address: u64,
    /// Kernel functions that the driver had called and that had not returned, outermost first:
    /// where in the driver they would have returned to.
    pub crossings: Vec<CrossingFrame>,
    /// Functions of the driver that the kernel had called back and that had not returned, outermost
    /// first: where in the kernel they would have returned to.
    pub callbacks: Vec<CrossingFrame>,
    /// Pages that the call had otherwise than the guest, in rising order.
    pub private: Vec<(Pfn, Box<Page>)>,
    /// The domain, to look at. Addresses are translated through the tables of the call.
    pub domain: &'a Domain,
}
