//! `trace`: where the time of isolated calls goes, event by event.

mod chrome;
mod phases;
mod summary;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

use chrome::Recorded;
use summary::Summary;

use super::{Ending, print_bytes, print_json};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::{Reply, Request, TraceWanted};
use crate::long_work::{Interrupt, LongWork};
use crate::options::VmName;
use crate::runtime_dir::RuntimeRoot;
use crate::words::counted;

/// Between two looks at what was recorded.
const LOOK: Duration = Duration::from_millis(50);

/// `trace`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
With --output the trace is written in Chrome's trace event format, which https://ui.perfetto.dev and chrome://tracing
open: the guest's vCPU on one line, the domain on another. A call that is run again, or comes back from the guest, counts
as one more. While nothing is recorded a call pays nothing for it.

Examples:
  cofferdam trace web e1000
  cofferdam trace web e1000 --function e1000_xmit_frame --calls 10 --output trace.json
  cofferdam trace web e1000 --calls 64 --limit 5 --json")]
pub struct TraceOptions {
    /// Name of the VM
    vm: VmName,
    /// Name of the isolated module
    module: String,
    /// Only calls of this isolated function
    #[arg(long, value_name = "F")]
    function: Option<String>,
    /// How many calls, up to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    calls: u32,
    /// How long to wait for them, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    /// Write the trace to this file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The summary as JSON
    #[arg(long)]
    json: bool,
}

impl TraceOptions {
    /// `trace`
    pub fn run(self) -> anyhow::Result<Ending> {
        // Before anything is recorded: who cannot write would have waited in vain.
        let output = self.output.as_deref().map(Output::begin).transpose()?;
        let interrupt = Interrupt::watch()?;
        let vm = RuntimeRoot::from_environment().find(Some(&self.vm))?;
        let mut client = ControlClient::to(&vm, ANSWER_TIME)?;
        let recorded = self.record(&mut client, &interrupt)?;
        if recorded.calls.is_empty() {
            return interrupt.ending(Err(self.none_came()));
        }
        let summary = Summary::new(&self.module, self.calls, &recorded);
        let is_written = match output {
            Some(output) => {
                let trace = recorded.chrome(&self.vm.to_string(), &self.module);
                output.end(&trace)?;
                true
            }
            None => false,
        };
        match self.json {
            true => print_json(&summary)?,
            false => {
                let mut text = summary.text();
                if let Some(path) = self.output.as_ref().filter(|_| is_written) {
                    text.push_str(&format!(
                        "written to {}: https://ui.perfetto.dev and chrome://tracing open it\n",
                        path.display()
                    ));
                }
                print_bytes(text.as_bytes())?;
            }
        }
        interrupt.ending(Ok(()))
    }

    fn none_came(&self) -> anyhow::Error {
        let whose = self.function.as_ref().unwrap_or(&self.module);
        let seconds = counted(self.limit, "second", "seconds");
        anyhow::anyhow!(
            "no isolated call of {whose} came within {seconds}: `cofferdam status {}` counts them",
            self.vm
        )
    }

    /// Has calls recorded and takes them, until there are as many as are wanted, the time is up, or
    /// a signal comes.
    fn record(
        &self,
        client: &mut ControlClient,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Recorded> {
        let begin = Request::BeginTrace {
            module: self.module.clone(),
            wanted: TraceWanted {
                function: self.function.clone(),
                calls: self.calls,
                limit_ms: self.limit * 1000,
            },
        };
        let Reply::TraceBegun { id } = client.ask(&begin)? else {
            bail!("the VM answered something else");
        };
        let mut word = LongWork::begin();
        let mut recorded = Recorded::default();
        let mut continues = false;
        loop {
            let take = Request::TakeTrace {
                module: self.module.clone(),
                id,
            };
            let Reply::Trace(taken) = client.ask(&take)? else {
                bail!("the VM answered something else");
            };
            recorded.functions.extend(taken.functions);
            let is_waiting = taken.call.is_none();
            if let Some(call) = taken.call {
                recorded.bars = taken.bars;
                match recorded.calls.last_mut().filter(|_| continues) {
                    Some(last) => last.events.extend(call.events),
                    None => recorded.calls.push(call),
                }
                continues = taken.continues;
            }
            if !taken.more {
                return Ok(recorded);
            }
            if is_waiting && interrupt.has_come() {
                client.tell(&Request::EndTrace {
                    module: self.module.clone(),
                    id,
                })?;
                return Ok(recorded);
            }
            if is_waiting {
                let (have, want) = (recorded.calls.len(), self.calls);
                word.tell(&format!("{have} of {want} calls recorded"));
                std::thread::sleep(LOOK);
            }
        }
    }
}

/// A file that is there whole, or as it was before.
struct Output<'a> {
    path: &'a Path,
    file: NamedTempFile,
}

impl<'a> Output<'a> {
    /// Nothing is at `path` until [`Output::end`].
    fn begin(path: &'a Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        if path.is_dir() {
            bail!("cannot write {}: it is a folder", path.display());
        }
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let file = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(parent.unwrap_or(Path::new(".")))
            .with_context(cannot)?;
        Ok(Self { path, file })
    }

    fn end(mut self, trace: &serde_json::Value) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", self.path.display());
        let mut text = trace.to_string();
        text.push('\n');
        self.file.write_all(text.as_bytes()).with_context(cannot)?;
        self.file.persist(self.path).with_context(cannot)?;
        Ok(())
    }
}
