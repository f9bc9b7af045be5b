//! A function by turns under everything at once, by chance: switches, guests that come, go, are
//! paused and saved, resets by drivers, memory that comes and goes, steps that fail. After each of it there is
//! one guest whose the device is, or nobody; and each guest finds its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::{Rng, SeedableRng};
use rand_xorshift::XorShiftRng;
use recovery::switch::Step;

use super::device::{CTRL, Device, RCTL, RDBAL, RDLEN, RESET, TCTL};
use super::guest::{Guest, MEMORY, host, wait};
use super::station;
use crate::device::ParkedAs;
use crate::device::host::Host;
use crate::device::passed::PassedCard;
use crate::options::VmName;

const NAMES: [&str; 4] = ["one", "two", "three", "four"];
/// Things that are done to it in the short form.
const ROUNDS: u32 = 400;
/// The full form: as long as this.
const FULL: Duration = Duration::from_secs(600);

/// How often what was done.
#[derive(Debug, Default)]
struct Counts {
    boots: u32,
    kills: u32,
    kills_amid: u32,
    switches: u32,
    faults: u32,
    rests: u32,
    resets: u32,
    saves: u32,
}

struct Soak {
    host: Arc<Host<PassedCard>>,
    device: Device,
    guests: [Option<Guest>; NAMES.len()],
    away: [bool; NAMES.len()],
    random: XorShiftRng,
    tail: u32,
    counts: Counts,
}

fn vm(index: usize) -> VmName {
    NAMES[index].parse().unwrap()
}

impl Soak {
    fn new(seed: u64) -> Self {
        let (host, device) = host(ParkedAs::Stall, NAMES.len());
        Self {
            host,
            device,
            guests: [const { None }; NAMES.len()],
            away: [false; NAMES.len()],
            random: XorShiftRng::seed_from_u64(seed),
            tail: 0,
            counts: Counts::default(),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.random.next_u32() as usize) % bound
    }

    fn alive(&self) -> Vec<usize> {
        let all = 0..NAMES.len();
        all.filter(|index| self.guests[*index].is_some()).collect()
    }

    fn boot(&mut self, index: usize) {
        self.guests[index] = Some(Guest::boot(&self.host, NAMES[index], index as u8 + 1));
        self.away[index] = false;
        self.counts.boots += 1;
    }

    /// Its connection ends; waits until that is known.
    fn await_end(&self, index: usize) {
        wait("its end", || {
            let contexts = self.host.contexts();
            let mut contexts = contexts.iter();
            !contexts.any(|one| one.vm.as_str() == NAMES[index] && one.is_taken())
        });
    }

    /// Something is done to one of the VMs, with or without a step that fails meanwhile.
    fn act(&mut self) {
        let index = self.below(NAMES.len());
        let Some(guest) = &mut self.guests[index] else {
            self.boot(index);
            return;
        };
        match self.random.next_u32() % 17 {
            16 => self.save(index),
            0..7 => self.switch(index),
            7..9 => self.rest(index),
            9..11 => self.kill(index),
            11..13 => self.kill_amid(index),
            13 => {
                guest.write(CTRL, RESET);
                guest.write(RDBAL, guest.ring());
                guest.write(RDLEN, 0x100);
                guest.write(RCTL, 2);
                guest.write(TCTL, 2);
                self.counts.resets += 1;
            }
            14 => {
                guest.give_more();
                guest.take_back();
            }
            _ => {
                guest.reset();
                guest.start();
                self.counts.resets += 1;
            }
        }
    }

    /// Has a step fail in what is done next, or not. Loading does not: the device of the test then
    /// keeps a register that guests have stored to while they were parked, of which it may hold
    /// less.
    fn may_fail(&mut self) {
        let step = Step::ALL[self.below(Step::ALL.len())];
        let fails = self.random.next_u32().is_multiple_of(4) && step != Step::Load;
        self.device.lock().fails = fails.then_some(step);
        self.counts.faults += u32::from(fails);
    }

    /// It may be refused, or fail: it is looked at afterwards who has the device.
    fn switch(&mut self, to: usize) {
        self.may_fail();
        match self.random.next_u32() % 8 {
            0 => self.host.slice(),
            _ => {
                let _ = self.host.switch_to(&vm(to));
            }
        }
        self.device.lock().fails = None;
        self.counts.switches += 1;
    }

