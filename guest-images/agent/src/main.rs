//! The guest agent: `/init` as process 1, `serve` for the host's channel, `traffic` to send
//! and check traffic, `clock` to look at the clock, `--socket PATH` for tests on a host.

mod clock;
mod traffic;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::Duration;

use guest_agent::server::{Powers, serve};
use guest_agent::{channel, init};

/// Between two looks for a port, and after a host that closed its side.
const AGAIN: Duration = Duration::from_millis(50);

/// Whether the first serial port wakes a kernel that has suspended itself, as `cofferdam wake` has
/// it; Linux' default is that it does not (`Documentation/ABI/testing/sysfs-devices-power`).
const CONSOLE_WAKES: &str = "/sys/class/tty/ttyS0/power/wakeup";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        // The kernel gives its /init the words of its command line that it does not know itself.
        init::run();
    }
    // Arguments of a person or of a request, not to be trusted to be text.
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve"] => serve_port(),
        ["clock", end] => ExitCode::from(clock::main(end)),
        ["traffic", ..] => ExitCode::from(traffic::main(&arguments[1..])),
        ["--socket", path] => match serve_socket(path) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("guest-agent: {path}: {error}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!(
                "usage: guest-agent serve | guest-agent --socket PATH | guest-agent traffic ... | guest-agent clock FILE (and /init as process 1)"
            );
            ExitCode::from(2)
        }
    }
}

/// Serves the host's port for ever.
fn serve_port() -> ! {
    // Where there is no such port there is nothing to do.
    let _ = std::fs::write(CONSOLE_WAKES, "enabled");
    loop {
        // No port: a machine that is not driven from outside, or a port that comes later. An error
        // while serving: the port was unplugged. In both cases, look again.
        if let Ok(port) = channel::open_port(agent_protocol::PORT_NAME) {
            let _ended = serve(port, Powers::WholeMachine);
        }
        std::thread::sleep(AGAIN);
    }
}

/// Serves one client after the other.
fn serve_socket(path: &str) -> std::io::Result<()> {
    let listener = UnixListener::bind(path)?;
    loop {
        let (client, _) = listener.accept()?;
        // An error is the client's end.
        let _ended = serve(File::from(OwnedFd::from(client)), Powers::Nothing);
    }
}
