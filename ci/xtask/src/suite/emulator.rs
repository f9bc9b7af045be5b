//! What a lab's processor costs this host.

use std::path::PathBuf;

/// A process whose processor time is asked for now and then.
pub struct Emulator {
    /// proc_pid_stat(5).
    stat: PathBuf,
    /// When it was last asked, in ticks.
    last: u64,
}

impl Emulator {
    /// The process of this number; none if there is none.
    pub fn new(pid: i32) -> Option<Self> {
        let stat = PathBuf::from(format!("/proc/{pid}/stat"));
        let last = ticks(&std::fs::read_to_string(&stat).ok()?)?;
        Some(Self { stat, last })
    }

    /// Processor time since it was last asked, in seconds: nothing once the process is gone.
    pub fn since_last(&mut self) -> Option<f64> {
        let now = ticks(&std::fs::read_to_string(&self.stat).ok()?)?;
        let since = now.checked_sub(self.last)?;
        self.last = now;
        Some(since as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}

/// User and system time, fields 14 and 15. The name, the second one, may have any character.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    next()?.checked_add(next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 120 30 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(150));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn work_is_seen() {
        let mut own = Emulator::new(std::process::id() as i32).unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut seen = 0.0;
        while seen <= 0.0 {
            assert!(std::time::Instant::now() < until);
            seen += own.since_last().unwrap();
        }
    }
}
