//! Serving one channel.
//!
//! ```text
//!  reader (this thread) ──► worker: one request after the other     ──┐
//!     │  hello, ping, kill: at once                                    ├──► channel, whole frames
//!     └──────────────────► one thread for each program that runs    ──┘
//! ```
//!
//! Whatever an answer is about, it belongs to the client that asked. When another client begins (a
//! mark in the stream) the generation is counted up: programs are killed, and what still comes from
//! the old client's requests is dropped. A request that hangs in the kernel hangs only its worker:
//! the next client gets a new one.
//!
//! A client's first answer takes as little as can be, since in a guest that goes on from a snapshot
//! each page that it touches has to come first: a worker begins when there is something for it to
//! do, one that waits for work serves the next client too, and the mark goes out with the answer.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use agent_protocol::frame::{self, Decoder, Item};
use agent_protocol::message::{AgentError, AgentInfo, Body, Call, Done};
use agent_protocol::{PROTOCOL_VERSION, Request, Response, Stamp};

use crate::cmdline::Exit;
use crate::fail::{Context, Result, error};
use crate::sys::stamp;
use crate::{exec, files, init, kmsg, modules, net, restart, symbols, sys};

/// Requests that may wait for the worker.
const QUEUE: usize = 64;

/// What a server may do besides answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Powers {
    /// The machine is the host's: it may be powered off and rebooted.
    WholeMachine,
    /// The machine is somebody else's.
    Nothing,
}

/// A channel being served.
struct Server {
    writer: Mutex<Writer>,
    generation: AtomicU64,
    running: exec::Running,
    powers: Powers,
    info: OnceLock<AgentInfo>,
}

/// The way to the client.
struct Writer {
    channel: File,
    /// A client has begun and was not told yet where its answers begin.
    mark_is_due: bool,
}

impl Writer {
    /// Sends an answer, behind the mark if that is due.
    fn send(&mut self, response: &Response) -> io::Result<()> {
        let mut bytes = self.mark();
        bytes.extend(frame::encode(&serde_json::to_vec(response)?)?);
        self.channel.write_all(&bytes)
    }

    /// Sends the mark if it is due.
    fn send_mark(&mut self) -> io::Result<()> {
        match self.mark() {
            none if none.is_empty() => Ok(()),
            mark => self.channel.write_all(&mark),
        }
    }

    fn mark(&mut self) -> Vec<u8> {
        match std::mem::take(&mut self.mark_is_due) {
            true => frame::MARK.to_vec(),
            false => Vec::new(),
        }
    }
}

/// A request of the client of that generation, and when it came.
type Work = (u64, Request, Stamp);

/// Who carries out one request after the other.
struct Worker {
    queue: SyncSender<Work>,
    /// Requests that it was given and has not done.
    open: Arc<AtomicUsize>,
}

impl Worker {
    fn is_idle(&self) -> bool {
        self.open.load(Ordering::SeqCst) == 0
    }

    fn take(&self, work: Work) -> Result<()> {
        self.open.fetch_add(1, Ordering::SeqCst);
        let refused = match self.queue.try_send(work) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(_)) => error(format!("{QUEUE} requests wait already")),
            Err(TrySendError::Disconnected(_)) => error("the agent's worker has ended"),
        };
        self.open.fetch_sub(1, Ordering::SeqCst);
        Err(refused)
    }
}

/// Serves until the other side closes the channel.
///
/// # Errors
/// What the channel reports.
pub fn serve(channel: File, powers: Powers) -> io::Result<()> {
    let mut reader = channel.try_clone()?;
    Server::new(channel, powers).serve_one(&mut reader, &mut None)
}

/// Serves one host after the other on a channel that goes on when a host closes its side, as a
/// virtio port does, and that waits for the next one where something is written to it. The port
/// stays open: to close it would end the session of a host that is there again already.
///
/// # Errors
/// What the channel reports: there is none any more.
pub fn serve_each(channel: File, powers: Powers) -> io::Result<()> {
    let mut reader = channel.try_clone()?;
    let (server, mut worker) = (Server::new(channel, powers), None);
    loop {
        server.serve_one(&mut reader, &mut worker)?;
    }
}

impl Server {
    fn new(channel: File, powers: Powers) -> Arc<Self> {
        Arc::new(Self {
            writer: Mutex::new(Writer {
                channel,
                mark_is_due: false,
            }),
            generation: AtomicU64::new(0),
            running: exec::Running::default(),
            powers,
            info: OnceLock::new(),
        })
    }

