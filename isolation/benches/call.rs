//! What a call in the domain costs, as ratios within one run, on a hand-made guest.
//!
//! `cargo bench -p isolation` prints one JSON object: times in microseconds are medians over
//! rounds. *Exit* is one turn from P to the host and back at an `out`; *crossing* is one kernel
//! function called through its trampoline, the function being a bare `ret`; *call* is a whole
//! isolated call that writes two pages; *abort* one that faults after the same writes. The two
//! memory sizes show whether commit and abort depend on the guest's memory. *Host* is the time of a
//! whole warm call outside `KVM_RUN`, by the pages that it writes: the same code at its real speed
//! also where KVM emulates. *One of* is that of a call that writes one page while as many are kept
//! from others. Allocations and system calls are those of the largest of these calls.

#![allow(clippy::unwrap_used, reason = "bench code")]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/warm_calls/counting.rs"]
mod counting;

use std::time::Instant;

use common::*;
use counting::allocations;
use iced_x86::code_asm::*;
use isolation::domain::Domain;
use isolation::domain::transaction::CallEnd;
use kvm_bindings::kvm_regs;

const ROUNDS: usize = 31;
const CALLS: u32 = 20;
/// Crossings or exits in one call, so that the call itself does not count.
const REPEATED: u32 = 200;
/// Calls of which the host's time is taken.
const HOST_CALLS: u32 = 2000;
/// Of these, one in so many writes to all pages, so that they are kept.
const SELDOM: u32 = 8;
/// Where the pages are that are written, present, writable and not executable.
const WRITTEN: u64 = 0xffff_c900_0080_0000;
const WRITTEN_GPA: u64 = 0x30_0000;
const WRITTEN_FLAGS: u64 = 2 | 1 << 63;

