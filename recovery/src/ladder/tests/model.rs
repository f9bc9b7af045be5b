//! The ladder against a model of it that is written another way.

use proptest::prelude::*;

use super::*;

/// Something that happens to a ladder.
#[derive(Debug, Clone, Copy)]
enum Event {
    Fault {
        entry: usize,
        attempts: u32,
        unheard: bool,
        half_done: bool,
        device_lost: bool,
        out_of_time: bool,
        in_a_row: bool,
        after_ns: u64,
    },
    BeginsAnew,
    Resumed(bool),
    Restarted(bool),
    Reset(bool),
    WentBack(bool),
    NotIsolated,
    IsolatedAgain,
}

const ENTRIES: [&str; 3] = ["a", "b", "c"];

fn events() -> impl Strategy<Value = Vec<Event>> {
    let fault = (
        0..ENTRIES.len(),
        1..5_u32,
        any::<bool>(),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.8),
        0..MINUTE_NS,
    );
    let fault = fault.prop_map(
        |(entry, attempts, unheard, half_done, device_lost, out_of_time, in_a_row, after_ns)| {
            Event::Fault {
                entry,
                attempts,
                unheard,
                half_done,
                device_lost,
                out_of_time,
                in_a_row,
                after_ns: after_ns / 8,
            }
        },
    );
    let event = prop_oneof![
        8 => fault,
        2 => any::<bool>().prop_map(Event::Resumed),
        2 => any::<bool>().prop_map(Event::Restarted),
        1 => any::<bool>().prop_map(Event::Reset),
        1 => any::<bool>().prop_map(Event::WentBack),
        1 => Just(Event::BeginsAnew),
        1 => Just(Event::NotIsolated),
        1 => Just(Event::IsolatedAgain),
    ];
    prop::collection::vec(event, 0..80)
}

fn configs() -> impl Strategy<Value = LadderConfig> {
    let on_fault = || prop::sample::select(&OnFault::ALL[..]);
    (
        prop::option::of(on_fault()),
        prop::collection::btree_map(
            prop::sample::select(&ENTRIES[..]).prop_map(str::to_owned),
            on_fault(),
            0..3,
        ),
        0..20_u32,
        0..4_u32,
        1..60_u32,
        prop::sample::select(&[MayReset::No, MayReset::Boot, MayReset::Snapshot][..]),
    )
        .prop_map(
            |(
                on_fault,
                per_entry,
                recoveries_per_minute,
                retries,
                failures_in_a_row,
                may_reset_guest,
            )| LadderConfig {
                on_fault,
                per_entry,
                recoveries_per_minute,
                retries,
                failures_in_a_row,
                may_reset_guest,
            },
        )
}

/// A ladder that keeps everything that ever happened and works out its state from that.
struct Model {
    config: LadderConfig,
    recovered_at: Vec<u64>,
    lost_at: Vec<u64>,
    /// Failures that count, by function: whether the one before failed too, and as how many.
    failures: Vec<(String, bool, u32)>,
    /// The same of those while a rung was tried; as 0 where none was, or where there were too many
    /// by then.
    meanwhile: Vec<(String, bool, u32)>,
    /// Whether a function rested since the device last began anew, or since no rung was tried.
    rested: bool,
    /// Rungs tried for functions that fail again and again: when, and after how many of `failures`.
    tried: Vec<(String, u64, usize)>,
    state: State,
    rungs: Rungs,
    failed_at: u64,
    went_back_at: Option<u64>,
}

