//! A function by its drivers under everything at once, by chance: switches, guests that come, go,
//! are paused and begin anew, memory that comes and goes, drivers that cannot, and steps that fail.
//! After each of it there is one guest whose driver has the device, or nobody.

use std::time::Instant;

use rand_core::{Rng, SeedableRng};
use rand_xorshift::XorShiftRng;

use super::*;

const NAMES: [&str; 4] = ["one", "two", "three", "four"];
/// Things that are done to it in the short form.
const ROUNDS: u32 = 300;
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
    restarts: u32,
}

struct Soak {
    host: Arc<Host<DrivenCard>>,
    vms: Vms,
    away: [bool; NAMES.len()],
    random: XorShiftRng,
    tail: u32,
    counts: Counts,
}

impl Soak {
    fn new(seed: u64) -> Self {
        let (host, vms) = host();
        Self {
            host,
            vms,
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
        let all = lock(&self.vms.all);
        (0..NAMES.len())
            .filter(|index| all.contains_key(NAMES[*index]))
            .collect()
    }

    /// Its connection ends; waits until that is known.
    fn await_end(&self, index: usize) {
        wait("its end", || {
            let contexts = self.host.contexts();
            let mut contexts = contexts.iter();
            !contexts.any(|one| one.vm.as_str() == NAMES[index] && one.is_taken())
        });
    }

    /// Something is done to one of the VMs, with or without something that fails meanwhile.
    fn act(&mut self) {
        let index = self.below(NAMES.len());
        if !self.alive().contains(&index) {
            self.vms.boot(&self.host, NAMES[index], index as u8 + 1);
            self.away[index] = false;
            self.counts.boots += 1;
            return;
        }
        match self.random.next_u32() % 16 {
            0..7 => {
                self.may_fail(index);
                // It may be refused, or fail: it is looked at afterwards who has the device.
                let _ = self.host.switch_to(&name(NAMES[index]));
                self.counts.switches += 1;
            }
            7..9 => {
                self.may_fail(index);
                self.away[index] ^= true;
                let _ = self.host.set_away(&name(NAMES[index]), self.away[index]);
                self.counts.rests += 1;
            }
            9..11 => {
                self.may_fail(index);
                self.vms.end(NAMES[index]);
                self.await_end(index);
                self.counts.kills += 1;
            }
            11..13 => self.kill_amid(index),
            13 => self.vms.with(NAMES[index], |one| {
                one.guest.give_more();
                one.guest.take_back();
            }),
            _ => {
                self.vms.begin_anew(NAMES[index]);
                self.counts.restarts += 1;
            }
        }
        self.vms.device.lock().fails = None;
        *lock(&self.vms.fails) = None;
    }

    /// Has a step or a driver fail in what is done next, or not.
    fn may_fail(&mut self, index: usize) {
        let fails = self.random.next_u32().is_multiple_of(4);
        let step = [Step::Unmap, Step::Map, Step::Resume][self.below(3)];
        let other = NAMES[self.below(NAMES.len())];
        let driver = match self.random.next_u32() % 4 {
            0 => format!("{other} suspends"),
            1 => format!("{other} suspends, late"),
            2 => format!("{} resumes", NAMES[index]),
            _ => format!("{} resumes, late", NAMES[index]),
        };
        match (fails, self.random.next_u32() % 2) {
            (false, _) => return,
            (true, 0) => self.vms.device.lock().fails = Some(step),
            (true, _) => *lock(&self.vms.fails) = Some(driver),
        }
        self.counts.faults += 1;
    }

    /// While switches are under way that others ask for.
    fn kill_amid(&mut self, index: usize) {
        let others = self.alive();
        let pause = Duration::from_micros(u64::from(self.random.next_u32() % 3000));
        let (host, vms) = (&self.host, &self.vms);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(pause);
                vms.end(NAMES[index]);
            });
            for to in others {
                let _ = host.switch_to(&name(NAMES[to]));
            }
        });
        self.await_end(index);
        self.counts.kills_amid += 1;
    }

    /// Whoever is given the device has it to itself, and the others find none that answers.
    fn look(&mut self, round: u32) {
        let alive = self.alive();
        let running: Vec<_> = alive.iter().filter(|index| !self.away[**index]).collect();
        if running.is_empty() {
            return;
        }
        let to = *running[self.below(running.len())];
        let ring = self.vms.with(NAMES[to], |one| one.guest.ring());
        // A switch that somebody's end began may be under way still.
        wait("a turn", || {
            let has = self.host.turn().as_deref() == Some(NAMES[to]);
            let has = has || self.host.switch_to(&name(NAMES[to])).is_ok();
            let state = self.vms.device.lock();
            has && state.get(RDBAL) == ring && state.masters
        });
        self.tail += 1;
        let tail = self.tail;
        self.vms.with(NAMES[to], |one| {
            one.guest.send(tail);
            assert_eq!(one.guest.read(RDBAL), ring, "{round}");
        });
        for other in alive.iter().filter(|other| **other != to) {
            self.vms.with(NAMES[*other], |one| {
                one.guest.write(RDBAL, 7);
                assert_eq!(one.guest.read(RDBAL), NOTHING, "{round}");
            });
        }
        let state = self.vms.device.lock();
        assert_eq!(state.sent.last(), Some(&tail), "{round}: {}", NAMES[to]);
        assert_eq!(state.get(RDBAL), ring, "{round}");
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
    lock(&soak.vms.all).clear();
    wait("silence", || {
        soak.host.turn().is_none() && soak.vms.device.lock().is_silent()
    });
}

#[test]
fn whatever_happens_to_a_function_by_its_drivers_one_of_them_has_it_or_nobody() {
    soak(1, |round| round < ROUNDS);
}

/// On request: ten minutes, and another seed each time, or that of `COFFERDAM_SEED`.
mod long {
    use super::*;

    #[test]
    #[ignore = "ten minutes: asked for by name"]
    fn ten_minutes_of_whatever_happens_to_a_function_by_its_drivers() {
        let given = std::env::var("COFFERDAM_SEED").ok();
        let seed = given.map_or_else(|| std::process::id().into(), |text| text.parse().unwrap());
        let begin = Instant::now();
        soak(seed, |_| begin.elapsed() < FULL);
    }
}
