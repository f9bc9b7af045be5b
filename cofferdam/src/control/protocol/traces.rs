//! Traces of isolated calls, in requests.

use std::time::Duration;

use isolation::dispatch::call_trace::TraceOrder;
use serde::{Deserialize, Serialize};

/// Which calls of an isolated module are to be recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceWanted {
    /// Those of this isolated function; of any otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
    /// How many: 1 to [`isolation::dispatch::call_trace::MAX_CALLS`].
    pub calls: u32,
    /// None that begins later, in milliseconds from now.
    pub limit_ms: u64,
}

impl From<TraceWanted> for TraceOrder {
    fn from(wanted: TraceWanted) -> Self {
        Self {
            function: wanted.function,
            calls: wanted.calls,
            limit: Duration::from_millis(wanted.limit_ms),
        }
    }
}
