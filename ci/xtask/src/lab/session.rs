//! Commands in the lab: brought up when needed, watched, tried once more when the lab hangs.
//!
//! ```text
//!            boot ok            command ended
//!  no lab ───────────► ready ◄───────────────► (status goes to the caller)
//!    ▲                   │ agent silent, channel broken, QEMU gone
//!    │   state saved,    ▼
//!    └── counted ────── hung        a second time in one request: an error
//! ```

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::Client;
use agent_protocol::message::{Exec, ExecEnd};
use anyhow::{Context, bail};

use super::channel::Watched;
use super::instance::{Instance, lock};
use super::interrupt;
use super::kick::Kick;
use super::ledger::{Ledger, Retry};
use super::request::{Ended, Request};
use super::settings::Settings;

/// Start of QEMU to a lab that is ready, on an idle machine of two processors.
const IDLE_BOOT: Duration = Duration::from_secs(5);

/// For our own short commands in L1.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);

/// Makes L1 ready for commands, once. The image has mounted the host's root on `/host` and our
/// results on `/out`, and put its own file systems over `/host/tmp` and others. A workspace below
/// one of those is brought back.
const PREPARE: &str = r#"
set -e
workspace=$1 out=$2
if [ ! -e "/host$workspace/Cargo.lock" ]; then
    mkdir -p /raw "/host$workspace"
    mount --bind /host /raw
    mount --bind "/raw$workspace" "/host$workspace"
fi
mount --bind /out "/host$out"
cd /host/dev
mkdir -p shm pts
grep -q ' /host/dev/shm ' /proc/mounts || mount -t tmpfs tmpfs shm
grep -q ' /host/dev/pts ' /proc/mounts || mount -t devpts devpts pts
ip link set lo up
"#;

/// Files may have changed on the host since the last command, and 9p caches: nothing is in use
/// between commands, so all of it goes.
const FORGET_FILES: &str = "echo 3 > /proc/sys/vm/drop_caches";

/// A namespace of its own takes along what the command leaves running. The shell is there to be
/// process 1, to which signals such as SIGABRT would do nothing.
const WRAPPER: &[&str] = &[
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--",
    "sh",
    "-c",
    r#""$@"; exit $?"#,
    "lab",
];

/// How a command ended, and what it took.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it ended.
    pub ended: Ended,
    /// Labs that hung under it.
    pub retries: u32,
}

/// Which lab is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The one that `lab start` left running, if there is one; otherwise one for this process.
    Any,
    /// A new one for this process.
    Fresh,
    /// One that stays after this process; started if there is none.
    Kept,
}

struct Running {
    instance: Instance,
    client: Client,
    heartbeat: Arc<AtomicBool>,
    used: bool,
}

/// A lab for some commands, one after the other.
pub struct Lab {
    settings: Settings,
    ledger: Ledger,
    kept: bool,
    running: Option<Running>,
    /// How long the last start took until the lab was ready.
    boot: Option<Duration>,
    /// Held while a kept lab is used: it serves one command at a time.
    _lock: Option<File>,
}

/// Why an attempt failed.
enum Failure {
    /// The lab hung: worth another try.
    Hung(String),
    /// Something that another try will not change.
    Final(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

impl Lab {
    /// A lab of this kind. It is brought up by the first command.
    pub fn open(settings: Settings, kind: Kind) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&settings.directory)
            .with_context(|| format!("cannot make {}", settings.directory.display()))?;
        interrupt::watch()?;
        let kept = match kind {
            Kind::Fresh => false,
            Kind::Kept => true,
            Kind::Any => Instance::find(&settings.kept()).is_some(),
        };
        let lock = match kept {
            true => Some(lock(
                &settings.directory.join("kept.lock"),
                Some(
                    "another command runs in the server that was left running: waiting for its end; --fresh does not",
                ),
            )?),
            false => None,
        };
        let ledger = Ledger::new(&settings.directory);
        let running = kept
            .then(|| Instance::find(&settings.kept()))
            .flatten()
            .map(|instance| Running::new(instance, &settings, true));
        Ok(Self {
            settings,
            ledger,
            kept,
            running,
            boot: None,
            _lock: lock,
        })
    }

    /// Brings the lab up, trying once more if it hangs.
    pub fn bring_up(&mut self) -> anyhow::Result<()> {
        self.attempt(&[], |lab| lab.ready().map(|_| Ended::Exited(0)))
            .map(drop)
    }

    /// How many times slower this lab came up than on an idle machine, at least 1: limits that end
    /// what hangs are to be so much longer. 1 for one that was up already.
    pub fn pace(&self) -> f64 {
        let boot = self.boot.unwrap_or_default();
        (boot.as_secs_f64() / IDLE_BOOT.as_secs_f64()).max(1.0)
    }

    /// Process id of the lab's QEMU, if it is up.
    pub fn pid(&self) -> Option<i32> {
        self.running.as_ref().map(|running| running.instance.pid())
    }

    /// Throws the lab away: the next command gets a fresh one.
    pub fn renew(&mut self) -> anyhow::Result<()> {
        self.running
            .take()
            .map_or(Ok(()), |running| running.instance.stop())
    }

