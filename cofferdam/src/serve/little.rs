//! Keeps the service's own memory little while it is asked, too: what a request has needed, most of
//! it pages of the program, is given back when there is much of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;

use crate::run::memory;

/// Resident memory from which on some is given back, in bytes. What is aimed at is 12 MiB with 16
/// guests; the rest is for what happens between two looks.
const MUCH: u64 = 9 << 20;

/// How much it may grow before more is given back, in bytes, where it cannot be less than that.
const ROOM: u64 = 2 << 20;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What this process has.
struct Watched {
    /// When it is looked at again.
    next: Option<Instant>,
    /// How much is much, in bytes.
    much: u64,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched {
    next: None,
    much: MUCH,
});

/// Gives memory back if there is much, and it was not looked at just now.
pub fn keep() {
    let now = Instant::now();
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    if watched.next.is_some_and(|next| now < next) {
        return;
    }
    watched.next = Some(now + LOOK_EVERY);
    if resident_bytes() >= watched.much {
        watched.give_back();
    }
}

/// Gives memory back, however much there is.
pub fn give_back() {
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    watched.give_back();
}

impl Watched {
    fn give_back(&mut self) {
        memory::give_back_unused();
        self.much = much_after(resident_bytes());
    }
}

/// How much is much when this much was left.
fn much_after(left: u64) -> u64 {
    MUCH.max(left.saturating_add(ROOM))
}

/// Does so after a request.
pub async fn after(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    keep();
    response
}

/// Resident memory of this process, in bytes (`/proc/self/statm`, proc_pid_statm(5)); none if the
/// kernel does not say.
pub fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok());
    let page = rustix::param::page_size() as u64;
    pages.map_or(0, |pages: u64| pages.saturating_mul(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_given_back_is_not_tried_again_at_each_look() {
        assert_eq!(much_after(0), MUCH);
        assert_eq!(much_after(MUCH - ROOM), MUCH);
        assert_eq!(much_after(MUCH), MUCH + ROOM);
        assert_eq!(much_after(u64::MAX), u64::MAX);
    }

    #[test]
    fn this_process_has_some_memory() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        let bytes = resident_bytes();
        // Other tests run in this process meanwhile.
        assert!(bytes > 1 << 20, "{bytes}");
        assert!(
            (kib << 10) / 4 < bytes && bytes / 4 < kib << 10,
            "{bytes}, {kib} KiB"
        );
    }
}
