//! Directories and files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::Error;

/// Results of steps, each in a directory named by the hash of what went into it.
pub struct Store {
    directory: PathBuf,
    used: Vec<PathBuf>,
    /// Held as long as the store is: one builder at a time.
    _lock: File,
}

impl Store {
    /// The store in `directory`; waits until no other process builds there, and sweeps up what an
    /// interrupted one left.
    pub fn open(directory: &Path, progress: &dyn Fn(&str)) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(Error::io(directory))?;
        let path = directory.join("lock");
        let lock = File::create(&path).map_err(Error::io(&path))?;
        if lock.try_lock().is_err() {
            progress("waiting for another build of the images to end");
            lock.lock().map_err(Error::io(&path))?;
        }
        let store = Self {
            directory: directory.into(),
            used: vec![],
            _lock: lock,
        };
        store.remove(&|name| name.starts_with("partial-"))?;
        Ok(store)
    }

    /// The stage `name` made of `inputs`: there already, or made now by `make` in an empty
    /// directory.
    pub fn stage(
        &mut self,
        name: &str,
        inputs: &impl serde::Serialize,
        make: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let path = self
            .directory
            .join(format!("{name}-{}", &hash_of(inputs)[..32]));
        self.used.push(path.clone());
        if path.is_dir() {
            return Ok(path);
        }
        let partial = self.directory.join(format!("partial-{name}"));
        fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
        make(&partial)?;
        fs::rename(&partial, &path).map_err(Error::io(&path))?;
        Ok(path)
    }

    /// Removes the stages that were not asked for since the store was opened.
    pub fn sweep(&self) -> Result<(), Error> {
        self.remove(&|name| name != "lock" && !self.used.iter().any(|u| u.ends_with(name)))
    }

    fn remove(&self, which: &dyn Fn(&str) -> bool) -> Result<(), Error> {
        for entry in fs::read_dir(&self.directory).map_err(Error::io(&self.directory))? {
            let entry = entry.map_err(Error::io(&self.directory))?;
            let path = entry.path();
            if path.is_dir() && which(&entry.file_name().to_string_lossy()) {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            }
        }
        Ok(())
    }
}

/// Writes a file beside its place and renames it.
pub fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<(), Error> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(Error::io(directory))?;
    let mut name = std::ffi::OsString::from(".partial-");
    name.push(path.file_name().unwrap_or_default());
    let partial = directory.join(name);
    let make = || {
        let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create(&partial)?);
        write(&mut file)?;
        file.into_inner()
            .map_err(std::io::IntoInnerError::into_error)?
            .sync_all()?;
        fs::rename(&partial, path)
    };
    make().map_err(Error::io(path))
}

/// SHA-256 of a value's JSON, in hex.
pub fn hash_of(value: &impl serde::Serialize) -> String {
    // Values here are plain structures with string keys: they always have a JSON form.
    hex(&Sha256::digest(
        serde_json::to_vec(value).unwrap_or_default(),
    ))
}

/// SHA-256 of a file, in hex.
pub fn hash_file(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_stage_leaves_nothing_and_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path(), &|_| ()).unwrap();
        let failed = store.stage("a", &1, |partial| {
            fs::write(partial.join("half"), "x").unwrap();
            Err(Error::NoFile("x".into()))
        });
        assert!(failed.is_err());
        drop(store);
        let mut store = Store::open(directory.path(), &|_| ()).unwrap();
        let path = store
            .stage("a", &1, |partial| {
                assert_eq!(fs::read_dir(partial).unwrap().count(), 0);
                fs::write(partial.join("whole"), "x").map_err(Error::io(partial))
            })
            .unwrap();
        assert!(path.join("whole").exists());
        let again = store.stage("a", &1, |_| panic!("made twice")).unwrap();
        assert_eq!(again, path);
    }

    #[test]
    fn sweep_keeps_what_was_used() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path(), &|_| ()).unwrap();
        let old = store.stage("a", &1, |_| Ok(())).unwrap();
        drop(store);
        let mut store = Store::open(directory.path(), &|_| ()).unwrap();
        let new = store.stage("a", &2, |_| Ok(())).unwrap();
        store.sweep().unwrap();
        assert!(new.exists() && !old.exists());
    }

    #[test]
    fn failed_write_keeps_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write_whole(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write_whole(&path, |out| {
            out.write_all(b"new")?;
            Err(std::io::ErrorKind::Other.into())
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
}