impl Model {
    fn fault(&mut self, fault: &Fault<'_>) -> Decision {
        self.failed_at = fault.now_ns;
        let Fault {
            entry,
            attempts,
            unheard,
            half_done,
            device_lost,
            out_of_time,
            in_a_row: _,
            now_ns: now,
        } = *fault;
        if self.state == State::Stopped {
            return Decision::Stop;
        }
        let recent = self.recovered_at.iter().filter(|at| now - **at < MINUTE_NS);
        let wanted = match (self.config.per_entry.get(entry), self.config.on_fault) {
            (Some(own), _) => *own,
            (None, Some(general)) => general,
            (None, None) if unheard => OnFault::Retry,
            (None, None) => OnFault::Error,
        };
        let lost_lately = self.lost_at.iter().any(|at| now - at < MINUTE_NS);
        let wanted = match wanted {
            OnFault::Stop | OnFault::Restart => wanted,
            _ if half_done || device_lost && lost_lately => OnFault::Restart,
            _ if device_lost => OnFault::Resume,
            _ => wanted,
        };
        let over = recent.count() >= self.config.recoveries_per_minute as usize;
        let keeps_failing = !over && self.keeps_failing(fault);
        let livelock = if over { None } else { self.livelock(fault) };
        let wanted = match (wanted, livelock) {
            (_, Some(OnFault::Stop)) => OnFault::Stop,
            (OnFault::Error | OnFault::Retry, Some(rung)) => rung,
            (OnFault::Resume, Some(OnFault::Restart)) => OnFault::Restart,
            (wanted, _) => wanted,
        };
        if !over {
            self.recovered_at.push(now);
            self.lost_at.extend(device_lost.then_some(now));
        }
        if over || wanted == OnFault::Stop {
            self.state = State::Stopped;
            self.rungs.stops += 1;
            return Decision::Stop;
        }
        let here = self.state == State::Running || self.state == State::Resuming;
        let is_begun = wanted == OnFault::Restart && here;
        if keeps_failing && !is_begun {
            self.rungs.errors += 1;
            self.rungs.rests += 1;
            self.rested = true;
            return Decision::Rest;
        }
        if wanted == OnFault::Retry && attempts <= self.config.retries && !out_of_time {
            self.rungs.retries += 1;
            return Decision::Retry;
        }
        self.rungs.errors += 1;
        if wanted == OnFault::Resume && self.state == State::Running {
            self.state = State::Resuming;
            self.rungs.resumes += 1;
            return Decision::Resume;
        }
        if is_begun {
            self.state = State::Restarting;
            self.rungs.restarts += 1;
            return Decision::Restart;
        }
        Decision::Error
    }

    /// Whether a function rests because it goes on failing while a rung is tried.
    fn keeps_failing(&mut self, fault: &Fault<'_>) -> bool {
        if fault.attempts > 1 && !fault.out_of_time {
            return false;
        }
        let entry = fault.entry.to_owned();
        match self.state {
            State::Unisolated => return false,
            State::Running => {
                self.meanwhile.push((entry, true, 0));
                return false;
            }
            _ => {}
        }
        let counts = if fault.out_of_time { HANG } else { 1 };
        self.meanwhile.push((entry.clone(), fault.in_a_row, counts));
        let mut mine = self.meanwhile.iter().rev().filter(|one| one.0 == entry);
        let mut row = 0;
        for (_, in_a_row, counts) in mine.by_ref().take_while(|one| one.2 > 0) {
            row += counts;
            if !in_a_row {
                break;
            }
        }
        let too_many = row >= self.config.failures_in_a_row;
        if too_many {
            self.meanwhile.push((entry, true, 0));
        }
        too_many
    }

    /// The rung to be tried because this function fails again and again.
    fn livelock(&mut self, fault: &Fault<'_>) -> Option<OnFault> {
        let is_counted = fault.attempts == 1 || fault.out_of_time;
        if self.state != State::Running || !is_counted {
            return None;
        }
        let entry = fault.entry.to_owned();
        let counts = if fault.out_of_time { HANG } else { 1 };
        self.failures.push((entry, fault.in_a_row, counts));
        let mine: Vec<_> = self
            .tried
            .iter()
            .filter(|tried| tried.0 == fault.entry)
            .collect();
        let since = mine.last().map_or(0, |tried| tried.2);
        let mut row = 0;
        for (entry, in_a_row, counts) in self.failures[since..].iter().rev() {
            if entry == fault.entry {
                row += counts;
                if !in_a_row {
                    break;
                }
            }
        }
        if row < self.config.failures_in_a_row {
            return None;
        }
        // One rung after the other, as long as none is ten minutes after the one before.
        let (mut tries, mut next) = (1, fault.now_ns);
        for tried in mine.iter().rev() {
            if next - tried.1 >= REMEMBERED_NS {
                break;
            }
            tries += 1;
            next = tried.1;
        }
        self.tried
            .push((fault.entry.to_owned(), fault.now_ns, self.failures.len()));
        Some(match tries {
            1 => OnFault::Resume,
            2 => OnFault::Restart,
            _ => OnFault::Stop,
        })
    }

