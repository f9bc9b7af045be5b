//! What is polled: a `struct napi_struct`.

use serde::Deserialize;

use super::lies_in;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::Btf;
use crate::guest::field::Field;
use crate::guest::modules::ModuleLayout;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::models;
use crate::policy::call::CallMemory;

/// Largest structure that is believed, in bytes.
const MAX_BYTES: u64 = 4096;

/// What is known of polls.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PollModel {
    scheduled: &'static str,
    #[serde(deserialize_with = "models::kept")]
    not_complete: &'static [&'static str],
    #[serde(deserialize_with = "models::kept")]
    waits: &'static [Waits],
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Waits {
    of: &'static str,
    member: &'static str,
}

/// Where things are in a `struct napi_struct`.
#[derive(Debug)]
pub(super) struct Polls {
    bytes: usize,
    poll: Field,
    device: Field,
    state: Field,
    scheduled: u64,
    not_complete: u64,
    /// Members that have interrupts wait: of itself, and of its device.
    waits: (Vec<Field>, Vec<Field>),
    /// The module's code.
    text: Vec<GvaRange>,
}

impl Polls {
    pub(super) fn new(model: &PollModel, types: &Btf, layout: &ModuleLayout) -> Option<Self> {
        let own = types.find_struct("napi_struct")?;
        let bytes = types.size_of(own).filter(|bytes| *bytes <= MAX_BYTES)?;
        let bit = |name: &&str| {
            let number = u32::try_from(types.enum_value(name)?).ok()?;
            1u64.checked_shl(number)
        };
        // An older kernel does not know of all of them.
        let not_complete = model.not_complete.iter().filter_map(bit);
        let waits = |of: &str| {
            let members = model.waits.iter().filter(|waits| waits.of == of);
            let found = members
                .filter_map(|waits| Field::find(types, types.find_struct(waits.of)?, waits.member));
            found.collect::<Vec<_>>()
        };
        Some(Self {
            bytes: usize::try_from(bytes).ok()?,
            poll: Field::find(types, own, "poll")?,
            device: Field::find(types, own, "dev")?,
            state: Field::find(types, own, "state")?,
            scheduled: bit(&model.scheduled)?,
            not_complete: not_complete.fold(0, |bits, bit| bits | bit),
            waits: (waits("napi_struct"), waits("net_device")),
            text: layout.text().map(|section| section.range).collect(),
        })
    }

    /// The interface of what is at `at`, if it is polled by the module at this moment, and the call
    /// has changed nothing else of it.
    pub(super) fn device_of<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> Option<u64> {
        let now = memory.private.read_vec(at, self.bytes).ok()?;
        let before = memory.earlier().read_vec(at, self.bytes).ok()?;
        let state = usize::try_from(self.state.offset).ok()?;
        let behind = state.checked_add(self.state.bytes)?;
        let same = now.get(..state)? == before.get(..state)?
            && now.get(behind..)? == before.get(behind..)?;
        let is_ours = lies_in(&self.text, self.poll.of(&now)?);
        let is_polled = self.state.of(&now)? & self.scheduled != 0;
        (same && is_ours && is_polled)
            .then(|| self.device.of(&now))
            .flatten()
    }

    /// Whether what is at `at` was to be polled when the call began.
    pub(super) fn was_scheduled<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> Option<bool> {
        let before = self.state.read(&memory.earlier(), at)?;
        Some(before & self.scheduled != 0)
    }

    /// Whether the poll of what is at `at`, of which [`Polls::device_of`] says that it is polled, is
    /// over for good if it ends now.
    pub(super) fn ends<M: GuestPhys>(&self, virt: VirtMemory<'_, M>, at: Gva) -> Option<()> {
        let device = Gva(self.device.read(&virt, at)?);
        let state = self.state.read(&virt, at)?;
        let mut waits = 0;
        for (fields, of) in [(&self.waits.0, at), (&self.waits.1, device)] {
            for field in fields {
                waits |= field.read(&virt, of)?;
            }
        }
        (state & self.not_complete == 0 && waits == 0).then_some(())
    }
}
