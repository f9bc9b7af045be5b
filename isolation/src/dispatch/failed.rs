//! A failed call as it was found: addresses without names.

use std::cell::RefCell;

use iced_x86::{Formatter, GasFormatter, Instruction};

use crate::domain::transaction::AbortPhases;
use crate::domain::violation::Violation;
use crate::fault_image::Kept;
use crate::guest::symbols::SymbolTable;
use crate::status::report::{Told, ViolationReport};

/// What there is to say of a failed call, read of the guest and its domain when it failed. Fields of
/// the same names are those of [`ViolationReport`].
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    pub entry: String,
    pub violation: Violation,
    /// The instruction where it failed, if there is one.
    pub instruction: Option<Instruction>,
    pub touched: Option<String>,
    pub stays: Option<String>,
    pub at_ns: u64,
    pub phases: AbortPhases,
    pub device_lost: Option<String>,
    pub image: Option<Kept>,
    pub told: Told,
}

impl Failed {
    /// The report: addresses with their names.
    pub fn named(self, symbols: &SymbolTable) -> ViolationReport {
        let crossings = self.violation.crossings.iter();
        let call_chain = crossings
            .filter_map(|return_address| symbols.name_of(return_address.wrapping_sub(1)))
            .collect();
        ViolationReport {
            entry: self.entry,
            at: symbols.place_of(self.violation.rip),
            instruction: text(self.instruction),
            touched: self.touched,
            call_chain,
            stays: self.stays,
            at_ns: self.at_ns,
            phases: self.phases,
            device_lost: self.device_lost,
            image: self.image,
            told: self.told,
            violation: self.violation,
        }
    }
}

/// An instruction in GNU's syntax; nothing where there is none.
fn text(instruction: Option<Instruction>) -> String {
    let Some(instruction) = instruction else {
        return String::new();
    };
    if instruction.is_invalid() {
        return "(bad)".into();
    }
    let mut text = String::new();
    FORMATTER.with_borrow_mut(|formatter| formatter.format(&instruction, &mut text));
    text
}

thread_local! {
    /// To make one takes longer than the rest of a report: it makes the names of all registers.
    static FORMATTER: RefCell<GasFormatter> = RefCell::new(GasFormatter::new());
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::domain::roots::Root;
    use crate::domain::violation::ViolationKind;

    /// A call of a function with this name that failed.
    pub fn failed(entry: &str) -> Failed {
        Failed {
            entry: entry.to_owned(),
            violation: Violation {
                kind: ViolationKind::PrivilegedInstruction,
                root: Root::Driver,
                rip: 0x1000,
                rsp: 0x2000,
                crossings: Vec::new(),
                reached_device: false,
                spills: 0,
                published: None,
            },
            instruction: None,
            touched: None,
            stays: None,
            at_ns: 0,
            phases: AbortPhases::default(),
            device_lost: None,
            image: None,
            told: Told::Error,
        }
    }

    #[test]
    fn an_address_that_nobody_knows_is_a_number_and_no_instruction_is_no_text() {
        let report = failed("call").named(&SymbolTable::default());
        assert_eq!(
            (report.at.as_str(), report.instruction.as_str()),
            ("0x1000", "")
        );
        let told = report.to_string();
        assert_eq!(told, "call: privileged instruction at 0x1000");
        let bad = Failed {
            instruction: Some(Instruction::default()),
            ..failed("call")
        };
        assert_eq!(bad.named(&SymbolTable::default()).instruction, "(bad)");
    }
}