    /// Throws the lab away: the next command gets a fresh one with `cpus` emulated processors.
    pub fn renew_with(&mut self, cpus: u32) -> anyhow::Result<()> {
        self.settings.machine.cpus = cpus;
        self.renew()
    }

    /// Runs a command; its output goes to `output(is_stderr, bytes)` as it comes.
    ///
    /// # Errors
    /// When the lab failed, twice if it hung. A command that fails is no error.
    pub fn run(
        &mut self,
        request: &Request,
        output: &mut dyn FnMut(bool, &[u8]) -> std::io::Result<()>,
    ) -> anyhow::Result<Outcome> {
        self.attempt(&request.argv, |lab| lab.try_run(request, output))
    }

    fn attempt(
        &mut self,
        command: &[String],
        mut work: impl FnMut(&mut Self) -> Result<Ended, Failure>,
    ) -> anyhow::Result<Outcome> {
        let mut retries = 0;
        loop {
            let reason = match work(self) {
                Ok(ended) => return Ok(Outcome { ended, retries }),
                Err(_) if interrupt::seen() => {
                    return Ok(Outcome {
                        ended: Ended::Interrupted,
                        retries,
                    });
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Hung(_)) if self.was_stopped() => {
                    self.running = None;
                    bail!("it was stopped by `lab stop` while the command ran");
                }
                Err(Failure::Hung(reason)) => reason,
            };
            let at = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| time.as_secs());
            let (diagnosis, last_words) = match self.running.take() {
                Some(running) => {
                    let into = self.settings.directory.join(format!("hung-{at}"));
                    if let Err(error) = running.instance.save_state(&into) {
                        eprintln!("lab: cannot save the state in {}: {error}", into.display());
                    }
                    let words = running.instance.last_words();
                    running.instance.stop()?;
                    (Some(into), words)
                }
                None => (None, String::new()),
            };
            if retries > 0 {
                bail!("the lab hung twice: {reason}\n{last_words}");
            }
            retries += 1;
            eprintln!("lab: {reason}: starting a new one, retry 1 of 1");
            self.ledger.count_retry(Retry {
                at,
                command: command.to_vec(),
                reason,
                diagnosis,
            })?;
        }
    }

    /// Whether somebody has ended the kept lab on purpose.
    fn was_stopped(&self) -> bool {
        self.kept && self.running.is_some() && Instance::was_stopped(&self.settings.kept())
    }

    fn ready(&mut self) -> Result<&mut Running, Failure> {
        match &mut self.running {
            None => self.start()?,
            // Left running by an earlier command.
            Some(running) if running.client.agent().is_none() => running.hello(PREPARE_LIMIT)?,
            Some(_) => {}
        }
        self.running
            .as_mut()
            .ok_or_else(|| Failure::Hung("the lab did not start".into()))
    }

    fn start(&mut self) -> Result<(), Failure> {
        let settings = &self.settings;
        let directory = match self.kept {
            true => settings.kept(),
            false => {
                settings
                    .directory
                    .join(format!("once-{}-{}", std::process::id(), settings.number))
            }
        };
        self.ledger.count_start()?;
        let begin = Instant::now();
        let instance = Instance::start(&directory, &settings.machine, !self.kept)?;
        let running = self.running.insert(Running::new(instance, settings, false));
        let out = settings.machine.out.clone();
        let prepared = running.hello(settings.boot_limit).and_then(|()| {
            let argv = shell(PREPARE, &[&settings.workspace, &out]);
            running.exec_plain(argv, "preparing the lab")
        });
        self.boot = Some(begin.elapsed());
        match prepared {
            Err(Failure::Hung(reason)) if !running.instance.alive() => {
                let words = running.instance.last_words();
                Err(Failure::Final(anyhow::anyhow!(
                    "the lab's QEMU ended ({reason}):\n{words}"
                )))
            }
            other => other,
        }
    }

    fn try_run(
        &mut self,
        request: &Request,
        output: &mut dyn FnMut(bool, &[u8]) -> std::io::Result<()>,
    ) -> Result<Ended, Failure> {
        let ledger = self.ledger.clone();
        let running = self.ready()?;
        ledger.count_command()?;
        let exec = Exec {
            argv: WRAPPER
                .iter()
                .map(|word| word.to_string())
                .chain(request.argv.clone())
                .collect(),
            env: request.env.clone(),
            cwd: Some(request.cwd.to_string_lossy().into_owned()),
            root: Some("/host".into()),
            limit_ms: Some(u64::try_from(request.limit.as_millis()).unwrap_or(u64::MAX)),
            ..Exec::default()
        };
        running.run(exec, output)
    }

    /// Leaves a kept lab running; ends any other.
    pub fn close(mut self) -> anyhow::Result<()> {
        match self.running.take() {
            Some(running) if self.kept => {
                running.instance.keep();
                Ok(())
            }
            Some(running) => running.instance.stop(),
            None => Ok(()),
        }
    }

    /// Ends the kept lab. `false` when there is none.
    pub fn stop_kept(settings: &Settings) -> anyhow::Result<bool> {
        match Instance::find(&settings.kept()) {
            Some(instance) => {
                instance.announce_stop()?;
                instance.stop().map(|()| true)
            }
            None => Ok(false),
        }
    }

    /// The kept lab's process id and directory, if it runs.
    pub fn kept(settings: &Settings) -> Option<(i32, PathBuf)> {
        let instance = Instance::find(&settings.kept())?;
        Some((instance.pid(), instance.directory().to_owned()))
    }
}

