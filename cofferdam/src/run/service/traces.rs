//! Traces of isolated calls, as the control socket has them begun and taken.

use isolation::dispatch::call_trace::MAX_CALLS;

use super::{VmService, text};
use crate::control::protocol::{Reply, TraceWanted};

impl VmService {
    pub(super) fn begin_trace(&self, module: &str, wanted: TraceWanted) -> Result<Reply, String> {
        if !(1..=MAX_CALLS).contains(&wanted.calls) {
            return Err(format!("1 to {MAX_CALLS} calls can be recorded at once"));
        }
        let begun = self.isolator().begin_trace(module, wanted.into());
        begun.map(|id| Reply::TraceBegun { id }).map_err(text)
    }

    pub(super) fn take_trace(&self, module: &str, id: u64) -> Result<Reply, String> {
        let taken = self.isolator().take_trace(module, id);
        taken.map(Box::new).map(Reply::Trace).map_err(text)
    }

    pub(super) fn end_trace(&self, module: &str, id: u64) -> Result<Reply, String> {
        let ended = self.isolator().end_trace(module, id);
        ended.map(|()| Reply::Done {}).map_err(text)
    }
}
