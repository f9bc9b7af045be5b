//! Writing a snapshot's directory: beside its name first, renamed when it is whole.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::memory_map::MAX_RUN_PAGES;
use super::{
    MANIFEST_FILE, Manifest, MemoryMap, PAGE_BYTES, PageRun, PageSums, SnapshotError, StoredFile,
};

/// Directories of one name that processes with the same number were killed over, at most.
const MAX_PARTIAL: u32 = 1000;

/// A directory that is being written. Dropped before [`DirectoryWriter::finish`], nothing of it
/// stays.
#[derive(Debug)]
pub struct DirectoryWriter {
    target: PathBuf,
    partial: PathBuf,
    done: bool,
}

impl DirectoryWriter {
    /// Begins a snapshot that is to be in `target`, which is not there yet or is empty.
    ///
    /// # Errors
    /// Something is there already, or the folder above cannot be written.
    pub fn begin(target: &Path) -> Result<Self, SnapshotError> {
        match std::fs::symlink_metadata(target) {
            Ok(metadata) if !metadata.is_dir() => {
                return Err(SnapshotError::NotADirectory(target.to_owned()));
            }
            Ok(_) => {
                let mut entries = target.read_dir().map_err(SnapshotError::read(target))?;
                if entries.next().is_some() {
                    return Err(SnapshotError::NotEmpty(target.to_owned()));
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(SnapshotError::read(target)(error)),
        }
        let name = target
            .file_name()
            .ok_or_else(|| SnapshotError::NotADirectory(target.to_owned()))?;
        Ok(Self {
            target: target.to_owned(),
            partial: make_partial(target, name)?,
            done: false,
        })
    }

    /// Makes a file of the snapshot, for reading and writing, that only its owner may read: it has
    /// the guest's memory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(&self, name: &str) -> Result<File, SnapshotError> {
        let path = self.partial.join(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(SnapshotError::write(path))
    }

    /// Writes a file of the snapshot.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn store(&self, name: &str, bytes: &[u8]) -> Result<StoredFile, SnapshotError> {
        let mut file = self.create(name)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(SnapshotError::write(self.partial.join(name)))?;
        Ok(StoredFile {
            bytes: bytes.len() as u64,
            crc32: Some(crc32fast::hash(bytes)),
        })
    }

    /// Writes the manifest and gives the directory its name.
    ///
    /// # Errors
    /// It cannot be written, or something was put there meanwhile.
    pub fn finish(mut self, manifest: &Manifest) -> Result<(), SnapshotError> {
        let text = manifest
            .to_text()
            .map_err(|what| SnapshotError::damaged(self.target.join(MANIFEST_FILE), what))?;
        self.store(MANIFEST_FILE, text.as_bytes())?;
        let sync = |path: &Path| File::open(path).and_then(|folder| folder.sync_all());
        sync(&self.partial).map_err(SnapshotError::write(&self.partial))?;
        match std::fs::rename(&self.partial, &self.target) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
                return Err(SnapshotError::NotEmpty(self.target.clone()));
            }
            renamed => renamed.map_err(SnapshotError::write(&self.target))?,
        }
        self.done = true;
        if let Some(above) = self.target.parent().filter(|path| path != &Path::new("")) {
            // It is there; whether it survives a loss of power now is the file system's business.
            let _ = sync(above);
        }
        Ok(())
    }
}

/// Makes a directory beside `target`, whose name is `name`: of this process, and of none that was
/// killed and had its number. In a jail all VMs have the same.
fn make_partial(target: &Path, name: &OsStr) -> Result<PathBuf, SnapshotError> {
    let mut attempt = 0;
    loop {
        let mut partial = name.to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        if attempt > 0 {
            partial.push(format!("-{attempt}"));
        }
        let partial = target.with_file_name(partial);
        match DirBuilder::new().mode(0o700).create(&partial) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists && attempt < MAX_PARTIAL => {
                attempt += 1;
            }
            made => {
                made.map_err(SnapshotError::write(&partial))?;
                return Ok(partial);
            }
        }
    }
}

impl Drop for DirectoryWriter {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = std::fs::remove_dir_all(&self.partial)
        {
            tracing::warn!("{} stays behind: {error}", self.partial.display());
        }
    }
}

/// What is known of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Untold,
    Zero,
    /// Its checksum.
    Stored(u64),
}

/// Writes pages into an image and keeps account of them. A page may come again: what came last
/// counts.
#[derive(Debug)]
pub struct ImageWriter {
    file: File,
    sums: PageSums,
    pages: Vec<Page>,
}

