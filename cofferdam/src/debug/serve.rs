//! The place where a `gdb` finds an image: a socket, and one session after the other.

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use isolation::fault_image::FaultImage;
use rustix::fs::Mode;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

use super::Session;
use crate::asked_to_end::asked_to_end;
use crate::options::MAX_SOCKET_PATH_BYTES;

/// Bytes that are read at once.
const READ_BYTES: usize = 4096;
/// How long the other side has to close its end after it has taken its leave.
const LEAVING_TIME: Duration = Duration::from_secs(1);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A unix socket.
    Unix(PathBuf),
    /// A port of this host's own address.
    Tcp(SocketAddr),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Tcp(address)),
            // Whoever connects reads all of the guest's memory.
            Ok(_) => Err("only an address of this host itself (127.0.0.1) is listened at".into()),
            Err(_) if text.is_empty() => Err("name a socket, or 127.0.0.1:PORT".into()),
            Err(_) if text.len() > MAX_SOCKET_PATH_BYTES => {
                Err("the path is too long for a socket".into())
            }
            Err(_) => Ok(Self::Unix(text.into())),
        }
    }
}

/// A unix socket that is removed when this is dropped.
struct OwnSocket {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl OwnSocket {
    fn bind(path: &Path) -> anyhow::Result<(Self, UnixListener)> {
        let cannot = || format!("cannot listen at {}", path.display());
        if let Ok(there) = path.symlink_metadata() {
            ensure!(
                there.file_type().is_socket(),
                "{} is there and no socket: choose another --listen",
                path.display()
            );
            match std::os::unix::net::UnixStream::connect(path) {
                Ok(_) => bail!("somebody listens at {} already", path.display()),
                Err(_) => std::fs::remove_file(path).with_context(cannot)?,
            }
        }
        // From the first moment on for its owner alone. No other thread runs yet.
        let others = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let bound = UnixListener::bind(path);
        rustix::process::umask(others);
        let listener = bound.with_context(cannot)?;
        let file = identity(path).with_context(cannot)?;
        let path = path.to_owned();
        Ok((Self { path, file }, listener))
    }
}

impl Drop for OwnSocket {
    fn drop(&mut self) {
        if identity(&self.path).ok() == Some(self.file) {
            // There is nobody to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let file = path.symlink_metadata()?;
    Ok((file.dev(), file.ino()))
}

/// Serves `image` until a signal asks for the end. `told` gets the command for `gdb` once it is
/// listened.
///
/// # Errors
/// The place cannot be listened at.
pub fn serve(
    image: &FaultImage,
    place: &Place,
    told: impl FnOnce(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot wait for gdb")?;
    runtime.block_on(async {
        // Before anybody can see that it is there.
        let asked_to_end = asked_to_end()?;
        let serving = async {
            match place {
                Place::Unix(path) => {
                    let (_own, listener) = OwnSocket::bind(path)?;
                    told(&format!("gdb -ex 'target remote {}'", path.display()))?;
                    loop {
                        let (stream, _) = listener.accept().await.context("cannot accept")?;
                        talk(image, stream).await;
                    }
                }
                Place::Tcp(address) => {
                    let listener = TcpListener::bind(address).await;
                    let listener =
                        listener.with_context(|| format!("cannot listen at {address}"))?;
                    let address = listener.local_addr().context("cannot listen")?;
                    told(&format!("gdb -ex 'target remote {address}'"))?;
                    loop {
                        let (stream, _) = listener.accept().await.context("cannot accept")?;
                        // Answers are short, and each is waited for.
                        let _ = stream.set_nodelay(true);
                        talk(image, stream).await;
                    }
                }
            }
        };
        tokio::select! {
            ended = serving => ended,
            () = asked_to_end => Ok(()),
        }
    })
}

/// One session, until the other side takes its leave or goes.
pub async fn talk(image: &FaultImage, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut session = Session::new(image);
    let mut bytes = [0; READ_BYTES];
    while !session.is_over() {
        let count = match stream.read(&mut bytes).await {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) => {
                tracing::debug!("gdb is gone: {error}");
                return;
            }
        };
        let answer = session.take(bytes.get(..count).unwrap_or_default());
        if let Err(error) = stream.write_all(&answer).await {
            tracing::debug!("gdb takes nothing: {error}");
            return;
        }
    }
    // It acknowledges the last answer, and takes it for an error if nobody reads that.
    let _ = stream.shutdown().await;
    let mut rest = async || while matches!(stream.read(&mut bytes).await, Ok(1..)) {};
    let _ = tokio::time::timeout(LEAVING_TIME, rest()).await;
}
