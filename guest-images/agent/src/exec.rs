//! Running programs: output as it comes, an end for every program.
//!
//! One thread a program. It waits for all of it at once: output, room for input, the program's end,
//! its time limit. What a program leaves running in the background keeps its pipes but not this
//! thread: after the program's end what is in the pipes is read, and no more.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::message::{Body, Bytes, CHUNK, Done, Exec, ExecEnd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::fail::{Context, Result, error};
use crate::sys;

/// Names a program: the client's generation and the request's id.
pub type Key = (u64, u64);

/// Programs that run.
#[derive(Default)]
pub struct Running {
    groups: Mutex<Groups>,
}

#[derive(Default)]
struct Groups {
    /// Programs of other generations are not started any more.
    generation: u64,
    running: HashMap<Key, Pid>,
}

/// More at once are refused.
const MOST: usize = 32;

impl Running {
    fn groups(&self) -> MutexGuard<'_, Groups> {
        // Nothing panics while it is held; if it did, the map would still be whole.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal to the program of a request.
    pub fn kill(&self, key: Key, signal: i32) -> Result<()> {
        let groups = self.groups();
        let group = groups
            .running
            .get(&key)
            .ok_or_else(|| error(format!("request {} runs no program", key.1)))?;
        let signal = Signal::from_named_raw(signal)
            .ok_or_else(|| error(format!("{signal} is no signal")))?;
        kill_process_group(*group, signal)
            .context(|| format!("kill the program of request {}", key.1))
    }

    /// Kills every program; from now on only programs of this generation are started.
    pub fn begin_generation(&self, generation: u64) {
        let mut groups = self.groups();
        groups.generation = generation;
        for group in groups.running.values() {
            // It may just have ended.
            let _gone = kill_process_group(*group, Signal::KILL);
        }
    }

    fn add(&self, key: Key, child: &Child) -> Result<()> {
        let mut groups = self.groups();
        if groups.generation != key.0 {
            return Err(error("another client has begun"));
        }
        if groups.running.len() >= MOST {
            return Err(error(format!("{MOST} programs run already")));
        }
        groups.running.insert(key, pid(child)?);
        Ok(())
    }
}

fn pid(child: &Child) -> Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| error("the program has no process id"))
}

/// Runs a program to its end.
pub fn run(
    key: Key,
    exec: Exec,
    running: &Running,
    part: &mut dyn FnMut(Body) -> Result<()>,
) -> Result<Done> {
    let deadline = exec
        .limit_ms
        .map(|ms| Instant::now() + Duration::from_millis(ms));
    let name = exec
        .argv
        .first()
        .cloned()
        .ok_or_else(|| error("no program was named"))?;
    let mut child =
        start(exec.argv, exec.env, exec.root, exec.cwd).context(|| format!("run {name}"))?;
    let result = running.add(key, &child).and_then(|()| {
        let pipes = Pipes::take(&mut child, exec.stdin)?;
        pipes.relay(&mut child, deadline, part)
    });
    if result.is_err()
        && let Ok(group) = pid(&child)
    {
        let _gone = kill_process_group(group, Signal::KILL);
    }
    // While the process has not been waited for, its number is not given to another one.
    running.groups().running.remove(&key);
    let status = child.wait().context(|| format!("wait for {name}"))?;
    let timed_out = result?;
    Ok(Done::Exec(
        match (timed_out, status.code(), status.signal()) {
            (true, ..) => ExecEnd::TimeLimit,
            (_, Some(code), _) => ExecEnd::Exited(code),
            (_, None, signal) => ExecEnd::Signaled(signal.unwrap_or(0)),
        },
    ))
}

fn start(
    argv: Vec<String>,
    env: Vec<(String, String)>,
    root: Option<String>,
    directory: Option<String>,
) -> io::Result<Child> {
    let mut words = argv.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).envs(env).process_group(0);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    sys::start_with_signals_free(&mut command);
    sys::start_in(&mut command, root, directory);
    command.spawn()
}

