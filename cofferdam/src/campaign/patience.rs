//! Waiting for a guest's work, but not for that of a guest that does not go on: its kernel has
//! panicked or says that a processor stands still, its agent does not answer, or a step takes much
//! longer than it does without a fault.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::client::Channel;
use agent_protocol::frame;
use agent_protocol::message::{Call, Exec};
use agent_protocol::{Client, ClientError, Request};
use recovery::campaign::verdict::is_stall;
use recovery::campaign::workload::is_over;

use crate::bench::guest::{Guest, text_from};

/// Between two looks at the guest.
const POLL: Duration = Duration::from_millis(50);

/// How long an agent may say nothing until it is asked for a sign, and between two such questions.
const ASK_AFTER: Duration = Duration::from_secs(1);

/// Number of those questions, which no request of a client has: theirs are counted from 1.
const SIGN: u64 = u64::MAX;

/// Longest output of a script that is looked at, in bytes: an honest one writes a few thousand.
const MAX_OUTPUT: usize = 1 << 20;

/// Longest line of it, in bytes.
const MAX_LINE: usize = 256;

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

/// How long a script is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For its end.
    pub all: Duration,
    /// For the next that it writes.
    pub line: Duration,
    /// For a sign of the guest's agent, which is asked for one when it says nothing.
    pub silence: Duration,
    /// A guest whose kernel says that a processor stands still is not waited for.
    pub until_stall: bool,
}

impl Limits {
    /// Nothing but this for its end.
    fn only(all: Duration) -> Self {
        Self {
            all,
            line: all,
            silence: Duration::MAX,
            until_stall: false,
        }
    }
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
    /// Its checks were not waited for, since they were not needed.
    pub cut: bool,
    /// The guest's agent gave no sign.
    pub silent: bool,
}

/// What a script writes in the guest until it ends, its time is up, or the guest panics or writes
/// too much, as its console says behind byte `heard`.
pub fn output_of(guest: &mut Guest, heard: u64, script: String, limit: Duration) -> String {
    let limits = Limits::only(limit);
    listen(guest, heard, script, &limits, &mut || true).output
}

/// The same with more limits, and when it came. When the script says that the work is over it is
/// asked once whether its checks are needed.
pub fn listen(
    guest: &mut Guest,
    heard: u64,
    script: String,
    limits: &Limits,
    needs_checks: &mut (dyn FnMut() -> bool + Send),
) -> Heard {
    guest.agent().disconnect();
    let said = Mutex::new(Said::new());
    let exec = Exec {
        argv: ["sh".to_owned(), "-c".to_owned(), script].into(),
        limit_ms: Some(u64::try_from(limits.all.as_millis()).unwrap_or(u64::MAX)),
        ..Exec::default()
    };
    let console = guest.console_file();
    let (mut asked, mut silent, mut cut) = (false, false, false);
    let mut has_ended = |since: Duration| {
        let text = text_from(&console, heard);
        let stalls = limits.until_stall && text.lines().any(is_stall);
        let (last, over) = {
            let said = lock(&said);
            (said.last, said.over.is_some())
        };
        if over && !asked {
            asked = true;
            cut = !needs_checks();
        }
        silent = since > limits.silence;
        cut || silent
            || stalls
            || last.elapsed() > limits.line
            || says_too_much(&console, heard)
            || has_panicked(&text)
    };
    let mut collect = |bytes: Vec<u8>| lock(&said).hear(bytes);
    // What it said before it hung counts.
    let agent = guest.paths().agent_socket();
    let _ended = exec_unless(&mut has_ended, &agent, exec, &mut collect);
    let said = said.into_inner().unwrap_or_else(PoisonError::into_inner);
    Heard {
        output: String::from_utf8_lossy(&said.output).into_owned(),
        began: said.began,
        over: said.over,
        cut,
        silent,
    }
}

/// What a script has written so far.
struct Said {
    output: Vec<u8>,
    /// The line that it is at, as far as lines are looked at.
    line: Vec<u8>,
    /// When its first byte came, and the last; the last is when it was started before that.
    began: Option<Instant>,
    last: Instant,
    over: Option<Instant>,
}

