//! The service's socket: there is one service at it, and one that died is in nobody's way.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rustix::fs::Mode;

use crate::options::MAX_SOCKET_PATH_BYTES;
use crate::runtime_dir::{create_dir, lock_folder};

/// The socket, which is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    folder: PathBuf,
    listener: UnixListener,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Socket {
    /// Makes the socket at `path`, for its owner alone.
    ///
    /// # Errors
    /// Another service answers there, the path is something else's, or the folder is not this
    /// user's to write.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let path = std::path::absolute(path)
            .with_context(|| format!("cannot name the socket {}", path.display()))?;
        ensure!(
            path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES,
            "{} is too long for a socket: choose a shorter --socket",
            path.display()
        );
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // Looking and taking are one step: two services that start at once do not take it from each
        // other.
        let _lock = lock_folder(&folder)?;
        clear_stale(&path)?;
        let cannot = || format!("cannot make the socket {}", path.display());
        // From the first moment on, or somebody might connect in between. No other thread runs yet.
        let others = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let bound = UnixListener::bind(&path);
        rustix::process::umask(others);
        let listener = bound.with_context(cannot)?;
        listener.set_nonblocking(true).with_context(cannot)?;
        let file = identity(&path).with_context(cannot)?;
        Ok(Self {
            path,
            folder,
            listener,
            file,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode of its file.
    pub fn file(&self) -> (u64, u64) {
        self.file
    }

    /// The same for the runtime that this is called in.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn listener(&self) -> anyhow::Result<tokio::net::UnixListener> {
        let copy = self.listener.try_clone();
        copy.and_then(tokio::net::UnixListener::from_std)
            .context("cannot listen")
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Without the lock a service that starts now could lose its socket to us.
        let _lock = lock_folder(&self.folder);
        if identity(&self.path).ok() == Some(self.file) {
            // There is nobody to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket that nobody listens at any more.
fn clear_stale(path: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot look at {}", path.display());
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(cannot),
        Ok(file) => ensure!(
            file.file_type().is_socket(),
            "{} is there and no socket: choose another --socket",
            path.display()
        ),
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "a service answers at {}: end it, or choose another --socket",
            path.display()
        ),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
        }
        Err(error) => Err(error).with_context(cannot),
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let file = path.symlink_metadata()?;
    Ok((file.dev(), file.ino()))
}
