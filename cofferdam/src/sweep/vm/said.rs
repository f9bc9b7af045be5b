//! What steps say that end otherwise than they should: they are done once more for it.

use std::time::Duration;

use recovery::campaign::workload::Workload;
use recovery::sweep::record::Record;

use super::{BOOTED, FIRST_TIME, ISOLATED, Native, Vm, limit};
use crate::campaign::patience::output_of;

/// Most of what a step says that is kept, in characters.
const MAX_SAID: usize = 600;

impl Vm {
    /// What a step says that does not do natively what it is to do.
    pub(super) fn said(&mut self, work: &Workload, step: &str) -> anyhow::Result<String> {
        self.go_to(BOOTED)?;
        self.load(work)?;
        Ok(self.said_now(work, step, FIRST_TIME))
    }

    /// What the first step that ended otherwise than natively says when it is done once more,
    /// isolated.
    pub(super) fn ask_why(
        &mut self,
        work: &Workload,
        native: &Native,
        record: &mut Record,
    ) -> anyhow::Result<()> {
        let of = |step: &str| {
            let is_it = |said: &String| said.split_once(": ").is_some_and(|(name, _)| name == step);
            record.differs.iter().position(is_it)
        };
        let first = work
            .steps
            .iter()
            .find_map(|step| Some((&step.name, of(&step.name)?)));
        if let Some((step, index)) = first {
            self.go_to(ISOLATED)?;
            let said = self.said_now(work, step, limit(native));
            if let Some(differs) = record.differs.get_mut(index) {
                differs.push_str(&said);
            }
        }
        Ok(())
    }

    /// What is said as far as to the end of `step`, in the guest as it is.
    fn said_now(&mut self, work: &Workload, step: &str, limit: Duration) -> String {
        let script = work.script_up_to(step);
        let output = output_of(&mut self.guest, self.heard, script, limit);
        let said: String = output.trim().chars().take(MAX_SAID).collect();
        match said.as_str() {
            "" => said,
            said => format!(": {}", said.replace('\n', " / ")),
        }
    }
}
