//! Faults on purpose, as the control socket has them put in and taken back.

use agent_protocol::message::Bytes;
use devices::edge::EdgeOrder;
use isolation::attach::text_fault::TextChange;
use isolation::dispatch::fault::FaultOrder;

use super::{VmService, text};
use crate::control::protocol::{FaultsState, FaultyCalls, FunctionBytes, Reply};
use crate::error_text::chain;
use crate::run::disturbance;

/// An instruction of a driver's function, and what is put in its place.
pub(super) struct Code {
    pub function: String,
    pub offset: u64,
    pub old: Vec<u8>,
    pub new: Vec<u8>,
    /// It fits where the instruction is another one.
    pub replaces_whole: bool,
}

impl VmService {
    pub(super) fn fault_count(&self, module: &str) -> Result<Reply, String> {
        let count = self.isolator().fault_count(module).map_err(text)?;
        Ok(Reply::FaultCount(count))
    }

    pub(super) fn disturb(&self, nic: Option<&str>, order: EdgeOrder) -> Result<Reply, String> {
        self.nics.forget_gone(&self.vm);
        let begin = || disturbance::begin(&self.nics, nic, order);
        self.vm.with_devices(begin).map(Reply::Disturbed)
    }

    pub(super) fn undisturb(
        &self,
        nic: Option<&str>,
        number: Option<u64>,
    ) -> Result<Reply, String> {
        let end = || disturbance::end(&self.nics, nic, number);
        let disturbances = self.vm.with_devices(end)?;
        Ok(Reply::Disturbances { disturbances })
    }

    pub(super) fn disturbances(&self, nic: Option<&str>) -> Result<Reply, String> {
        let disturbances = disturbance::all(&self.nics, nic)?;
        Ok(Reply::Disturbances { disturbances })
    }

    pub(super) fn function_text(&self, module: &str, function: &str) -> Result<Reply, String> {
        self.guest_runs()?;
        let text = self.supervisor.guest().function_text(module, function);
        let text = text.map_err(chain)?;
        let mut modules = self.isolator().status().into_iter();
        Ok(Reply::FunctionText(FunctionBytes {
            start: text.start,
            code: Bytes(text.code),
            callees: text.callees.into_iter().collect(),
            isolated: modules.any(|status| status.module == module),
        }))
    }

    /// Into calls of an isolated function, or into the guest's own text.
    pub(super) fn inject_code(
        &self,
        module: &str,
        code: Code,
        calls: Option<FaultyCalls>,
    ) -> Result<Reply, String> {
        let Some(calls) = calls else {
            return self.inject_into_text(module, code);
        };
        let order = FaultOrder {
            function: code.function,
            offset: code.offset,
            code: code.new,
            which: calls.which,
            times: calls.times,
            used_up_by: calls.used_up_by,
        };
        match code.replaces_whole {
            true => self.inject(module, order),
            false => {
                every_some(&order)?;
                let ordered = self.isolator().order_code(module, order, &code.old);
                ordered.map(|()| Reply::Done {}).map_err(text)
            }
        }
    }

    fn inject_into_text(&self, module: &str, code: Code) -> Result<Reply, String> {
        self.guest_runs()?;
        let change = |start: u64| TextChange {
            at: start.wrapping_add(code.offset),
            old: code.old.clone(),
            new: code.new.clone(),
        };
        let guest = self.supervisor.guest();
        let put = guest.set_text_fault(module, &code.function, change);
        put.map(|()| Reply::Done {}).map_err(chain)
    }

    pub(super) fn faults(&self, module: &str) -> Reply {
        Reply::Faults(FaultsState {
            calls: self.isolator().fault_count(module).ok(),
            own_text: self.isolator().text_fault_status(),
        })
    }

    pub(super) fn undo_faults(&self, module: &str) -> Result<Reply, String> {
        let calls = self.isolator().withdraw_faults(module).ok();
        let of_module = self.isolator().text_fault_status();
        let own_text = match of_module.filter(|fault| fault.module == module) {
            Some(_) => Some(self.isolator().clear_text_fault().map_err(text)?),
            None => None,
        };
        if calls.is_none() && own_text.is_none() {
            return Err(format!("there are no faults of {module} to be taken back"));
        }
        Ok(Reply::Faults(FaultsState { calls, own_text }))
    }

    pub(super) fn inject(&self, module: &str, order: FaultOrder) -> Result<Reply, String> {
        every_some(&order)?;
        self.isolator().order_fault(module, order).map_err(text)?;
        Ok(Reply::Done {})
    }
}

fn every_some(order: &FaultOrder) -> Result<(), String> {
    match order.which.is_none() {
        true => Err("no call is to have the fault: choose every 1st for every call".to_owned()),
        false => Ok(()),
    }
}
