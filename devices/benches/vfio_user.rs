//! What an access costs to a card that another thread serves over a socket, beside the same card in
//! this one.
//!
//! `cargo bench -p devices` prints one JSON object: medians in nanoseconds over rounds. *Read* is a
//! register that is read, there and back. *Posted* is a store that nobody waits for, of those in
//! bursts of 64; *done* is such a store when the read behind the burst has come back, so that all
//! of it was carried out. *Written* is a store that is waited for. *Here* is a read in the same
//! process. Rounds of all of them alternate.

#![allow(clippy::unwrap_used, reason = "bench code")]

#[path = "../tests/vfio_user/support.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod support;

use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use support::{Host, Machine};

const ROUNDS: usize = 2001;
const BURST: u32 = 64;
/// Device status: nothing happens when it is read.
const STATUS: u64 = 0x8;
/// Receive address: memory, as far as stores go.
const SCRATCH: u64 = 0x5600;

fn median(times: &mut [Duration], parts: u32) -> u128 {
    times.sort_unstable();
    (times[times.len() / 2] / parts).as_nanos()
}

fn main() {
    let host = Host::new("e1000");
    let (machine, _served) = Machine::on(&host);
    let mut nic = machine.nic.lock().unwrap();
    let mut data = [0; 4];
    let mut times: [Vec<Duration>; 5] = Default::default();
    let measure = |times: &mut Vec<Duration>, work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        times.push(start.elapsed());
    };
    let [read, posted, done, written, here] = &mut times;
    for round in 0..ROUNDS {
        measure(read, &mut || nic.bar_read(0, STATUS, &mut data));
        let burst = Instant::now();
        measure(posted, &mut || {
            for _ in 0..BURST {
                nic.bar_write(0, SCRATCH, &(round as u32).to_le_bytes());
            }
        });
        nic.bar_read(0, SCRATCH, &mut data);
        done.push(burst.elapsed());
        measure(written, &mut || nic.bar_write(2, 0, &0_u32.to_le_bytes()));
        let mut function = host.offered.function.lock().unwrap();
        measure(here, &mut || function.bar_read(0, STATUS, &mut data));
    }
    println!(
        "{{\"rounds\": {ROUNDS}, \"read_ns\": {}, \"posted_ns\": {}, \"done_ns\": {}, \"written_ns\": {}, \"here_ns\": {}}}",
        median(read, 1),
        median(posted, BURST),
        median(done, BURST),
        median(written, 1),
        median(here, 1),
    );
}
