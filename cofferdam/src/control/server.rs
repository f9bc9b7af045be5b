//! The side of the control socket that answers.
//!
//! One thread accepts, one thread serves each connection, so that a client that is slow or sends
//! nonsense holds up nobody but itself. Lines, connections and waits are bounded.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use recovery::asker::{Asker, Gone};

use super::Protocol;
use super::protocol::{Answer, BEAT, MAX_REQUEST_BYTES, VmProtocol};

/// Connections served at one time.
const MAX_CONNECTIONS: usize = 16;

/// How long a connection may stay silent, and how long it may take nothing of an answer.
const SILENCE: Duration = Duration::from_secs(600);

/// How long to wait before accepting again when the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What answers requests.
pub trait Handler<P: Protocol = VmProtocol>: Send + Sync + 'static {
    /// Carries out `request`, telling `asker` what is done if it takes long. The error is one line
    /// for the person who asked.
    fn handle(&self, request: P::Request, asker: &dyn Asker) -> Result<P::Reply, String>;
}

/// Answers requests at `path` with `handler` until the process ends. The file is the caller's to
/// remove.
pub fn serve(path: &Path, handler: Arc<dyn Handler>) -> anyhow::Result<Serving> {
    serve_protocol(path, handler)
}

/// The same for another process than that of a VM.
pub fn serve_protocol<P: Protocol>(
    path: &Path,
    handler: Arc<dyn Handler<P>>,
) -> anyhow::Result<Serving> {
    let serving = Serving::default();
    let under_way = serving.clone();
    let listener = UnixListener::bind(path)
        .with_context(|| format!("cannot make the control socket {}", path.display()))?;
    thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || accept(&listener, &handler, &under_way))
        .context("cannot start the control thread")?;
    Ok(serving)
}

/// The requests that are being carried out.
#[derive(Clone, Default)]
pub struct Serving(Arc<(Mutex<Unanswered>, Condvar)>);

/// Requests that have no answer yet.
#[derive(Debug, Default)]
struct Unanswered {
    count: usize,
    /// Somebody waits until there are none: nobody is woken otherwise, which takes a system call.
    is_waited_for: bool,
}

impl Serving {
    /// Waits until each has its answer, for `limit` at most: who asked for the end is to hear that
    /// it came.
    pub fn wait_for_answers(&self, limit: Duration) {
        let (unanswered, changed) = &*self.0;
        let mut unanswered = unanswered.lock().unwrap_or_else(PoisonError::into_inner);
        unanswered.is_waited_for = true;
        // Whether all are answered makes no difference any more.
        let _ = changed.wait_timeout_while(unanswered, limit, |unanswered| unanswered.count > 0);
    }

    fn begin(&self) -> UnderWay<'_> {
        self.unanswered().count += 1;
        UnderWay(self)
    }

    fn unanswered(&self) -> MutexGuard<'_, Unanswered> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that has no answer yet.
struct UnderWay<'a>(&'a Serving);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut unanswered = self.0.unanswered();
        unanswered.count -= 1;
        if unanswered.is_waited_for {
            self.0.0.1.notify_all();
        }
    }
}

/// Accepts connections for ever.
fn accept<P: Protocol>(listener: &UnixListener, handler: &Arc<dyn Handler<P>>, serving: &Serving) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("control socket: {error}");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let slot = Slot::take(&open);
        if slot.0.load(Ordering::Relaxed) > MAX_CONNECTIONS {
            refuse(stream);
            continue;
        }
        let handler = Arc::clone(handler);
        let serving = serving.clone();
        let served = thread::Builder::new()
            .name("control-client".to_owned())
            .spawn(move || {
                let _slot = slot;
                if let Err(error) = serve_connection(stream, &*handler, &serving) {
                    tracing::debug!("control connection ended: {error}");
                }
            });
        if let Err(error) = served {
            tracing::warn!("control connection dropped, no thread for it: {error}");
        }
    }
}

/// One of the connections that may be open.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells a client that there is no room for it.
fn refuse(mut stream: UnixStream) {
    let answer = Answer::<()>::Error("too many connections: close one and try again".to_owned());
    // It may be gone already; there is nobody else to tell.
    let _ = stream
        .set_nonblocking(true)
        .and_then(|()| stream.write_all(answer.line().as_bytes()));
}

