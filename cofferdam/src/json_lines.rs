//! Files of JSON lines that are gone on with: the first line says what the file is of, each other
//! one is a record.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::Serialize;

/// Times that a file is opened which others remove at the same time.
const MAX_OPENINGS: u32 = 100;

/// What becomes of a name at which there is no file but something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    /// A link leads where it leads, and a device is used: who gave the name has put it there.
    Followed,
    /// It is refused: others may put things into the folder.
    Refused,
}

impl Elsewhere {
    /// Opens what is at `path` and nothing that is put there later: what is looked at is what was
    /// opened. Where it is refused, a FIFO is not waited for.
    fn open(self, options: &mut OpenOptions, path: &Path) -> anyhow::Result<File> {
        let name = || path.display().to_string();
        let flags = match self {
            Self::Followed => 0,
            Self::Refused => libc::O_NONBLOCK | libc::O_NOFOLLOW,
        };
        let opened = options.custom_flags(flags).open(path);
        let is_link = |error: &std::io::Error| error.raw_os_error() == Some(libc::ELOOP);
        if self == Self::Refused && opened.as_ref().is_err_and(is_link) {
            bail!("{} is no file but a link: choose another name", name());
        }
        let file = opened.with_context(name)?;
        let is_file = file.metadata().with_context(name)?.is_file();
        ensure!(
            self == Self::Followed || is_file,
            "{} is no file: choose another name",
            name()
        );
        Ok(file)
    }
}

/// What is in such a file.
pub struct Contents<H, R> {
    /// What it is of.
    pub header: H,
    /// Its records.
    pub records: Vec<R>,
    /// Bytes of its whole lines: what is behind was cut off.
    pub whole_bytes: usize,
}

/// The file to go on in, and the records in it; a new one gets its `header`. What is cut off at its
/// end is taken out. Of one that is of something else it is said which parts of that can be
/// otherwise (`differs`).
///
/// # Errors
/// It is another one's, has `limit` bytes or more, or cannot be read or written.
pub fn open<H: Serialize + PartialEq, R>(
    (path, elsewhere): (&Path, Elsewhere),
    header: &H,
    limit: u64,
    read: impl FnOnce(&str) -> anyhow::Result<Contents<H, R>>,
    differs: &str,
) -> anyhow::Result<(File, Vec<R>)> {
    let name = || path.display().to_string();
    let mut file = open_alone(path, elsewhere)?;
    if file.metadata().with_context(name)?.len() == 0 {
        append(&mut file, header).with_context(name)?;
        return Ok((file, Vec::new()));
    }
    // What is read is what is written: by its name it could be another file by now.
    let there = read(&text_of(&file, path, limit)?).with_context(name)?;
    ensure_same(path, &there.header, header, differs)?;
    file.set_len(there.whole_bytes as u64).with_context(name)?;
    Ok((file, there.records))
}

/// Opens the file to write behind its end, for this process alone as long as it is open; it is made
/// if it is not there.
fn open_alone(path: &Path, elsewhere: Elsewhere) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    let name = || path.display().to_string();
    for _ in 0..MAX_OPENINGS {
        let file = elsewhere.open(&mut options, path)?;
        match file.try_lock() {
            Ok(()) if is_still(&file, path) => return Ok(file),
            // Who looked whether it can be written has removed it again meanwhile.
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => break,
            Err(TryLockError::Error(error)) => return Err(error).with_context(name),
        }
    }
    bail!(
        "{} is being written by another process: wait for its end, or choose another file",
        path.display()
    )
}

/// Whether `file` (or folder) is what is there at `path` now.
pub(crate) fn is_still(file: &File, path: &Path) -> bool {
    let there = std::fs::metadata(path).map(|there| (there.dev(), there.ino()));
    let ours = file.metadata().map(|ours| (ours.dev(), ours.ino()));
    matches!((ours, there), (Ok(ours), Ok(there)) if ours == there)
}

