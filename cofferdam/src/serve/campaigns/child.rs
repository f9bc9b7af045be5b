//! The process that makes a campaign: this program, which ends with its VMs when its standard input
//! ends, be it that the job was given up or that the service is not there any more.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::campaign::stream::Line;
use crate::json_lines::is_still;
use crate::runtime_dir::RuntimeRoot;
use crate::serve::create::{last_line, said_file_in};
use crate::serve::jobs::{Job, shown};
use crate::serve::problem::{Code, Problem};

/// Between two looks whether a job was given up.
const LOOK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// How long one that was given up may take to end its VMs.
const END_TIME: Duration = Duration::from_secs(40);

/// How long another service of the runtime folder may take to remove what was left behind.
const HOLD_TIME: Duration = Duration::from_secs(60);

/// Between two looks whether it has.
const HOLD_POLL: Duration = Duration::from_millis(20);

/// Longest line that is taken, in bytes: two records of a trial.
const MAX_LINE: usize = 4 << 20;

/// Most of what is read at once, in bytes.
const CHUNK: usize = 16 << 10;

/// Runs `cofferdam` with these words to its end, with the folders of its VMs in `guests`, and tells
/// the job what it says. What comes back is what a replay has found.
pub fn run(
    root: &RuntimeRoot,
    guests: &Path,
    job: &Job,
    words: &[String],
) -> Result<Option<Value>, Problem> {
    let internal = |error: std::io::Error| Problem::new(Code::Internal, error.to_string());
    let _held = hold(guests, job)?;
    let said = said_file_in(root)?;
    let (ours, theirs) = UnixStream::pair().map_err(internal)?;
    // This program itself, also when another was put in its place.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("cofferdam")
        .args(words)
        .env("TMPDIR", guests)
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(said.try_clone().map_err(internal)?);
    // SAFETY: `setsid` is a plain system call, which may be made between fork and exec
    // (signal-safety(7)).
    unsafe {
        command.pre_exec(|| {
            // Signals of the service's terminal are not for it.
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(internal)?;
    // It holds its end of the connection alone.
    drop(command);
    job.is_done_over(ours.try_clone().map_err(internal)?);
    let heard = listen(&mut child, job);
    drop(ours);
    if heard.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(internal)?;
    let result = heard?;
    match status.success() {
        true => Ok(result),
        false => Err(Problem::new(
            Code::CampaignFailed,
            last_line(said).unwrap_or_else(|| format!("its process ended: {status}")),
        )),
    }
}

/// Hears what it says until it has no more to say.
fn listen(child: &mut Child, job: &Job) -> Result<Option<Value>, Problem> {
    let broken = |why: String| Problem::new(Code::BrokenOff, why);
    let Some(mut from) = child.stdout.take() else {
        return Err(broken("the campaign's process says nothing".to_owned()));
    };
    let mut result = None;
    let mut text = Vec::new();
    let mut given_up: Option<Instant> = None;
    loop {
        if job.is_given_up() && given_up.get_or_insert_with(Instant::now).elapsed() > END_TIME {
            return Err(broken("the campaign's process does not end".to_owned()));
        }
        if !has_more(&from).map_err(|error| broken(error.to_string()))? {
            continue;
        }
        let mut chunk = [0; CHUNK];
        let read = from.read(&mut chunk);
        let read = read.map_err(|error| broken(error.to_string()))?;
        let chunk = chunk.get(..read).unwrap_or_default();
        if chunk.is_empty() {
            return Ok(result);
        }
        text.extend_from_slice(chunk);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let line = serde_json::from_slice(&line).map_err(|error| broken(error.to_string()))?;
            match line {
                Line::Says { text } => job.tell(&text),
                Line::Made(figures) => job.counts(shown(figures)?),
                Line::Replayed { then, now } => result = Some(json!({"then": then, "now": now})),
            }
        }
        if text.len() > MAX_LINE {
            return Err(broken("the campaign's process says too much".to_owned()));
        }
    }
}

/// Whether there is something to read, or the end.
fn has_more(from: &ChildStdout) -> std::io::Result<bool> {
    let mut polled = [PollFd::new(from, PollFlags::IN)];
    match poll(&mut polled, Some(&LOOK)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Keeps the folder `guests` and what is in it from every service of the runtime folder, as long as
/// the campaign of `job` is under way and what is given is open. Where no campaign is under way yet,
/// of this service or another one, what those before have left behind is removed first.
fn hold(guests: &Path, job: &Job) -> Result<File, Problem> {
    let internal = |error: std::io::Error| {
        let detail = format!("cannot lock {}: {error}", guests.display());
        Problem::new(Code::Internal, detail)
    };
    let deadline = Instant::now() + HOLD_TIME;
    while Instant::now() < deadline && !job.is_given_up() {
        crate::runtime_dir::create_dir(guests).map_err(internal)?;
        let folder = match File::open(guests) {
            // A service that ends has removed it meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            folder => folder.map_err(internal)?,
        };
        if is_alone(&folder) && is_still(&folder, guests) {
            clear(guests);
        }
        // In place of the lock that it may have.
        match flock(&folder, FlockOperation::NonBlockingLockShared) {
            Ok(()) if is_still(&folder, guests) => return Ok(folder),
            Ok(()) => {}
            // Another service removes what is left behind.
            Err(Errno::WOULDBLOCK | Errno::INTR) => std::thread::sleep(HOLD_POLL),
            Err(error) => return Err(internal(error.into())),
        }
    }
    let detail = "another service of this runtime folder clears what campaigns left: try again";
    Err(Problem::new(Code::Busy, detail))
}

/// Whether no campaign is under way; none begins then as long as `folder` is open.
fn is_alone(folder: &File) -> bool {
    flock(folder, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// Removes the folder `guests`, if no campaign is under way and nothing is in it.
pub fn leave(guests: &Path) {
    if let Ok(folder) = File::open(guests)
        && is_alone(&folder)
    {
        // One whose guests are just ending is left, and used again.
        let _ = std::fs::remove_dir(guests);
    }
}

/// Removes what campaigns have left behind in `guests` whose processes were killed. None is under
/// way.
fn clear(guests: &Path) {
    let Ok(entries) = std::fs::read_dir(guests) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        // A campaign of the service before may be ending yet.
        let runs = RuntimeRoot::new(&path).running();
        if runs.is_ok_and(|running| running.is_empty())
            && let Err(error) = std::fs::remove_dir_all(&path)
        {
            tracing::warn!("{} is left over: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::jobs::{GivingUp, Jobs, Subject};

    #[tokio::test]
    async fn what_is_left_behind_goes_only_when_no_service_has_a_campaign_under_way() {
        let folder = tempfile::tempdir().unwrap();
        let guests = folder.path().join("guests");
        let left = guests.join("left");
        let of = Subject::Campaign("a".to_owned(), Vec::new());
        let nothing = |_: &Job| Ok(Value::Null);
        let job = Jobs::default().start(of, "a test", GivingUp::Closing(None), nothing);
        let job = job.unwrap();
        std::fs::create_dir_all(&left).unwrap();
        let first = hold(&guests, &job).unwrap();
        assert!(!left.exists());
        // A guest of the first has its folder and does not run yet when the second comes.
        std::fs::create_dir(&left).unwrap();
        let second = hold(&guests, &job).unwrap();
        drop(first);
        leave(&guests);
        assert!(left.exists());
        drop(second);
        let third = hold(&guests, &job).unwrap();
        assert!(!left.exists());
        leave(&guests);
        assert!(guests.exists(), "a campaign has it");
        drop(third);
        leave(&guests);
        assert!(!guests.exists());
    }
}
