//! A hand-made driver that is gone and has left timers: in its variables, in an object of its own,
//! and for work.

use super::*;
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::TestGuest;
use crate::guest::paging::{Entry, Levels};
use crate::guest::symbols::read_kallsyms;

const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
/// The driver's text and variables.
const TEXT: u64 = 0xffff_ffff_c000_1000;
const VARIABLES: u64 = 0xffff_ffff_c000_3000;
/// Objects of whoever.
const OBJECTS: u64 = 0xffff_8880_0000_0000;
/// Per-CPU memory of two processors, and where the wheels are in it.
const AREAS: [u64; 2] = [0xffff_8880_0010_0000, 0xffff_8880_0020_0000];
const BASES: u64 = 0x2000;
const OFFSETS: u64 = 0xffff_ffff_8200_0000;
const CPUS: u64 = OFFSETS + 0x100;
const KERNEL_FUNCTION: u64 = 0xffff_ffff_8100_0000;
const WORK_TIMER: u64 = KERNEL_FUNCTION + 0x100;

/// Bytes of a wheel: lock, running timer, three slots.
const BASE_BYTES: u64 = 40;

fn types() -> Btf {
    let mut e = Encoder::new(None);
    let (word, half) = (e.int("u64", 8, 0), e.int("u32", 4, 0));
    let links = e.structure("hlist_node", 16, &[("next", word, 0), ("pprev", word, 8)]);
    let timer = [
        ("entry", links, 0),
        ("expires", word, 16),
        ("function", word, 24),
    ];
    let timer = e.structure("timer_list", 40, &timer);
    let work = e.structure("work_struct", 32, &[("data", word, 0), ("func", word, 24)]);
    let delayed = [("work", work, 0), ("timer", timer, 32)];
    e.structure("delayed_work", 72, &delayed);
    let slots = e.array(word, 3);
    let base = [
        ("lock", half, 0),
        ("running_timer", word, 8),
        ("vectors", slots, 16),
    ];
    e.structure("timer_base", 40, &base);
    Btf::parse(&e.bytes(), None).unwrap()
}

struct Bench {
    guest: TestGuest,
    wheels: TimerWheels,
}

impl Bench {
    fn new() -> Self {
        let text = format!(
            "{BASES:x} A timer_bases\n{:x} A behind\n{OFFSETS:x} D __per_cpu_offset\n{CPUS:x} D nr_cpu_ids\n\
             {WORK_TIMER:x} T delayed_work_timer_fn\n",
            BASES + 2 * BASE_BYTES
        );
        let symbols = read_kallsyms(text.as_bytes(), |_| true).unwrap();
        let mut guest = TestGuest::new(Levels::Four);
        for page in [VARIABLES, OBJECTS] {
            guest.put(Gva(page), &[0; 4096], DATA);
        }
        for area in AREAS {
            guest.put(Gva(area + BASES), &[0; 2 * BASE_BYTES as usize], DATA);
        }
        let mut bench = Self {
            guest,
            wheels: TimerWheels::find(&types(), &symbols).unwrap(),
        };
        bench.set(OFFSETS, AREAS[0]);
        bench.set(OFFSETS + 8, AREAS[1]);
        bench.set(CPUS, 0xffff_ffff_0000_0002);
        bench
    }

    fn set(&mut self, at: u64, word: u64) {
        self.guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }

    fn word(&self, at: u64) -> u64 {
        self.guest.virt().read_u64(Gva(at)).unwrap()
    }

    /// `hlist_add_head`, of a timer with this function.
    fn arm(&mut self, (cpu, base, slot): (usize, u64, u64), timer: u64, function: u64) {
        let head = AREAS[cpu] + BASES + base * BASE_BYTES + 16 + slot * 8;
        let first = self.word(head);
        if first != 0 {
            self.set(first + 8, timer);
        }
        self.set(timer, first);
        self.set(timer + 8, head);
        self.set(head, timer);
        self.set(timer + 24, function);
    }

