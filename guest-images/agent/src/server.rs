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

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

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
    writer: Mutex<File>,
    generation: AtomicU64,
    running: exec::Running,
    powers: Powers,
}

/// Serves until the other side closes the channel.
///
/// # Errors
/// What the channel reports.
pub fn serve(channel: File, powers: Powers) -> io::Result<()> {
    let mut reader = channel.try_clone()?;
    let server = Arc::new(Server {
        writer: Mutex::new(channel),
        generation: AtomicU64::new(0),
        running: exec::Running::default(),
        powers,
    });
    // On a virtio port this waits until the host has opened its side.
    server.begin(Some(Body::Ready(agent_info())))?;
    let result = server.read(&mut reader);
    server.next_generation();
    result
}

impl Server {
    fn read(self: &Arc<Self>, reader: &mut File) -> io::Result<()> {
        let mut decoder = Decoder::new();
        let mut worker = self.worker()?;
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
                    Item::Mark => {
                        self.begin(None)?;
                        worker = self.worker()?;
                    }
                    Item::TooLong(length) => {
                        self.refuse(
                            0,
                            stamp(),
                            format!("a request of {length} bytes is too long"),
                        )?;
                    }
                    Item::Frame(payload) => self.request(&payload, &worker)?,
                }
            }
        }
    }

    /// A client begins: nothing of an earlier one goes on.
    fn begin(&self, hello: Option<Body>) -> io::Result<()> {
        self.next_generation();
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        frame::send_mark(&mut *writer)?;
        if let Some(body) = hello {
            let now = stamp();
            send(
                &mut writer,
                &Response {
                    id: 0,
                    received: now,
                    sent: now,
                    body,
                },
            )?;
        }
        Ok(())
    }

    fn next_generation(&self) {
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        self.running.begin_generation(generation);
    }

    fn worker(self: &Arc<Self>) -> io::Result<SyncSender<(Request, Stamp)>> {
        let (sender, receiver) = sync_channel::<(Request, Stamp)>(QUEUE);
        let (server, generation) = (self.clone(), self.generation.load(Ordering::SeqCst));
        std::thread::Builder::new().spawn(move || {
            for (Request { id, call }, received) in receiver {
                if server.generation.load(Ordering::SeqCst) != generation {
                    return;
                }
                let mut part = |body| server.part(generation, id, received, body);
                let result = carry_out(call, &mut part);
                server.finish(generation, id, received, result);
            }
        })?;
        Ok(sender)
    }

    fn request(
        self: &Arc<Self>,
        payload: &[u8],
        worker: &SyncSender<(Request, Stamp)>,
    ) -> io::Result<()> {
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
                agent: agent_info(),
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
            call => match worker.try_send((Request { id, call }, received)) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(_)) => Err(error(format!("{QUEUE} requests wait already"))),
                Err(TrySendError::Disconnected(_)) => Err(error("the agent's worker has ended")),
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
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        match self.generation.load(Ordering::SeqCst) == generation {
            true => send(&mut writer, response),
            false => Ok(()),
        }
    }
}

fn send(writer: &mut File, response: &Response) -> io::Result<()> {
    frame::send(writer, &serde_json::to_vec(response)?)
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
