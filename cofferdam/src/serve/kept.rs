//! Connections to guests that are kept for the next look at the same one: to make one, a thread in
//! the guest's process and the look into the runtime folder take longer than the answer.
//!
//! A connection goes when it has not been used for a while, since the guest's process has room for
//! few of them, and with its guest: one that comes back under the same name has another socket.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::control::client::{self, ControlClient};
use crate::control::protocol::{Answer, Reply, Request};
use crate::options::VmName;

/// Connections that are kept at most, one of each guest.
const MAX_KEPT: usize = 64;

/// How long an answer is waited for before anything else is done. Most are there sooner, and to wait
/// among all else takes two system calls more, a timer and another turn of the scheduler. All other
/// requests wait meanwhile; for a guest that does not answer at all they do so once, since its
/// connection is not kept.
const AT_ONCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000,
};

/// How long an answer is waited for without a thread: one that is there sooner has needed none, and
/// to wake one takes as long as the answer.
const SOON: Duration = Duration::from_millis(200);

/// Longest answer that is read without a thread, in bytes: what is longer holds up other requests.
const SHORT: usize = 64 << 10;

/// Those that nobody uses.
#[derive(Debug, Clone, Default)]
pub struct Kept(Arc<Mutex<BTreeMap<VmName, Idle>>>);

/// One of them.
#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

/// A connection that can be waited for without a thread.
#[derive(Debug)]
struct Connection {
    /// Reading and writing do not wait.
    stream: UnixStream,
    asked: client::Asked,
}

/// How much of an answer's line has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Come {
    /// All of it.
    Whole,
    /// Not its end, but more of it than is read here.
    Long,
    /// Not its end.
    Part,
}

impl Connection {
    /// # Errors
    /// Something has come that nobody has asked for.
    fn of(client: ControlClient) -> io::Result<Self> {
        let parts = client.into_parts().ok_or(io::ErrorKind::InvalidData)?;
        let (stream, asked) = parts;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, asked })
    }

    /// One that a thread waits for.
    fn into_client(self) -> io::Result<ControlClient> {
        self.stream.set_nonblocking(false)?;
        Ok(ControlClient::of_parts(self.stream, self.asked))
    }

    /// Sends a request, if nothing has come that nobody asked for: that would be taken for its
    /// answer.
    fn send(&mut self, request: &Request) -> io::Result<()> {
        match self.stream.read(&mut [0; 1]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
        }
        let line = request.line();
        match self.stream.write(line.as_bytes())? == line.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Waits for the next of an answer, for [`AT_ONCE`] at most, and reads that. All other requests
    /// wait meanwhile.
    fn read_at_once(&mut self, line: &mut Vec<u8>) -> io::Result<Come> {
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        // Whoever is interrupted waits in the other way.
        let _ = rustix::event::poll(&mut fds, Some(&AT_ONCE));
        take(|bytes| self.stream.read(bytes), line)
    }

    /// Reads on in an answer's line while others can be served.
    async fn read_line(self, line: &mut Vec<u8>) -> io::Result<(Self, Come)> {
        let stream = tokio::net::UnixStream::from_std(self.stream)?;
        let soon = async {
            loop {
                stream.readable().await?;
                match take(|bytes| stream.try_read(bytes), line)? {
                    Come::Part => {}
                    come => return Ok(come),
                }
            }
        };
        let come = tokio::time::timeout(SOON, soon).await;
        let come = come.unwrap_or(io::Result::Ok(Come::Part))?;
        let (stream, asked) = (stream.into_std()?, self.asked);
        Ok((Self { stream, asked }, come))
    }
}

/// Takes what `read` has of an answer's line.
fn take(read: impl FnOnce(&mut [u8]) -> io::Result<usize>, line: &mut Vec<u8>) -> io::Result<Come> {
    let mut bytes = [0; 8 << 10];
    let read = match read(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Come::Part),
        read => read?,
    };
    let bytes = bytes.get(..read).unwrap_or_default();
    if bytes.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    line.extend_from_slice(bytes);
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) if end + 1 < bytes.len() => Err(io::ErrorKind::InvalidData.into()),
        Some(_) => Ok(Come::Whole),
        None if line.len() >= SHORT => Ok(Come::Long),
        None => Ok(Come::Part),
    }
}

