//! Taking a snapshot of a machine that runs.
//!
//! ```text
//!  guest runs                          │ at rest                                       │ guest runs
//!  ────────────────────────────────────┼───────────────────────────────────────────────┼──────────────────────
//!  all pages ─► image, then those that │ the last of them ─► image; machine, devices,  │ ─► other files ─► name
//!  changed meanwhile, some times over  │ what is beside ─► memory of this process      │
//! ```
//!
//! Where somebody beside this process writes guest memory ([`crate::Outside`]), all of it is copied at
//! rest, when they are kept from it; a diff has every page compared then.
//!
//! With the directory written beside its name, whoever looks finds all of the snapshot or nothing.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestAddress;

use super::capture_error::{CaptureError, still_wanted};
use super::copier::Copier;
use super::manifest::Files;
use super::{
    Chain, CpuModel, DEVICES_FILE, DirectoryWriter, FORMAT_VERSION, IMAGE_FILE, ImageWriter,
    MACHINE_FILE, MAP_FILE, Manifest, PageSums, ParentSnapshot, SnapshotError, SnapshotId,
    StoredFile,
};
use crate::dirty::ChangedPages;
use crate::error::Error;
use crate::handle::VmHandle;
use crate::memory::copying::{Copying, CopyingError, FEW_PAGES, ROUNDS};
use crate::outside::Others;
use crate::quiesce::{Quiesced, Stay};
use crate::refused::QuiesceError;

/// What is saved with a machine by the layers above it.
#[derive(Debug, Default)]
pub struct Beside {
    /// What it takes to make the same machine.
    pub vm: Value,
    /// What guest memory is to hold at some places instead of what it holds: whoever has patched
    /// the guest tells what was there before. By guest physical address.
    pub instead: Vec<(GuestAddress, Vec<u8>)>,
}

/// A snapshot that is wanted.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotRequest<'a> {
    /// Where: a directory that is not there, or an empty one.
    pub dir: &'a Path,
    /// The snapshot that it is to be a diff of; a full one without.
    pub parent: Option<&'a Path>,
    /// Who writes it, for the manifest.
    pub program: &'a str,
    /// Have it followed from now on what changes, so that a diff of this snapshot takes little
    /// time. It costs the guest something. Without it nothing is followed for snapshots any more.
    pub track: bool,
    /// The machine ends where the snapshot was taken.
    pub stop: bool,
    /// How long the machine may take to come to rest.
    pub limit: Duration,
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Which it is.
    pub id: SnapshotId,
    /// Pages in its image.
    pub pages: u64,
    /// Whether it is a diff.
    pub diff: bool,
    /// How long the guest was at rest, in microseconds.
    pub rest_us: u64,
    /// How long all of it took, in microseconds.
    pub whole_us: u64,
}

/// What is known when the machine has been at rest.
struct AtRest {
    /// Of a machine that is to end with this. They go on before it does, if it does.
    others: Option<Box<dyn Others>>,
    machine: Vec<u8>,
    devices: Vec<u8>,
    cpu: CpuModel,
    vm: Value,
    rest: Duration,
    /// Of a machine that is to end with this.
    stay: Option<Stay>,

    /// What changed since the last snapshot, where that is followed.
    changed: Option<ChangedPages>,
}

