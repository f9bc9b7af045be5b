//! The thread that hears of clients that have gone, and passes the turn on when its time is up.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::card::Card;
use super::happened::Happened;
use super::host::Host;

/// Keeps house until nobody is left who could tell it anything.
pub fn keep<C: Card>(host: &Arc<Host<C>>, events: &Receiver<Happened>) {
    let mut slices: Option<(Duration, Instant)> = None;
    loop {
        let event = match slices {
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some((_, next)) => events.recv_timeout(next.saturating_duration_since(Instant::now())),
        };
        match event {
            Ok(Happened::Gone { vm, serial, why }) => host.gone(&vm, serial, &why),
            Ok(Happened::Slices(every)) => {
                slices = every.map(|every| (every, Instant::now() + every));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if let Some((every, next)) = &mut slices
            && *next <= Instant::now()
        {
            host.slice();
            // A slice that was held up is not made up for.
            *next = (*next + *every).max(Instant::now());
        }
    }
}
