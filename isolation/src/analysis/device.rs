//! Values that a device delivered, used without having been compared with anything.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::code::{Callee, Code, Goes};
use super::facts;
use super::findings::{Finding, FindingKind};
use super::flow::{Address, Flow};
use super::image::Ko;
use super::objects::Objects;
use super::reached::ARGUMENTS;
use super::values::SMALL;
use super::values::{Shared, State, Value};

/// What is found in a function.
pub fn find(
    ko: &Ko<'_>,
    code: &Code,
    flow: &mut Flow<'_>,
    objects: Option<&Objects<'_>>,
) -> Vec<(usize, FindingKind, String)> {
    let mut found = Vec::new();
    for (block, start) in code.blocks.iter().zip(flow.starts.clone()) {
        let Some(mut state) = start else { continue };
        for (at, insn) in code.block(block) {
            if let Some(use_of) = memory_use(flow, &state, at, &insn.i, &|address| {
                room(ko, flow.shared(), objects, address)
            }) {
                found.push((at, use_of.0, source(flow, code, use_of.1)));
            }
            if let Some(sites) = length(ko, flow, &state, insn.goes, &insn.i) {
                found.push((at, FindingKind::DeviceLength, source(flow, code, sites)));
            }
            flow.step(&mut state, at);
        }
    }
    found
}

/// Where the value comes from.
fn source(flow: &Flow<'_>, code: &Code, sites: u64) -> String {
    let all = flow
        .sites
        .iter()
        .enumerate()
        .filter(|(index, _)| sites >> index & 1 != 0);
    let start = code.insns.first().map_or(0, |insn| insn.i.ip());
    let said = all.map(|(_, site)| {
        let at = code
            .insns
            .get(site.insn)
            .map_or(0, |insn| insn.i.ip().wrapping_sub(start));
        let from = if site.memory {
            "memory that the device writes"
        } else {
            "a register of the device"
        };
        format!("{from} at +{at:#x}")
    });
    format!(
        "loaded from {}",
        said.take(3).collect::<Vec<_>>().join(", ")
    )
}

type Room<'a> = &'a dyn Fn(Address) -> Option<u64>;

/// An unchecked value in the address of a memory operand: what it is used as, and its sites.
fn memory_use(
    flow: &Flow<'_>,
    state: &State,
    at: usize,
    i: &Instruction,
    room: Room<'_>,
) -> Option<(FindingKind, u64)> {
    let in_memory = (0..i.op_count()).any(|number| i.op_kind(number) == OpKind::Memory);
    if !in_memory || matches!(i.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) {
        return None;
    }
    let address = flow.address(state, at);
    if matches!(
        address,
        Address::Registers | Address::RegisterTable | Address::Shared
    ) {
        return None;
    }
    let (base, index) = (
        flow.register(state, i.memory_base()),
        flow.register(state, i.memory_index()),
    );
    let in_data = matches!(address, Address::Data { .. });
    let (sites, bits, scale) = match (base, index) {
        (Value::Element { sites }, _) => (sites, 64, 1),
        (_, Value::Device { sites, bits }) => (sites, bits, u64::from(i.memory_index_scale())),
        (Value::Device { sites, bits }, _) if in_data || i.memory_index() != Register::None => {
            (sites, bits, 1)
        }
        // As a pointer it could be anything; what is found so is mostly the driver's own in memory
        // that it shares.
        _ => return None,
    };
    if state.is_checked(sites) {
        return None;
    }
    let bytes = i.memory_size().size() as u64;
    let most = 1u64
        .checked_shl(u32::from(bits))
        .map_or(u64::MAX, |over| over - 1);
    let reached = most.saturating_mul(scale).saturating_add(bytes);
    let fits = match room(address) {
        Some(room) => reached <= room,
        None => bits <= SMALL,
    };
    (!fits).then_some((FindingKind::DeviceIndex, sites))
}

/// Bytes from the address to the end of the object that it is in, if that is known.
fn room(
    ko: &Ko<'_>,
    shared: &Shared,
    objects: Option<&Objects<'_>>,
    address: Address,
) -> Option<u64> {
    match address {
        Address::Data {
            at: (section, offset),
            ..
        } => {
            let object = ko.objects.get(ko.object_around(section, offset)?)?;
            Some(object.len - (offset - object.start))
        }
        Address::Struct { id, offset, .. } => {
            let objects = objects?;
            let (id, offset) = objects.settle(shared, id, offset)?;
            Some(objects.member(id, offset)?.room)
        }
        _ => None,
    }
}

/// An unchecked value as a length: its sites.
fn length(ko: &Ko<'_>, flow: &Flow<'_>, state: &State, goes: Goes, i: &Instruction) -> Option<u64> {
    let value = match goes {
        Goes::Call(Callee::Import(import)) | Goes::TailCall(Callee::Import(import)) => {
            let name = ko.imports.get(import).copied()?;
            let argument = facts::LINUX.takes_length.get(name)?;
            flow.register(state, *ARGUMENTS.get(*argument)?)
        }
        _ if i.has_rep_prefix() && i.is_string_instruction() => flow.register(state, Register::RCX),
        _ => return None,
    };
    match value {
        Value::Device { sites, bits } if bits > SMALL && !state.is_checked(sites) => Some(sites),
        _ => None,
    }
}

/// Makes a finding of an instruction.
pub fn finding(
    ko: &Ko<'_>,
    function: usize,
    code: &Code,
    at: usize,
    kind: FindingKind,
    what: String,
) -> Option<Finding> {
    let named = ko.functions.get(function)?;
    let ip = code.insns.get(at)?.i.ip();
    Some(Finding {
        function: named.name.to_owned(),
        offset: ip.wrapping_sub(named.start),
        kind,
        what,
    })
}