impl Said {
    fn new() -> Self {
        Self {
            output: Vec::new(),
            line: Vec::new(),
            began: None,
            last: Instant::now(),
            over: None,
        }
    }

    fn hear(&mut self, bytes: Vec<u8>) {
        let now = Instant::now();
        self.began.get_or_insert(now);
        self.last = now;
        for byte in &bytes {
            match byte {
                b'\n' => {
                    if self.over.is_none() && is_over(&String::from_utf8_lossy(&self.line)) {
                        self.over = Some(now);
                    }
                    self.line.clear();
                }
                byte if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {}
            }
        }
        if self.output.len() < MAX_OUTPUT {
            self.output.extend(bytes);
        }
    }
}

/// A stream that takes note of when something came last.
struct Watched {
    stream: UnixStream,
    last: Arc<Mutex<Instant>>,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        *lock(&self.last) = Instant::now();
        Ok(count)
    }
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Channel for Watched {
    fn set_time_limit(&self, limit: Duration) -> io::Result<()> {
        Channel::set_time_limit(&self.stream, limit)
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a program in a guest by a channel of its own, which is closed when the guest `has_ended`;
/// that is told how long the guest has given no sign. Gives its output away as it comes.
fn exec_unless(
    has_ended: &mut (dyn FnMut(Duration) -> bool + Send),
    agent: &Path,
    exec: Exec,
    output: &mut (dyn FnMut(Vec<u8>) + Send),
) -> Result<(), ClientError> {
    let channel: Arc<Mutex<Option<UnixStream>>> = Arc::default();
    let last = Arc::new(Mutex::new(Instant::now()));
    let (ours, heard, socket) = (channel.clone(), last.clone(), agent.to_owned());
    let mut client = Client::new(move || {
        let stream = UnixStream::connect(&socket)?;
        *lock(&ours) = Some(stream.try_clone()?);
        let last = heard.clone();
        Ok(Box::new(Watched { stream, last }) as Box<dyn Channel>)
    });
    let over = AtomicBool::new(false);
    // Whether the program was asked for: until then the client says hello over and over by itself.
    let is_asked = AtomicBool::new(false);
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut asked = Instant::now();
            while !over.load(Ordering::Acquire) {
                let since = lock(&last).elapsed();
                let stream = lock(&channel).as_ref().map(UnixStream::try_clone);
                if let Some(Ok(mut stream)) = stream {
                    if has_ended(since) {
                        gone.store(true, Ordering::Release);
                        // The reader sees the end of the stream.
                        let _ = stream.shutdown(Shutdown::Both);
                    } else if is_asked.load(Ordering::Acquire)
                        && since.min(asked.elapsed()) > ASK_AFTER
                    {
                        asked = Instant::now();
                        // One that takes nothing any more gives no sign either.
                        let _ = ask_for_a_sign(&mut stream);
                    }
                }
                std::thread::park_timeout(POLL);
            }
        });
        let limit = exec.limit_ms.map_or(ASK_AFTER, Duration::from_millis);
        let ended = greet(&mut client, limit, &gone).and_then(|()| {
            is_asked.store(true, Ordering::Release);
            client.exec_streaming(exec, &mut |is_error, bytes| {
                if !is_error {
                    output(bytes);
                }
                Ok(())
            })
        });
        over.store(true, Ordering::Release);
        watch.thread().unpark();
        ended.map(drop)
    })
}

/// Waits until the agent answers, unless its guest is `gone` by then.
fn greet(client: &mut Client, limit: Duration, gone: &AtomicBool) -> Result<(), ClientError> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match client.hello(left.min(ASK_AFTER)) {
            Err(ClientError::Time(..)) if !left.is_zero() && !gone.load(Ordering::Acquire) => {}
            other => return other.map(drop),
        }
    }
}

