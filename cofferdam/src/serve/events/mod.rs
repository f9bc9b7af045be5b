//! What changes, as it is seen: server-sent events.
//!
//! Everything is looked at once a second, and only while somebody listens. Whoever listens gets
//! what there is first and then what changes. A listener that is too slow for that is told so, and
//! has to begin anew.

mod change;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::{Event as SseEvent, KeepAlive};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{Receiver, Sender, channel};

use super::look::look_at;
use super::problem::Problem;
use crate::runtime_dir::RuntimeRoot;

use change::View;
pub use change::{Event, guest_state};

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a process may take to answer in one.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// Between two signs of life on a stream on which nothing happens.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How far a listener may be behind, in looks at which something had changed: however much that
/// was, who reads has all of it. What a connection holds comes on top of it.
pub const MAX_BEHIND: usize = 16;

/// What changed between two looks.
type Changes = Arc<[Arc<Event>]>;

/// What runs in one place, and who is told of what changes there.
#[derive(Debug, Clone)]
pub struct Watch(Arc<Watching>);

/// Who listens, and what was seen last.
#[derive(Debug)]
struct Watching {
    root: RuntimeRoot,
    watched: Mutex<Watched>,
    /// Held by the listener that comes first while it looks: those that come meanwhile begin with
    /// what it saw.
    first: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Watched {
    /// `None` while nobody looks.
    view: Option<View>,
    changes: Sender<Changes>,
}

impl Watching {
    fn new(root: RuntimeRoot) -> Self {
        Self {
            root,
            watched: Mutex::new(Watched {
                view: None,
                changes: channel(MAX_BEHIND).0,
            }),
            first: tokio::sync::Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is, and what changes from there on. None while nobody looks.
    fn listen(&self) -> Option<(View, Receiver<Changes>)> {
        let watched = self.lock();
        let view = watched.view.clone()?;
        Some((view, watched.changes.subscribe()))
    }

    /// Something was seen: tells what changed. Whether anybody listens.
    fn saw(&self, mut view: View) -> bool {
        let mut watched = self.lock();
        if watched.changes.receiver_count() == 0 {
            watched.view = None;
            return false;
        }
        if let Some(before) = &watched.view {
            let changes: Changes = view.since(before).into_iter().map(Arc::new).collect();
            if !changes.is_empty() {
                // Who listened may have gone just now.
                let _ = watched.changes.send(changes);
            }
            view.carry_on(before);
        }
        watched.view = Some(view);
        true
    }

    /// The first listener came: `view` is what it begins with.
    fn begin(&self, view: View) -> (View, Receiver<Changes>, bool) {
        let mut watched = self.lock();
        let changes = watched.changes.subscribe();
        match &watched.view {
            Some(other) => (other.clone(), changes, false),
            None => {
                watched.view = Some(view.clone());
                (view, changes, true)
            }
        }
    }
}

impl Watch {
    /// Of what runs in `root`.
    pub fn new(root: RuntimeRoot) -> Self {
        Self(Arc::new(Watching::new(root)))
    }

    /// Listens, and looks from now on if nobody did.
    async fn listen(&self) -> Result<(View, Receiver<Changes>), Problem> {
        let watching = &self.0;
        if let Some(listened) = watching.listen() {
            return Ok(listened);
        }
        let _first = watching.first.lock().await;
        if let Some(listened) = watching.listen() {
            return Ok(listened);
        }
        let look = look_at(&watching.root, LOOK_TIME).await?;
        let (view, changes, first) = watching.begin(View::of(&look));
        if first {
            tokio::spawn(look_on(Arc::clone(watching)));
        }
        Ok((view, changes))
    }
}

/// Looks until nobody listens.
async fn look_on(watching: Arc<Watching>) {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        match look_at(&watching.root, LOOK_TIME).await {
            Ok(look) if watching.saw(View::of(&look)) => {}
            Ok(_) => return,
            // It may be seen the next time.
            Err(problem) => tracing::warn!("cannot look at guests: {problem:?}"),
        }
    }
}

/// What one listener is told.
struct Listener {
    /// What it was not told yet of a look, the first thing last.
    next: Vec<Arc<Event>>,
    changes: Receiver<Changes>,
    ended: bool,
}

impl Listener {
    /// One that begins with what there is.
    fn new(now: View, changes: Receiver<Changes>) -> Self {
        Self {
            next: vec![Arc::new(now.into_event())],
            changes,
            ended: false,
        }
    }

    async fn next(&mut self) -> Option<Arc<Event>> {
        while self.next.is_empty() && !self.ended {
            match self.changes.recv().await {
                Ok(changes) => self.next.extend(changes.iter().rev().cloned()),
                Err(RecvError::Closed) => self.ended = true,
                Err(RecvError::Lagged(missed)) => {
                    self.ended = true;
                    let reason =
                        format!("what {missed} looks saw was not read in time: listen anew");
                    self.next.push(Arc::new(Event::Dropped { reason }));
                }
            }
        }
        self.next.pop()
    }
}

fn sse(event: &Event) -> Result<SseEvent, Infallible> {
    let name = event.name();
    let data = serde_json::to_string(event).unwrap_or_default();
    Ok(SseEvent::default().event(name).data(data))
}

/// Listen to what changes: server-sent events, the first of which says what there is.
#[utoipa::path(get, path = "/v1/events", tag = "events",
    responses((status = 200, body = Event, content_type = "text/event-stream",
        description = "One event after the other, each as JSON in its data")))]
pub async fn listen_to_events(
    State(watch): State<Watch>,
) -> Result<Sse<impl futures_util::Stream<Item = Result<SseEvent, Infallible>>>, Problem> {
    let (view, changes) = watch.listen().await?;
    let listener = Listener::new(view, changes);
    let stream = futures_util::stream::unfold(listener, |mut listener| async {
        let event = listener.next().await?;
        Some((sse(&event), listener))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

#[cfg(test)]
pub mod tests;
