//! The gateway's state: leases, and frames on their way to the guest. Connections are not in it: the guest finds them
//! reset. Who pings is asked anew.

use serde::{Deserialize, Serialize};

use super::{Gateway, signal};
use crate::state::{Form, Part, StateError};
use crate::wire::MAX_FRAME_BYTES;

const FORM: Form = Form {
    kind: "user-mode network",
    version: 1,
};

#[derive(Serialize, Deserialize)]
struct NetworkState {
    vlan: Option<u16>,
    leases: Vec<[u8; 6]>,
}

#[derive(Serialize, Deserialize)]
struct GatewayState {
    networks: Vec<NetworkState>,
    carrier: bool,
    frames: Vec<Vec<u8>>,
}

impl Gateway {
    pub(super) fn save_state(&self) -> Result<Part, StateError> {
        let state = self.shared.lock();
        let networks = state.networks.iter().map(|network| NetworkState {
            vlan: network.vlan,
            leases: network.leases(),
        });
        let content = GatewayState {
            networks: networks.collect(),
            carrier: state.carrier,
            frames: state.outbox.lasting().map(<[u8]>::to_vec).collect(),
        };
        Part::new(FORM, &content)
    }

    pub(super) fn restore_state(&mut self, part: &Option<Part>) -> Result<(), StateError> {
        let Some(part) = part else {
            return Err(FORM.does_not_fit("it is of a wire without a state"));
        };
        let saved: GatewayState = part.open(FORM)?;
        let mut state = self.shared.lock();
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
        for (network, saved) in state.networks.iter_mut().zip(&saved.networks) {
            if !network.set_leases(&saved.leases) {
                return Err(FORM.does_not_fit("it has given out what it cannot"));
            }
        }
        state.carrier = saved.carrier;
        state.outbox.replace(saved.frames);
        // Whoever listens looks at carrier and frames.
        state.readable_signalled = true;
        signal(&self.shared.readable);
        self.shared.signal_writable(&mut state);
        Ok(())
    }
}
