//! Waiting for a guest's work, but not for that of a guest whose kernel has panicked: nothing comes
//! from it any more.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::client::Channel;
use agent_protocol::message::Exec;
use agent_protocol::{Client, ClientError};

use crate::bench::guest::{Guest, text_from};
use recovery::campaign::workload::is_over;

/// Between two looks at the guest.
const POLL: Duration = Duration::from_millis(200);

/// Longest output of a script that is looked at, in bytes: an honest one writes a few thousand.
const MAX_OUTPUT: usize = 1 << 20;

/// Longest console of a run, in bytes: one that writes more without an end is not waited for.
const MAX_CONSOLE: u64 = 16 << 20;

/// Whether this is of the console of a guest whose kernel has panicked (`panic` in kernel/panic.c).
pub fn has_panicked(console: &str) -> bool {
    console.contains("Kernel panic - not syncing")
}

/// Whether a guest has written more than a whole run may to its console behind byte `heard`.
fn says_too_much(console: &Path, heard: u64) -> bool {
    let bytes = std::fs::metadata(console).map_or(0, |console| console.len());
    bytes.saturating_sub(heard) > MAX_CONSOLE
}

/// What a script wrote, and when.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// All of it.
    pub output: String,
    /// When its first byte came.
    pub began: Option<Instant>,
    /// When it had said that the work is over.
    pub over: Option<Instant>,
}

/// What a script writes in the guest until it ends, its time is up, or the guest panics or writes
/// too much, as its console says behind byte `heard`.
pub fn output_of(guest: &mut Guest, heard: u64, script: String, limit: Duration) -> String {
    listen(guest, heard, script, limit).output
}

/// The same, and when it came.
pub fn listen(guest: &mut Guest, heard: u64, script: String, limit: Duration) -> Heard {
    guest.agent().disconnect();
    let mut output = Vec::new();
    let (mut began, mut over) = (None, None);
    let exec = Exec {
        argv: ["sh".to_owned(), "-c".to_owned(), script].into(),
        limit_ms: Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
        ..Exec::default()
    };
    let mut collect = |bytes: Vec<u8>| {
        if output.len() < MAX_OUTPUT {
            output.extend(bytes);
        }
        let now = Instant::now();
        began.get_or_insert(now);
        if over.is_none() && is_over(&String::from_utf8_lossy(&output)) {
            over = Some(now);
        }
    };
    let console = guest.console_file();
    let has_ended = || says_too_much(&console, heard) || has_panicked(&text_from(&console, heard));
    // What it said before it hung counts.
    let _ended = exec_unless(has_ended, &guest.paths().agent_socket(), exec, &mut collect);
    Heard {
        output: String::from_utf8_lossy(&output).into_owned(),
        began,
        over,
    }
}

/// Runs a program in a guest by a channel of its own, which is closed when the guest `has_ended`.
/// Gives its output away as it comes.
fn exec_unless(
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

    use agent_protocol::frame::{Decoder, Item, send};
    use agent_protocol::message::{AgentInfo, Body, Call, Done};
    use agent_protocol::{PROTOCOL_VERSION, Request, Response, Stamp};

    use super::*;

    /// An agent that answers when it is greeted; ends when it is asked for more.
    fn greet(stream: &mut UnixStream) {
        let now = Stamp {
            mono_ns: 1,
            real_ns: 1,
        };
        let (mut decoder, mut buffer) = (Decoder::new(), [0; 4096]);
        loop {
            let count = stream.read(&mut buffer).unwrap();
            let mut input = &buffer[..count];
            while let Some(item) = decoder.next(&mut input) {
                let Item::Frame(payload) = item else {
                    continue;
                };
                let request: Request = serde_json::from_slice(&payload).unwrap();
                let Call::Hello { nonce } = request.call else {
                    return;
                };
                let agent = AgentInfo {
                    version: PROTOCOL_VERSION,
                    boot_id: String::new(),
                    kernel: String::new(),
                    pid: 1,
                };
                let response = Response {
                    id: request.id,
                    received: now,
                    sent: now,
                    body: Body::Done(Done::Hello { nonce, agent }),
                };
                send(stream, &serde_json::to_vec(&response).unwrap()).unwrap();
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_guest_that_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        let has_ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                greet(&mut stream);
                has_ended.store(true, Ordering::Release);
                // Until its user has gone.
                while matches!(stream.read(&mut [0]), Ok(1)) {}
            });
            let exec = Exec {
                argv: vec!["true".to_owned()],
                limit_ms: Some(60_000),
                ..Exec::default()
            };
            let ended = exec_unless(
                || has_ended.load(Ordering::Acquire),
                &socket,
                exec,
                &mut |_| panic!("it says nothing"),
            );
            // Not that its time was up.
            assert!(matches!(ended, Err(ClientError::Channel(_))), "{ended:?}");
        });
    }
}