/// What became of a request.
#[derive(Debug)]
pub enum Asked {
    /// It was answered.
    Answered(Reply),
    /// It was refused, with this reason.
    Refused(String),
    /// It was sent, and this much of the answer has come: the rest is to be waited for.
    Begun(ControlClient, Vec<u8>),
    /// Nobody could be asked over a connection that is there: another has to be made. The request
    /// may have been sent, so that it has to be one that changes nothing.
    Nobody,
}

impl Kept {
    /// Asks the guest `name` over the connection that is kept, if there is one, and waits no longer
    /// for the answer than other requests can wait for this thread.
    pub async fn ask(&self, name: &VmName, request: &Request) -> Asked {
        let Some(connection) = self.take(name) else {
            return Asked::Nobody;
        };
        let asked = over(connection, request).await;
        if let Err(error) = &asked {
            // Its process has ended, or has closed it: who has the name now?
            tracing::debug!(%name, "a connection that was kept: {error}");
        }
        match asked {
            Ok((connection, Heard::Reply(reply))) => {
                self.put(name, connection);
                Asked::Answered(reply)
            }
            Ok((_, Heard::Refusal(why))) => Asked::Refused(why),
            Ok((connection, Heard::Begin(line))) => match connection.into_client() {
                Ok(client) => Asked::Begun(client, line),
                Err(_) => Asked::Nobody,
            },
            Err(_) => Asked::Nobody,
        }
    }

    /// Keeps a connection that was answered.
    pub fn keep(&self, name: &VmName, client: ControlClient) {
        match Connection::of(client) {
            Ok(connection) => self.put(name, connection),
            Err(error) => tracing::debug!(%name, "a connection is not kept: {error}"),
        }
    }

    /// Closes those that have not been used for `age`.
    pub fn close_idle(&self, age: Duration) {
        self.lock().retain(|_, idle| idle.since.elapsed() < age);
    }

    fn take(&self, name: &VmName) -> Option<Connection> {
        self.lock().remove(name).map(|idle| idle.connection)
    }

