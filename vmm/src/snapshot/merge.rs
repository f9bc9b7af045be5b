//! Making one directory of a chain.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::manifest::Files;
use super::{
    Chain, DEVICES_FILE, DirectoryWriter, FORMAT_VERSION, IMAGE_FILE, ImageWriter, MACHINE_FILE,
    MAP_FILE, Manifest, PAGE_BYTES, PageSums, SnapshotError, StoredFile, Tell,
};

impl Chain {
    /// Writes the same snapshot to `into`, as a full one: it is read and checked, and keeps its
    /// identity, so that diffs of it may be put beside it. `tell` hears what is done, and says
    /// whether it is still wanted; nothing is left of what is not.
    ///
    /// # Errors
    /// Something is damaged, `into` cannot be written, or it is not wanted any more.
    pub fn merge(&self, into: &Path, tell: Tell<'_>) -> Result<(), SnapshotError> {
        let writer = DirectoryWriter::begin(into)?;
        let cannot_write = |source| SnapshotError::write(into.join(IMAGE_FILE))(source);
        let top = self.top().manifest();
        let image = ImageWriter::new(
            writer.create(IMAGE_FILE)?,
            top.memory_bytes,
            PageSums::Xxh64,
        );
        let image = Mutex::new(image.map_err(cannot_write)?);
        self.load(false, tell, |offset, content| {
            let mut image = image.lock().unwrap_or_else(PoisonError::into_inner);
            image
                .put(offset / PAGE_BYTES, content)
                .map_err(cannot_write)
        })?;
        let image = image.into_inner().unwrap_or_else(PoisonError::into_inner);
        let still_wanted = |tell: Tell<'_>| match tell("writing the snapshot") {
            true => Ok(()),
            false => Err(SnapshotError::GivenUp),
        };
        still_wanted(tell)?;
        let (_, map) = image.finish(false).map_err(cannot_write)?;
        let map = map
            .to_bytes()
            .map_err(|what| SnapshotError::damaged(into.join(MAP_FILE), what))?;
        let files = Files {
            machine: writer.store(MACHINE_FILE, &self.top().machine_state()?)?,
            devices: writer.store(DEVICES_FILE, &self.top().device_states()?)?,
            map: writer.store(MAP_FILE, &map)?,
            image: StoredFile {
                bytes: top.memory_bytes,
                crc32: None,
            },
        };
        still_wanted(tell)?;
        writer.finish(&Manifest {
            version: FORMAT_VERSION,
            parent: None,
            files,
            ..top.clone()
        })
    }
}
