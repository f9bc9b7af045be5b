//! The pages that a guest touches first when it goes on lazily: recorded once, fetched ahead from
//! then on.
//!
//! A file beside the snapshot, which is whole without it. Who goes on first records it, all others
//! read it. Wrong pages in it cost time and nothing else; so one that cannot be read is not used,
//! and is recorded anew. What is no working set, or has a second name, is left as it is.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `cofferws` |
//! | 4 | version, little-endian |
//! | 4 | CRC-32 of what follows, little-endian |
//! | rest | the snapshot's identity and the pages ([`Content`]), by `postcard` |

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{PAGE_BYTES, Snapshot, SnapshotId};

/// Name of the file.
pub const WORKING_SET_FILE: &str = "working.set";
/// Its version. One of another is not used, and not written over either.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"cofferws";
const HEAD_BYTES: usize = 16;
/// Longest one that is looked at, in bytes: each second page of 16 GiB.
const MAX_BYTES: u64 = 16 << 20;

#[derive(Serialize, Deserialize)]
struct Content {
    snapshot: SnapshotId,
    /// First page and number of pages, in rising order; none overlap.
    runs: Vec<(u64, u64)>,
}

/// What is known of the pages that come first.
#[derive(Debug, Default)]
pub struct WorkingSet {
    pages: Vec<Range<u64>>,
    /// To be recorded into: locked, and nobody else does so meanwhile.
    recorder: Option<Recorder>,
}

/// Who records.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    snapshot: SnapshotId,
}

/// What is in a file.
enum Found {
    Pages(Vec<Range<u64>>),
    /// Nothing yet.
    Empty,
    Damaged(String),
    /// Of another version.
    Other(u32),
}

impl WorkingSet {
    /// What is recorded of `snapshot`, or else the right to record it. Neither is missing a reason
    /// not to go on: what is wrong is said in the log.
    pub fn of(snapshot: &Snapshot) -> Self {
        let path = snapshot.dir().join(WORKING_SET_FILE);
        let (id, bytes) = (snapshot.manifest().id, snapshot.manifest().memory_bytes);
        Self::open(&path, id, bytes).unwrap_or_else(|error| {
            tracing::debug!("{}: no pages are fetched ahead: {error}", path.display());
            Self::default()
        })
    }

    fn open(path: &Path, id: SnapshotId, memory_bytes: u64) -> std::io::Result<Self> {
        // A FIFO would be waited for, and a link leads elsewhere.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(flags).mode(0o600);
        let mut recording = options.clone();
        recording.write(true).create(true).truncate(false);
        let (file, is_writable) = match recording.open(path) {
            Ok(file) => (file, true),
            Err(_) => (options.open(path)?, false),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > MAX_BYTES {
            return Err(Error::new(ErrorKind::InvalidData, "it is no working set"));
        }
        // Whoever records it has it alone.
        let lock = match is_writable && metadata.len() == 0 {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        flock(&file, lock)?;
        let mut content = Vec::new();
        (&file).take(MAX_BYTES).read_to_end(&mut content)?;
        // What is not a working set, or has another name besides, is somebody else's.
        let is_ours = content.is_empty() || content.starts_with(MAGIC);
        let is_ours = is_writable && is_ours && metadata.nlink() == 1;
        let recorder = |file| Recorder { file, snapshot: id };
        match read(&content, id, memory_bytes) {
            Found::Pages(pages) => Ok(Self {
                pages,
                recorder: None,
            }),
            Found::Other(version) => {
                let what = format!("it has version {version}");
                Err(Error::new(ErrorKind::InvalidData, what))
            }
            Found::Damaged(what) => {
                tracing::warn!("{} is not used: {what}", path.display());
                flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                Ok(Self {
                    pages: Vec::new(),
                    recorder: is_ours.then(|| recorder(file)),
                })
            }
            Found::Empty => Ok(Self {
                pages: Vec::new(),
                recorder: is_ours.then(|| recorder(file)),
            }),
        }
    }

    /// Parts of memory that are touched first, in bytes of the image and whole pages; nothing where
    /// it is not known.
    pub fn pages(&self) -> &[Range<u64>] {
        &self.pages
    }

    /// Who is to record it, if it is to be.
    pub fn recorder(&mut self) -> Option<Recorder> {
        self.recorder.take()
    }
}

impl Recorder {
    /// Writes that `pages`, whole ones in bytes of the image and in rising order, are touched
    /// first.
    ///
    /// # Errors
    /// They cannot be written. What is there then is not used by anybody.
    pub fn record(self, pages: &[Range<u64>]) -> std::io::Result<()> {
        let runs = pages.iter().map(|range| {
            let first = range.start / PAGE_BYTES;
            (first, range.end.div_ceil(PAGE_BYTES) - first)
        });
        let content = Content {
            snapshot: self.snapshot,
            runs: runs.collect(),
        };
        let body = postcard::to_stdvec(&content).map_err(Error::other)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(crc32fast::hash(&body).to_le_bytes());
        bytes.extend(body);
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ErrorKind::FileTooLarge.into());
        }
        self.file.write_all_at(&bytes, 0)?;
        self.file.set_len(bytes.len() as u64)
    }
}

