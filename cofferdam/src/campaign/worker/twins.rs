//! Which memory changes without a fault, and what else has changed with one.
//!
//! Runs of the same guest from the same mark are never quite alike: interrupts come at other moments.
//! What differs by chance is learnt from twins: runs without a fault, and runs in which a function of
//! the driver has an undefined instruction, so that its call fails, or each of them, and is taken
//! back before it has done anything wrong. Memory that was in use all the time, and differs from the mark in none of
//! these, and that calls of the driver have written, nobody had to change. What the guest writes
//! otherwise because a call went otherwise is not looked at.

use std::collections::BTreeSet;

use anyhow::bail;
use isolation::mutation::{Kind, Mutation, mutate, sites};
use recovery::campaign::Way;
use recovery::campaign::verdict::Seen;

use super::{FIRST_TIME, Fault, ISOLATED, Worker};
use crate::campaign::with_function;
use crate::control::protocol::{FunctionBytes, Reply, Request};

/// How often a run without a fault is made once more where memory differs twice with one.
const TWINS_BEHIND: u32 = 3;

/// Whether the memory of isolated runs is compared.
#[derive(Debug)]
pub(super) enum Twins {
    /// It is not.
    None,
    /// These runs are the twins.
    Learning,
    /// With the twins. Pieces that differed by chance since.
    Compared(BTreeSet<String>),
}

/// Which piece a name is of, without the place in it.
fn piece(name: &str) -> &str {
    name.rsplit_once(" + ").map_or(name, |(piece, _)| piece)
}

/// A fault of the function that does nothing but to have the call fail.
fn harmless(name: &str, text: &FunctionBytes) -> Option<Mutation> {
    with_function(name, text, |function| {
        let fits = |kinds: &[Kind]| kinds.contains(&Kind::UndefinedInstruction);
        let mut places = sites(function).into_iter();
        let first = places.find(|site| fits(&site.kinds))?;
        mutate(function, Kind::UndefinedInstruction, first.offset, 0).ok()
    })
}

impl Worker {
    /// Makes the twins: so many without a fault, one with a call that fails of each function that is
    /// isolated, and one in which all of its calls do.
    pub(super) fn learn(&mut self, twins: u32) -> anyhow::Result<()> {
        self.twins = Twins::Learning;
        let workload = self.workload.clone();
        // From now on it is remembered where calls write.
        self.rewind(ISOLATED)?;
        self.ask_for_bystanders()?;
        for _ in 0..twins {
            self.rewind(ISOLATED)?;
            self.work(&workload, FIRST_TIME)?;
            self.ask_for_bystanders()?;
        }
        let texts = self.texts.iter();
        let isolated = texts.filter(|(name, _)| workload.entries.contains(name));
        let faults =
            isolated.filter_map(|(name, text)| Some((name.clone(), harmless(name, text)?)));
        let faults: Vec<_> = faults.collect();
        for (function, mutation) in faults {
            let steps = self.steps_for(&function);
            let fault = Fault::Code(function, mutation);
            for way in [Way::Once, Way::Stays] {
                self.run(way, &fault, &steps)?;
            }
        }
        self.twins = Twins::Compared(BTreeSet::new());
        Ok(())
    }

    /// Of the memory that differs in a run that was `seen` what is no chance: it differs once more
    /// when the run is made once more, and in none without the fault. The rest is known to be
    /// chance from now on.
    pub(super) fn confirm(
        &mut self,
        (way, fault): (Way, &Fault),
        steps: &[String],
        seen: &mut Seen,
    ) -> anyhow::Result<()> {
        let Some(again) = self.run_once(way, fault, steps)? else {
            return Ok(());
        };
        let first = std::mem::take(&mut seen.bystanders);
        let is_in = |name: &String, others: &[String]| {
            others.iter().any(|other| piece(other) == piece(name))
        };
        let (mut twice, mut once): (Vec<_>, Vec<_>) = first
            .into_iter()
            .partition(|name| !again.is_compared() || is_in(name, &again.bystanders));
        let part = self.workload.only(steps);
        let mut behind = 0..TWINS_BEHIND;
        while !twice.is_empty() && behind.next().is_some() {
            self.rewind(ISOLATED)?;
            self.work(&part, FIRST_TIME)?;
            let without = self.ask_for_bystanders()?;
            let (chance, left) = twice.into_iter().partition(|name| is_in(name, &without));
            once.extend::<Vec<_>>(chance);
            twice = left;
        }
        if let Twins::Compared(by_chance) = &mut self.twins {
            by_chance.extend(once.iter().map(|name| piece(name).to_owned()));
        }
        seen.bystanders = twice;
        Ok(())
    }

    /// Names of what has changed in a run that was `seen`, and in none of the twins; nothing where
    /// that is not compared, or the driver was begun anew meanwhile.
    pub(super) fn bystanders(&mut self, way: Way, seen: &Seen) -> anyhow::Result<Vec<String>> {
        match way != Way::Native && seen.is_compared() && !matches!(self.twins, Twins::None) {
            true => self.ask_for_bystanders(),
            false => Ok(Vec::new()),
        }
    }

    fn ask_for_bystanders(&mut self) -> anyhow::Result<Vec<String>> {
        self.guest.agent().disconnect();
        let request = Request::Bystanders {
            module: self.workload.driver.clone(),
            mark: ISOLATED.to_owned(),
            learn: matches!(self.twins, Twins::Learning),
        };
        let Reply::Bystanders { count, mut named } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        tracing::debug!("{count} pieces of memory have changed: {named:?}");
        let Twins::Compared(by_chance) = &self.twins else {
            return Ok(Vec::new());
        };
        let more = count.saturating_sub(named.len() as u64);
        named.retain(|name| !by_chance.contains(piece(name)));
        named.extend((more > 0).then(|| format!("{more} others")));
        Ok(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_the_same_wherever_in_it_something_differs() {
        let names = ["page at 0x1000 + 0x8", "page at 0x1000 + 0x10"];
        assert_eq!(piece(names[0]), piece(names[1]));
        assert_ne!(piece(names[0]), piece("page at 0x2000 + 0x8"));
        assert_eq!(piece("3 others"), "3 others");
    }
}
