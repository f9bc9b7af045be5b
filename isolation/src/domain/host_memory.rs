//! Memory of the host that calls make it keep: one account for all that a guest can have open at a
//! time.
//!
//! Each thing that is kept has a limit of its own, but a guest can have thousands of calls open,
//! and the limits multiply. What is charged: journals, kernel functions that are still to be
//! called, private copies of pages, old bytes of what was published before a call's end, and calls
//! that are in the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use devices::clock::monotonic_ns;

/// Bytes that all calls of a guest may have the host keep unless said otherwise: some twenty times
/// what the largest honest call takes.
pub const DEFAULT_LIMIT: u64 = 256 << 20;

/// So much kept at once leaves the allocator with more free memory than is worth to keep.
const LARGE: u64 = 1 << 20;

/// The allocator is asked at most this often: it looks through all that it has.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Account {
    used: AtomicU64,
    /// The most that was kept at once since the allocator was last asked to give back.
    most: AtomicU64,
    /// When that was, in nanoseconds of the host's monotonic clock.
    asked: AtomicU64,
    limit: u64,
}

/// The account. Clones are the same one.
#[derive(Debug, Clone)]
pub struct HostMemory(Arc<Account>);

impl Default for HostMemory {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl HostMemory {
    /// An account of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Account {
            used: AtomicU64::new(0),
            most: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            limit,
        }))
    }

    /// Bytes that are kept now.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// Nothing kept yet. What large calls have kept and freed until now goes back to the host.
    pub fn nothing(&self) -> Kept {
        if self.large_calls_have_ended(monotonic_ns()) {
            // SAFETY: malloc_trim takes no pointer and may be called at any time.
            unsafe { libc::malloc_trim(0) };
        }
        Kept {
            account: Some(self.clone()),
            bytes: 0,
        }
    }

    fn take(&self, bytes: u64) -> bool {
        let within = |used: u64| used.checked_add(bytes).filter(|now| *now <= self.0.limit);
        let used = &self.0.used;
        let before = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within);
        if let Ok(before) = before {
            self.0.most.fetch_max(before + bytes, Ordering::Relaxed);
        }
        before.is_ok()
    }

    /// Says once, when most of it is gone, that much was kept, if it has not said so lately.
    fn large_calls_have_ended(&self, now_ns: u64) -> bool {
        let most = self.0.most.load(Ordering::Relaxed);
        let used = self.used();
        if most < LARGE || used > most / 4 {
            return false;
        }
        let since = now_ns.saturating_sub(self.0.asked.load(Ordering::Relaxed));
        if Duration::from_nanos(since) < AGAIN_AFTER {
            return false;
        }
        self.0.most.store(used, Ordering::Relaxed);
        self.0.asked.store(now_ns, Ordering::Relaxed);
        true
    }

    fn give_back(&self, bytes: u64) {
        self.0.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What one thing keeps, given back when it goes. The default one is nobody's, and not counted.
#[derive(Debug, Default)]
pub struct Kept {
    account: Option<HostMemory>,
    bytes: u64,
}

impl Kept {
    /// Makes it at least `bytes`; `false` if there is no room, and it is as before.
    pub fn reach(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let Some(account) = self.account.as_ref().filter(|_| more > 0) else {
            return true;
        };
        if !account.take(more) {
            return false;
        }
        self.bytes = bytes;
        true
    }

    /// Makes it `bytes` more; `false` if there is no room, and it is as before.
    pub fn grow(&mut self, bytes: u64) -> bool {
        self.reach(self.bytes.saturating_add(bytes))
    }
}

impl Clone for Kept {
    /// The copy is another thing that is kept, or not counted if there is no room for it.
    fn clone(&self) -> Self {
        let account = self.account.clone();
        match account.filter(|account| account.take(self.bytes)) {
            Some(account) => Self {
                account: Some(account),
                bytes: self.bytes,
            },
            None => Self::default(),
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.give_back(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_kept_than_there_is_room_for_and_all_is_given_back() {
        let account = HostMemory::new(100);
        let (mut one, mut two) = (account.nothing(), account.nothing());
        assert!(one.grow(60) && two.grow(40));
        assert!(!one.grow(1) && !two.grow(u64::MAX));
        assert!(one.reach(10), "it is more already");
        assert_eq!(account.used(), 100);
        drop(two);
        assert!(one.reach(100) && !one.reach(101));
        let copy = one.clone();
        drop(copy);
        assert_eq!(account.used(), 100);
        drop(one);
        assert_eq!(account.used(), 0);
    }

    #[test]
    fn the_allocator_is_asked_to_give_back_once_when_what_was_large_has_gone() {
        let account = HostMemory::new(1 << 30);
        let second = 1_000_000_000;
        let now = second;
        let mut small = account.nothing();
        assert!(small.grow(LARGE / 8));
        assert!(!account.large_calls_have_ended(now), "nothing was large");
        let mut large = account.nothing();
        assert!(large.grow(LARGE));
        assert!(!account.large_calls_have_ended(now), "it is still kept");
        drop(large);
        assert!(account.large_calls_have_ended(now));
        assert!(!account.large_calls_have_ended(now), "once");
        drop(small);
        assert!(!account.large_calls_have_ended(now));
        // Many small ones are as good as a large one.
        let many: Vec<Kept> = (0..64).map(|_| account.nothing()).collect();
        let grown = many.into_iter().map(|mut kept| {
            assert!(kept.grow(LARGE / 32));
            kept
        });
        drop(grown.collect::<Vec<_>>());
        assert!(!account.large_calls_have_ended(now + second / 2), "lately");
        assert!(account.large_calls_have_ended(now + second));
    }
}