impl ImageWriter {
    /// An image of memory of `memory_bytes` in `file`, which is empty. Its map has checksums of the
    /// kind `sums`.
    ///
    /// # Errors
    /// The file system refuses so long a file.
    pub fn new(file: File, memory_bytes: u64, sums: PageSums) -> std::io::Result<Self> {
        file.set_len(memory_bytes)?;
        let count = usize::try_from(memory_bytes / PAGE_BYTES).map_err(std::io::Error::other)?;
        Ok(Self {
            file,
            sums,
            pages: vec![Page::Untold; count],
        })
    }

    /// Takes the whole pages in `content`, the first of which is page number `first`.
    ///
    /// # Errors
    /// They cannot be written, or are not within memory.
    pub fn put(&mut self, first: u64, content: &[u8]) -> std::io::Result<()> {
        let beyond = || std::io::Error::from(ErrorKind::InvalidInput);
        let start = usize::try_from(first).map_err(|_| beyond())?;
        let (pages, rest) = content.as_chunks::<{ PAGE_BYTES as usize }>();
        let known = self.pages.get_mut(start..).ok_or_else(beyond)?;
        if known.len() < pages.len() || !rest.is_empty() {
            return Err(beyond());
        }
        // Runs of pages that are to be written; zero pages are not, unless something is there
        // already.
        let mut run_start = 0;
        for (index, (page, known)) in pages.iter().zip(known).enumerate() {
            let was_stored = matches!(known, Page::Stored(_));
            *known = match is_zero(page) {
                true => Page::Zero,
                false => Page::Stored(self.sums.page(page)),
            };
            if *known == Page::Zero && !was_stored {
                write_pages(&self.file, first, &pages[run_start..index], run_start)?;
                run_start = index + 1;
            }
        }
        write_pages(&self.file, first, &pages[run_start..], run_start)
    }

    /// Changes page `number` if it was told of; what `change` returns, or `None` if the page is
    /// beyond memory.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn change(
        &mut self,
        number: u64,
        change: impl FnOnce(&mut [u8; PAGE_BYTES as usize]) -> Option<()>,
    ) -> std::io::Result<Option<()>> {
        let Some(known) = usize::try_from(number)
            .ok()
            .and_then(|number| self.pages.get(number))
        else {
            return Ok(None);
        };
        let mut page = [0; PAGE_BYTES as usize];
        match known {
            Page::Untold => return Ok(Some(())),
            Page::Zero => {}
            Page::Stored(_) => self.file.read_exact_at(&mut page, number * PAGE_BYTES)?,
        }
        match change(&mut page) {
            Some(()) => self.put(number, &page).map(Some),
            None => Ok(None),
        }
    }

    /// The image's file once all is in it, and its map. `diff`: pages that were not told of are the
    /// parent's; in a full snapshot they are zero, and zero pages are left out.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self, diff: bool) -> std::io::Result<(File, MemoryMap)> {
        self.file.sync_all()?;
        self.finish_unsynced(diff)
    }

    /// The same, and the host's kernel writes the file when it likes: for an image that nobody
    /// misses after the host has lost its power.
    ///
    /// # Errors
    /// It has more pages than a map can tell of.
    pub fn finish_unsynced(self, diff: bool) -> std::io::Result<(File, MemoryMap)> {
        let mut runs: Vec<PageRun> = Vec::new();
        for (number, page) in (0u64..).zip(&self.pages) {
            let sum = match page {
                Page::Stored(sum) => Some(*sum),
                Page::Zero if diff => None,
                _ => continue,
            };
            match runs.last_mut() {
                Some(run)
                    if run.end() == number
                        && run.pages < MAX_RUN_PAGES
                        && run.sum.is_some() == sum.is_some() =>
                {
                    run.pages += 1;
                    let both = run.sum.zip(sum);
                    run.sum = both.map(|(all, this)| self.sums.joined(all, this));
                }
                _ => runs.push(PageRun {
                    first: number,
                    pages: 1,
                    sum,
                }),
            }
        }
        let memory_bytes = self.pages.len() as u64 * PAGE_BYTES;
        let map = MemoryMap::new(runs, memory_bytes).map_err(std::io::Error::other)?;
        Ok((self.file, map))
    }
}

/// Writes `pages`, which are `skipped` pages behind page number `first`.
fn write_pages(
    file: &File,
    first: u64,
    pages: &[[u8; PAGE_BYTES as usize]],
    skipped: usize,
) -> std::io::Result<()> {
    if pages.is_empty() {
        return Ok(());
    }
    file.write_all_at(pages.as_flattened(), (first + skipped as u64) * PAGE_BYTES)
}

fn is_zero(page: &[u8; PAGE_BYTES as usize]) -> bool {
    // Page by page as words, which the compiler turns into vector instructions.
    let (words, _) = page.as_chunks::<8>();
    words
        .iter()
        .fold(0, |all, word| all | u64::from_ne_bytes(*word))
        == 0
}