    /// Serves until the host closes its side.
    fn serve_one(
        self: &Arc<Self>,
        reader: &mut File,
        worker: &mut Option<Worker>,
    ) -> io::Result<()> {
        self.begin(worker);
        // On a virtio port this waits until the host has opened its side.
        self.is_ready()?;
        let result = self.read(reader, worker);
        self.next_generation();
        result
    }

    fn read(self: &Arc<Self>, reader: &mut File, worker: &mut Option<Worker>) -> io::Result<()> {
        let mut decoder = Decoder::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut input = &buffer[..n];
            while let Some(item) = decoder.next(&mut input) {
                match item {
                    Item::Mark => self.begin(worker),
                    Item::TooLong(length) => {
                        self.refuse(
                            0,
                            stamp(),
                            format!("a request of {length} bytes is too long"),
                        )?;
                    }
                    Item::Frame(payload) => self.request(&payload, worker)?,
                }
            }
            self.writer().send_mark()?;
        }
    }

    /// A client begins: nothing of an earlier one goes on.
    fn begin(&self, worker: &mut Option<Worker>) {
        self.next_generation();
        *worker = worker.take().filter(Worker::is_idle);
        self.writer().mark_is_due = true;
    }

    /// Tells a client that did not ask that somebody serves.
    fn is_ready(&self) -> io::Result<()> {
        let now = stamp();
        self.writer().send(&Response {
            id: 0,
            received: now,
            sent: now,
            body: Body::Ready(self.info()),
        })
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stays the same as long as the machine runs.
    fn info(&self) -> AgentInfo {
        self.info.get_or_init(agent_info).clone()
    }

    fn next_generation(&self) {
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        self.running.begin_generation(generation);
    }

    fn worker(self: &Arc<Self>) -> io::Result<Worker> {
        let (queue, receiver) = sync_channel::<Work>(QUEUE);
        let (server, open) = (self.clone(), Arc::new(AtomicUsize::new(0)));
        let done = open.clone();
        std::thread::Builder::new().spawn(move || {
            for (generation, Request { id, call }, received) in receiver {
                if server.generation.load(Ordering::SeqCst) == generation {
                    let mut part = |body| server.part(generation, id, received, body);
                    let result = carry_out(call, &mut part);
                    server.finish(generation, id, received, result);
                }
                done.fetch_sub(1, Ordering::SeqCst);
            }
        })?;
        Ok(Worker { queue, open })
    }

    /// Has a worker carry out the request, which begins if there is none.
    fn queue(self: &Arc<Self>, work: Work, worker: &mut Option<Worker>) -> Result<()> {
        let worker = match worker {
            Some(worker) => worker,
            None => {
                let new = self.worker();
                let failed = |failed| error(format!("no thread for the request: {failed}"));
                worker.insert(new.map_err(failed)?)
            }
        };
        worker.take(work)
    }

    fn request(self: &Arc<Self>, payload: &[u8], worker: &mut Option<Worker>) -> io::Result<()> {
        let received = stamp();
        let request: Request = match serde_json::from_slice(payload) {
            Ok(request) => request,
            Err(error) => {
                return self.refuse(0, received, format!("a request cannot be read: {error}"));
            }
        };
        let generation = self.generation.load(Ordering::SeqCst);
        let id = request.id;
        let result = match request.call {
            Call::Hello { nonce } => Ok(Done::Hello {
                nonce,
                agent: self.info(),
            }),
            Call::Ping => Ok(Done::Ok),
            Call::Kill { target, signal } => self
                .running
                .kill((generation, target), signal)
                .map(|()| Done::Ok),
            Call::PowerOff => self.exit(id, received, Exit::PowerOff),
            Call::Reboot => self.exit(id, received, Exit::Reboot),
            Call::SetTime { real_ns } => self.set_time(real_ns),
            Call::Exec(exec) => {
                let server = self.clone();
                let started = std::thread::Builder::new().spawn(move || {
                    let mut part = |body| server.part(generation, id, received, body);
                    let result = exec::run((generation, id), exec, &server.running, &mut part);
                    server.finish(generation, id, received, result);
                });
                match started {
                    Ok(_) => return Ok(()),
                    Err(failed) => Err(error(format!("no thread for the program: {failed}"))),
                }
            }
            call => match self.queue((generation, Request { id, call }, received), worker) {
                Ok(()) => return Ok(()),
                Err(refused) => Err(refused),
            },
        };
        let body = result.map_or_else(Body::Error, Body::Done);
        self.send(
            generation,
            &Response {
                id,
                received,
                sent: stamp(),
                body,
            },
        )
    }

    fn set_time(&self, real_ns: u64) -> Result<Done> {
        if self.powers == Powers::Nothing {
            return Err(error(
                "this agent runs on a machine whose clock it must not set",
            ));
        }
        sys::set_time(real_ns).context(|| "set the real time".into())?;
        Ok(Done::Ok)
    }

    fn exit(&self, id: u64, received: Stamp, how: Exit) -> Result<Done> {
        if self.powers == Powers::Nothing {
            return Err(error("this agent runs on a machine that it must not end"));
        }
        let generation = self.generation.load(Ordering::SeqCst);
        self.finish(generation, id, received, Ok(Done::Ok));
        Err(init::end_machine(how))
    }

    fn part(&self, generation: u64, id: u64, received: Stamp, body: Body) -> Result<()> {
        if self.generation.load(Ordering::SeqCst) != generation {
            return Err(error("another client has begun"));
        }
        self.send(
            generation,
            &Response {
                id,
                received,
                sent: stamp(),
                body,
            },
        )
        .map_err(|failed| error(format!("the channel failed: {failed}")))
    }

    fn finish(&self, generation: u64, id: u64, received: Stamp, result: Result<Done>) {
        let body = result.map_or_else(Body::Error, Body::Done);
        // A channel that fails ends the reader, which says so.
        let _reported = self.send(
            generation,
            &Response {
                id,
                received,
                sent: stamp(),
                body,
            },
        );
    }

    fn refuse(&self, id: u64, received: Stamp, message: String) -> io::Result<()> {
        let body = Body::Error(AgentError {
            message,
            errno: None,
        });
        self.send(
            self.generation.load(Ordering::SeqCst),
            &Response {
                id,
                received,
                sent: stamp(),
                body,
            },
        )
    }

    /// Sends an answer, unless it is for an earlier client.
    fn send(&self, generation: u64, response: &Response) -> io::Result<()> {
        let mut writer = self.writer();
        match self.generation.load(Ordering::SeqCst) == generation {
            true => writer.send(response),
            false => Ok(()),
        }
    }
}