/// Looks whether the file can be written, before anything is done that takes long. One that was not
/// there is not left behind, but where a link leads.
///
/// # Errors
/// It cannot, or another process writes it.
pub fn ensure_writable(path: &Path, elsewhere: Elsewhere) -> anyhow::Result<()> {
    let was_there = path.try_exists();
    let file = open_alone(path, elsewhere)?;
    // A link is not ours to remove, and what it leads to is not found by it any more without it.
    let is_link = path
        .symlink_metadata()
        .is_ok_and(|there| there.is_symlink());
    let is_empty = file.metadata().is_ok_and(|file| file.len() == 0);
    if matches!(was_there, Ok(false)) && is_empty && !is_link {
        std::fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Whether a file is of what is wanted.
///
/// # Errors
/// It is not: a line that says so.
pub fn ensure_same<H: PartialEq>(
    path: &Path,
    there: &H,
    wanted: &H,
    differs: &str,
) -> anyhow::Result<()> {
    ensure!(
        there == wanted,
        "{} is of {differs}: choose another file",
        path.display()
    );
    Ok(())
}

/// Writes a record's line.
///
/// # Errors
/// It cannot be written.
pub fn append(file: &mut File, value: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    file.write_all(line.as_bytes())?;
    Ok(())
}

/// The text in a file of less than `limit` bytes.
///
/// # Errors
/// It cannot be read, or is too large.
pub fn text(path: &Path, elsewhere: Elsewhere, limit: u64) -> anyhow::Result<String> {
    let file = elsewhere.open(OpenOptions::new().read(true), path)?;
    text_of(&file, path, limit)
}

/// The same; `None` if there is no file, or nothing in it.
///
/// # Errors
/// As of [`text`].
pub fn text_if_any(
    path: &Path,
    elsewhere: Elsewhere,
    limit: u64,
) -> anyhow::Result<Option<String>> {
    match text(path, elsewhere, limit) {
        Ok(text) if text.is_empty() => Ok(None),
        Err(error) if is_not_there(&error) => Ok(None),
        text => text.map(Some),
    }
}

fn is_not_there(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::NotFound)
}

/// The text in the open `file`, which is at `path`.
fn text_of(file: &File, path: &Path, limit: u64) -> anyhow::Result<String> {
    let mut text = String::new();
    let bytes = file.take(limit).read_to_string(&mut text);
    let bytes = bytes.with_context(|| path.display().to_string())?;
    ensure!(
        (bytes as u64) < limit,
        "{} is larger than {limit} bytes",
        path.display()
    );
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::Elsewhere::{Followed, Refused};
    use super::*;

    /// Opens a file whose first line is 7.
    fn seven(path: &Path, elsewhere: Elsewhere) -> anyhow::Result<(File, Vec<()>)> {
        let read = |text: &str| -> anyhow::Result<Contents<u32, ()>> {
            ensure!(text == "7\n", "it has {text:?}");
            Ok(Contents {
                header: 7,
                records: Vec::new(),
                whole_bytes: text.len(),
            })
        };
        open((path, elsewhere), &7_u32, 100, read, "")
    }

    #[test]
    fn a_file_is_written_by_one_at_a_time_and_looking_leaves_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        ensure_writable(&path, Followed).unwrap();
        assert!(!path.exists());
        let (held, _) = seven(&path, Followed).unwrap();
        for refused in [
            ensure_writable(&path, Followed),
            seven(&path, Followed).map(drop),
        ] {
            let why = format!("{:#}", refused.unwrap_err());
            assert!(why.contains("by another process"), "{why}");
        }
        drop(held);
        ensure_writable(&path, Followed).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "7\n");
        let missing = folder.path().join("none/file");
        let why = format!("{:#}", ensure_writable(&missing, Followed).unwrap_err());
        assert!(why.contains("none/file"), "{why}");
    }

    #[test]
    fn looking_takes_no_file_from_who_has_just_opened_it() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // It may be refused: the other one writes.
                    let _ = ensure_writable(&path, Followed);
                }
            });
            let mut nameless = 0;
            for _ in 0..10_000 {
                if let Ok((file, _)) = seven(&path, Followed) {
                    nameless += u32::from(!is_still(&file, &path));
                    let _ = std::fs::remove_file(&path);
                }
            }
            over.store(true, Ordering::Relaxed);
            assert_eq!(nameless, 0, "files that were written and have no name");
        });
    }

    #[test]
    fn what_is_no_file_is_neither_read_nor_written_where_it_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (outside, path) = (folder.path().join("outside"), folder.path().join("file"));
        for contents in ["", "7\n"] {
            std::fs::write(&outside, contents).unwrap();
            std::os::unix::fs::symlink(&outside, &path).unwrap();
            for refused in [
                ensure_writable(&path, Refused),
                seven(&path, Refused).map(drop),
                text(&path, Refused, 100).map(drop),
                text_if_any(&path, Refused, 100).map(drop),
            ] {
                let why = format!("{:#}", refused.unwrap_err());
                assert!(why.contains("file is no file but a link"), "{why}");
            }
            assert_eq!(std::fs::read_to_string(&outside).unwrap(), contents);
            // Whoever may choose the name may choose a link.
            drop(seven(&path, Followed).unwrap());
            assert_eq!(text(&path, Followed, 100).unwrap(), "7\n");
            std::fs::remove_file(&path).unwrap();
        }
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for refused in [
            ensure_writable(&path, Refused),
            text(&path, Refused, 100).map(drop),
        ] {
            let why = format!("{:#}", refused.unwrap_err());
            assert!(why.contains("is no file"), "{why}");
        }
        assert_eq!(
            text_if_any(&folder.path().join("none"), Refused, 9).unwrap(),
            None
        );
    }

    #[test]
    fn a_pipe_is_read_to_its_end_and_a_link_stays_where_its_file_is_yet_to_come() {
        let folder = tempfile::tempdir().unwrap();
        let [pipe, link, led] = ["pipe", "link", "led"].map(|name| folder.path().join(name));
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| text(&pipe, Followed, 100).unwrap());
            let mut writer = OpenOptions::new().write(true).open(&pipe).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            writer.write_all(b"7\n").unwrap();
            drop(writer);
            assert_eq!(reader.join().unwrap(), "7\n");
        });
        std::os::unix::fs::symlink(&led, &link).unwrap();
        ensure_writable(&link, Followed).unwrap();
        drop(seven(&link, Followed).unwrap());
        assert_eq!(std::fs::read_to_string(&led).unwrap(), "7\n");
        assert!(link.symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn a_link_that_comes_between_is_never_followed() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let folder = tempfile::tempdir().unwrap();
        let (outside, path) = (folder.path().join("outside"), folder.path().join("file"));
        let next = folder.path().join("next");
        std::fs::write(&outside, "").unwrap();
        let over = AtomicBool::new(false);
        let mut refused = 0;
        std::thread::scope(|scope| {
            let renames = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::os::unix::fs::symlink(&outside, &next).unwrap();
                    std::fs::rename(&next, &path).unwrap();
                    std::fs::write(&next, "7\n").unwrap();
                    std::fs::rename(&next, &path).unwrap();
                }
            });
            // Until it has met a link often, and a file.
            let mut opened = 0;
            while refused < 1000 || opened < 1000 {
                assert!(!renames.is_finished(), "{opened} and {refused}");
                match seven(&path, Refused) {
                    Ok(_) => opened += 1,
                    Err(_) => refused += 1,
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(std::fs::read(&outside).unwrap(), b"");
    }
}