impl Running {
    fn new(instance: Instance, settings: &Settings, used: bool) -> Self {
        let heartbeat = Arc::new(AtomicBool::new(used));
        let directory = instance.directory().to_owned();
        let (flag, silence_limit) = (heartbeat.clone(), settings.silence_limit);
        let client = Client::new(move || {
            if interrupt::seen() {
                return Err(std::io::Error::other("interrupted"));
            }
            let stream = Instance::connect_agent(&directory)?;
            let kick = Instance::connect_test(&directory).map(Kick::new).ok();
            let flag = flag.clone();
            Ok(Box::new(Watched::new(stream, kick, flag, silence_limit)))
        });
        Self {
            instance,
            client,
            heartbeat,
            used,
        }
    }

    /// Waits for the agent. In slices, so that a QEMU that has ended and a Ctrl-C are noticed.
    fn hello(&mut self, limit: Duration) -> Result<(), Failure> {
        let until = Instant::now() + limit;
        loop {
            match self.client.hello(Duration::from_secs(1)) {
                Ok(_) => {
                    self.heartbeat.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                Err(agent_protocol::ClientError::Version(_)) => {
                    let error = "the lab's image is of another version: run `cargo xtask images`";
                    return Err(Failure::Final(anyhow::anyhow!(error)));
                }
                Err(error) if interrupt::seen() || !self.instance.alive() => {
                    return Err(Failure::Hung(error.to_string()));
                }
                Err(error) if Instant::now() > until => {
                    return Err(Failure::Hung(format!(
                        "the lab did not come up within {} s ({error})",
                        limit.as_secs()
                    )));
                }
                Err(_) => {}
            }
        }
    }

    /// Runs one of our own commands in L1 itself, outside the chroot.
    fn exec_plain(&mut self, argv: Vec<String>, what: &str) -> Result<(), Failure> {
        let limit_ms = u64::try_from(PREPARE_LIMIT.as_millis()).ok();
        let result = self
            .client
            .exec(Exec {
                argv,
                limit_ms,
                ..Exec::default()
            })
            .map_err(|error| Failure::Hung(format!("{what}: {error}")))?;
        if result.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&result.stderr)
            .trim()
            .replace('\n', "; ");
        Err(Failure::Final(anyhow::anyhow!(
            "{what} failed ({:?}): {words}",
            result.end
        )))
    }

    fn run(
        &mut self,
        exec: Exec,
        output: &mut dyn FnMut(bool, &[u8]) -> std::io::Result<()>,
    ) -> Result<Ended, Failure> {
        if self.used {
            self.exec_plain(shell(FORGET_FILES, &[]), "forgetting cached files")?;
        }
        self.used = true;
        let mut write_error = None;
        let result = self.client.exec_streaming(exec, &mut |is_stderr, bytes| {
            output(is_stderr, &bytes).map_err(|error| {
                let text = error.to_string();
                write_error = Some(error);
                agent_protocol::ClientError::Malformed(text)
            })
        });
        let error = match result {
            Ok((ExecEnd::Exited(status), _)) => return Ok(Ended::Exited(status)),
            Ok((ExecEnd::Signaled(signal), _)) => return Ok(Ended::Signaled(signal)),
            Ok((ExecEnd::TimeLimit, _)) => return Ok(Ended::TimeLimit),
            Err(error) => error,
        };
        let interrupted = interrupt::seen();
        if interrupted || write_error.is_some() {
            // The command goes on in L1 until a new client says hello.
            interrupt::clear();
            self.hello(PREPARE_LIMIT)?;
        }
        match (write_error, error) {
            _ if interrupted => Ok(Ended::Interrupted),
            (Some(error), _) => Err(Failure::Final(
                anyhow::Error::new(error).context("cannot pass on the output"),
            )),
            (None, agent_protocol::ClientError::Agent(refused)) => Err(Failure::Final(
                anyhow::anyhow!("the lab cannot run it: {}", refused.message),
            )),
            (None, error) => Err(Failure::Hung(error.to_string())),
        }
    }
}

/// `script` with its arguments, for L1's own shell.
fn shell(script: &str, arguments: &[&Path]) -> Vec<String> {
    let mut argv: Vec<String> = ["/bin/busybox", "sh", "-c", script, "lab"]
        .iter()
        .map(|word| word.to_string())
        .collect();
    let text = |path: &&Path| String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
    argv.extend(arguments.iter().map(text));
    argv
}

#[cfg(test)]
#[path = "session_test.rs"]
mod tests;
