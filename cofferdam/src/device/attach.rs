//! The socket at which guests attach. Each connection is heard by a thread of its own until it is
//! served or refused.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};

use super::card::Card;
use super::hello::{Hello, VERSION, Welcome, read_line, write_line};
use super::host::Host;

/// How long a client may take to say what it wants, and to take the answer.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// Clients that are heard at a time.
const MAX_HEARD: usize = 32;
/// How long to wait before accepting again when the process has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Attaches whoever comes to `path`, until the process ends. The file is the caller's to remove.
pub fn listen<C: Card>(path: &Path, host: Arc<Host<C>>) -> anyhow::Result<()> {
    let listener = UnixListener::bind(path)
        .with_context(|| format!("cannot make the device's socket {}", path.display()))?;
    std::thread::Builder::new()
        .name("attach".to_owned())
        .spawn(move || accept(&listener, &host))
        .context("cannot start the thread at the device's socket")?;
    Ok(())
}

fn accept<C: Card>(listener: &UnixListener, host: &Arc<Host<C>>) {
    let heard = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("device socket: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let place = Place::take(&heard);
        if place.0.load(Ordering::Relaxed) > MAX_HEARD {
            tracing::warn!("too many clients at a time at the device's socket");
            continue;
        }
        let host = host.clone();
        let thread = std::thread::Builder::new()
            .name("attach-client".to_owned())
            .spawn(move || {
                let _place = place;
                hear(stream, &host);
            });
        if let Err(error) = thread {
            tracing::warn!("a client is not heard, there is no thread for it: {error}");
        }
    }
}

/// One of the clients that are heard.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(heard: &Arc<AtomicUsize>) -> Self {
        heard.fetch_add(1, Ordering::Relaxed);
        Self(heard.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn hear<C: Card>(stream: UnixStream, host: &Host<C>) {
    // For the answer, where it is an error.
    let answer = stream.try_clone();
    let Err(error) = attach(stream, host) else {
        return;
    };
    tracing::info!("not attached: {error:#}");
    if let Ok(answer) = answer {
        // It may have gone; there is nobody else to tell.
        let _ = write_line(&answer, &Welcome::Error(format!("{error:#}")));
    }
}

fn attach<C: Card>(stream: UnixStream, host: &Host<C>) -> anyhow::Result<()> {
    stream.set_write_timeout(Some(HELLO_TIME))?;
    let Hello::Attach {
        version,
        vm,
        mac,
        goes_on,
    } = read_line(&stream, HELLO_TIME)?;
    ensure!(
        version == VERSION,
        "it speaks version {VERSION} and not {version}: use programs of one version"
    );
    host.attach((vm.parse()?, mac.parse()?), goes_on.as_deref(), stream)
}
