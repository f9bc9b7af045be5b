//! What the sandbox costs: `cargo bench -p cofferdam --bench sandbox [-- ROUNDS]`, on a host with
//! KVM.
//!
//! VMs with the sandbox and without it run in turn, two kinds of guest: one that writes to a port
//! that nobody listens at, an exit each time, and one that sends back over its serial port what a
//! client sends it, one byte at a time, over a unix socket. Printed are the median of each, and the
//! median, smallest and largest of the ratios of the pairs.

#![allow(
    clippy::unwrap_used,
    reason = "a measurement ends where something unexpected happens"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::place::{LIMIT, Place, end};
use common::{ECHO_CODE, EM_X86_64, elf};

/// Pairs of runs where nobody says.
const ROUNDS: usize = 20;

/// Exits of the guest that makes some.
const EXITS: u32 = 100_000;

/// Bytes that go there and back.
const BYTES: usize = 5000;

/// Writes [`EXITS`] times to port 0x80, then turns the machine off.
fn exits_code() -> Vec<u8> {
    let mut code = vec![0xb9]; // mov ecx, EXITS
    code.extend(EXITS.to_le_bytes());
    code.extend([0xe6, 0x80]); // out 0x80, al
    code.extend([0xff, 0xc9]); // dec ecx
    code.extend([0x75, 0xfa]); // jnz to the out
    code.extend([0x66, 0xba, 0x00, 0x06]); // mov dx, 0x600 (sleep control)
    code.extend([0xb0, 0x34]); // mov al, SLP_EN and soft-off
    code.extend([0xee, 0xf4]); // out dx, al; hlt
    code
}

/// A run of the guest that exits, from its start to its end.
fn exits(place: &Place, kernel: &str, sandbox: &str) -> Duration {
    let began = Instant::now();
    let output = place.run(&format!(
        "--name exits --memory 32M --kernel {kernel} --sandbox {sandbox}"
    ));
    assert!(output.status.success(), "{output:?}");
    began.elapsed()
}

/// All bytes there and back.
fn echo(place: &Place, kernel: &str, sandbox: &str) -> Duration {
    let socket = place.path("serial");
    let words = format!(
        "--memory 32M --serial unix={} --sandbox {sandbox}",
        socket.display()
    );
    let vm = place.start("echo", kernel, &words);
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut there_and_back = || {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    };
    (0..BYTES / 10).for_each(|_| there_and_back());
    let began = Instant::now();
    (0..BYTES).for_each(|_| there_and_back());
    let took = began.elapsed();
    end(place, vm, &[]);
    took
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // Cargo passes `--bench`.
    let mut numbers = std::env::args().filter_map(|word| word.parse().ok());
    let rounds = numbers.next().unwrap_or(ROUNDS).max(1);
    let place = Place::new();
    let exits_kernel = place.file("exits", &elf(EM_X86_64, &exits_code()));
    let echo_kernel = place.file("echo", &elf(EM_X86_64, &ECHO_CODE));
    type Run = fn(&Place, &str, &str) -> Duration;
    let guests: [(&str, &str, u32, Run); 2] = [
        ("exits", &exits_kernel, EXITS, exits),
        ("bytes there and back", &echo_kernel, BYTES as u32, echo),
    ];
    for (what, kernel, count, run) in guests {
        let (mut with, mut without, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            // Who comes first changes: what goes on beside it does too.
            let order = if round % 2 == 0 {
                ["on", "off"]
            } else {
                ["off", "on"]
            };
            let [first, second] = order.map(|sandbox| run(&place, kernel, sandbox).as_secs_f64());
            let (on, off) = if round % 2 == 0 {
                (first, second)
            } else {
                (second, first)
            };
            with.push(on * 1e6 / f64::from(count));
            without.push(off * 1e6 / f64::from(count));
            ratios.push(on / off);
        }
        let ratio = median(&mut ratios);
        println!(
            "{count} {what}, {rounds} pairs: with {:.2} us each, without {:.2} us; ratio {ratio:.3} ({:.3} to {:.3})",
            median(&mut with),
            median(&mut without),
            ratios[0],
            ratios[rounds - 1],
        );
    }
    // Nothing of a VM is left.
    place.assert_empty();
}
