//! The other end of the guest's serial port, and what is typed into it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use anyhow::{Context, bail};
use devices::serial::SerialBackend;
use rustix::pipe::{PipeFlags, pipe_with};
use vmm::VmHandle;

use super::escape::{Command, EscapeFilter, HELP};
use super::terminal::{self, RawTerminal};
use super::watch::Belongings;
use crate::options::SerialSpec;

/// Bytes read from standard input at a time.
const INPUT_BYTES: usize = 256;

/// The other end of a serial port.
pub struct Opened {
    /// What the port is connected to.
    pub backend: SerialBackend,
    /// Standard input, still to be started.
    pub input: Option<Input>,
    /// Where what is typed through the control socket goes.
    pub typed: Option<File>,
}

impl From<SerialBackend> for Opened {
    fn from(backend: SerialBackend) -> Self {
        Self {
            backend,
            input: None,
            typed: None,
        }
    }
}

/// Opens what `spec` says.
pub fn open(spec: &SerialSpec, belongings: &Belongings) -> anyhow::Result<Opened> {
    match spec {
        SerialSpec::Stdio => stdio(),
        SerialSpec::File(path) => Ok(SerialBackend::Output(open_file(path)?).into()),
        SerialSpec::Unix(path) => {
            let listener = listen(path)?;
            belongings.add_socket(path.clone());
            Ok(SerialBackend::Socket(listener).into())
        }
        SerialSpec::Control => {
            let (input, typed) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
            never_waits(&typed)?;
            Ok(Opened {
                typed: Some(typed.into()),
                ..SerialBackend::Input(input.into()).into()
            })
        }
    }
}

/// A guest that does not read what is typed holds up nobody.
fn never_waits(typed: &impl AsFd) -> anyhow::Result<()> {
    rustix::fs::fcntl_setfl(typed, rustix::fs::OFlags::NONBLOCK).context("cannot set up a pipe")
}

fn stdio() -> anyhow::Result<Opened> {
    let output: File = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .context("standard output cannot be used for the console: give --serial file=PATH")?
        .into();
    let interactive = terminal::available();
    if !interactive && std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        // In the background of a shell: a read would stop the process.
        return Ok(SerialBackend::Output(output).into());
    }
    // A person who types into a guest that does not read must still be able to end it; what is
    // piped in waits instead.
    let (input, typed) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    if interactive {
        never_waits(&typed)?;
    }
    let backend = SerialBackend::Streams {
        input: input.into(),
        output,
    };
    Ok(Opened {
        input: Some(Input {
            typed: typed.into(),
            interactive,
        }),
        ..backend.into()
    })
}

/// Opens a console file for writing; the guest's output is put at its end.
fn open_file(path: &Path) -> anyhow::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        // A FIFO that nobody reads would hold us up for ever.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .with_context(|| format!("cannot write the console to {}", path.display()))?;
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::APPEND)
        .with_context(|| format!("cannot write the console to {}", path.display()))?;
    Ok(file)
}

/// Listens at `path`; a socket that nobody listens on any more is replaced.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let bind = || UnixListener::bind(path);
    match bind() {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let is_socket = path
                .symlink_metadata()
                .is_ok_and(|m| m.file_type().is_socket());
            if !is_socket {
                bail!(
                    "{} exists and is no socket: choose another path",
                    path.display()
                );
            }
            if UnixStream::connect(path).is_ok() {
                bail!(
                    "another process listens on {}: end it or choose another path",
                    path.display()
                );
            }
            std::fs::remove_file(path).and_then(|()| bind())
        }
        other => other,
    }
    .with_context(|| format!("cannot make the console's socket {}", path.display()))
}

/// Standard input on its way to the guest.
pub struct Input {
    /// The guest's end of it is the other end of this pipe.
    typed: File,
    interactive: bool,
}

impl Input {
    /// Takes the terminal, if it is one, and starts to read.
    pub fn start(self, vm: VmHandle, belongings: &Belongings) -> anyhow::Result<()> {
        if self.interactive
            && let Some(raw) = RawTerminal::take().context("cannot use the terminal")?
        {
            belongings.add_terminal(raw);
            eprintln!("Ctrl-A x ends the guest, Ctrl-A h shows what else there is.");
        }
        // The thread ends with its input or with the process.
        thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || self.read(&vm))
            .context("cannot start the terminal thread")?;
        Ok(())
    }

    fn read(mut self, vm: &VmHandle) {
        let mut filter = EscapeFilter::default();
        let mut buffer = [0; INPUT_BYTES];
        let mut for_guest = Vec::new();
        let mut stdin = std::io::stdin().lock();
        loop {
            let read = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => &buffer[..read],
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!("standard input cannot be read: {error}");
                    return;
                }
            };
            for_guest.clear();
            if self.interactive {
                for command in filter.filter(read, &mut for_guest) {
                    obey(command, vm);
                }
            } else {
                for_guest.extend_from_slice(read);
            }
            match self.typed.write_all(&for_guest) {
                // The guest does not read what is typed: it is lost, as on a full terminal.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!("the guest's console takes no input: {error}");
                    return;
                }
                Ok(()) => {}
            }
        }
    }
}

/// Does what a person asked of us.
fn obey(command: Command, vm: &VmHandle) {
    let done = match command {
        Command::Quit => vm.power_off(),
        Command::Reset => vm.reset(),
        Command::Help => {
            eprint!("{HELP}");
            Ok(())
        }
    };
    if let Err(error) = done {
        eprintln!("cofferdam: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_socket_of_a_dead_process_is_replaced_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let first = listen(&path).unwrap();
        assert!(
            listen(&path)
                .unwrap_err()
                .to_string()
                .contains("another process")
        );
        drop(first);
        listen(&path).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(listen(&file).unwrap_err().to_string().contains("no socket"));
        assert!(file.exists());
    }

    #[test]
    fn a_fifo_that_nobody_reads_does_not_hold_us_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(open_file(&path).is_err());
    }
}
