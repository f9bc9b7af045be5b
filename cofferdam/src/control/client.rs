//! The other side of the control socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::protocol::{Answer, MAX_ANSWER_BYTES, Reply, Request, Status};

/// How long a VM process may take to answer: to isolate a module it asks the guest's agent for all symbols and
/// types first.
const ANSWER_TIME: Duration = Duration::from_secs(90);

/// A connection to a VM process.
#[derive(Debug)]
pub struct ControlClient {
    reader: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot reach the VM at {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        stream.set_write_timeout(Some(ANSWER_TIME))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// Asks for something and waits for the answer.
    pub fn ask(&mut self, request: &Request) -> anyhow::Result<Reply> {
        self.ask_and_watch(request, &mut |_| {})
    }

    /// The same, with what is told meanwhile for `progress`. Each step may take as long as an answer.
    pub fn ask_and_watch(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Reply> {
        self.reader
            .get_mut()
            .write_all(request.line().as_bytes())
            .context("the VM has closed its control socket")?;
        loop {
            match self.answer()? {
                Answer::Ok(reply) => return Ok(reply),
                Answer::Error(error) => bail!("{error}"),
                Answer::Progress(what) => progress(&what),
            }
        }
    }

    fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut line = Vec::new();
        (&mut self.reader)
            .take(MAX_ANSWER_BYTES)
            .read_until(b'\n', &mut line)
            .context("the VM does not answer")?;
        ensure!(
            line.last() == Some(&b'\n'),
            "the VM ended before it answered"
        );
        serde_json::from_slice(&line).context("the VM's answer cannot be read")
    }

    /// Asks for something that answers nothing but that it was done.
    pub fn tell(&mut self, request: &Request) -> anyhow::Result<()> {
        match self.ask(request)? {
            Reply::Done {} => Ok(()),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }

    /// Asks how the VM is.
    pub fn status(&mut self) -> anyhow::Result<Status> {
        match self.ask(&Request::Status {})? {
            Reply::Status(status) => Ok(*status),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }
}
