//! The thread that hears of clients that have gone, passes the turn on when its time is up, and
//! tries again to give it to somebody when a switch has left it with nobody.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::card::Card;
use super::happened::Happened;
use super::host::Host;

/// How long after a switch that left the turn with nobody it is tried again; after each attempt
/// that fails, twice as long.
const AGAIN: Duration = Duration::from_secs(2);
/// At most that long.
const LONGEST_AGAIN: Duration = Duration::from_secs(60);

/// Keeps house until nobody is left who could tell it anything.
pub fn keep<C: Card>(host: &Arc<Host<C>>, events: &Receiver<Happened>) {
    let mut slices: Option<(Duration, Instant)> = None;
    let mut again: Option<(Duration, Instant)> = None;
    loop {
        let next = [slices, again].into_iter().flatten();
        let event = match next.map(|(_, next)| next).min() {
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(next) => events.recv_timeout(next.saturating_duration_since(Instant::now())),
        };
        match event {
            Ok(Happened::Gone { vm, serial, why }) => host.gone(&vm, serial, &why),
            Ok(Happened::Slices(every)) => {
                slices = every.map(|every| (every, Instant::now() + every));
            }
            Ok(Happened::Nobody) => {
                again = again.or_else(|| Some((AGAIN, Instant::now() + AGAIN)));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if let Some((pause, next)) = again
            && next <= Instant::now()
        {
            let pause = (pause * 2).min(LONGEST_AGAIN);
            let is_nobodys = host.try_again();
            again = is_nobodys.then(|| (pause, Instant::now() + pause));
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
