//! Runs a command on this host as the lab would: output as it comes, a time limit, nothing left
//! running.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::lab::{Ended, Request, interrupted};

const SLICE: Duration = Duration::from_millis(100);

/// Runs it.
pub fn run(
    request: &Request,
    output: &mut dyn FnMut(bool, &[u8]) -> std::io::Result<()>,
) -> anyhow::Result<Ended> {
    let (program, arguments) = request.argv.split_first().context("there is no command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(request.env.iter().map(|(name, value)| (name, value)))
        .current_dir(&request.cwd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let group = Pid::from_child(&child);
    let (sender, receiver) = mpsc::channel();
    let pipes: [(bool, Option<Box<dyn Read + Send>>); 2] = [
        (false, child.stdout.take().map(|pipe| Box::new(pipe) as _)),
        (true, child.stderr.take().map(|pipe| Box::new(pipe) as _)),
    ];
    for (is_stderr, pipe) in pipes {
        let mut pipe = pipe.context("a pipe is missing")?;
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                if sender.send((is_stderr, buffer[..count].to_vec())).is_err() {
                    break;
                }
            }
        });
    }
    drop(sender);
    let until = Instant::now() + request.limit;
    let mut cut = None;
    let status = loop {
        match receiver.recv_timeout(SLICE) {
            Ok((is_stderr, bytes)) => {
                output(is_stderr, &bytes).context("cannot pass on the output")?
            }
            // Both pipes are closed.
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if cut.is_none() {
            cut = match (Instant::now() > until, interrupted()) {
                (_, true) => Some(Ended::Interrupted),
                (true, _) => Some(Ended::TimeLimit),
                _ => None,
            };
            if cut.is_some() {
                end(group);
            }
        }
        if let Some(status) = child.try_wait().context("cannot wait for the command")? {
            break status;
        }
    };
    // What it left running would also hold the pipes open.
    end(group);
    while let Ok((is_stderr, bytes)) = receiver.recv_timeout(SLICE) {
        output(is_stderr, &bytes).context("cannot pass on the output")?;
    }
    Ok(cut.unwrap_or(match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, Some(signal)) => Ended::Signaled(signal),
        (None, None) => Ended::Exited(125),
    }))
}

fn end(group: Pid) {
    // The only failure is that nobody is left in the group.
    let _ = kill_process_group(group, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> (Ended, String) {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let request = Request::new(argv, limit).unwrap();
        let mut text = String::new();
        let ended = run(&request, &mut |_, bytes| {
            text.push_str(std::str::from_utf8(bytes).unwrap());
            Ok(())
        });
        (ended.unwrap(), text)
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn status_and_output_come_back() {
        assert_eq!(
            shell("echo out; exit 5", LONG),
            (Ended::Exited(5), "out\n".into())
        );
        assert_eq!(shell("kill -KILL $$", LONG).0, Ended::Signaled(9));
    }

    #[test]
    fn command_is_killed_with_all_its_children_when_its_time_is_up() {
        // A busy host may not even have started the shell within the limit: then with a longer one.
        let mut limit = Duration::from_millis(200);
        let child = loop {
            let (ended, text) = shell("sleep 600 & echo $!; sleep 600", limit);
            assert_eq!(ended, Ended::TimeLimit);
            match text.trim() {
                "" => limit *= 2,
                child => break child.to_owned(),
            }
        };
        // A killed process is gone when it is next scheduled.
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z")
        };
        let until = Instant::now() + Duration::from_secs(60);
        while !gone() {
            assert!(Instant::now() < until, "the child still runs");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn large_output_on_both_pipes_is_complete() {
        let (ended, text) = shell(
            "head -c 300000 /dev/zero | tr '\\0' a; head -c 300000 /dev/zero | tr '\\0' b >&2",
            LONG,
        );
        assert_eq!((ended, text.len()), (Ended::Exited(0), 600_000));
    }
}
