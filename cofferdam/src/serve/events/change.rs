//! What there is to be seen, and what is different between two looks.

use std::collections::BTreeMap;

use recovery::ladder::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::control::listed::Listed;
use crate::control::protocol::{Status, VmState};
use crate::serve::look::Look;

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// What there is when a listener begins.
    Now {
        /// State of each guest, by name.
        guests: BTreeMap<String, String>,
        /// Who has the turn at each device, by name.
        devices: BTreeMap<String, Option<String>>,
    },
    /// A guest runs that did not.
    GuestAppeared {
        /// Its name.
        guest: String,
        /// Its state.
        state: String,
    },
    /// A guest runs no more.
    GuestGone {
        /// Its name.
        guest: String,
    },
    /// A guest is in another state.
    GuestState {
        /// Its name.
        guest: String,
        /// `starting`, `running`, `panicked`, `paused`, `ending` or `no_answer`.
        state: String,
        /// The state before.
        before: String,
    },
    /// Calls of an isolated module failed.
    Violations {
        /// Name of the guest.
        guest: String,
        /// Name of the module.
        module: String,
        /// How many calls since the last look.
        more: u64,
        /// How many since the module was isolated.
        count: u64,
    },
    /// Recovery of a module is in another state.
    Recovery {
        /// Name of the guest.
        guest: String,
        /// Name of the module.
        module: String,
        /// `running`, `resuming`, `restarting`, `resetting`, `stopped` or `unisolated`; none when
        /// it is isolated no more.
        #[schema(value_type = Option<String>)]
        state: Option<State>,
    },
    /// A device host runs that did not.
    DeviceAppeared {
        /// Its name.
        device: String,
        /// The guest that has the turn.
        turn: Option<String>,
    },
    /// A device host runs no more.
    DeviceGone {
        /// Its name.
        device: String,
    },
    /// The turn at a device was passed on.
    Turn {
        /// Its name.
        device: String,
        /// The guest that has the turn.
        turn: Option<String>,
        /// The guest that had it at the last look.
        before: Option<String>,
        /// Switches since the last look.
        switches: u64,
    },
    /// The listener was too slow. Nothing comes after it.
    Dropped {
        /// Why, for people.
        reason: String,
    },
}

impl Event {
    /// Its name on the stream.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Now { .. } => "now",
            Self::GuestAppeared { .. } => "guest_appeared",
            Self::GuestGone { .. } => "guest_gone",
            Self::GuestState { .. } => "guest_state",
            Self::Violations { .. } => "violations",
            Self::Recovery { .. } => "recovery",
            Self::DeviceAppeared { .. } => "device_appeared",
            Self::DeviceGone { .. } => "device_gone",
            Self::Turn { .. } => "turn",
            Self::Dropped { .. } => "dropped",
        }
    }
}

/// What a guest does, in a word.
pub fn guest_state(listed: &Listed<Status>) -> &'static str {
    match &listed.status {
        None => "no_answer",
        Some(status) => match (status.state, &status.guest_panic) {
            (VmState::Running, Some(_)) => "panicked",
            (state, _) => state.name(),
        },
    }
}

