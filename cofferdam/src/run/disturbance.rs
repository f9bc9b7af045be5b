//! Faults at the edges of a guest's NICs ([`devices::edge`]).

use std::sync::PoisonError;

use devices::edge::{EdgeOrder, EdgeStatus};

use super::nics::{GuestNic, Nics};
use crate::control::protocol::Disturbance;

/// Has something go wrong at the edge of `nic`, which may be left out where there is one.
///
/// # Errors
/// There is no such NIC, or it cannot go wrong so.
pub fn begin(nics: &Nics, nic: Option<&str>, order: EdgeOrder) -> Result<Disturbance, String> {
    let all = nics.all();
    let nic = match (nic, all.as_slice()) {
        (Some(name), all) => find(all, name)?,
        (None, [only]) => only,
        (None, []) => return Err("this VM has no NIC".to_owned()),
        (None, all) => return Err(format!("say which NIC: {}", list(all))),
    };
    let function = &nic.nic.function;
    let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
    let armed = nic.edge.arm(order, &mut *function);
    let status = armed.map_err(|error| error.to_string())?;
    tracing::warn!(
        nic = nic.address(),
        fault = status.order.kind.name(),
        "a NIC is disturbed on purpose"
    );
    Ok(of(nic, status))
}

/// Takes back what goes wrong at the edge of `nic`, or of all: one thing, or everything.
///
/// # Errors
/// There is no such NIC, or nothing of that number goes wrong there.
pub fn end(
    nics: &Nics,
    nic: Option<&str>,
    number: Option<u64>,
) -> Result<Vec<Disturbance>, String> {
    let all = nics.all();
    let mut ended = Vec::new();
    for nic in which(&all, nic)? {
        let function = &nic.nic.function;
        let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
        let statuses = nic.edge.disarm(number, &mut *function);
        drop(function);
        nic.edge.tell_link();
        ended.extend(statuses.into_iter().map(|status| of(nic, status)));
    }
    match number {
        Some(number) if ended.is_empty() => Err(format!("there is no disturbance {number}")),
        _ => Ok(ended),
    }
}

/// What goes wrong at the edge of `nic`, or of all.
///
/// # Errors
/// There is no such NIC.
pub fn all(nics: &Nics, nic: Option<&str>) -> Result<Vec<Disturbance>, String> {
    let all = nics.all();
    let mut disturbances = Vec::new();
    for nic in which(&all, nic)? {
        let statuses = nic.edge.statuses().into_iter();
        disturbances.extend(statuses.map(|status| of(nic, status)));
    }
    Ok(disturbances)
}

/// The NIC of this name, or all of them.
fn which<'a>(all: &'a [GuestNic], nic: Option<&str>) -> Result<&'a [GuestNic], String> {
    match nic {
        Some(name) => find(all, name).map(std::slice::from_ref),
        None => Ok(all),
    }
}

fn of(nic: &GuestNic, status: EdgeStatus) -> Disturbance {
    Disturbance {
        nic: nic.address(),
        status,
    }
}

/// The NIC with this number or PCI address.
fn find<'a>(all: &'a [GuestNic], name: &str) -> Result<&'a GuestNic, String> {
    let is_it = |nic: &&GuestNic| nic.address() == name || nic.number.to_string() == name;
    let found = all.iter().find(is_it);
    found.ok_or_else(|| format!("this VM has no NIC {name}: there is {}", list(all)))
}

fn list(all: &[GuestNic]) -> String {
    let names = all
        .iter()
        .map(|nic| format!("{} ({})", nic.number, nic.address()));
    names.collect::<Vec<_>>().join(", ")
}
