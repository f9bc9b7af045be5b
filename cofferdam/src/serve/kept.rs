//! Connections to guests that are kept for the next look at the same one: to make one, a thread in
//! the guest's process and the look into the runtime folder take longer than the answer.
//!
//! A connection goes when it has not been used for a while, since the guest's process has room for
//! few of them, and with its guest: one that comes back under the same name has another socket.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::control::client::{AskError, ControlClient};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

/// Connections that are kept at most, one of each guest.
const MAX_KEPT: usize = 64;

/// Those that nobody uses.
#[derive(Debug, Clone, Default)]
pub struct Kept(Arc<Mutex<BTreeMap<VmName, Idle>>>);

/// One of them.
#[derive(Debug)]
struct Idle {
    client: ControlClient,
    since: Instant,
}

impl Kept {
    /// Asks the guest `name` over the connection that is kept, if there is one, else over the one
    /// that `connect` makes, and keeps it if it was answered. The request is asked twice where a
    /// connection ends before it was answered: it has to be one that changes nothing.
    ///
    /// # Errors
    /// Those of [`ControlClient::ask`], and of `connect`.
    pub fn ask<E: From<anyhow::Error>>(
        &self,
        name: &VmName,
        request: &Request,
        connect: impl FnOnce() -> Result<ControlClient, E>,
    ) -> Result<Reply, E> {
        if let Some(mut client) = self.take(name) {
            match client.ask(request) {
                Ok(reply) => {
                    self.keep(name, client);
                    return Ok(reply);
                }
                Err(error) if is_answer_enough(&error) => return Err(error.into()),
                // Its process has ended, or has closed it: who has the name now?
                Err(error) => tracing::debug!(%name, "a connection that was kept: {error:#}"),
            }
        }
        let mut client = connect()?;
        let reply = client.ask(request)?;
        self.keep(name, client);
        Ok(reply)
    }

    /// Closes those that have not been used for `age`.
    pub fn close_idle(&self, age: Duration) {
        self.lock().retain(|_, idle| idle.since.elapsed() < age);
    }

    fn take(&self, name: &VmName) -> Option<ControlClient> {
        self.lock().remove(name).map(|idle| idle.client)
    }

    fn keep(&self, name: &VmName, client: ControlClient) {
        let mut kept = self.lock();
        if kept.len() < MAX_KEPT || kept.contains_key(name) {
            let since = Instant::now();
            kept.insert(name.clone(), Idle { client, since });
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmName, Idle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the guest's process is there, so that another connection would change nothing.
fn is_answer_enough(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(AskError::Refused(_) | AskError::Silent(_))
    )
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread::JoinHandle;

    use super::*;

    /// A process that answers `answers` requests of its first connection, and closes that.
    fn guest(path: &Path, answers: &'static [&'static str]) -> JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in answers {
                lines.next().unwrap().unwrap();
                let answer = format!("{answer}\n");
                (&stream).write_all(answer.as_bytes()).unwrap();
            }
        })
    }

    const DONE: &str = r#"{"ok":{"reply":"done"}}"#;
    const REFUSED: &str = r#"{"error":"no"}"#;

    /// Asks, and says how often a connection was made for it.
    fn asked(kept: &Kept, path: &Path) -> (Result<Reply, anyhow::Error>, u32) {
        let name = "web".parse().unwrap();
        let made = Cell::new(0);
        let reply = kept.ask(&name, &Request::Status {}, || {
            made.set(made.get() + 1);
            ControlClient::connect(path)
        });
        (reply, made.get())
    }

    #[test]
    fn a_connection_that_was_answered_is_used_again_and_another_made_when_its_process_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (first, next) = (dir.path().join("first"), dir.path().join("next"));
        let kept = Kept::default();
        let process = guest(&first, &[DONE, DONE, REFUSED]);
        for made in [1, 0] {
            let (reply, times) = asked(&kept, &first);
            assert_eq!((reply.unwrap(), times), (Reply::Done {}, made));
        }
        // A refusal is an answer: nobody else is asked.
        let (reply, times) = asked(&kept, &first);
        assert_eq!((reply.unwrap_err().to_string().as_str(), times), ("no", 0));
        process.join().unwrap();
        let process = guest(&next, &[DONE]);
        let (reply, times) = asked(&kept, &next);
        assert_eq!((reply.unwrap(), times), (Reply::Done {}, 1));
        process.join().unwrap();
        // What is kept has ended; another process has the name.
        let again = dir.path().join("again");
        let process = guest(&again, &[DONE]);
        let (reply, times) = asked(&kept, &again);
        assert_eq!((reply.unwrap(), times), (Reply::Done {}, 1));
        process.join().unwrap();
    }

    #[test]
    fn one_that_nobody_uses_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let kept = Kept::default();
        let process = guest(&path, &[DONE]);
        asked(&kept, &path).0.unwrap();
        kept.close_idle(Duration::from_secs(3600));
        assert_eq!(kept.lock().len(), 1);
        kept.close_idle(Duration::ZERO);
        assert_eq!(kept.lock().len(), 0);
        process.join().unwrap();
    }
}