/// What `bytes` say of the snapshot `id` of so much memory.
fn read(bytes: &[u8], id: SnapshotId, memory_bytes: u64) -> Found {
    let damaged = |what: &str| Found::Damaged(what.to_owned());
    if bytes.is_empty() {
        return Found::Empty;
    }
    let Some((head, body)) = bytes.split_at_checked(HEAD_BYTES) else {
        return damaged("it is cut");
    };
    let Some(&[version, crc32]) = head.strip_prefix(MAGIC).map(|head| head.as_chunks().0) else {
        return damaged("it is something else");
    };
    let [version, crc32] = [version, crc32].map(u32::from_le_bytes);
    if version != VERSION {
        return Found::Other(version);
    }
    if crc32fast::hash(body) != crc32 {
        return damaged("its checksum is wrong");
    }
    let Ok((content, [])) = postcard::take_from_bytes::<Content>(body) else {
        return damaged("it cannot be decoded");
    };
    if content.snapshot != id {
        return damaged("it is of another snapshot");
    }
    if content.runs.is_empty() {
        return damaged("it tells of no page");
    }
    let all = memory_bytes / PAGE_BYTES;
    let (mut pages, mut behind) = (Vec::new(), 0);
    for (first, count) in content.runs {
        let end = first.checked_add(count).filter(|end| *end <= all);
        match end {
            Some(end) if first >= behind && count > 0 => {
                pages.push(first * PAGE_BYTES..end * PAGE_BYTES);
                behind = end;
            }
            _ => return damaged("it tells of pages that there are not"),
        }
    }
    Found::Pages(pages)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMORY: u64 = 64 << 20;

    fn recorded(id: SnapshotId, pages: &[Range<u64>]) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        let recorder = Recorder {
            file: file.try_clone().unwrap(),
            snapshot: id,
        };
        recorder.record(pages).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn id() -> SnapshotId {
        "00112233445566778899aabbccddeeff".parse().unwrap()
    }

    proptest! {
        #[test]
        fn what_is_recorded_is_read_and_nothing_else_is(
            gaps in prop::collection::vec((1u64..50, 1u64..50), 1..100),
            flip in any::<prop::sample::Index>(),
            bit in 0..8u8,
            cut in any::<prop::sample::Index>(),
        ) {
            let mut at = 0;
            let pages: Vec<_> = gaps.iter().map(|(gap, count)| {
                let start = at + gap * PAGE_BYTES;
                at = start + count * PAGE_BYTES;
                start..at
            }).collect();
            let bytes = recorded(id(), &pages);
            let Found::Pages(found) = read(&bytes, id(), MEMORY) else { panic!("it is not read") };
            prop_assert_eq!(found, pages);
            let mut flipped = bytes.clone();
            flipped[flip.index(bytes.len())] ^= 1 << bit;
            prop_assert!(!matches!(read(&flipped, id(), MEMORY), Found::Pages(_) | Found::Empty));
            let cut = &bytes[..cut.index(bytes.len())];
            prop_assert!(!matches!(read(cut, id(), MEMORY), Found::Pages(_)));
        }
    }

    #[test]
    fn a_file_of_somebody_else_is_not_recorded_into() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(WORKING_SET_FILE);
        let recorder = || {
            WorkingSet::open(&path, id(), MEMORY)
                .unwrap()
                .recorder()
                .is_some()
        };
        // Nothing yet, cut behind the magic, and one that tells of no page.
        assert!(recorder());
        for damaged in [&MAGIC[..], &recorded(id(), &[])] {
            std::fs::write(&path, damaged).unwrap();
            assert!(recorder());
        }
        let theirs = [
            b"x".to_vec(),
            b"COFFERWS, longer than the head".to_vec(),
            vec![0; 64],
        ];
        for theirs in theirs {
            std::fs::write(&path, &theirs).unwrap();
            assert!(!recorder());
            assert_eq!(std::fs::read(&path).unwrap(), theirs);
        }
        // By another name it may be anything.
        std::fs::write(&path, b"").unwrap();
        std::fs::hard_link(&path, folder.path().join("other")).unwrap();
        assert!(!recorder());
    }

    #[test]
    fn one_of_another_snapshot_of_less_memory_or_of_another_version_is_not_used() {
        let page = 0x100_0000..0x100_2000;
        let bytes = recorded(id(), std::slice::from_ref(&page));
        let other = "ff112233445566778899aabbccddeeff".parse().unwrap();
        assert!(matches!(read(&bytes, other, MEMORY), Found::Damaged(_)));
        assert!(matches!(read(&bytes, id(), 0x100_1000), Found::Damaged(_)));
        assert!(matches!(read(&bytes, id(), 0x100_2000), Found::Pages(_)));
        // Nothing is touched by nobody: it was recorded wrongly.
        let none = recorded(id(), &[]);
        assert!(matches!(read(&none, id(), MEMORY), Found::Damaged(_)));
        let twice = recorded(id(), &[page.clone(), page]);
        assert!(matches!(read(&twice, id(), MEMORY), Found::Damaged(_)));
        let mut newer = bytes;
        newer[8] = 2;
        assert!(matches!(read(&newer, id(), MEMORY), Found::Other(2)));
    }
}
