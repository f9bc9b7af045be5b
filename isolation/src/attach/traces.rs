//! Traces of calls of isolated modules, as they are asked for and taken.

use std::sync::PoisonError;

use devices::pci::BarSpace;

use super::{AttachError, Isolator};
use crate::dispatch::call_trace::{BarPlace, TraceOrder, TraceTaken, Tracer};

impl Isolator {
    /// Has the next calls of a module recorded, in the place of whatever was asked for before, and
    /// returns the number by which they can be taken.
    ///
    /// # Errors
    /// The module is not isolated, or the function is not.
    pub fn begin_trace(&self, module: &str, order: TraceOrder) -> Result<u64, AttachError> {
        self.with_module(module, |armed| {
            if let Some(function) = &order.function {
                let mut gates = armed.gates.values();
                if !gates.any(|gate| !gate.is_guard && gate.entry.name == *function) {
                    return Err(AttachError::NotIsolatedFunction(function.clone()));
                }
            }
            let tracer = Tracer::new(order);
            let id = tracer.id;
            armed.tracer = Some(Box::new(tracer));
            Ok(id)
        })
    }

    /// Takes some of what was recorded. When there is no more nothing is kept of it.
    ///
    /// # Errors
    /// The module is not isolated any more, or another trace was begun.
    pub fn take_trace(&self, module: &str, id: u64) -> Result<TraceTaken, AttachError> {
        let (mut taken, slots) = self.with_module(module, |armed| {
            let knowledge = &armed.guest.knowledge;
            let tracer = armed.tracer.as_mut().filter(|tracer| tracer.id == id);
            let tracer = tracer.ok_or(AttachError::NoTrace)?;
            let taken = tracer.take(|at| knowledge.function_name(at));
            if !taken.more {
                armed.tracer = None;
            }
            Ok((taken, armed.device.slots.clone()))
        })?;
        if taken.call.is_some() {
            taken.bars = self.bars_of(&slots);
        }
        Ok(taken)
    }

    /// Records no more calls, and forgets those that were.
    ///
    /// # Errors
    /// The module is not isolated any more, or another trace was begun.
    pub fn end_trace(&self, module: &str, id: u64) -> Result<(), AttachError> {
        self.with_module(module, |armed| {
            match armed.tracer.as_ref().is_some_and(|tracer| tracer.id == id) {
                true => armed.tracer = None,
                false => return Err(AttachError::NoTrace),
            }
            Ok(())
        })
    }

    /// What the functions in these slots decode.
    fn bars_of(&self, slots: &[u8]) -> Vec<BarPlace> {
        let bus = self.vm.pci_bus();
        let mut bars = Vec::new();
        for slot in slots {
            let others: Vec<u8> = (0..=u8::MAX).filter(|other| other != slot).collect();
            for function in bus.functions_except(&others) {
                let function = function.lock().unwrap_or_else(PoisonError::into_inner);
                bars.extend(function.decoded().iter().map(|range| BarPlace {
                    slot: *slot,
                    bar: range.bar,
                    is_io: range.space == BarSpace::Io,
                    start: range.address,
                    bytes: range.size_bytes,
                }));
            }
        }
        bars
    }
}