    fn resumed(&mut self, well: bool) {
        let well = well && !self.rested;
        self.rungs.failed_resumes += u64::from(!well);
        if self.state == State::Resuming {
            self.state = if well {
                State::Running
            } else {
                State::Restarting
            };
            self.rungs.restarts += u64::from(!well);
        }
    }

    fn restarted(&mut self, well: bool) {
        if self.state == State::Restarting {
            let well = well && !self.rested;
            self.rungs.failed_restarts += u64::from(!well);
            self.state = match (well, self.config.may_reset_guest) {
                (true, _) => State::Running,
                (false, MayReset::No) => State::Stopped,
                (false, _) => State::Resetting,
            };
            if self.state == State::Resetting {
                let lately = self
                    .went_back_at
                    .filter(|at| self.failed_at - at < REMEMBERED_NS);
                if self.config.may_reset_guest == MayReset::Boot || lately.is_some() {
                    self.rungs.resets += 1;
                } else {
                    self.rungs.rewinds += 1;
                    self.went_back_at = Some(self.failed_at);
                }
            }
            self.rungs.stops += u64::from(self.state == State::Stopped);
        }
    }

    fn reset(&mut self, well: bool) {
        if self.state == State::Resetting {
            self.state = if well { State::Running } else { State::Stopped };
            self.rungs.stops += u64::from(!well);
            if well {
                self.rested = false;
                self.recovered_at.clear();
            }
        }
    }

    fn went_back(&mut self, well: bool) {
        match (self.state, well) {
            (State::Resetting, true) => self.reset(true),
            (State::Resetting | State::Running, false) => {
                self.state = State::Resetting;
                self.rungs.resets += 1;
            }
            _ => {}
        }
    }

    fn isolated(&mut self, well: bool) {
        self.state = match (self.state, well) {
            (State::Running | State::Stopped, false) => State::Unisolated,
            (State::Unisolated, true) => State::Running,
            (other, _) => other,
        };
    }
}

proptest! {
    #[test]
    fn a_ladder_does_what_the_model_does(config in configs(), events in events()) {
        let mut ladder = Ladder::new(config.clone());
        let mut model = Model {
            config: config.clone(),
            recovered_at: Vec::new(),
            lost_at: Vec::new(),
            failures: Vec::new(),
            meanwhile: Vec::new(),
            rested: false,
            tried: Vec::new(),
            state: State::Running,
            rungs: Rungs::default(),
            failed_at: 0,
            went_back_at: None,
        };
        let mut now_ns = 0;
        for event in events {
            match event {
                Event::Fault { entry, attempts, unheard, half_done, device_lost, out_of_time, in_a_row, after_ns } => {
                    now_ns += after_ns;
                    let entry = ENTRIES[entry];
                    let fault = Fault { entry, attempts, unheard, half_done, device_lost, out_of_time, in_a_row, now_ns };
                    prop_assert_eq!(ladder.fault(&fault), model.fault(&fault));
                }
                Event::BeginsAnew => {
                    ladder.device_begins_anew();
                    model.rested = false;
                }
                Event::Resumed(well) => {
                    ladder.resumed(if well { Ok(()) } else { Err("why") });
                    model.resumed(well);
                }
                Event::Restarted(well) => {
                    ladder.restarted(if well { Ok(()) } else { Err("why") });
                    model.restarted(well);
                }
                Event::Reset(well) => {
                    ladder.reset(if well { Ok(()) } else { Err("why") });
                    model.reset(well);
                }
                Event::WentBack(well) => {
                    ladder.went_back(if well { Ok(()) } else { Err("why") });
                    model.went_back(well);
                }
                Event::NotIsolated => {
                    ladder.not_isolated("why");
                    model.isolated(false);
                }
                Event::IsolatedAgain => {
                    ladder.isolated_again();
                    model.isolated(true);
                }
            }
            prop_assert_eq!(ladder.status().state, model.state);
            prop_assert_eq!(ladder.status().rungs, model.rungs);
            let has_given_up = matches!(model.state, State::Stopped | State::Unisolated);
            prop_assert_eq!(ladder.status().gave_up.is_some(), has_given_up);
            prop_assert!(ladder.lately.len() <= config.recoveries_per_minute as usize);
        }
    }
}