    fn rest(&mut self, index: usize) {
        self.may_fail();
        self.away[index] ^= true;
        let _ = self.host.set_away(&vm(index), self.away[index]);
        self.device.lock().fails = None;
        self.counts.rests += 1;
    }

    fn kill(&mut self, index: usize) {
        self.may_fail();
        self.guests[index] = None;
        self.await_end(index);
        self.device.lock().fails = None;
        self.counts.kills += 1;
    }

    /// While switches are under way that others ask for.
    fn kill_amid(&mut self, index: usize) {
        let guest = self.guests[index].take();
        let pause = Duration::from_micros(u64::from(self.random.next_u32() % 3000));
        let others = self.alive();
        let host = &self.host;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(pause);
                drop(guest);
            });
            for to in [index].into_iter().chain(others) {
                let _ = host.switch_to(&vm(to));
            }
        });
        self.await_end(index);
        self.counts.kills_amid += 1;
    }

    /// Saved, while others may get the device; it goes on, or from what was saved of it.
    fn save(&mut self, index: usize) {
        let (switches, leaves) = (self.below(2) == 0, self.below(2) == 0);
        let to = self.below(NAMES.len());
        let guest = self.guests[index].as_mut().unwrap();
        guest.stop();
        if switches {
            let _ = self.host.switch_to(&vm(to));
        }
        let state = guest.save();
        match leaves {
            false => guest.go_on(),
            true => {
                self.guests[index] = None;
                self.await_end(index);
                let mac = index as u8 + 1;
                let guest = Guest::from_saved(&self.host, NAMES[index], mac, &state);
                self.guests[index] = Some(guest);
                self.away[index] = false;
            }
        }
        self.counts.saves += 1;
    }

    /// Everybody finds its own, and the device is of whoever is given it.
    fn look(&mut self, round: u32) {
        for index in self.alive() {
            let guest = self.guests[index].as_mut().unwrap();
            assert_eq!(guest.read(RDBAL), guest.ring(), "{round}: {}", NAMES[index]);
            assert_eq!(station(guest), guest.mac, "{round}: {}", NAMES[index]);
        }
        let alive = self.alive().into_iter();
        let running: Vec<_> = alive.filter(|index| !self.away[*index]).collect();
        if running.is_empty() {
            return;
        }
        let to = running[self.below(running.len())];
        // A switch that somebody's end began may be under way still.
        wait("a turn", || {
            let has = self.host.turn().as_deref() == Some(NAMES[to]);
            let has = has || self.host.switch_to(&vm(to)).is_ok();
            has && self.device.lock().mapped == MEMORY
        });
        self.tail += 1;
        let (tail, guest) = (self.tail, self.guests[to].as_mut().unwrap());
        guest.send(tail);
        assert_eq!(guest.read(RDBAL), guest.ring());
        let state = self.device.lock();
        assert_eq!(state.sent.last(), Some(&tail), "{round}: {}", NAMES[to]);
        assert_eq!(state.address(), guest.mac, "{round}");
        assert_eq!(state.get(RDBAL), guest.ring(), "{round}");
        assert_eq!((state.masters, state.mapped), (true, MEMORY), "{round}");
    }
}

fn soak(seed: u64, mut goes_on: impl FnMut(u32) -> bool) {
    println!("seed {seed}");
    let mut soak = Soak::new(seed);
    let mut round = 0;
    while goes_on(round) {
        soak.act();
        soak.look(round);
        round += 1;
    }
    let status = soak.host.status();
    println!(
        "{round} rounds, {:?}, {} switches in all, of which {} failed",
        soak.counts, status.switch_count, status.failed_switches
    );
    // All of them go: nobody has it, and it reaches nothing.
    soak.guests = [const { None }; NAMES.len()];
    wait("silence", || {
        soak.host.turn().is_none() && soak.device.lock().is_silent()
    });
}

#[test]
fn whatever_happens_to_a_function_by_turns_everybody_finds_its_own() {
    soak(1, |round| round < ROUNDS);
}

/// On request: ten minutes, and another seed each time, or that of `COFFERDAM_SEED`.
mod long {
    use super::*;

    #[test]
    #[ignore = "ten minutes: asked for by name"]
    fn ten_minutes_of_whatever_happens_to_a_function_by_turns() {
        let given = std::env::var("COFFERDAM_SEED").ok();
        let seed = given.map_or_else(|| std::process::id().into(), |text| text.parse().unwrap());
        let begin = Instant::now();
        soak(seed, |_| begin.elapsed() < FULL);
    }
}