/// What was seen in one look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    guests: BTreeMap<String, Guest>,
    devices: BTreeMap<String, Device>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Guest {
    pid: Option<u32>,
    state: &'static str,
    /// `None` where it does not answer: what it was stays.
    modules: Option<BTreeMap<String, Module>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Module {
    violations: u64,
    state: Option<State>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    pid: Option<u32>,
    /// `None` where it does not answer.
    turns: Option<(Option<String>, u64)>,
}

impl View {
    /// What there is to be seen in `look`.
    pub fn of(look: &Look) -> Self {
        let guests = look.guests.iter().map(|listed| {
            let guest = Guest {
                pid: listed.pid,
                state: guest_state(listed),
                modules: listed.status.as_ref().map(modules),
            };
            (listed.name.clone(), guest)
        });
        let devices = look.devices.iter().map(|listed| {
            let status = listed.status.as_ref();
            let device = Device {
                pid: listed.pid,
                turns: status.map(|status| (status.turn.clone(), status.switch_count)),
            };
            (listed.name.clone(), device)
        });
        Self {
            guests: guests.collect(),
            devices: devices.collect(),
        }
    }

    /// All of it.
    pub fn into_event(self) -> Event {
        let guests = self.guests.into_iter();
        let devices = self.devices.into_iter();
        Event::Now {
            guests: guests
                .map(|(name, guest)| (name, guest.state.to_owned()))
                .collect(),
            devices: devices
                .map(|(name, device)| (name, device.turns.and_then(|(turn, _)| turn)))
                .collect(),
        }
    }

    /// What is different from `before`. What a process that does not answer had counted is carried
    /// on.
    pub fn since(&self, before: &Self) -> Vec<Event> {
        let mut events = Vec::new();
        for (name, old) in &before.guests {
            if self.guests.get(name).is_none_or(|new| new.pid != old.pid) {
                events.push(Event::GuestGone {
                    guest: name.clone(),
                });
            }
        }
        for (name, new) in &self.guests {
            match before.guests.get(name).filter(|old| old.pid == new.pid) {
                None => events.push(Event::GuestAppeared {
                    guest: name.clone(),
                    state: new.state.to_owned(),
                }),
                Some(old) => new.since(old, name, &mut events),
            }
        }
        for (name, old) in &before.devices {
            if self.devices.get(name).is_none_or(|new| new.pid != old.pid) {
                events.push(Event::DeviceGone {
                    device: name.clone(),
                });
            }
        }
        for (name, new) in &self.devices {
            let old = before.devices.get(name).filter(|old| old.pid == new.pid);
            match (old, &new.turns) {
                (None, turns) => events.push(Event::DeviceAppeared {
                    device: name.clone(),
                    turn: turns.as_ref().and_then(|(turn, _)| turn.clone()),
                }),
                (Some(old), Some((turn, count))) => {
                    let (had, counted) = old.turns.clone().unwrap_or((None, *count));
                    if had != *turn || counted != *count {
                        events.push(Event::Turn {
                            device: name.clone(),
                            turn: turn.clone(),
                            before: had,
                            switches: count.saturating_sub(counted),
                        });
                    }
                }
                (Some(_), None) => {}
            }
        }
        events
    }

    /// Carries on what was seen before of processes that do not answer now.
    pub fn carry_on(&mut self, before: &Self) {
        for (name, guest) in &mut self.guests {
            let old = before.guests.get(name).filter(|old| old.pid == guest.pid);
            if guest.modules.is_none() {
                guest.modules = old.and_then(|old| old.modules.clone());
            }
        }
        for (name, device) in &mut self.devices {
            let old = before.devices.get(name).filter(|old| old.pid == device.pid);
            if device.turns.is_none() {
                device.turns = old.and_then(|old| old.turns.clone());
            }
        }
    }
}

impl Guest {
    fn since(&self, before: &Self, name: &str, events: &mut Vec<Event>) {
        let guest = || name.to_owned();
        if self.state != before.state {
            events.push(Event::GuestState {
                guest: guest(),
                state: self.state.to_owned(),
                before: before.state.to_owned(),
            });
        }
        let (Some(new), Some(old)) = (&self.modules, &before.modules) else {
            return;
        };
        for (module, now) in new {
            let was = old.get(module).copied().unwrap_or_default();
            // Fewer than before: it was isolated anew, and they are counted from there.
            let more = now
                .violations
                .checked_sub(was.violations)
                .unwrap_or(now.violations);
            if more > 0 {
                events.push(Event::Violations {
                    guest: guest(),
                    module: module.clone(),
                    more,
                    count: now.violations,
                });
            }
            if now.state != was.state {
                events.push(Event::Recovery {
                    guest: guest(),
                    module: module.clone(),
                    state: now.state,
                });
            }
        }
        for module in old.keys().filter(|module| !new.contains_key(*module)) {
            events.push(Event::Recovery {
                guest: guest(),
                module: module.clone(),
                state: None,
            });
        }
    }
}

fn modules(status: &Status) -> BTreeMap<String, Module> {
    let mut modules: BTreeMap<String, Module> = BTreeMap::new();
    for module in &status.isolation {
        modules.entry(module.module.clone()).or_default().violations = module.violations;
    }
    for (module, ladder) in &status.recovery {
        modules.entry(module.clone()).or_default().state = Some(ladder.state);
    }
    modules
}
