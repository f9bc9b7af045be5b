//! Writing an image: beside its name first, renamed when all of it is there.
//!
//! The guest stands still meanwhile. So nothing is synchronised with the disk; what is lost when
//! the host loses its power shows by the checksums.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use devices::dma::GuestMemory;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::snapshot::{ImageWriter, StoredFile};

use super::manifest::{Control, FORMAT_VERSION, Files, Manifest, Region, ReturnPoint, Section};
use super::{
    FaultImageError, KERNEL_TYPES_FILE, MANIFEST_FILE, MAP_FILE, MEMORY_FILE, MODULE_TYPES_FILE,
    PAGE_SUMS, PRIVATE_FILE, SYMBOLS_FILE,
};
use crate::domain::failing::Failing;
use crate::domain::view::PAGE_SIZE;
use crate::guest::btf::Btf;
use crate::guest::symbols::SymbolTable;
use crate::status::report::ViolationReport;

/// What is known of a guest and of the module whose faults are kept.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Name of the module.
    pub module: String,
    /// Its sections and where they are.
    pub sections: Vec<(String, u64)>,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// The guest's symbols.
    pub symbols: Arc<SymbolTable>,
    /// Types of the kernel and the module.
    pub types: Option<Arc<Btf>>,
    /// Bits of a guest physical address.
    pub physical_bits: u8,
}

/// Guest memory that is copied at once, in bytes.
const BATCH_BYTES: u64 = 1 << 20;
/// What is written at once of the other files, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// What an image is made of.
pub(super) struct Content<'a> {
    pub entry: &'a str,
    pub subject: &'a Subject,
    pub report: &'a ViolationReport,
    pub failing: &'a Failing<'a>,
}

/// Writes an image into a directory of this name in `dir`, and returns where it is. On an error
/// nothing of it is left.
pub(super) fn write_image(
    dir: &Path,
    name: &str,
    content: &Content<'_>,
) -> Result<PathBuf, FaultImageError> {
    let target = dir.join(name);
    let partial = Partial::make(dir.join(format!(".{name}.partial-{}", std::process::id())))?;
    let Content {
        subject, failing, ..
    } = content;
    let private = partial.store(PRIVATE_FILE, |file| {
        failing.private.iter().try_for_each(|(pfn, page)| {
            file.write_all(&pfn.gpa().to_le_bytes())?;
            file.write_all(page.as_slice())
        })
    })?;
    let symbols = partial.store(SYMBOLS_FILE, |file| subject.symbols.write(file))?;
    let types = |name: &str, types: Option<&Btf>| {
        let stored = types.map(|types| partial.store(name, |file| types.write(file)));
        stored.transpose()
    };
    let (kernel, module) = match subject.types.as_deref() {
        None => (None, None),
        Some(types) => match types.base() {
            Some(base) => (Some(&**base), Some(types)),
            None => (Some(types), None),
        },
    };
    let kernel_types = types(KERNEL_TYPES_FILE, kernel)?;
    let module_types = types(MODULE_TYPES_FILE, module)?;
    let memory = failing.domain.view().shared();
    let (memory_bytes, map) = partial.store_memory(memory)?;
    let map = partial.store(MAP_FILE, |file| file.write_all(&map))?;
    let files = Files {
        private,
        symbols,
        kernel_types,
        module_types,
        map,
        memory: StoredFile {
            bytes: memory_bytes,
            crc32: None,
        },
    };
    let text = manifest(content, files).to_text();
    let path = partial.path.join(MANIFEST_FILE);
    let text = text.map_err(|what| FaultImageError::damaged(path, what))?;
    partial.store(MANIFEST_FILE, |file| file.write_all(text.as_bytes()))?;
    partial.rename(&target)?;
    Ok(target)
}

fn manifest(content: &Content<'_>, files: Files) -> Manifest {
    let Content {
        entry,
        subject,
        report,
        failing,
    } = content;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let section = |(name, address): &(String, u64)| Section {
        name: name.clone(),
        address: *address,
    };
    Manifest {
        version: FORMAT_VERSION,
        created_unix_s: now.map_or(0, |now| now.as_secs()),
        program: concat!("cofferdam ", env!("CARGO_PKG_VERSION")).to_owned(),
        kernel: subject.kernel.clone(),
        module: subject.module.clone(),
        sections: subject.sections.iter().map(section).collect(),
        entry: (*entry).to_owned(),
        text: report.to_string(),
        // Only maps with keys that are no text fail to become JSON, and there are none in here.
        report: serde_json::to_value(report).unwrap_or_default(),
        at: failing.violation.rip,
        root: failing.violation.root,
        registers: failing.regs.into(),
        returned: failing.returned,
        control: Control::new(failing.sregs, failing.cr2),
        physical_bits: subject.physical_bits,
        called_with: failing.entry.into(),
        returns_to: ReturnPoint {
            address: failing.return_address,
            rsp: failing.entry.rsp.wrapping_add(8),
        },
        crossings: failing.crossings.iter().map(ReturnPoint::from).collect(),
        callbacks: failing.callbacks.iter().map(ReturnPoint::from).collect(),
        regions: regions(failing.domain.view().shared()),
        files,
    }
}

