//! The work with one fault in one function.

use anyhow::bail;
use devices::clock::monotonic_ns;
use isolation::dispatch::fault::FaultCount;
use recovery::campaign::workload::Workload;
use recovery::fault::FaultKind;
use recovery::sweep::loaded_name;
use recovery::sweep::record::{Called, Fault};

use super::{ISOLATED, Native, Vm, limit};
use crate::control::protocol::{Reply, Request};

impl Vm {
    /// The work with one fault in a function, and all of it again.
    pub(super) fn with_fault(
        &mut self,
        work: &Workload,
        native: &Native,
        function: &str,
    ) -> anyhow::Result<Fault> {
        let mut fault = Fault::default();
        // Afterwards it was released.
        self.go_to(ISOLATED)?;
        for offset in self.offsets(work, function)? {
            self.go_to(ISOLATED)?;
            let before = self.entry(work, function)?;
            let begun_ns = monotonic_ns();
            self.control.ask(&Request::Inject {
                module: loaded_name(&work.driver),
                entry: function.to_owned(),
                offset,
                fault: FaultKind::NullDereference,
                every: 1,
                times: 1,
            })?;
            self.work(work, limit(native));
            let count = self.fault_count(work)?;
            let after = self.entry(work, function)?;
            let taken_back = after.aborts.saturating_sub(before.aborts);
            fault = Fault {
                function: function.to_owned(),
                offset,
                reached: count.failed > 0 || count.reached > 0 || taken_back > 0,
                taken_back,
                answers: self.answers(),
                log: self.log(),
                ..Fault::default()
            };
            if taken_back > 0 {
                fault.returned_us = self.returned_us(&work.driver, begun_ns)?;
            }
            if fault.answers {
                let outcome = self.work(work, limit(native));
                fault.differs = outcome.differs(&native.outcome, work);
                fault.works = outcome.finished
                    && outcome.works
                    && outcome.corrupted == 0
                    && fault.differs.is_empty();
                let again = self.entry(work, function)?;
                fault.inside_again = again.commits.saturating_sub(after.commits);
                fault.answers = self.answers();
                fault.log.extend(self.log());
            }
            if fault.reached || !fault.answers {
                break;
            }
        }
        Ok(fault)
    }

    /// Where a fault goes: in the middle of the function, or where calls do not come there, at its
    /// begin.
    fn offsets(&mut self, work: &Workload, function: &str) -> anyhow::Result<Vec<u64>> {
        let request = Request::Instructions {
            module: loaded_name(&work.driver),
            function: function.to_owned(),
        };
        let Reply::Instructions { instructions } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        let middle = instructions
            .get(instructions.len() / 2)
            .map_or(0, |at| at.offset);
        Ok([middle, 0]
            .into_iter()
            .take(if middle == 0 { 1 } else { 2 })
            .collect())
    }

    fn fault_count(&mut self, work: &Workload) -> anyhow::Result<FaultCount> {
        let module = loaded_name(&work.driver);
        match self.control.ask(&Request::FaultCount { module }) {
            Ok(Reply::FaultCount(count)) => Ok(count),
            Ok(_) => bail!("the VM answered something else"),
            // A driver that was restarted has forgotten it.
            Err(_) => self.control.status().map(|_| FaultCount::default()),
        }
    }
}

/// At most so many of the functions of which a call ran inside, from all over the list.
pub(super) fn some(called: &[Called], most: u32) -> Vec<String> {
    let inside: Vec<_> = called.iter().filter(|one| one.inside > 0).collect();
    let most = usize::try_from(most)
        .unwrap_or(usize::MAX)
        .min(inside.len());
    let chosen = (0..most).filter_map(|number| inside.get(number * inside.len() / most));
    chosen.map(|one| one.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_chosen_from_all_over_the_list_and_each_once() {
        let called: Vec<_> = (0..10)
            .map(|number| Called {
                name: format!("f{number}"),
                calls: 1,
                inside: u64::from(number != 3),
                ..Called::default()
            })
            .collect();
        assert_eq!(some(&called, 3), ["f0", "f4", "f7"]);
        assert_eq!(some(&called, 20).len(), 9);
        assert!(some(&called, 0).is_empty());
    }
}
