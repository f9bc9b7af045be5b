//! What an access to a card's register costs a guest, by the way that it takes.
//!
//! `cargo bench -p vmm --bench mapped_bars` prints one JSON object: medians over rounds, in
//! nanoseconds, of a load and a store with the loop around them. *Mapped* is a page that the card's
//! server lets be mapped, *message* the page behind it, which goes to the server and back, and
//! *exit* is one that a card in this process answers. Rounds of all three alternate in one run:
//! compare them with each other, not with another host.

#![allow(clippy::unwrap_used, reason = "bench code")]

#[path = "../tests/mapped_bars/card.rs"]
mod card;
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/mapped_bars/counting.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod counting;
#[path = "../tests/mapped_bars/server.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod server;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use card::Card;
use counting::{AT, Counting};
use server::{MAPPED, PAGE, Remote};

const ROUNDS: usize = 31;
const TIMES: u32 = 1000;

fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let remote = Remote::new();
    let far = Counting::start(|guest, slot| remote.function(&mut guest.vm, slot));
    let here = Counting::start(|_, _| Arc::new(Mutex::new(Card::new(4 * PAGE, (MAPPED, PAGE)))));
    for guest in [&far, &here] {
        guest.move_to(AT);
        guest.decode(true);
    }
    let ways = [
        (&far, AT + MAPPED),
        (&far, AT + MAPPED + PAGE),
        (&here, AT + MAPPED + PAGE),
    ];
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..ROUNDS {
        for ((guest, address), times) in ways.iter().zip(&mut times) {
            let start = Instant::now();
            guest.order(*address, TIMES);
            guest.running.report();
            times.push(start.elapsed().as_nanos() as f64 / f64::from(TIMES));
        }
    }
    let spread = times.clone().map(|mut times| {
        times.sort_unstable_by(f64::total_cmp);
        [times[times.len() / 4], times[3 * times.len() / 4]]
    });
    let [mapped, message, exit] = times.each_mut().map(|times| median(times));
    println!(
        "{{\"rounds\": {ROUNDS}, \"mapped_ns\": {mapped:.0}, \"message_ns\": {message:.0}, \"exit_ns\": {exit:.0}, \
         \"quartiles_ns\": {spread:.0?}, \"message_by_mapped\": {:.1}, \"exit_by_mapped\": {:.1}}}",
        message / mapped,
        exit / mapped
    );
    far.running.power_off();
    here.running.power_off();
}
