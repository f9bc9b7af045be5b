//! What kernel functions keep of what the driver gives them: looked at when they are called, since
//! nobody would lay it at the driver's door when it is used.

use super::Call;
use crate::domain::effects::KernelCall;
use crate::domain::effects::{KeptArgument, Required};
use crate::domain::error::DomainError;
use crate::domain::violation::ViolationKind;

/// Objects in a list of the kernel's that are looked at.
const MAX_LISTED: usize = 4096;
/// Bytes of a direct call or jump.
const CALL_BYTES: u64 = 5;

impl Call<'_> {
    /// What of this call's arguments is not what the function may keep.
    pub(super) fn keeps_what_it_must_not(
        &self,
        call: &KernelCall,
    ) -> Result<Option<ViolationKind>, DomainError> {
        let keeps = self
            .request
            .effects
            .and_then(|effects| effects.keeps.get(&call.function));
        for kept in keeps.into_iter().flatten() {
            let Some(argument) = call.arguments.get(usize::from(kept.argument)) else {
                continue;
            };
            let value = match kept.offset {
                None => Some(*argument),
                Some(offset) => self.read_guest(argument.wrapping_add(offset))?,
            };
            // What cannot be read the function meets itself, in this call.
            if let Some(value) = value
                && !self.is_what_is_required(kept, value)?
            {
                return Ok(Some(ViolationKind::KeptArgument {
                    function: call.function,
                    argument: kept.argument,
                    value,
                }));
            }
        }
        Ok(None)
    }

    fn is_what_is_required(&self, kept: &KeptArgument, value: u64) -> Result<bool, DomainError> {
        match kept.is {
            Required::Function => Ok(self.supervisor.is_driver_function(value)
                || self.supervisor.is_kernel_function(value)),
            Required::Listed { head, links } => self.is_listed(value, head, links),
        }
    }

    /// Whether `object` is in a list. One that cannot be followed to its end says nothing.
    fn is_listed(&self, object: u64, head: u64, links: u64) -> Result<bool, DomainError> {
        let mut at = head;
        for _ in 0..MAX_LISTED {
            match self.read_guest(at)? {
                None => return Ok(true),
                Some(next) if next == head => return Ok(false),
                Some(next) if next.wrapping_sub(links) == object => return Ok(true),
                Some(next) => at = next,
            }
        }
        Ok(true)
    }

    /// The instruction of the driver that calls, where that is known, by what it would return to: a
    /// call in the function's place (a jump) returns to the function's caller.
    pub(super) fn called_from(&self, return_address: u64) -> u64 {
        let at = return_address.wrapping_sub(CALL_BYTES);
        let mut opcode = [0];
        let is_call = self.domain.is_driver_text(return_address)
            && self.domain.code(at, &mut opcode).is_ok()
            && opcode == [0xe8];
        if is_call {
            at
        } else if self.domain.is_driver_text(return_address) {
            return_address
        } else {
            self.request.function
        }
    }
}
