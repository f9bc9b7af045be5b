//! `top`: a live view of all guests.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::ensure;

use super::{Ending, print_bytes};
use crate::runtime_dir::RuntimeRoot;
use crate::top::{self, MAX_INTERVAL, MIN_INTERVAL};

/// `top`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Keys: arrows or j, k select a guest, Enter shows its details, Esc goes back, ? helps, q ends.

Examples:
  cofferdam top
  cofferdam top --once --interval 0.5")]
pub struct TopOptions {
    /// Time between two looks at each guest, from 0.1 to 60
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Print one frame as text, with rates over one interval, and end; needs no terminal
    #[arg(long)]
    once: bool,
}

impl TopOptions {
    /// `top`
    pub fn run(self) -> anyhow::Result<Ending> {
        let root = RuntimeRoot::from_environment();
        if self.once {
            print_bytes(top::once(root, self.interval)?.as_bytes())?;
            return Ok(Ending::SUCCESS);
        }
        ensure!(
            std::io::stdout().is_terminal(),
            "standard output is no terminal: `cofferdam top --once` prints one frame as text"
        );
        top::run(root, self.interval)
    }
}

/// A time between two looks as a person types it.
fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    seconds
        .and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| (MIN_INTERVAL..=MAX_INTERVAL).contains(time))
        .ok_or_else(|| "give seconds from 0.1 to 60".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_has_bounds() {
        assert_eq!(interval("0.1"), Ok(MIN_INTERVAL));
        assert_eq!(interval("60"), Ok(MAX_INTERVAL));
        for bad in ["", "0", "0.09", "61", "-1", "nan", "inf", "1e300", "x"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
