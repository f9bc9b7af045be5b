//! The gateway's state: leases, where hosts are, the guest's connections, frames on their way to
//! it, and the probe. What is not in it: datagrams in the middle of an answer and fragments that
//! wait for others, which are lost as on any wire.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::connections::ConnectionState;
use super::port::Outbox;
use super::probe::ProbeState;
use super::services::ServiceState;
use super::{Gateway, signal, smoltcp_now};
use crate::clock::monotonic_ns;
use crate::state::{Form, Part, StateError};
use crate::wire::MAX_FRAME_BYTES;

const FORM: Form = Form {
    kind: "user-mode network",
    version: 2,
};

#[derive(Serialize, Deserialize)]
struct NetworkState {
    vlan: Option<u16>,
    leases: Vec<[u8; 6]>,
    hosts: Vec<(Ipv4Addr, [u8; 6])>,
    connections: Vec<(ServiceState, ConnectionState)>,
}

#[derive(Serialize, Deserialize)]
struct GatewayState {
    networks: Vec<NetworkState>,
    carrier: bool,
    frames: Vec<Vec<u8>>,
    probe: ProbeState,
}

impl Gateway {
    pub(super) fn save_state(&self) -> Result<Part, StateError> {
        let mut state = self.shared.lock();
        let networks = state.networks.iter_mut().map(|network| NetworkState {
            vlan: network.vlan,
            leases: network.leases(),
            hosts: network.hosts(),
            connections: network.connections(),
        });
        let networks = networks.collect();
        let content = GatewayState {
            networks,
            carrier: state.carrier,
            frames: state.outbox.lasting().map(<[u8]>::to_vec).collect(),
            probe: state.probe.save(),
        };
        Part::new(FORM, &content)
    }

    pub(super) fn restore_state(&mut self, part: &Option<Part>) -> Result<(), StateError> {
        let Some(part) = part else {
            return Ok(());
        };
        let saved: GatewayState = part.open(FORM)?;
        let now_ns = monotonic_ns();
        let now = smoltcp_now(now_ns);
        let shared = &*self.shared;
        let mut state = shared.lock();
        let here = state.networks.iter().map(|network| network.vlan);
        if !here.eq(saved.networks.iter().map(|network| network.vlan)) {
            return Err(FORM.does_not_fit("it has other networks"));
        }
        if saved.frames.len() > state.outbox.limit()
            || saved
                .frames
                .iter()
                .any(|frame| frame.len() > MAX_FRAME_BYTES)
        {
            return Err(FORM.does_not_fit("more frames wait in it than can"));
        }
        let mut outbox = Outbox::new(state.outbox.limit());
        outbox.replace(saved.frames);
        for (network, saved) in state.networks.iter_mut().zip(&saved.networks) {
            // One that has not changed since then need not be made anew.
            let unchanged =
                network.hosts() == saved.hosts && network.connections() == saved.connections;
            let anew = (!unchanged).then(|| {
                let mut anew = network.anew(&shared.config, now);
                anew.set_hosts(&saved.hosts, now);
                let fits = anew.go_on_with(&saved.connections, &mut outbox, now);
                fits.then_some(anew)
            });
            match anew {
                Some(Some(anew)) => *network = anew,
                Some(None) => {
                    return Err(FORM.does_not_fit("it has more connections than it can have"));
                }
                None => {}
            }
            if !network.set_leases(&saved.leases) {
                return Err(FORM.does_not_fit("it has given out what it cannot"));
            }
        }
        state.carrier = saved.carrier;
        state.probe.restore(saved.probe, now_ns);
        state.outbox = outbox;
        // Whoever listens looks at carrier and frames; what is under way is sent again.
        state.readable_signalled = true;
        signal(&shared.readable);
        shared.signal_writable(&mut state);
        shared.run(&mut state, None);
        Ok(())
    }
}