    fn left(&self) -> Result<TimersLeft, InUse> {
        let range = |at| GvaRange::new(Gva(at), 0x1000).unwrap();
        let virt = self.guest.virt();
        self.wheels.left(&virt, &[range(VARIABLES)], &[range(TEXT)])
    }

    /// Takes them out, and says how many there were.
    fn take_out(&mut self) -> usize {
        let left = self.left().unwrap();
        for (at, word) in &left.stores {
            self.set(at.0, *word);
        }
        left.count
    }

    /// The timers of a slot, each pointed back at.
    fn pending(&self, (cpu, base, slot): (usize, u64, u64)) -> Vec<u64> {
        let mut from = AREAS[cpu] + BASES + base * BASE_BYTES + 16 + slot * 8;
        let mut all = Vec::new();
        loop {
            let next = self.word(from);
            if next == 0 {
                return all;
            }
            assert_eq!(self.word(next + 8), from);
            all.push(next);
            from = next;
        }
    }
}

/// `wg_ratelimiter_init`: delayed work in the module's variables, whose timer has a function of the
/// kernel's.
#[test]
fn timers_of_a_driver_that_is_gone_are_found_by_where_they_are_and_by_what_they_call() {
    let mut bench = Bench::new();
    let slot = (0, 1, 2);
    let others = [OBJECTS, OBJECTS + 0x100, OBJECTS + 0x200];
    let in_variables = VARIABLES + 0x20;
    let (own, for_work, others_work) = (OBJECTS + 0x300, OBJECTS + 0x420, OBJECTS + 0x520);
    bench.set(for_work - 32 + 24, TEXT + 0x40);
    bench.set(others_work - 32 + 24, KERNEL_FUNCTION);
    bench.arm(slot, others[0], KERNEL_FUNCTION);
    bench.arm(slot, in_variables, WORK_TIMER);
    bench.arm(slot, own, TEXT + 0x10);
    bench.arm(slot, others[1], KERNEL_FUNCTION);
    bench.arm(slot, for_work, WORK_TIMER);
    bench.arm(slot, others_work, WORK_TIMER);
    bench.arm((1, 0, 0), VARIABLES + 0x80, TEXT);
    bench.arm((1, 1, 1), others[2], KERNEL_FUNCTION);
    assert_eq!(bench.take_out(), 4);
    assert_eq!(bench.pending(slot), [others_work, others[1], others[0]]);
    assert_eq!(bench.pending((1, 0, 0)), Vec::<u64>::new());
    assert_eq!(bench.pending((1, 1, 1)), [others[2]]);
    // They are not pending any more (`timer_pending`).
    for timer in [in_variables, own, for_work, VARIABLES + 0x80] {
        assert_eq!(bench.word(timer + 8), 0);
    }
    assert_eq!(bench.take_out(), 0);
}

#[test]
fn wheels_that_somebody_uses_are_left_alone() {
    for (word, value) in [(0, 1), (8, VARIABLES)] {
        let mut bench = Bench::new();
        bench.arm((0, 0, 0), VARIABLES, TEXT);
        bench.set(AREAS[1] + BASES + BASE_BYTES + word, value);
        assert_eq!(bench.left(), Err(InUse));
        bench.set(AREAS[1] + BASES + BASE_BYTES + word, 0);
        assert_eq!(bench.take_out(), 1);
    }
}

#[test]
fn a_list_that_leads_nowhere_or_has_no_end_is_left_alone() {
    let mut bench = Bench::new();
    bench.arm((0, 0, 0), OBJECTS, KERNEL_FUNCTION);
    bench.arm((0, 0, 0), VARIABLES, TEXT);
    bench.set(OBJECTS, 0xdead_0000_0000_0300);
    assert_eq!(bench.left(), Ok(TimersLeft::default()));
    bench.set(OBJECTS, VARIABLES);
    assert_eq!(bench.left(), Ok(TimersLeft::default()));
}
