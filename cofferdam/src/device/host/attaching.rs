//! Guests' VMMs that come and go: their places at a device host.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::{ContextOf, Host, LOOK};
use crate::device::OnExit;
use crate::device::card::Card;
use crate::device::context::Context;
use crate::device::held::lock;
use crate::device::hello::{AttachInfo, Welcome, write_line};
use crate::device::protocol::Reason;
use crate::device::share::Share;
use crate::options::{MacAddress, VmName};

/// How long a VM that is attached already may take to be noticed to have gone: its process may just
/// have been killed.
const GONE_TIME: Duration = Duration::from_secs(1);

impl<C: Card> Host<C> {
    /// Attaches `vm`, whose VMM is at `stream`, and tells it. A guest that goes on from a snapshot
    /// says with a NIC of which model.
    pub fn attach(
        &self,
        (vm, mac): (VmName, MacAddress),
        goes_on: Option<&str>,
        stream: UnixStream,
    ) -> anyhow::Result<()> {
        let model = self.card.name();
        if let Some(saved) = goes_on {
            ensure!(
                saved == model,
                "{vm} was saved with a NIC of the model {saved}, and this is a {model}"
            );
        }
        let (context, serial) = self.reserve(vm, mac, &stream)?;
        let attached = self.serve(&context, serial, goes_on.is_some(), stream);
        if attached.is_err() {
            // Where it was served this is done by who served it, before anybody can come back.
            let _ = context.share.plug(false);
            self.gone(&context.vm, serial, "could not be served");
        }
        attached
    }

    fn serve(
        &self,
        context: &Arc<ContextOf<C>>,
        serial: u64,
        goes_on: bool,
        stream: UnixStream,
    ) -> anyhow::Result<()> {
        context.share.plug(true)?;
        let given = self.begin_for(&stream).and_then(|switching| {
            self.give_what_is_nobodys(&switching, Some(context.clone()), Reason::Attached)
        });
        if let Err(error) = given {
            tracing::warn!(vm = %context.vm, "gets no turn: {error:#}");
        }
        let info = AttachInfo {
            device: self.config.name.to_string(),
            model: self.card.name(),
            mac: context.mac().to_string(),
            turn: context.share.has_turn(),
            returned: serial > 1,
            by_driver: self.card.is_suspended_by_drivers(),
        };
        // The client speaks after it has read this.
        write_line(&stream, &Welcome::Ok(info))?;
        stream.set_write_timeout(None)?;
        context.serve((serial, goes_on), stream, self.keeper.clone())?;
        tracing::info!(vm = %context.vm, mac = %context.mac(), "attached");
        Ok(())
    }

    /// The place for a client of `vm`, in its context or in a new one.
    fn reserve(
        &self,
        vm: VmName,
        mac: MacAddress,
        stream: &UnixStream,
    ) -> anyhow::Result<(Arc<ContextOf<C>>, u64)> {
        let deadline = Instant::now() + GONE_TIME;
        loop {
            if let Some(reserved) = self.try_reserve(&vm, mac, stream)? {
                return Ok(reserved);
            }
            ensure!(
                Instant::now() < deadline,
                "it is busy: a VM named {vm} is attached; give the VM another --name, or stop that one"
            );
            std::thread::sleep(LOOK);
        }
    }

    /// See [`Host::reserve`]; `None` while the VM has a client.
    fn try_reserve(
        &self,
        vm: &VmName,
        mac: MacAddress,
        stream: &UnixStream,
    ) -> anyhow::Result<Option<(Arc<ContextOf<C>>, u64)>> {
        // Dropped after the lock is free: it waits for a thread.
        let mut given_up = Vec::new();
        // A context that is being given the turn does not have to make place.
        let _switching = self.begin_for(stream)?;
        let mut contexts = self.contexts();
        let others = |context: &Arc<ContextOf<C>>| context.vm != *vm && context.mac() == mac;
        if let Some(other) = contexts.iter().find(|context| others(context)) {
            ensure!(
                !other.is_taken() && !other.share.has_turn(),
                "its address {mac} is that of {}: choose another with mac=",
                other.vm
            );
            let same = other.vm.clone();
            given_up.extend(contexts.extract_if(.., |context| context.vm == same));
        }
        let own = contexts.iter().find(|context| context.vm == *vm).cloned();
        if let Some(context) = own {
            let serial = context.reserve(mac);
            return Ok(serial.map(|serial| (context, serial)));
        }
        if contexts.len() >= self.config.slots {
            let free =
                |context: &Arc<ContextOf<C>>| !context.is_taken() && !context.share.has_turn();
            let Some(place) = contexts.iter().position(free) else {
                bail!(
                    "all of its {} slots are taken: stop a VM that is attached, or serve it with more --slots",
                    self.config.slots
                );
            };
            given_up.push(contexts.remove(place));
        }
        let context = Context::new(vm.clone(), mac, self.card.share(mac)?)?;
        let context = Arc::new(context);
        let serial = context.reserve(mac);
        contexts.push(context.clone());
        drop(contexts);
        drop(given_up);
        Ok(serial.map(|serial| (context, serial)))
    }

    /// The client of `vm` has gone. Its turn is passed on, if that is what was chosen.
    pub fn gone(&self, vm: &VmName, serial: u64, why: &str) {
        let Ok(context) = self.context(vm) else {
            return;
        };
        if !context.client_has_gone(serial) {
            return;
        }
        tracing::info!(%vm, "detached: {why}");
        // One that is back already keeps its turn.
        if self.config.on_exit == OnExit::Next && !context.is_connected() {
            self.leave(&context, Reason::Gone);
        }
        // One that came back just now found that the turn was its own still.
        let switching = lock(&self.switching);
        let next = self.next(None);
        let given = self.give_what_is_nobodys(&switching, next, Reason::Attached);
        if let Err(error) = given {
            tracing::warn!("nobody gets the turn: {error:#}");
        }
    }
}
