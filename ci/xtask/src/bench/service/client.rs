//! A client of the service's socket: one request after the other over a connection, or a stream of
//! events.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

/// How long an answer may take.
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// Longest answer that is taken, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// Longest line of a head or of an event, in bytes.
const MAX_LINE: u64 = 1 << 20;

/// A connection.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// To the service at `socket`.
    ///
    /// # Errors
    /// There is none.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket).context("the service is not there")?;
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Looks at `path`.
    ///
    /// # Errors
    /// What comes back is no answer, or one of failure.
    pub fn get(&mut self, path: &str) -> anyhow::Result<Vec<u8>> {
        self.ask("GET", path)
    }

    /// Asks without a body.
    ///
    /// # Errors
    /// As of [`Self::get`].
    pub fn ask(&mut self, method: &str, path: &str) -> anyhow::Result<Vec<u8>> {
        self.send(method, path)?;
        let length = self.head()?;
        ensure!(length <= MAX_ANSWER, "{path}: {length} bytes come back");
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).context("the answer is cut")?;
        Ok(body)
    }

    /// Listens to events from now on: each line is to be read as it comes.
    ///
    /// # Errors
    /// The service does not let us.
    pub fn listen(mut self) -> anyhow::Result<BufReader<UnixStream>> {
        self.send("GET", "/v1/events")?;
        self.head()?;
        Ok(self.0)
    }

    fn send(&mut self, method: &str, path: &str) -> anyhow::Result<()> {
        let text = format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        let sent = self.0.get_mut().write_all(text.as_bytes());
        sent.context("the service does not take a request")
    }

    /// Reads the head of an answer; how long its body is, as far as that is said.
    fn head(&mut self) -> anyhow::Result<usize> {
        let mut length = 0;
        let mut first = true;
        loop {
            let line = line_of(&mut self.0)?.context("the service has closed the connection")?;
            let line = line.trim_end();
            if first {
                let code = line.split(' ').nth(1).unwrap_or_default();
                ensure!(code.starts_with('2'), "the service says {line:?}");
                first = false;
            } else if line.is_empty() {
                return Ok(length);
            } else if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().context("the answer's length")?;
            }
        }
    }
}

/// The next line; `None` at the end.
///
/// # Errors
/// It does not come in time, or is too long.
pub fn line_of(from: &mut BufReader<UnixStream>) -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    let read = from.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
    match read.context("nothing comes in time")? {
        0 => Ok(None),
        _ if line.ends_with(b"\n") => Ok(Some(String::from_utf8_lossy(&line).into_owned())),
        _ if line.len() as u64 == MAX_LINE => bail!("a line is longer than {MAX_LINE} bytes"),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn answers_are_read_one_after_the_other_and_failures_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = Client::connect(&path).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        let answers = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc\
            HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 404 Not Found\r\ncontent-length: 1\r\n\r\nx";
        other.write_all(answers.as_bytes()).unwrap();
        assert_eq!(client.get("/").unwrap(), b"abc");
        assert_eq!(client.ask("POST", "/").unwrap(), b"");
        let refused = client.get("/").unwrap_err().to_string();
        assert!(refused.contains("404"), "{refused}");
    }
}
