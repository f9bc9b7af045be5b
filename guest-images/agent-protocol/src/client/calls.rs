//! A method for each thing that an agent can be asked, and what it gives back.

use std::time::Duration;

use super::{Answer, Client, ClientError};
use crate::message::*;

/// Added to a program's own time limit, so that the agent's word arrives before ours.
const EXEC_GRACE: Duration = Duration::from_secs(10);

/// How a program ended and what it wrote.
#[derive(Clone, Debug)]
pub struct ExecResult {
    /// How it ended.
    pub end: ExecEnd,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// The answer with its times.
    pub answer: Answer,
}

impl ExecResult {
    /// Exit status 0.
    pub fn success(&self) -> bool {
        self.end == ExecEnd::Exited(0)
    }

    /// Standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Client {
    /// A call whose answer has no parts.
    fn simple(&mut self, call: Call) -> Result<Answer, ClientError> {
        self.call(call, self.limit, &mut |body| Err(unexpected(&body)))
    }

    /// Nothing but the times.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn ping(&mut self) -> Result<Answer, ClientError> {
        self.simple(Call::Ping)
    }

    /// Runs a program and gives its output away as it comes: `output(is_stderr, bytes)`.
    ///
    /// # Errors
    /// See [`Client::call`]. A program that fails is no error.
    pub fn exec_streaming(
        &mut self,
        exec: Exec,
        output: &mut dyn FnMut(bool, Vec<u8>) -> Result<(), ClientError>,
    ) -> Result<(ExecEnd, Answer), ClientError> {
        let limit = exec.limit_ms.map_or(self.limit, Duration::from_millis) + EXEC_GRACE;
        let answer = self.call(Call::Exec(exec), limit, &mut |body| match body {
            Body::Stdout(bytes) => output(false, bytes.0),
            Body::Stderr(bytes) => output(true, bytes.0),
            other => Err(unexpected(&other)),
        })?;
        match answer.done {
            Done::Exec(end) => Ok((end, answer)),
            other => Err(unexpected(&other)),
        }
    }

    /// Runs a program and collects its output.
    ///
    /// # Errors
    /// See [`Client::call`]. A program that fails is no error.
    pub fn exec(&mut self, exec: Exec) -> Result<ExecResult, ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let most = self.collect_limit;
        let (end, answer) = self.exec_streaming(exec, &mut |is_stderr, bytes| {
            let total = stdout.len() + stderr.len() + bytes.len();
            let into = if is_stderr { &mut stderr } else { &mut stdout };
            collect(into, bytes, total, most)
        })?;
        Ok(ExecResult {
            end,
            stdout,
            stderr,
            answer,
        })
    }

    /// Runs a program given by words.
    ///
    /// # Errors
    /// See [`Client::call`]. A program that fails is no error.
    pub fn run(&mut self, argv: &[&str]) -> Result<ExecResult, ClientError> {
        let limit_ms = Some(u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX));
        self.exec(Exec {
            argv: argv.iter().map(|s| s.to_string()).collect(),
            limit_ms,
            ..Exec::default()
        })
    }

    /// Loads a module, with what it depends on, from the guest's `/lib/modules`.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn load_module(&mut self, name: &str, params: &str) -> Result<Answer, ClientError> {
        self.simple(Call::LoadModule {
            source: ModuleSource::Name(name.into()),
            params: params.into(),
        })
    }

    /// Loads a module from a file of the guest.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn load_module_file(&mut self, path: &str, params: &str) -> Result<Answer, ClientError> {
        self.simple(Call::LoadModule {
            source: ModuleSource::Path(path.into()),
            params: params.into(),
        })
    }

    /// Removes a module.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn remove_module(&mut self, name: &str) -> Result<Answer, ClientError> {
        self.simple(Call::RemoveModule { name: name.into() })
    }

    /// Removes and inserts a driver; the steps with their times.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn restart_driver(
        &mut self,
        restart: RestartDriver,
    ) -> Result<(Vec<Step>, Answer), ClientError> {
        let answer = self.simple(Call::RestartDriver(restart))?;
        match &answer.done {
            Done::Restart(steps) => Ok((steps.clone(), answer)),
            other => Err(unexpected(other)),
        }
    }

    /// The kernel's symbols that pass the filter.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn symbols(&mut self, filter: SymbolFilter) -> Result<Vec<Symbol>, ClientError> {
        let mut symbols = Vec::new();
        let most = self.collect_limit;
        let mut total = 0;
        self.call(Call::Symbols(filter), self.limit, &mut |body| match body {
            Body::Symbols(part) => {
                total += part
                    .iter()
                    .map(|s| size_of::<Symbol>() + s.name.len())
                    .sum::<usize>();
                collect(&mut symbols, part, total, most)
            }
            other => Err(unexpected(&other)),
        })?;
        Ok(symbols)
    }

    /// Loaded modules, or the one with this name.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn modules(&mut self, name: Option<&str>) -> Result<Vec<Module>, ClientError> {
        match self
            .simple(Call::Modules {
                name: name.map(str::to_string),
            })?
            .done
        {
            Done::Modules(modules) => Ok(modules),
            other => Err(unexpected(&other)),
        }
    }

    /// The network interfaces.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn interfaces(&mut self) -> Result<Vec<Interface>, ClientError> {
        match self.simple(Call::Interfaces)?.done {
            Done::Interfaces(interfaces) => Ok(interfaces),
            other => Err(unexpected(&other)),
        }
    }

    /// Brings an interface up or down.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn set_link(&mut self, interface: &str, up: bool) -> Result<Answer, ClientError> {
        self.simple(Call::SetLink {
            interface: interface.into(),
            up,
        })
    }

    /// Gives an interface its address.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn set_address(
        &mut self,
        interface: &str,
        address: Ipv4,
        gateway: Option<std::net::Ipv4Addr>,
    ) -> Result<Answer, ClientError> {
        self.simple(Call::SetAddress {
            interface: interface.into(),
            address,
            gateway,
        })
    }

    /// Sets the guest's real time, in nanoseconds since 1970.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn set_time(&mut self, real_ns: u64) -> Result<Answer, ClientError> {
        self.simple(Call::SetTime { real_ns })
    }

    /// Gives an interface another hardware address, address and default route, as far as they are
    /// said.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn readdress(
        &mut self,
        interface: &str,
        mac: Option<[u8; 6]>,
        address: Option<Ipv4>,
        gateway: Option<std::net::Ipv4Addr>,
    ) -> Result<Answer, ClientError> {
        self.simple(Call::Readdress {
            interface: interface.into(),
            mac,
            address,
            gateway,
        })
    }

    /// Kernel messages from a sequence number on, and the number to go on with.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn kmsg(&mut self, since: u64) -> Result<(Vec<KmsgRecord>, u64), ClientError> {
        let mut records = Vec::new();
        let most = self.collect_limit;
        let mut total = 0;
        let answer = self.call(Call::Kmsg { since }, self.limit, &mut |body| match body {
            Body::Kmsg(part) => {
                total += part
                    .iter()
                    .map(|r| size_of::<KmsgRecord>() + r.text.len())
                    .sum::<usize>();
                collect(&mut records, part, total, most)
            }
            other => Err(unexpected(&other)),
        })?;
        match answer.done {
            Done::Kmsg { next } => Ok((records, next)),
            other => Err(unexpected(&other)),
        }
    }

    /// A file's content.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn read_file(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        let mut content = Vec::new();
        let most = self.collect_limit;
        let call = Call::ReadFile {
            path: path.into(),
            offset: 0,
            limit: u64::MAX,
        };
        self.call(call, self.limit, &mut |body| match body {
            Body::File(bytes) => {
                let total = content.len() + bytes.0.len();
                collect(&mut content, bytes.0, total, most)
            }
            other => Err(unexpected(&other)),
        })?;
        Ok(content)
    }

    /// Writes a file of any size, in place of what is there.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn write_file(&mut self, path: &str, data: &[u8], mode: u32) -> Result<(), ClientError> {
        // At least one piece, so that an empty file is made.
        for (i, piece) in data
            .chunks(CHUNK)
            .chain(data.is_empty().then_some(&[][..]))
            .enumerate()
        {
            let data = Bytes(piece.to_vec());
            self.simple(Call::WriteFile {
                path: path.into(),
                data,
                append: i > 0,
                mode,
            })?;
        }
        Ok(())
    }

    /// Powers the guest off.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn power_off(&mut self) -> Result<Answer, ClientError> {
        self.simple(Call::PowerOff)
    }

    /// Reboots the guest. The next call waits for the new agent.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn reboot(&mut self) -> Result<Answer, ClientError> {
        let answer = self.simple(Call::Reboot)?;
        self.session = None;
        Ok(answer)
    }
}

fn unexpected(what: &impl std::fmt::Debug) -> ClientError {
    let mut text = format!("{what:?}");
    text.truncate(text.floor_char_boundary(100));
    ClientError::Malformed(format!("not what was asked for: {text}"))
}

fn collect<T>(
    into: &mut Vec<T>,
    part: Vec<T>,
    total: usize,
    most: usize,
) -> Result<(), ClientError> {
    if total > most {
        return Err(ClientError::TooMuch(most));
    }
    into.extend(part);
    Ok(())
}