/// Answers the requests of one connection until it closes.
fn serve_connection<P: Protocol>(
    stream: UnixStream,
    handler: &dyn Handler<P>,
    serving: &Serving,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let request = read_request::<P>(&mut reader)?;
        let _under_way = serving.begin();
        let answer = match request {
            None => return Ok(()),
            Some(Ok(request)) => {
                tracing::debug!(?request, "control");
                let client = Client::new(&writer);
                let result = if P::may_take(&request).is_some() {
                    client.while_it_waits(|| handler.handle(request, &client))
                } else {
                    handler.handle(request, &client)
                };
                result.map_or_else(Answer::Error, Answer::Ok)
            }
            Some(Err(Malformed { error, recoverable })) => {
                writer.write_all(Answer::<P::Reply>::Error(error).line().as_bytes())?;
                if recoverable {
                    continue;
                }
                return Ok(());
            }
        };
        writer.write_all(answer.line().as_bytes())?;
    }
}

/// Who waits for an answer at the other end of a connection.
struct Client<'a> {
    /// What it was told last.
    told: Mutex<String>,
    stream: &'a UnixStream,
}

impl<'a> Client<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self {
            told: Mutex::new("working".to_owned()),
            stream,
        }
    }

    /// Repeats what was told last at every beat while `work` is done: that the process lives, and
    /// what it is at.
    fn while_it_waits<T>(&self, work: impl FnOnce() -> T) -> T {
        let (done, ended) = channel::<()>();
        thread::scope(|scope| {
            // Without the thread there are no signs of life; the answer comes all the same.
            let _beats = thread::Builder::new().spawn_scoped(scope, move || {
                while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                    // Under the lock, or an old word would come after a new one.
                    let told = self.told();
                    if self.write(&told).is_err() {
                        return;
                    }
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    fn told(&self) -> MutexGuard<'_, String> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, what: &str) -> std::io::Result<()> {
        let line = Answer::<()>::Progress(what.to_owned()).line();
        let mut stream = self.stream;
        stream.write_all(line.as_bytes())
    }
}

impl Asker for Client<'_> {
    fn tell(&self, what: &str) -> Result<(), Gone> {
        tracing::debug!("{what}");
        let mut told = self.told();
        what.clone_into(&mut told);
        self.write(&told).map_err(|_| Gone)
    }
}

/// A line that is no request.
struct Malformed {
    error: String,
    /// Whether the next line can be found.
    recoverable: bool,
}

/// Reads one line; `None` at the end of the stream.
fn read_request<P: Protocol>(
    reader: &mut impl BufRead,
) -> std::io::Result<Option<Result<P::Request, Malformed>>> {
    let mut line = Vec::new();
    match reader.take(MAX_REQUEST_BYTES).read_until(b'\n', &mut line) {
        Ok(0) => return Ok(None),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
        other => other?,
    };
    if line.last() != Some(&b'\n') {
        let error = format!("a request is one line of at most {MAX_REQUEST_BYTES} bytes");
        return Ok(Some(Err(Malformed {
            error,
            recoverable: false,
        })));
    }
    Ok(Some(serde_json::from_slice(&line).map_err(|error| {
        Malformed {
            error: format!("this is not a request: {error}"),
            recoverable: true,
        }
    })))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::control::client::ControlClient;
    use crate::control::protocol::{Reply, Request};

    /// Accepts nothing but `pause`, `reset` in two steps, and `release`, which takes its time.
    #[derive(Default)]
    struct OnlyPause(Arc<AtomicBool>);

    impl Handler for OnlyPause {
        fn handle(&self, request: Request, asker: &dyn Asker) -> Result<Reply, String> {
            match request {
                Request::Pause {} => Ok(Reply::Done {}),
                Request::Reset {} => {
                    asker.tell("down").unwrap();
                    asker.tell("up").unwrap();
                    Ok(Reply::Done {})
                }
                Request::Release { module } => {
                    asker.tell("at it").unwrap();
                    while asker.tell("waiting").is_ok() && module == "until I go" {
                        thread::sleep(Duration::from_millis(5));
                    }
                    self.0.store(true, Ordering::Relaxed);
                    thread::sleep(BEAT * 5 / 2);
                    Ok(Reply::Done {})
                }
                other => Err(format!("not {other:?}")),
            }
        }
    }

    fn served() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        serve(&path, Arc::new(OnlyPause::default())).unwrap();
        (dir, path)
    }

    fn ask(stream: &mut UnixStream, line: &[u8]) -> String {
        stream.write_all(line).unwrap();
        let mut answer = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut answer)
            .unwrap();
        answer
    }

    #[test]
    fn requests_are_answered_or_refused_with_a_reason() {
        let (_dir, path) = served();
        let mut client = ControlClient::connect(&path).unwrap();
        assert_eq!(client.ask(&Request::Pause {}).unwrap(), Reply::Done {});
        let refused = client.ask(&Request::Quit {}).unwrap_err().to_string();
        assert_eq!(refused, "not Quit");
    }

    #[test]
    fn what_is_done_is_told_before_the_answer() {
        let (_dir, path) = served();
        let mut client = ControlClient::connect(&path).unwrap();
        let mut told = Vec::new();
        let reply =
            client.ask_and_watch(&Request::Reset {}, &mut |what| told.push(what.to_owned()));
        assert_eq!(reply.unwrap(), Reply::Done {});
        assert_eq!(told, ["down", "up"]);
        // Who does not watch gets the answer all the same.
        assert_eq!(client.ask(&Request::Reset {}).unwrap(), Reply::Done {});
        assert_eq!(client.ask(&Request::Pause {}).unwrap(), Reply::Done {});
    }

    #[test]
    fn a_process_that_is_long_at_something_says_so_until_it_is_done() {
        let (_dir, path) = served();
        let mut client = ControlClient::connect(&path).unwrap();
        let mut told = Vec::new();
        let request = Request::Release {
            module: "e1000".to_owned(),
        };
        let reply = client.ask_and_watch(&request, &mut |what| told.push(what.to_owned()));
        assert_eq!(reply.unwrap(), Reply::Done {});
        // The same word again is not told again.
        assert_eq!(told, ["at it", "waiting"]);
    }

    #[test]
    fn who_goes_away_is_known_to_have_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let ended = Arc::new(AtomicBool::new(false));
        serve(&path, Arc::new(OnlyPause(ended.clone()))).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        let request = Request::Release {
            module: "until I go".to_owned(),
        };
        ask(&mut stream, request.line().as_bytes());
        assert!(!ended.load(Ordering::Relaxed));
        drop(stream);
        while !ended.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_end_waits_for_answers_and_not_for_silence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let serving = serve(&path, Arc::new(OnlyPause::default())).unwrap();
        // A connection without a request.
        let _silent = UnixStream::connect(&path).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        ask(&mut stream, b"{\"request\":\"pause\"}\n");
        serving.wait_for_answers(Duration::MAX);
        // One that never ends is waited for as long as is said.
        let busy = serving.begin();
        serving.wait_for_answers(Duration::from_millis(1));
        drop(busy);
        serving.wait_for_answers(Duration::MAX);
    }

    #[test]
    fn nonsense_is_answered_and_the_next_request_works() {
        let (_dir, path) = served();
        let mut stream = UnixStream::connect(&path).unwrap();
        for nonsense in [
            &b"\n"[..],
            b"{}\n",
            b"{\"request\":\"fly\"}\n",
            b"{\"request\":\"pause\",\"x\":1}\n",
            b"\xff\xfe\n",
            b"[[[[[[\n",
        ] {
            let answer = ask(&mut stream, nonsense);
            assert!(answer.starts_with("{\"error\":"), "{answer}");
        }
        assert!(ask(&mut stream, b"{\"request\":\"pause\"}\n").starts_with("{\"ok\":"));
    }

    #[test]
    fn a_line_without_end_closes_the_connection_only() {
        let (_dir, path) = served();
        let mut stream = UnixStream::connect(&path).unwrap();
        let long = vec![b'x'; usize::try_from(MAX_REQUEST_BYTES).unwrap()];
        let answer = ask(&mut stream, &long);
        assert!(answer.contains("at most"), "{answer}");
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        let mut client = ControlClient::connect(&path).unwrap();
        assert_eq!(client.ask(&Request::Pause {}).unwrap(), Reply::Done {});
    }

    #[test]
    fn more_connections_than_are_served_are_told_so() {
        let (_dir, path) = served();
        let mut clients: Vec<UnixStream> = (0..MAX_CONNECTIONS)
            .map(|_| {
                let mut stream = UnixStream::connect(&path).unwrap();
                ask(&mut stream, b"{\"request\":\"pause\"}\n");
                stream
            })
            .collect();
        let mut answer = String::new();
        let one_more = UnixStream::connect(&path).unwrap();
        BufReader::new(one_more).read_line(&mut answer).unwrap();
        assert!(answer.contains("too many"), "{answer}");
        let last = clients.last_mut().unwrap();
        assert!(ask(last, b"{\"request\":\"pause\"}\n").starts_with("{\"ok\":"));
    }
}
