//! Files of JSON lines that are gone on with: the first line says what the file is of, each other
//! one is a record.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, ensure};
use serde::Serialize;

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
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true);
    let mut file = options.open(path).with_context(name)?;
    if file.metadata().with_context(name)?.len() == 0 {
        append(&mut file, header).with_context(name)?;
        return Ok((file, Vec::new()));
    }
    let there = read(path)?;
    ensure_same(path, &there.header, header, differs)?;
    file.set_len(there.whole_bytes as u64).with_context(name)?;
    Ok((file, there.records))
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