/// Requests that may take their time.
fn carry_out(call: Call, part: &mut dyn FnMut(Body) -> Result<()>) -> Result<Done> {
    match call {
        Call::LoadModule { source, params } => modules::load(&source, &params).map(modules::done),
        Call::RemoveModule { name } => modules::remove(&name).map(modules::done),
        Call::Symbols(filter) => symbols::symbols(&filter, part),
        Call::Modules { name } => symbols::modules(name.as_deref()).map(Done::Modules),
        Call::Interfaces => net::interfaces().map(Done::Interfaces),
        Call::SetLink { interface, up } => net::set_link(&interface, up).map(|()| Done::Ok),
        Call::SetAddress {
            interface,
            address,
            gateway,
        } => {
            net::set_address(&interface, address)?;
            gateway.map_or(Ok(()), net::set_gateway)?;
            Ok(Done::Ok)
        }
        Call::Readdress {
            interface,
            mac,
            address,
            gateway,
        } => {
            if let Some(mac) = mac {
                net::set_mac(&interface, mac)?;
            }
            if let Some(address) = address {
                net::set_address(&interface, address)?;
            }
            gateway.map_or(Ok(()), net::set_gateway)?;
            Ok(Done::Ok)
        }
        Call::Kmsg { since } => kmsg::records(since, part),
        Call::ReadFile {
            path,
            offset,
            limit,
        } => files::read(&path, offset, limit, part),
        Call::WriteFile {
            path,
            data,
            append,
            mode,
        } => files::write(&path, &data.0, append, mode),
        Call::RestartDriver(request) => restart::restart(&request),
        Call::Hello { .. }
        | Call::Ping
        | Call::Kill { .. }
        | Call::Exec(_)
        | Call::SetTime { .. }
        | Call::PowerOff
        | Call::Reboot => Err(error("this request does not wait in the queue")),
    }
}

fn agent_info() -> AgentInfo {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    AgentInfo {
        version: PROTOCOL_VERSION,
        boot_id: boot_id.trim_end().into(),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        pid: std::process::id(),
    }
}
