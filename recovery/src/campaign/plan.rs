//! Which faults are tried: a list that the seed decides.

use isolation::mutation::Kind;
use rand_core::{Rng, SeedableRng};
use rand_xorshift::XorShiftRng;
use serde::{Deserialize, Serialize};

use super::kind::TrialKind;

/// Where faults at the edge of a device are, in place of a function.
pub const EDGE: &str = "device";
/// Parts of a guest's work that [`Trial::offset`] counts in where a fault is at the edge.
pub const PARTS: u32 = 1_000_000;

/// An instruction that faults can be put in place of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The function that it is in.
    pub function: String,
    /// Where in it, in bytes from its start.
    pub offset: u32,
    /// Kinds that fit.
    pub kinds: Vec<Kind>,
}

/// One fault to be tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number in the campaign, from 1.
    pub number: u32,
    /// What goes wrong.
    pub kind: TrialKind,
    /// The function that it is in, or [`EDGE`].
    pub function: String,
    /// Where in it, in bytes from its start. At the edge: when, in [`PARTS`] of what the guest's
    /// work has of events that such a fault can strike at.
    pub offset: u32,
    /// What chooses among several ways of the kind there.
    pub seed: u64,
}

impl Trial {
    /// Where the fault is, for a person.
    pub fn place(&self) -> String {
        match self.kind {
            TrialKind::Code(_) => format!("in {}+{:#x}", self.function, self.offset),
            TrialKind::Edge(_) => {
                let percent = self.offset / (PARTS / 100);
                format!("at the device's edge, {percent} % into the work")
            }
        }
    }
}

/// The first `count` trials of the campaign with this `seed`. Each kind that fits anywhere comes as
/// often as the others, each function that it fits as often as the others on the average, so that
/// long functions and common kinds do not hide the rest. The same places, kinds and seed give the
/// same trials, and more of them begin with the same.
pub fn trials(places: &[Place], kinds: &[TrialKind], count: u32, seed: u64) -> Vec<Trial> {
    let fitting = kinds.iter().filter_map(|kind| {
        let functions = match kind {
            TrialKind::Code(kind) => by_function(places, *kind),
            TrialKind::Edge(_) => return Some((*kind, Vec::new())),
        };
        (!functions.is_empty()).then_some((*kind, functions))
    });
    let fitting: Vec<_> = fitting.collect();
    let mut random = XorShiftRng::seed_from_u64(seed);
    let mut all = Vec::new();
    for (number, (kind, functions)) in (1..=count).zip(fitting.iter().cycle()) {
        let (function, offset) = match kind {
            TrialKind::Code(_) => {
                let of_function = choose(functions, &mut random);
                let place = of_function.and_then(|places| choose(places, &mut random));
                let Some(place) = place else { break };
                (place.function.clone(), place.offset)
            }
            TrialKind::Edge(_) => (EDGE.to_owned(), random.next_u32() % PARTS),
        };
        all.push(Trial {
            number,
            kind: *kind,
            function,
            offset,
            seed: random.next_u64(),
        });
    }
    all
}

/// The places that a kind fits, function by function.
fn by_function(places: &[Place], kind: Kind) -> Vec<Vec<&Place>> {
    let mut functions: Vec<Vec<&Place>> = Vec::new();
    for place in places.iter().filter(|place| place.kinds.contains(&kind)) {
        let known = functions.iter_mut().find(|known| {
            known
                .first()
                .is_some_and(|one| one.function == place.function)
        });
        match known {
            Some(known) => known.push(place),
            None => functions.push(vec![place]),
        }
    }
    functions
}

fn choose<'a, T>(all: &'a [T], random: &mut XorShiftRng) -> Option<&'a T> {
    let index = random.next_u64().checked_rem(all.len() as u64)?;
    all.get(usize::try_from(index).ok()?)
}

#[cfg(test)]
mod tests {
    use devices::edge::EdgeKind;

    use super::*;

    fn places() -> Vec<Place> {
        let place = |function: &str, offset, kinds: &[Kind]| Place {
            function: function.to_owned(),
            offset,
            kinds: kinds.to_vec(),
        };
        let mut all: Vec<_> = (0..100)
            .map(|at| place("long", at * 4, &[Kind::Nop, Kind::TextBitFlip]))
            .collect();
        all.push(place("short", 8, &[Kind::Nop, Kind::MissingCall]));
        all
    }

    const KINDS: [TrialKind; 4] = [
        TrialKind::Code(Kind::Nop),
        TrialKind::Code(Kind::MissingCall),
        TrialKind::Code(Kind::TextBitFlip),
        TrialKind::Code(Kind::Halt),
    ];

    #[test]
    fn the_seed_decides_the_trials_and_more_of_them_begin_with_the_same() {
        let few = trials(&places(), &KINDS, 30, 7);
        assert_eq!(few.len(), 30);
        assert_eq!(trials(&places(), &KINDS, 300, 7)[..30], few);
        assert_ne!(trials(&places(), &KINDS, 30, 8), few);
        let numbers: Vec<u32> = few.iter().map(|trial| trial.number).collect();
        assert_eq!(numbers, (1..=30).collect::<Vec<_>>());
    }

    #[test]
    fn kinds_that_fit_and_functions_have_equal_shares_and_what_does_not_fit_none() {
        let all = trials(&places(), &KINDS, 300, 1);
        let of = |kind| {
            let kind = TrialKind::Code(kind);
            all.iter().filter(move |trial| trial.kind == kind)
        };
        for kind in [Kind::Nop, Kind::MissingCall, Kind::TextBitFlip] {
            assert_eq!(of(kind).count(), 100);
        }
        assert_eq!(of(Kind::Halt).count(), 0);
        assert!(of(Kind::MissingCall).all(|trial| trial.function == "short"));
        let short = of(Kind::Nop)
            .filter(|trial| trial.function == "short")
            .count();
        assert!((25..=75).contains(&short), "{short} of 100");
    }

    #[test]
    fn faults_at_the_edge_need_no_place_and_come_at_any_time() {
        let kinds = [KINDS[0], TrialKind::Edge(EdgeKind::LoadOnes)];
        let all = trials(&places(), &kinds, 40, 1);
        let edge: Vec<_> = all.iter().filter(|one| one.function == EDGE).collect();
        assert_eq!((all.len(), edge.len()), (40, 20));
        assert!(
            edge.iter()
                .all(|one| one.offset < PARTS && one.kind == kinds[1])
        );
        let early = edge.iter().filter(|one| one.offset < PARTS / 2).count();
        assert!((3..=17).contains(&early), "{early} of 20");
        assert_eq!(trials(&[], &kinds[1..], 3, 1).len(), 3);
    }

    #[test]
    fn without_a_place_there_is_no_trial() {
        assert!(trials(&[], &KINDS, 10, 1).is_empty());
        assert!(trials(&places(), &KINDS[3..], 10, 1).is_empty());
        assert!(trials(&places(), &[], 10, 1).is_empty());
        assert!(trials(&places(), &KINDS, 0, 1).is_empty());
    }
}