/// Time of one call in microseconds, on average over one round.
fn round(guest: &Guest, domain: &mut Domain, kernel: &mut Kernel, aborts: bool) -> f64 {
    let start = Instant::now();
    for _ in 0..CALLS {
        let result = guest.call(domain, kernel);
        assert_eq!(
            matches!(result.end, CallEnd::Aborted(_)),
            aborts,
            "{result:?}"
        );
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Median time of one call in microseconds.
fn time(guest: &Guest, domain: &mut Domain, kernel: &mut Kernel, aborts: bool) -> f64 {
    median(
        (0..ROUNDS)
            .map(|_| round(guest, domain, kernel, aborts))
            .collect(),
    )
}

/// Median time of one call with the smaller guest, and how many times as long it takes with the
/// larger one. Rounds alternate, so that both see the same host.
fn compare(sizes: [u64; 2], aborts: bool) -> (f64, f64) {
    let mut both = sizes.map(|pages| {
        driver(pages, |a| {
            if aborts {
                a.ud2().unwrap();
            }
        })
    });
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for ((guest, domain), times) in both.iter_mut().zip(&mut times) {
            times.push(round(guest, domain, &mut Kernel::with_data(), aborts));
        }
    }
    let [small, large] = times.map(median);
    (small, large / small)
}

/// A driver that writes two pages and then does what `end` adds.
fn driver(pages: u64, end: impl FnOnce(&mut CodeAssembler)) -> (Guest, Domain) {
    let guest = Guest::with_memory(pages);
    guest.code(DRIVER_TEXT, |a| {
        a.mov(rcx, DRIVER_DATA).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.push(rax).unwrap();
        a.pop(rax).unwrap();
        end(a);
        a.ret().unwrap();
    });
    let domain = guest.domain();
    (guest, domain)
}

/// A driver that adds one to a word of each of the first pages, as many as its argument says, of
/// `pages`.
fn writer(pages: u64) -> (Guest, Domain, Kernel) {
    let mut guest = Guest::new();
    for page in 0..pages {
        let at = page * PAGE;
        guest.map(WRITTEN + at, WRITTEN_GPA + at, WRITTEN_FLAGS);
    }
    guest.code(DRIVER_TEXT, |a| {
        let mut top = a.create_label();
        a.mov(rcx, WRITTEN).unwrap();
        a.set_label(&mut top).unwrap();
        a.inc(qword_ptr(rcx)).unwrap();
        a.add(rcx, PAGE as i32).unwrap();
        a.dec(rdi).unwrap();
        a.jnz(top).unwrap();
        a.ret().unwrap();
    });
    let domain = guest.domain();
    let kernel = Kernel {
        writable: vec![(WRITTEN, pages * PAGE)],
        ..Kernel::default()
    };
    (guest, domain, kernel)
}

/// What a warm call costs besides `KVM_RUN`.
#[derive(Default)]
struct Host {
    /// Median, in microseconds.
    us: f64,
    /// The most of one call.
    allocations: u64,
    system_calls: u32,
}

/// What a warm call costs that writes to `written` of `pages` pages and to that of its return
/// address, if each [`SELDOM`]th writes to all.
fn host(pages: u64, written: u64) -> Host {
    let (guest, mut domain, mut kernel) = writer(pages);
    let mut host = Host::default();
    let mut call = |pages| {
        let regs = kvm_regs {
            rdi: pages,
            ..guest.entry_regs()
        };
        let start = Instant::now();
        let mut result = None;
        let allocations = allocations(|| {
            result = Some(guest.call_with(&mut domain, &mut kernel, regs));
        });
        let all = start.elapsed().as_nanos() as f64;
        let result = result.unwrap();
        assert!(matches!(result.end, CallEnd::Committed), "{result:?}");
        let us = (all - result.stats.private_ns as f64) / 1e3;
        (us, allocations, result.stats.other_syscalls)
    };
    (0..CALLS).for_each(|_| {
        call(pages);
    });
    let mut times = Vec::new();
    for number in 1..=HOST_CALLS {
        if number % SELDOM == 0 {
            call(pages);
        }
        let (us, allocations, system_calls) = call(written);
        times.push(us);
        host.allocations = host.allocations.max(allocations);
        host.system_calls = host.system_calls.max(system_calls);
    }
    host.us = median(times);
    host
}

fn repeated(a: &mut CodeAssembler, body: impl FnOnce(&mut CodeAssembler)) {
    a.push(rbx).unwrap();
    a.mov(ebx, REPEATED as i32).unwrap();
    let mut top = a.create_label();
    a.set_label(&mut top).unwrap();
    body(a);
    a.dec(ebx).unwrap();
    a.jnz(top).unwrap();
    a.pop(rbx).unwrap();
}

/// Address of the first direct call in the driver.
fn call_site(guest: &Guest) -> u64 {
    let bytes: Vec<u8> = (0..16)
        .flat_map(|word| guest.read(DRIVER_TEXT + word * 8).to_le_bytes())
        .collect();
    DRIVER_TEXT + bytes.iter().position(|byte| *byte == 0xe8).unwrap() as u64
}

fn main() {
    let small = (128 << 20) / PAGE;
    let large = (4 << 30) / PAGE;
    let kernel_function = KERNEL_TEXT + 0x100;

    let (call, call_large) = compare([small, large], false);
    let (abort, abort_large) = compare([small, large], true);

    // The serial port's is the one port that a kernel function may write; the driver calls one that
    // does nothing else.
    let (guest, mut domain) = driver(small, |a| repeated(a, |a| a.call(kernel_function).unwrap()));
    guest.code(kernel_function, |a| a.ret().unwrap());
    domain.redirect(call_site(&guest), kernel_function).unwrap();
    let crossings = time(&guest, &mut domain, &mut Kernel::with_data(), false);
    let crossing = (crossings - call) / f64::from(REPEATED);

    let device = 0xfeb0_0000u64;
    let (guest, mut domain) = driver(small, |a| {
        a.mov(rdx, DEVICE).unwrap();
        repeated(a, |a| a.mov(dword_ptr(rdx), eax).unwrap());
    });
    assert_eq!(device, DEVICE_GPA);
    let mut kernel = Kernel::with_data();
    let stores = time(&guest, &mut domain, &mut kernel, false);
    let exit = (stores - call) / f64::from(REPEATED);

    let by_pages = |host: fn(u64) -> Host| {
        let hosts = [1, 9, 33].map(|pages| (pages, host(pages)));
        let most = hosts.iter().fold((0, 0), |most, (_, host)| {
            (most.0.max(host.allocations), most.1.max(host.system_calls))
        });
        let hosts = hosts.map(|(pages, host)| format!("\"{}\":{:.2}", pages + 1, host.us));
        (hosts.join(","), most)
    };
    let (all, (allocations, system_calls)) = by_pages(|pages| host(pages, pages));
    let (one_of, _) = by_pages(|pages| host(pages, 1));
    println!(
        "{{\"exit_us\":{exit:.3},\"crossing_us\":{crossing:.3},\"crossing_per_exit\":{:.3},\
         \"call_us\":{call:.1},\"call_per_exit\":{:.2},\"abort_us\":{abort:.1},\"abort_per_exit\":{:.2},\
         \"call_4g_per_128m\":{:.3},\"abort_4g_per_128m\":{:.3},\"host_us_by_pages\":{{{all}}},\"host_us_one_of\":{{{one_of}}},\
         \"allocations\":{allocations},\"system_calls\":{system_calls}}}",
        crossing / exit,
        call / exit,
        abort / exit,
        call_large,
        abort_large,
    );
}
