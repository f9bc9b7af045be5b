//! A snapshot with all that it is based on.

use std::ops::Range;
use std::path::Path;

use super::image::in_parallel;
use super::{Loaded, PAGE_BYTES, PageRun, Snapshot, SnapshotError, Tell};

/// Most snapshots that a page is looked for in.
pub(super) const MAX_CHAIN: usize = 64;

/// Where pages go.
pub(super) trait Place: Sync {
    /// Puts `content` to byte `offset` of memory.
    fn put(&self, offset: u64, content: &[u8]) -> Result<(), SnapshotError>;

    /// Has `read` fill `bytes` from byte `offset` of memory on, where they are. `None` where they
    /// are not to be had in one piece: then nothing was done.
    fn in_place(
        &self,
        offset: u64,
        bytes: usize,
        read: &mut dyn FnMut(&mut [u8]) -> Result<(), SnapshotError>,
    ) -> Option<Result<(), SnapshotError>>;
}

/// A function that takes copies.
struct Put<F>(F);

impl<F: Fn(u64, &[u8]) -> Result<(), SnapshotError> + Sync> Place for Put<F> {
    fn put(&self, offset: u64, content: &[u8]) -> Result<(), SnapshotError> {
        (self.0)(offset, content)
    }

    fn in_place(
        &self,
        _: u64,
        _: usize,
        _: &mut dyn FnMut(&mut [u8]) -> Result<(), SnapshotError>,
    ) -> Option<Result<(), SnapshotError>> {
        None
    }
}

/// A snapshot and its parents.
#[derive(Debug)]
pub struct Chain {
    /// Itself first, the full one last.
    snapshots: Vec<Snapshot>,
    /// Which of them has which pages, in rising order.
    pieces: Vec<Piece>,
}

/// Pages that one of a chain's snapshots has and none of those above it.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Which snapshot.
    level: usize,
    /// The run that it is a part of.
    run: PageRun,
    /// First page.
    first: u64,
    /// First page behind it.
    end: u64,
}