fn regions(memory: &GuestMemory) -> Vec<Region> {
    let region = |region: &<GuestMemory as GuestMemoryBackend>::R| Region {
        gpa: region.start_addr().raw_value(),
        bytes: region.len(),
    };
    memory.iter().map(region).collect()
}

/// A directory that is being written. Dropped before it has its name, nothing of it stays.
struct Partial {
    path: PathBuf,
    done: bool,
}

impl Partial {
    fn make(path: PathBuf) -> Result<Self, FaultImageError> {
        // What is in there is the guest's memory.
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(FaultImageError::write(&path))?;
        Ok(Self { path, done: false })
    }

    fn create(&self, name: &str) -> Result<File, FaultImageError> {
        let path = self.path.join(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(FaultImageError::write(path))
    }

    /// Writes a file.
    fn store(
        &self,
        name: &str,
        write: impl FnOnce(&mut BufWriter<Summed>) -> std::io::Result<()>,
    ) -> Result<StoredFile, FaultImageError> {
        let mut file = BufWriter::with_capacity(
            BUFFER_BYTES,
            Summed {
                file: self.create(name)?,
                bytes: 0,
                crc32: crc32fast::Hasher::new(),
            },
        );
        write(&mut file)
            .and_then(|()| file.flush())
            .map_err(FaultImageError::write(self.path.join(name)))?;
        let Summed { bytes, crc32, .. } = file.into_parts().0;
        Ok(StoredFile {
            bytes,
            crc32: Some(crc32.finalize()),
        })
    }

    /// Writes the guest's memory; its length and its map.
    fn store_memory(&self, memory: &GuestMemory) -> Result<(u64, Vec<u8>), FaultImageError> {
        let cannot = || FaultImageError::write(self.path.join(MEMORY_FILE));
        let bytes = memory.iter().map(|region| region.len()).sum();
        let mut image =
            ImageWriter::new(self.create(MEMORY_FILE)?, bytes, PAGE_SUMS).map_err(cannot())?;
        let mut buffer = Vec::new();
        let mut before = 0;
        for region in memory.iter() {
            for range in data_of(region) {
                let mut at = range.start;
                while at < range.end {
                    let behind = range.end.min(at + BATCH_BYTES);
                    buffer.resize((behind - at) as usize, 0);
                    let gpa = region.start_addr().raw_value() + at;
                    let read = memory.read_slice(&mut buffer, GuestAddress(gpa));
                    read.map_err(|_| FaultImageError::GuestMemory(gpa))?;
                    let first = (before + at) / PAGE_SIZE;
                    image.put(first, &buffer).map_err(cannot())?;
                    at = behind;
                }
            }
            before += region.len();
        }
        let (_, map) = image.finish_unsynced(false).map_err(cannot())?;
        let map = map.to_bytes();
        let map = map.map_err(|what| FaultImageError::damaged(self.path.join(MAP_FILE), what))?;
        Ok((bytes, map))
    }

    fn rename(mut self, target: &Path) -> Result<(), FaultImageError> {
        std::fs::rename(&self.path, target).map_err(FaultImageError::write(target))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!("{} stays behind: {error}", self.path.display());
        }
    }
}

/// Parts of a region, in bytes from its start and whole pages, outside of which all is zero.
fn data_of(region: &<GuestMemory as GuestMemoryBackend>::R) -> Vec<std::ops::Range<u64>> {
    let all = || std::iter::once(0..region.len()).collect();
    let Some(file) = region.file_offset() else {
        return all();
    };
    let (start, end) = (file.start(), file.start() + region.len());
    let found = match region.get_mmap().bitmap().missing_pages() {
        Some(missing) => missing.data(),
        None => vmm::memory::data_of(file.file(), end),
    };
    match found {
        Ok(found) => found
            .into_iter()
            .map(|range| range.start.clamp(start, end) - start..range.end.clamp(start, end) - start)
            .filter(|range| !range.is_empty())
            .collect(),
        Err(_) => all(),
    }
}

/// A file that is written, with length and checksum.
struct Summed {
    file: File,
    bytes: u64,
    crc32: crc32fast::Hasher,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        let taken = bytes.get(..written).unwrap_or_default();
        self.crc32.update(taken);
        self.bytes += taken.len() as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}
