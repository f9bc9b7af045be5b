//! Going back to a mark while the ladder is still at work.
//!
//! A VM whose recovery does not come to rest refuses to be rewound. What keeps it at work is most
//! often the fault itself, which was left in and has each rung fail; another VM would have to be
//! booted and made ready.

use std::time::{Duration, Instant};

use crate::control::client::AskError;

/// How long a VM that refuses is asked again, less than it takes to make another one ready.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until it is not refused any more, or `time` is up. Before each time but the first
/// something is done `in_between`.
pub(super) fn unless_refused<T, V>(
    vm: &mut V,
    time: Duration,
    ask: impl Fn(&mut V) -> anyhow::Result<T>,
    in_between: impl Fn(&mut V),
) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        match ask(vm) {
            Err(error) if is_refused(&error) && begun.elapsed() < time => in_between(vm),
            other => return other,
        }
    }
}

fn is_refused(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(AskError::Refused(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A VM that refuses so often; how it answers then, how often it was asked, and how often
    /// something was done in between.
    fn asked(refuses: u32, time: Duration, then: anyhow::Result<()>) -> (bool, u32, u32) {
        let mut vm = (0, 0, Some(then));
        let ask = |(asked, _, then): &mut (u32, u32, Option<anyhow::Result<()>>)| {
            *asked += 1;
            match *asked > refuses {
                true => then.take().unwrap_or(Ok(())),
                false => Err(AskError::Refused("not at rest".to_owned()).into()),
            }
        };
        let ended = unless_refused(&mut vm, time, ask, |vm| vm.1 += 1);
        (ended.is_ok(), vm.0, vm.1)
    }

    #[test]
    fn who_refuses_is_asked_again_and_who_says_nothing_is_not() {
        assert_eq!(asked(0, Duration::MAX, Ok(())), (true, 1, 0));
        assert_eq!(asked(2, Duration::MAX, Ok(())), (true, 3, 2));
        let silent = || Err(AskError::Silent("no answer".to_owned()).into());
        assert_eq!(asked(0, Duration::MAX, silent()), (false, 1, 0));
        assert_eq!(asked(1, Duration::MAX, silent()), (false, 2, 1));
        // Its time is up.
        assert_eq!(asked(9, Duration::ZERO, Ok(())), (false, 1, 0));
    }
}
