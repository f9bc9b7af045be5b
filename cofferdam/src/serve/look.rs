//! Looks at all guests and devices at once. However many ask, there is one look at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::little;
use super::problem::{Code, Problem};
use crate::control::listed::{self, Listed};
use crate::control::protocol::Status;
use crate::device::protocol::HostStatus;
use crate::error_text::one_line;
use crate::runtime_dir::RuntimeRoot;

/// How long a process may take to answer.
const LOOK_TIME: Duration = Duration::from_secs(5);

/// What was seen.
#[derive(Debug)]
pub struct Look {
    /// The guests that run, by name.
    pub guests: Vec<Listed<Status>>,
    /// The device hosts that run, by name.
    pub devices: Vec<Listed<HostStatus>>,
}

/// Looks at what runs in one place: the last one, and when it began.
#[derive(Debug)]
pub struct Looks {
    root: RuntimeRoot,
    last: Mutex<Option<(Instant, Arc<Look>)>>,
}

impl Looks {
    /// At what runs in `root`.
    pub fn new(root: RuntimeRoot) -> Self {
        Self {
            root,
            last: Mutex::default(),
        }
    }

    /// Looks at everything. What comes back was not seen before this was called.
    pub async fn look(&self) -> Result<Arc<Look>, Problem> {
        let called = Instant::now();
        let mut last = self.last.lock().await;
        // Several that waited for one look share the next.
        if let Some((begun, look)) = &*last
            && *begun >= called
        {
            return Ok(Arc::clone(look));
        }
        let begun = Instant::now();
        let look = Arc::new(look_at(&self.root, LOOK_TIME).await?);
        *last = Some((begun, Arc::clone(&look)));
        Ok(look)
    }
}

/// Looks at everything in `root`; each process has `limit` to answer.
pub async fn look_at(root: &RuntimeRoot, limit: Duration) -> Result<Look, Problem> {
    let root = root.clone();
    let look = tokio::task::spawn_blocking(move || {
        let internal = |error: anyhow::Error| Problem::new(Code::Internal, one_line(&error));
        std::thread::scope(|scope| {
            let devices = scope.spawn(|| listed::devices(&root, limit));
            let guests = listed::vms(&root, limit).map_err(internal)?;
            let devices = devices.join().unwrap_or_else(|_| Ok(Vec::new()));
            let devices = devices.map_err(internal)?;
            Ok(Look { guests, devices })
        })
    });
    let look = look.await;
    little::keep();
    look.unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())))
}