impl Chain {
    /// Opens the snapshot in `dir` and all that it is based on.
    ///
    /// # Errors
    /// One of them cannot be used, or is not the one that the diff was based on.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let mut chain = vec![Snapshot::open(dir)?];
        while let Some(child) = chain.last()
            && let Some(parent) = &child.manifest().parent
        {
            if chain.len() >= MAX_CHAIN {
                return Err(SnapshotError::ChainTooLong(dir.to_owned()));
            }
            let path = child.dir().join(&parent.path);
            let other = |what: String| SnapshotError::Parent {
                path: path.clone(),
                child: child.dir().to_owned(),
                what,
            };
            let found = match Snapshot::open(&path) {
                Err(SnapshotError::NoSnapshot(_)) => return Err(other("nothing is there".into())),
                found => found?,
            };
            let (here, there) = (child.manifest(), found.manifest());
            if there.id != parent.id {
                return Err(other(format!("it is {}, not {}", there.id, parent.id)));
            }
            if here.memory_bytes != there.memory_bytes {
                return Err(other("it has other memory".to_owned()));
            }
            chain.push(found);
        }
        Ok(Self {
            pieces: pieces(&chain),
            snapshots: chain,
        })
    }

    /// The snapshot itself and then its parents, the full one last.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// The snapshot itself.
    pub fn top(&self) -> &Snapshot {
        // One is always there.
        &self.snapshots[0]
    }

    /// The full snapshot that all of it is based on.
    pub fn base(&self) -> &Snapshot {
        &self.snapshots[self.snapshots.len() - 1]
    }

    /// Reads every file of every snapshot and checks it. `tell` hears what is done, and says
    /// whether it is still wanted.
    ///
    /// # Errors
    /// Something is damaged, or it is not wanted any more.
    pub fn check(&self, tell: Tell<'_>) -> Result<(), SnapshotError> {
        self.snapshots
            .iter()
            .try_for_each(|snapshot| snapshot.check(tell))
    }

    /// Gives every page that differs from zero, checked, to `put` with its offset in memory, as
    /// [`Chain::load_to`] does.
    ///
    /// # Errors
    /// As of that.
    pub fn load(
        &self,
        above_base: bool,
        tell: Tell<'_>,
        put: impl Fn(u64, &[u8]) -> Result<(), SnapshotError> + Sync,
    ) -> Result<Loaded, SnapshotError> {
        self.load_to(above_base, tell, &Put(put))
    }

    /// Gives every page that differs from zero, checked, to `place` with its offset in memory, a
    /// run at a time and on several threads. `above_base`: only what the diffs say, zero pages too.
    /// `tell` hears how much of it is done, and says whether it is still wanted.
    ///
    /// # Errors
    /// Pages are damaged or cannot be read, `place` says so, or it is not wanted any more.
    pub(super) fn load_to(
        &self,
        above_base: bool,
        tell: Tell<'_>,
        place: &impl Place,
    ) -> Result<Loaded, SnapshotError> {
        let pieces = self.pieces.iter().copied();
        let pieces: Vec<Piece> = pieces
            .filter(|piece| match above_base {
                true => piece.level + 1 < self.snapshots.len(),
                false => piece.run.sum.is_some(),
            })
            .collect();
        let all: u64 = pieces.iter().map(|piece| piece.end - piece.first).sum();
        let (mut counted, mut done) = (0, 0);
        let mut how_far = |taken: usize| {
            let new = pieces.iter().take(taken).skip(counted);
            done += new.map(|piece| piece.end - piece.first).sum::<u64>();
            counted = taken;
            tell(&format!(
                "reading memory, {} of {} MiB",
                done >> 8,
                all >> 8
            ))
        };
        in_parallel(&pieces, &mut how_far, |piece, buffer| {
            let (snapshot, run) = (&self.snapshots[piece.level], &piece.run);
            if (piece.first, piece.end) == (run.first, run.end()) {
                let mut read = |target: &mut [u8]| snapshot.read_run(run, target);
                if let Some(done) = place.in_place(run.offset(), run.bytes(), &mut read) {
                    return done;
                }
            }
            buffer.resize(run.bytes(), 0);
            snapshot.read_run(run, buffer)?;
            let from = (piece.first - piece.run.first) * PAGE_BYTES;
            let to = (piece.end - piece.run.first) * PAGE_BYTES;
            place.put(
                piece.first * PAGE_BYTES,
                &buffer[from as usize..to as usize],
            )
        })?;
        Ok(Loaded { pages: all })
    }

    /// Whether a snapshot says something of one of `pages`, by their numbers.
    pub fn has(&self, pages: Range<u64>) -> bool {
        let next = self
            .pieces
            .partition_point(|piece| piece.end <= pages.start);
        let next = self.pieces.get(next);
        next.is_some_and(|piece| piece.first < pages.end)
    }

    /// Fills `buffer` with the pages from number `first` on, checked; those that no snapshot has
    /// are zero.
    ///
    /// # Errors
    /// Pages are damaged or cannot be read.
    pub fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), SnapshotError> {
        buffer.fill(0);
        let behind = first.saturating_add(buffer.len() as u64 / PAGE_BYTES);
        let from = self.pieces.partition_point(|piece| piece.end <= first);
        let mut run = Vec::new();
        for piece in &self.pieces[from..] {
            if piece.first >= behind {
                break;
            }
            if piece.run.sum.is_none() {
                continue;
            }
            run.resize(piece.run.bytes(), 0);
            self.snapshots[piece.level].read_run(&piece.run, &mut run)?;
            let (start, end) = (piece.first.max(first), piece.end.min(behind));
            let within = |page: u64, base: u64| ((page - base) * PAGE_BYTES) as usize;
            buffer[within(start, first)..within(end, first)].copy_from_slice(
                &run[within(start, piece.run.first)..within(end, piece.run.first)],
            );
        }
        Ok(())
    }
}

/// Which of `snapshots` has which pages, in rising order.
fn pieces(snapshots: &[Snapshot]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (level, snapshot) in snapshots.iter().enumerate() {
        let mut below = Vec::new();
        let mut above = pieces.iter().peekable();
        for run in snapshot.map().runs() {
            let mut first = run.first;
            while let Some(other) = above.next_if(|other| other.end <= first) {
                below.push(*other);
            }
            // Whatever of the run is between pieces that are known already.
            loop {
                match above.peek() {
                    Some(other) if other.first < run.end() => {
                        if other.first > first {
                            below.push(Piece {
                                level,
                                run: *run,
                                first,
                                end: other.first,
                            });
                        }
                        first = first.max(other.end);
                        if other.end > run.end() {
                            break;
                        }
                        below.push(**other);
                        above.next();
                    }
                    _ => {
                        if first < run.end() {
                            below.push(Piece {
                                level,
                                run: *run,
                                first,
                                end: run.end(),
                            });
                        }
                        break;
                    }
                }
            }
        }
        below.extend(above.copied());
        pieces = below;
    }
    pieces
}