/// Asks an agent for nothing but an answer, which the client that waits for another one passes by.
fn ask_for_a_sign(stream: &mut UnixStream) -> io::Result<()> {
    let request = Request {
        id: SIGN,
        call: Call::Ping,
    };
    stream.write_all(&frame::encode(&serde_json::to_vec(&request)?)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::AtomicU32;

    use agent_protocol::frame::{Decoder, Item, send};
    use agent_protocol::message::{AgentInfo, Body, Done};
    use agent_protocol::{PROTOCOL_VERSION, Response, Stamp};

    use super::*;

    /// An agent that answers when it is greeted, and when it is asked for a sign as long as there
    /// are `signs` left; its program never ends. It ends with its client.
    fn serve(stream: &mut UnixStream, signs: &AtomicU32) {
        let now = Stamp {
            mono_ns: 1,
            real_ns: 1,
        };
        let (mut decoder, mut buffer) = (Decoder::new(), [0; 4096]);
        loop {
            let count = stream.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                return;
            }
            let mut input = &buffer[..count];
            while let Some(item) = decoder.next(&mut input) {
                let Item::Frame(payload) = item else {
                    continue;
                };
                let request: Request = serde_json::from_slice(&payload).unwrap();
                let done = match request.call {
                    Call::Hello { nonce } => {
                        let agent = AgentInfo {
                            version: PROTOCOL_VERSION,
                            boot_id: String::new(),
                            kernel: String::new(),
                            pid: 1,
                        };
                        Done::Hello { nonce, agent }
                    }
                    Call::Ping if signs.load(Ordering::Acquire) > 0 => {
                        signs.fetch_sub(1, Ordering::AcqRel);
                        Done::Ok
                    }
                    _ => continue,
                };
                let response = Response {
                    id: request.id,
                    received: now,
                    sent: now,
                    body: Body::Done(done),
                };
                send(stream, &serde_json::to_vec(&response).unwrap()).unwrap();
            }
        }
    }

    /// Has such an agent run a program until the guest has ended, as `has_ended` says of how long
    /// it has given no sign.
    fn run_until(signs: &AtomicU32, has_ended: &mut (dyn FnMut(Duration) -> bool + Send)) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| serve(&mut listener.accept().unwrap().0, signs));
            let exec = Exec {
                argv: vec!["true".to_owned()],
                limit_ms: Some(600_000),
                ..Exec::default()
            };
            let ended = exec_unless(has_ended, &socket, exec, &mut |_| panic!("it says nothing"));
            // Not that its time was up.
            assert!(matches!(ended, Err(ClientError::Channel(_))), "{ended:?}");
        });
    }

    #[test]
    fn nobody_waits_for_a_guest_that_has_ended() {
        let mut looks = 0;
        run_until(&AtomicU32::new(0), &mut |_| {
            looks += 1;
            looks == 3
        });
        assert_eq!(looks, 3);
    }

    #[test]
    fn an_agent_that_says_nothing_is_asked_for_a_sign_and_not_waited_for_when_it_gives_none() {
        let signs = AtomicU32::new(2);
        let mut longest = Duration::ZERO;
        // It would go on for ever if it was not asked while it answers.
        run_until(&signs, &mut |since| {
            longest = since;
            since > 2 * ASK_AFTER && signs.load(Ordering::Acquire) == 0
        });
        assert!(longest > 2 * ASK_AFTER);
    }

    #[test]
    fn a_script_is_heard_line_by_line_however_its_bytes_come() {
        let mut said = Said::new();
        for bytes in ["at:1\nstep:0 a\nst", "ep:1 wor", "ks"] {
            said.hear(bytes.into());
            assert!(said.over.is_none() && said.began.is_some(), "{bytes}");
        }
        said.hear(b"\nat:2\n".to_vec());
        assert!(said.over.is_some());
        // One that has no end.
        let mut said = Said::new();
        for _ in 0..3 * MAX_OUTPUT / CHUNK {
            said.hear(vec![b'x'; CHUNK]);
        }
        assert_eq!((said.line.len(), said.over), (MAX_LINE, None));
        assert!(said.output.len() < MAX_OUTPUT + CHUNK);
    }

    /// Bytes that come at a time.
    const CHUNK: usize = 4096;
}
