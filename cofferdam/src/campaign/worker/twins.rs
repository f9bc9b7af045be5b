//! Which memory changes without a fault, and what else has changed with one.
//!
//! Runs of the same guest from the same mark are never quite alike: interrupts come at other moments.
//! What differs by chance is learnt from twins: runs without a fault, and runs in which a function of
//! the driver has an undefined instruction, so that its call fails, and is taken back, before it has
//! done anything wrong. Memory that was in use all the time, and differs from the mark in none of
//! these, nobody had to change.

use anyhow::bail;
use isolation::mutation::{Kind, Mutation, mutate, sites};
use recovery::campaign::Way;
use recovery::campaign::verdict::Seen;

use super::{FIRST_TIME, Fault, ISOLATED, Worker};
use crate::campaign::with_function;
use crate::control::protocol::{FunctionBytes, Reply, Request};

/// Whether the memory of isolated runs is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Twins {
    /// It is not.
    None,
    /// These runs are the twins.
    Learning,
    /// With the twins.
    Compared,
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
    /// Makes the twins: so many without a fault, and one with a call that fails of each function
    /// that is isolated.
    pub(super) fn learn(&mut self, twins: u32) -> anyhow::Result<()> {
        self.twins = Twins::Learning;
        let workload = self.workload.clone();
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
            self.run(Way::Once, &Fault::Code(function, mutation), &steps)?;
        }
        self.twins = Twins::Compared;
        Ok(())
    }

    /// Names of what has changed in a run that was `seen`, and in none of the twins; nothing where
    /// that is not compared, or the driver was begun anew meanwhile.
    pub(super) fn bystanders(&mut self, way: Way, seen: &Seen) -> anyhow::Result<Vec<String>> {
        let is_isolated = way != Way::Native && seen.given_up.is_none() && seen.rungs == 0;
        match seen.answers && is_isolated && self.twins != Twins::None {
            true => self.ask_for_bystanders(),
            false => Ok(Vec::new()),
        }
    }

    fn ask_for_bystanders(&mut self) -> anyhow::Result<Vec<String>> {
        self.guest.agent().disconnect();
        let request = Request::Bystanders {
            module: self.workload.driver.clone(),
            mark: ISOLATED.to_owned(),
            learn: self.twins == Twins::Learning,
        };
        let Reply::Bystanders { count, mut named } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        tracing::debug!("{count} pieces of memory have changed");
        if count > named.len() as u64 {
            named.push(format!("and {} others", count - named.len() as u64));
        }
        Ok(match self.twins {
            Twins::Learning | Twins::None => Vec::new(),
            Twins::Compared => named,
        })
    }
}
