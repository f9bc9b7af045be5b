//! Waiting for a guest's work, but not for that of a guest whose kernel has panicked: nothing comes from it any more.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent_protocol::client::Channel;
use agent_protocol::message::Exec;
use agent_protocol::{Client, ClientError};

/// Between two looks at the guest.
const POLL: Duration = Duration::from_millis(200);

/// Runs a program in a guest by a channel of its own, which is closed when the guest `has_ended`. Gives its output away as it
/// comes.
pub fn exec_unless(
    has_ended: impl Fn() -> bool + Sync,
    agent: &Path,
    exec: Exec,
    output: &mut (dyn FnMut(Vec<u8>) + Send),
) -> Result<(), ClientError> {
    let channel: Arc<Mutex<Option<UnixStream>>> = Arc::default();
    let (ours, socket) = (channel.clone(), agent.to_owned());
    let lock = |channel: &Mutex<Option<UnixStream>>| {
        let stream = channel.lock().unwrap_or_else(PoisonError::into_inner);
        stream.as_ref().map(UnixStream::try_clone)
    };
    let mut client = Client::new(move || {
        let stream = UnixStream::connect(&socket)?;
        *ours.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
        Ok(Box::new(stream) as Box<dyn Channel>)
    });
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                if has_ended()
                    && let Some(Ok(stream)) = lock(&channel)
                {
                    // The reader sees the end of the stream.
                    let _ = stream.shutdown(Shutdown::Both);
                }
                std::thread::park_timeout(POLL);
            }
        });
        let ended = client.exec_streaming(exec, &mut |is_error, bytes| {
            if !is_error {
                output(bytes);
            }
            Ok(())
        });
        over.store(true, Ordering::Release);
        watch.thread().unpark();
        ended.map(drop)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn nobody_waits_for_a_guest_that_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        let has_ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // An agent that reads what it is asked and never answers.
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                has_ended.store(true, Ordering::Release);
                // Until its user has gone.
                while matches!(stream.read(&mut byte), Ok(1)) {}
                drop(listener);
            });
            let exec = Exec {
                argv: vec!["true".to_owned()],
                limit_ms: Some(2_000),
                ..Exec::default()
            };
            let ended = exec_unless(
                || has_ended.load(Ordering::Acquire),
                &socket,
                exec,
                &mut |_| panic!("it says nothing"),
            );
            assert!(ended.is_err());
        });
    }
}
