//! Files of JSON lines that are gone on with: the first line says what the file is of, each other
//! one is a record.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::Serialize;

/// Times that a file is opened which others remove at the same time.
const MAX_OPENINGS: u32 = 100;

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
/// It is another one's, or cannot be read or written.
pub fn open<H: Serialize + PartialEq, R>(
    path: &Path,
    header: &H,
    read: impl FnOnce(&Path) -> anyhow::Result<Contents<H, R>>,
    differs: &str,
) -> anyhow::Result<(File, Vec<R>)> {
    let name = || path.display().to_string();
    let mut file = open_alone(path)?;
    if file.metadata().with_context(name)?.len() == 0 {
        append(&mut file, header).with_context(name)?;
        return Ok((file, Vec::new()));
    }
    let there = read(path)?;
    ensure_same(path, &there.header, header, differs)?;
    file.set_len(there.whole_bytes as u64).with_context(name)?;
    Ok((file, there.records))
}

/// Opens the file to write behind its end, for this process alone as long as it is open; it is made
/// if it is not there.
fn open_alone(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    let name = || path.display().to_string();
    for _ in 0..MAX_OPENINGS {
        let file = options.open(path).with_context(name)?;
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
/// there is not left behind.
///
/// # Errors
/// It cannot, or another process writes it.
pub fn ensure_writable(path: &Path) -> anyhow::Result<()> {
    let was_there = path.try_exists();
    let file = open_alone(path)?;
    if matches!(was_there, Ok(false)) && file.metadata().is_ok_and(|file| file.len() == 0) {
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
pub fn text(path: &Path, limit: u64) -> anyhow::Result<String> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
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
    use super::*;

    #[test]
    fn a_file_is_written_by_one_at_a_time_and_looking_leaves_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        ensure_writable(&path).unwrap();
        assert!(!path.exists());
        let nothing = |_: &Path| -> anyhow::Result<Contents<u32, ()>> { bail!("for a test") };
        let (held, _) = open(&path, &7_u32, nothing, "").unwrap();
        for refused in [
            ensure_writable(&path),
            open(&path, &7_u32, nothing, "").map(drop),
        ] {
            let why = format!("{:#}", refused.unwrap_err());
            assert!(why.contains("by another process"), "{why}");
        }
        drop(held);
        ensure_writable(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "7\n");
        let missing = folder.path().join("none/file");
        let why = format!("{:#}", ensure_writable(&missing).unwrap_err());
        assert!(why.contains("none/file"), "{why}");
    }

    #[test]
    fn looking_takes_no_file_from_who_has_just_opened_it() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let nothing = |_: &Path| -> anyhow::Result<Contents<u32, ()>> { bail!("for a test") };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // It may be refused: the other one writes.
                    let _ = ensure_writable(&path);
                }
            });
            let mut nameless = 0;
            for _ in 0..10_000 {
                if let Ok((file, _)) = open(&path, &7_u32, nothing, "") {
                    nameless += u32::from(!is_still(&file, &path));
                    let _ = std::fs::remove_file(&path);
                }
            }
            over.store(true, Ordering::Relaxed);
            assert_eq!(nameless, 0, "files that were written and have no name");
        });
    }
}
