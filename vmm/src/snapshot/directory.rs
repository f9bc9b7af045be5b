//! A snapshot's directory, opened for reading.

use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::image::{in_parallel, verify_run};
use super::manifest::{MAX_MANIFEST_BYTES, StoredFile};
use super::memory_map::MAX_MAP_BYTES;
use super::{
    DEVICES_FILE, IMAGE_FILE, MACHINE_FILE, MANIFEST_FILE, MAP_FILE, Manifest, MemoryMap, PageRun,
    SnapshotError, Tell,
};

/// Longest state that is looked at, in bytes: each part of it has a limit of its own.
const MAX_STATE_BYTES: u64 = 256 << 20;

/// One snapshot, its parents apart: the manifest is read and checked, the files are open and as
/// long as it says.
#[derive(Debug)]
pub struct Snapshot {
    dir: PathBuf,
    manifest: Manifest,
    map: MemoryMap,
    image: File,
    /// Of the image when it was opened.
    stamp: Stamp,
}

/// What tells that a file was changed meanwhile.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    length: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl Manifest {
    /// What the snapshot in `dir` says of itself, without a look at its other files.
    ///
    /// # Errors
    /// There is no snapshot, it is not one of this version, or its manifest is damaged.
    pub fn read(dir: &Path) -> Result<Self, SnapshotError> {
        let path = dir.join(MANIFEST_FILE);
        let text = match read_limited(&path, MAX_MANIFEST_BYTES) {
            Err(SnapshotError::Read { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                return Err(SnapshotError::NoSnapshot(dir.to_owned()));
            }
            text => text?,
        };
        let text = String::from_utf8(text)
            .map_err(|_| SnapshotError::damaged(&path, "it is no text (UTF-8)"))?;
        Self::from_text(&path, &text)
    }
}

impl Snapshot {
    /// Opens the snapshot in `dir`.
    ///
    /// # Errors
    /// There is none, it is not one of this version, or its manifest, map or image is damaged in a
    /// way that can be seen without reading the pages.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let manifest = Manifest::read(dir)?;
        let map = read_stored(dir, MAP_FILE, &manifest.files.map, MAX_MAP_BYTES)?;
        let map = MemoryMap::from_bytes(&map, manifest.memory_bytes)
            .map_err(|what| SnapshotError::damaged(dir.join(MAP_FILE), what))?;
        let path = dir.join(IMAGE_FILE);
        let image = File::open(&path).map_err(SnapshotError::read(&path))?;
        let metadata = image.metadata().map_err(SnapshotError::read(&path))?;
        if !metadata.is_file() {
            return Err(SnapshotError::damaged(path, "it is no file"));
        }
        check_length(&path, metadata.len(), &manifest.files.image)?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            map,
            stamp: Stamp::of(&metadata),
            image,
        })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Which pages it has.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The pages, each at its offset.
    pub fn image(&self) -> &File {
        &self.image
    }

    /// The machine's state, as [`crate::MachineState::from_bytes`] reads it.
    ///
    /// # Errors
    /// It is damaged.
    pub fn machine_state(&self) -> Result<Vec<u8>, SnapshotError> {
        let file = &self.manifest.files.machine;
        read_stored(&self.dir, MACHINE_FILE, file, MAX_STATE_BYTES)
    }

    /// The devices' states.
    ///
    /// # Errors
    /// They are damaged.
    pub fn device_states(&self) -> Result<Vec<u8>, SnapshotError> {
        let file = &self.manifest.files.devices;
        read_stored(&self.dir, DEVICES_FILE, file, MAX_STATE_BYTES)
    }

    /// Looks whether the image is still the file that was opened, as long and last written when it
    /// was then: for who has mapped it without a look at its checksums.
    ///
    /// # Errors
    /// It was changed.
    pub fn image_is_as_opened(&self) -> Result<(), SnapshotError> {
        let path = self.dir.join(IMAGE_FILE);
        let now = self.image.metadata().map_err(SnapshotError::read(&path))?;
        match Stamp::of(&now) == self.stamp {
            true => Ok(()),
            false => Err(SnapshotError::ChangedMeanwhile(path)),
        }
    }

    /// Reads the pages of `run` into `buffer`, whose length is theirs.
    ///
    /// # Errors
    /// They cannot be read, or are not those that were written.
    pub fn read_run(&self, run: &PageRun, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        verify_run(&self.image, run, self.manifest.page_sums(), buffer).map_err(|error| match error
            .kind()
        {
            std::io::ErrorKind::InvalidData => {
                SnapshotError::damaged(self.dir.join(IMAGE_FILE), error.to_string())
            }
            _ => SnapshotError::Read {
                path: self.dir.join(IMAGE_FILE),
                source: error,
            },
        })
    }

    /// Reads everything and checks it, see [`super::Chain::check`].
    ///
    /// # Errors
    /// Something is damaged, or it is not wanted any more.
    pub fn check(&self, tell: Tell<'_>) -> Result<(), SnapshotError> {
        self.machine_state()?;
        self.device_states()?;
        let runs = self.map.runs();
        let (mut counted, mut pages) = (0, 0);
        let mut how_far = |taken: usize| {
            let new = runs.iter().take(taken).skip(counted);
            pages += new.map(|run| u64::from(run.pages)).sum::<u64>();
            counted = taken;
            let (done, all) = (pages >> 8, self.map.stored_pages() >> 8);
            tell(&format!(
                "reading {}, {done} of {all} MiB",
                self.dir.display()
            ))
        };
        in_parallel(runs, &mut how_far, |run, buffer| {
            buffer.resize(run.bytes(), 0);
            self.read_run(run, buffer)
        })
    }
}

/// Reads a file of at most `limit` bytes.
fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, SnapshotError> {
    let file = File::open(path).map_err(SnapshotError::read(path))?;
    let metadata = file.metadata().map_err(SnapshotError::read(path))?;
    // A FIFO would be waited for, a device read without end.
    if !metadata.is_file() {
        return Err(SnapshotError::damaged(path, "it is no file"));
    }
    if metadata.len() > limit {
        let what = format!("it has {} bytes, more than any", metadata.len());
        return Err(SnapshotError::damaged(path, what));
    }
    // All of it at once, and one byte of room in which its end is seen.
    let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    let mut bytes = Vec::with_capacity(length.saturating_add(1));
    let read = file.take(limit).read_to_end(&mut bytes);
    read.map_err(SnapshotError::read(path))?;
    Ok(bytes)
}

/// Reads a file that the manifest tells of.
fn read_stored(
    dir: &Path,
    name: &str,
    stored: &StoredFile,
    limit: u64,
) -> Result<Vec<u8>, SnapshotError> {
    let path = dir.join(name);
    let bytes = read_limited(&path, limit)?;
    check_length(&path, bytes.len() as u64, stored)?;
    if stored.crc32 != Some(crc32fast::hash(&bytes)) {
        return Err(SnapshotError::damaged(path, "its checksum is wrong"));
    }
    Ok(bytes)
}

fn check_length(path: &Path, found: u64, stored: &StoredFile) -> Result<(), SnapshotError> {
    if found == stored.bytes {
        return Ok(());
    }
    let what = format!("it has {found} bytes instead of {}", stored.bytes);
    Err(SnapshotError::damaged(path, what))
}