    fn put(&self, name: &VmName, connection: Connection) {
        let mut kept = self.lock();
        if kept.len() < MAX_KEPT || kept.contains_key(name) {
            let since = Instant::now();
            kept.insert(name.clone(), Idle { connection, since });
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmName, Idle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came soon.
enum Heard {
    Reply(Reply),
    Refusal(String),
    /// This much of an answer's line.
    Begin(Vec<u8>),
}

/// Asks and hears what comes soon.
async fn over(mut connection: Connection, request: &Request) -> io::Result<(Connection, Heard)> {
    let mut line = Vec::new();
    connection.send(request)?;
    let mut come = connection.read_at_once(&mut line)?;
    if come == Come::Part {
        (connection, come) = connection.read_line(&mut line).await?;
    }
    if come != Come::Whole {
        return Ok((connection, Heard::Begin(line)));
    }
    let heard = match serde_json::from_slice(&line)? {
        Answer::Ok(reply) => Heard::Reply(reply),
        Answer::Error(why) => Heard::Refusal(why),
        // It has only begun.
        Answer::Progress(_) => Heard::Begin(Vec::new()),
    };
    Ok((connection, heard))
}

#[cfg(test)]
mod tests {
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
    async fn asked(kept: &Kept, path: &Path) -> (Result<Reply, String>, u32) {
        let name = "web".parse().unwrap();
        let request = Request::Status {};
        let (mut client, made) = match kept.ask(&name, &request).await {
            Asked::Answered(reply) => return (Ok(reply), 0),
            Asked::Refused(why) => return (Err(why), 0),
            Asked::Begun(mut client, line) => {
                let reply = client.go_on(&request, line).unwrap();
                kept.keep(&name, client);
                return (Ok(reply), 0);
            }
            Asked::Nobody => (ControlClient::connect(path).unwrap(), 1),
        };
        let reply = client.ask(&request).map_err(|error| error.to_string());
        kept.keep(&name, client);
        (reply, made)
    }

    #[tokio::test]
    async fn a_connection_that_was_answered_is_used_again_and_another_made_when_its_process_has_ended()
     {
        let dir = tempfile::tempdir().unwrap();
        let (first, next) = (dir.path().join("first"), dir.path().join("next"));
        let kept = Kept::default();
        let process = guest(&first, &[DONE, DONE, REFUSED]);
        for made in [1, 0] {
            let asked = asked(&kept, &first).await;
            assert_eq!(asked, (Ok(Reply::Done {}), made));
        }
        // A refusal is an answer: nobody else is asked.
        assert_eq!(asked(&kept, &first).await, (Err("no".to_owned()), 0));
        process.join().unwrap();
        let process = guest(&next, &[DONE]);
        assert_eq!(asked(&kept, &next).await, (Ok(Reply::Done {}), 1));
        process.join().unwrap();
        // What is kept has ended; another process has the name.
        let again = dir.path().join("again");
        let process = guest(&again, &[DONE]);
        assert_eq!(asked(&kept, &again).await, (Ok(Reply::Done {}), 1));
        process.join().unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_comes_late_or_in_pieces_or_with_progress_is_waited_for() {
        for pieces in [
            &[DONE, "\n"][..],
            &[r#"{"ok":{"#, r#""reply":"done"}}"#, "\n"],
            &["{\"progress\":\"at it\"}\n", DONE, "\n"],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("control.sock");
            let kept = Kept::default();
            let listener = UnixListener::bind(&path).unwrap();
            let process = std::thread::spawn(move || {
                let (stream, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                lines.next().unwrap().unwrap();
                (&stream).write_all(format!("{DONE}\n").as_bytes()).unwrap();
                lines.next().unwrap().unwrap();
                for piece in pieces {
                    std::thread::sleep(SOON + SOON / 2);
                    (&stream).write_all(piece.as_bytes()).unwrap();
                }
                // The next one is answered at once, over the same connection.
                lines.next().unwrap().unwrap();
                (&stream).write_all(format!("{DONE}\n").as_bytes()).unwrap();
            });
            for made in [1, 0, 0] {
                let asked = asked(&kept, &path).await;
                assert_eq!(asked, (Ok(Reply::Done {}), made), "{pieces:?}");
            }
            process.join().unwrap();
        }
    }

    #[tokio::test]
    async fn what_nobody_asked_for_is_no_answer_to_the_next() {
        const OTHER: &str = r#"{"error":"of before"}"#;
        for unasked in [
            // A whole line behind the answer, and the beginning of one.
            format!("{DONE}\n{OTHER}\n"),
            format!("{DONE}\n{OTHER}"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("control.sock");
            let kept = Kept::default();
            let listener = UnixListener::bind(&path).unwrap();
            let process = std::thread::spawn(move || {
                for answer in [&unasked, &format!("{DONE}\n")] {
                    let (stream, _) = listener.accept().unwrap();
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    lines.next().unwrap().unwrap();
                    (&stream).write_all(answer.as_bytes()).unwrap();
                }
            });
            for _ in 0..2 {
                assert_eq!(asked(&kept, &path).await, (Ok(Reply::Done {}), 1));
            }
            process.join().unwrap();
        }
    }

    #[tokio::test]
    async fn one_that_nobody_uses_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let kept = Kept::default();
        let process = guest(&path, &[DONE]);
        asked(&kept, &path).await.0.unwrap();
        kept.close_idle(Duration::from_secs(3600));
        assert_eq!(kept.lock().len(), 1);
        kept.close_idle(Duration::ZERO);
        assert_eq!(kept.lock().len(), 0);
        process.join().unwrap();
    }
}