/// Reads after a program's end: enough for a pipe of the largest size that an ordinary user can set
/// (1 MiB).
const MOST_LAST_READS: usize = (1 << 20) / CHUNK + 1;

struct Pipes {
    stdin: Option<ChildStdin>,
    input: Vec<u8>,
    written: usize,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    buffer: Vec<u8>,
}

impl Pipes {
    fn take(child: &mut Child, input: Bytes) -> Result<Self> {
        let pipes = Self {
            stdin: child.stdin.take().filter(|_| !input.0.is_empty()),
            input: input.0,
            written: 0,
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
            buffer: vec![0; CHUNK],
        };
        let fds = [
            pipes.stdin.as_ref().map(AsFd::as_fd),
            pipes.stdout.as_ref().map(AsFd::as_fd),
            pipes.stderr.as_ref().map(AsFd::as_fd),
        ];
        for fd in fds.into_iter().flatten() {
            rustix::io::ioctl_fionbio(fd, true).context(|| "prepare the program's pipes".into())?;
        }
        Ok(pipes)
    }

    /// Until the program has ended; says whether its time was up.
    fn relay(
        mut self,
        child: &mut Child,
        deadline: Option<Instant>,
        part: &mut dyn FnMut(Body) -> Result<()>,
    ) -> Result<bool> {
        let group = pid(child)?;
        let end = pidfd_open(group, PidfdFlags::empty()).context(|| "watch the program".into())?;
        let mut timed_out = false;
        loop {
            let left = deadline
                .filter(|_| !timed_out)
                .map(|d| d.saturating_duration_since(Instant::now()));
            if left.is_some_and(|l| l.is_zero()) {
                timed_out = true;
                let _gone = kill_process_group(group, Signal::KILL);
                continue;
            }
            let timeout = left.and_then(|l| Timespec::try_from(l).ok());
            let mut fds = vec![PollFd::new(&end, PollFlags::IN)];
            fds.extend(self.stdout.as_ref().map(|p| PollFd::new(p, PollFlags::IN)));
            fds.extend(self.stderr.as_ref().map(|p| PollFd::new(p, PollFlags::IN)));
            fds.extend(self.stdin.as_ref().map(|p| PollFd::new(p, PollFlags::OUT)));
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                other => drop(other.context(|| "wait for the program".into())?),
            }
            let ended = !fds[0].revents().is_empty();
            if ended {
                // Everything it wrote is in the pipes by now. What it left running may write for
                // ever.
                let mut reads = 0;
                while reads < MOST_LAST_READS && self.pump(part)? {
                    reads += 1;
                }
                return Ok(timed_out);
            }
            self.pump(part)?;
        }
    }

    /// Moves what can be moved now; says whether some output was.
    fn pump(&mut self, part: &mut dyn FnMut(Body) -> Result<()>) -> Result<bool> {
        let out = read_some(&mut self.stdout, &mut self.buffer);
        let moved = out.is_some();
        if let Some(bytes) = out {
            part(Body::Stdout(bytes))?;
        }
        let err = read_some(&mut self.stderr, &mut self.buffer);
        let moved = moved || err.is_some();
        if let Some(bytes) = err {
            part(Body::Stderr(bytes))?;
        }
        self.write_some();
        Ok(moved)
    }

    fn write_some(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        match stdin.write(&self.input[self.written..]) {
            Ok(n) => self.written += n,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            // The program does not want it.
            Err(_) => self.written = self.input.len(),
        }
        if self.written == self.input.len() {
            self.stdin = None;
        }
    }
}

/// What is there to read; closes the pipe at its end.
fn read_some(pipe: &mut Option<impl Read>, buffer: &mut [u8]) -> Option<Bytes> {
    match pipe.as_mut()?.read(buffer) {
        Ok(0) => *pipe = None,
        Ok(n) => return Some(Bytes(buffer[..n].to_vec())),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) => {}
        Err(_) => *pipe = None,
    }
    None
}