impl VmHandle {
    /// Takes a snapshot. `tell` hears what is done, and says whether it is still wanted; `beside`
    /// is asked at rest.
    ///
    /// # Errors
    /// See [`CaptureError`].
    pub fn snapshot(
        &self,
        request: &SnapshotRequest<'_>,
        tell: &mut dyn FnMut(&str) -> bool,
        beside: &mut dyn FnMut() -> Result<Beside, String>,
    ) -> Result<Taken, CaptureError> {
        let begun = Instant::now();
        let others_write = self.others_write();
        if others_write && request.track {
            return Err(CaptureError::NotTracked);
        }
        let parent = request.parent.map(Chain::open).transpose()?;
        if let Some(parent) = &parent {
            self.is_of_this_machine(parent)?;
        }
        let writer = DirectoryWriter::begin(request.dir)?;
        let cannot_write = || SnapshotError::write(request.dir.join(IMAGE_FILE));
        let image = ImageWriter::new(
            writer.create(IMAGE_FILE)?,
            self.ram().size_bytes(),
            PageSums::Xxh64,
        );
        let image = image.map_err(cannot_write())?;
        let mut copier = Copier::new(self.ram(), request.dir, image, parent.as_ref());
        let copying = match others_write {
            true => None,
            false => self.copy_ahead(&mut copier, parent.as_ref(), request.limit, tell)?,
        };
        still_wanted(tell, "bringing the guest to rest")?;
        let mut at_rest = self.quiesce(request.limit, |quiesced| {
            self.take(request, quiesced, copying.as_ref(), &mut copier, beside)
        })??;
        still_wanted(tell, "writing the snapshot")?;
        let finished = copier.into_image().finish(parent.is_some());
        let (_, map) = finished.map_err(cannot_write())?;
        let pages = map.stored_pages();
        let map = map
            .to_bytes()
            .map_err(|what| SnapshotError::damaged(request.dir.join(MAP_FILE), what))?;
        let id = SnapshotId::random().map_err(SnapshotError::write(request.dir))?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH);
        let files = Files {
            machine: writer.store(MACHINE_FILE, &at_rest.machine)?,
            devices: writer.store(DEVICES_FILE, &at_rest.devices)?,
            map: writer.store(MAP_FILE, &map)?,
            image: StoredFile {
                bytes: self.ram().size_bytes(),
                crc32: None,
            },
        };
        let diff = parent.is_some();
        writer.finish(&Manifest {
            version: FORMAT_VERSION,
            id,
            parent: parent.as_ref().map(|parent| relation(request.dir, parent)),
            created_unix_s: created.map_or(0, |since| since.as_secs()),
            program: request.program.to_owned(),
            cpu: at_rest.cpu,
            memory_bytes: self.ram().size_bytes(),
            vcpus: self.machine().vcpus.len() as u8,
            files,
            vm: at_rest.vm,
        })?;
        self.is_snapshot(id, at_rest.changed.take(), request.track)?;
        // What changed since the last snapshot is asked for by the next one only now.
        drop(copying);
        if at_rest.stay.is_some() {
            self.power_off().map_err(QuiesceError::from)?;
            if let Some(others) = at_rest.others.take() {
                others.stay();
            }
        }
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Ok(Taken {
            id,
            pages,
            diff,
            rest_us: us(at_rest.rest),
            whole_us: us(begun.elapsed()),
        })
    }

    fn is_of_this_machine(&self, parent: &Chain) -> Result<(), CaptureError> {
        let (here, there) = (
            self.ram().size_bytes(),
            parent.top().manifest().memory_bytes,
        );
        if here == there {
            return Ok(());
        }
        Err(CaptureError::OtherMemory {
            path: parent.top().dir().to_owned(),
            there: there >> 20,
            here: here >> 20,
        })
    }

    /// Copies while the guest runs. `None` where KVM does not tell what changes meanwhile: all is
    /// left to be done.
    fn copy_ahead(
        &self,
        copier: &mut Copier<'_>,
        parent: Option<&Chain>,
        limit: Duration,
        tell: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Option<Copying<'_>>, CaptureError> {
        still_wanted(tell, "waiting for others who copy memory")?;
        let copying = match self.follow_copying(self.one_copying()) {
            Err(CopyingError::Kvm(Error::KvmLacks(_))) => return Ok(None),
            Err(CopyingError::Refused(refused)) => return Err(QuiesceError::from(refused).into()),
            Err(CopyingError::Kvm(error)) => return Err(error.into()),
            Ok(copying) => copying,
        };
        let changed = match self.is_tracked_since(parent) {
            true => self.quiesce(limit, |quiesced| quiesced.changed_pages())??,
            false => None,
        };
        match changed {
            Some(changed) => {
                for range in changed.ranges() {
                    copier.copy(range, tell)?;
                }
            }
            None => copier.copy_all(tell)?,
        }
        copier.comes_again();
        for _ in 0..ROUNDS {
            let pages = self.with_devices_at_rest(|| copying.changed());
            let pages = pages.map_err(QuiesceError::from)??;
            copier.copy_pages(&pages, tell)?;
            if pages.len() <= FEW_PAGES {
                break;
            }
        }
        Ok(Some(copying))
    }

    /// What has to be done while nothing runs.
    fn take(
        &self,
        request: &SnapshotRequest<'_>,
        quiesced: &mut Quiesced<'_, '_>,
        copying: Option<&Copying<'_>>,
        copier: &mut Copier<'_>,
        beside: &mut dyn FnMut() -> Result<Beside, String>,
    ) -> Result<AtRest, CaptureError> {
        let begun = Instant::now();
        let beside = beside().map_err(CaptureError::Beside)?;
        let others = quiesced.others_rest().map_err(CaptureError::Beside)?;
        if others.is_some() && request.track {
            return Err(CaptureError::NotTracked);
        }
        let machine = quiesced.save()?;
        let devices = quiesced.save_devices()?;
        // Nobody is asked any more: what is left is short, or cannot be had otherwise.
        match copying.filter(|_| others.is_none()) {
            Some(copying) => copier.copy_pages(&copying.changed()?, &mut |_| true)?,
            None => copier.copy_all(&mut |_| true)?,
        }
        for (address, bytes) in &beside.instead {
            copier.put_instead(*address, bytes)?;
        }
        let changed = quiesced.changed_pages()?;
        if changed.is_none() && request.track {
            quiesced.track_changes()?;
        }
        Ok(AtRest {
            stay: request.stop.then(|| quiesced.stay()),
            others: others.filter(|_| request.stop),
            rest: begun.elapsed(),
            cpu: machine.cpu_model(),
            machine: machine.to_bytes().map_err(Error::from)?,
            devices: devices.to_bytes().map_err(Error::from)?,
            vm: beside.vm,
            changed,
        })
    }

    /// Whether it is known what changed since `parent`.
    fn is_tracked_since(&self, parent: Option<&Chain>) -> bool {
        let last = *self.machine().last_snapshot();
        parent.is_some_and(|parent| last == Some(parent.top().manifest().id))
    }

    /// Snapshot `id` is complete: what changed until then counts no more.
    fn is_snapshot(
        &self,
        id: SnapshotId,
        changed: Option<ChangedPages>,
        track: bool,
    ) -> Result<(), Error> {
        if let Some(changed) = changed {
            self.confirm_changes(&changed);
        }
        *self.machine().last_snapshot() = Some(id);
        match track {
            true => Ok(()),
            false => self.stop_tracking_changes(),
        }
    }
}

/// How the snapshot in `dir` names its parent: by its name where both are in one folder, so that
/// they can be moved together.
fn relation(dir: &Path, parent: &Chain) -> ParentSnapshot {
    let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let there = whole(parent.top().dir());
    let above = dir
        .parent()
        .map(|above| match above.as_os_str().is_empty() {
            true => whole(Path::new(".")),
            false => whole(above),
        });
    let path = match (there.parent(), there.file_name()) {
        (Some(folder), Some(name)) if Some(folder) == above.as_deref() => {
            Path::new("..").join(name)
        }
        _ => there,
    };
    ParentSnapshot {
        id: parent.top().manifest().id,
        path: path.display().to_string(),
    }
}
