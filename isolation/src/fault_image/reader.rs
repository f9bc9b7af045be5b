//! Reading an image: memory as the call had it, symbols, types.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddress;
use vmm::snapshot::{MemoryMap, PageRun, StoredFile};

use super::manifest::{MAX_MANIFEST_BYTES, Manifest};
use super::{
    FaultImageError, KERNEL_TYPES_FILE, MANIFEST_FILE, MAP_FILE, MEMORY_FILE, MODULE_TYPES_FILE,
    PAGE_SUMS, PRIVATE_FILE, SYMBOLS_FILE,
};
use crate::domain::view::{PAGE_SIZE, Page};
use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::paging::{AddressSpace, VirtError, VirtMemory};
use crate::guest::phys::{GuestPhys, OutsideMemory};
use crate::guest::symbols::{SymbolTable, read_kallsyms};

/// Most bytes of pages that a call had otherwise: no call of a guest may have the host keep as
/// many.
const MAX_PRIVATE_BYTES: u64 = 512 << 20;
/// Most bytes of symbols.
const MAX_SYMBOLS_BYTES: u64 = 256 << 20;
/// Most bytes of types.
const MAX_TYPES_BYTES: u64 = 64 << 20;
/// Longest list of pages that is looked at, in bytes.
const MAX_MAP_BYTES: u64 = 256 << 20;
/// Bytes of a page and its address.
const RECORD_BYTES: usize = 8 + PAGE_SIZE as usize;
/// Runs of pages that are kept in memory; each is of 1 MiB at most.
const RUNS_KEPT: usize = 32;
/// Most images that a directory is looked through for.
const MAX_IMAGES: usize = 1024;

/// A guest at a fault, its files open and as long as the manifest says.
pub struct FaultImage {
    dir: PathBuf,
    manifest: Manifest,
    private: BTreeMap<u64, Box<Page>>,
    symbols: SymbolTable,
    types: Option<Arc<Btf>>,
    map: MemoryMap,
    memory: File,
    /// Runs that were read last, by their place in the map; `None` where one is damaged.
    runs: Mutex<HashMap<usize, Option<Arc<Vec<u8>>>>>,
}

impl FaultImage {
    /// Opens the image in `dir`.
    ///
    /// # Errors
    /// There is none, it is not one of this version, or something in it is damaged in a way that
    /// can be seen without reading the guest's memory.
    pub fn open(dir: &Path) -> Result<Self, FaultImageError> {
        let path = dir.join(MANIFEST_FILE);
        let bytes = match read_limited(&path, MAX_MANIFEST_BYTES) {
            Err(FaultImageError::Read { source, .. })
                if matches!(
                    source.kind(),
                    ErrorKind::NotFound | ErrorKind::NotADirectory
                ) =>
            {
                return Err(FaultImageError::NoImage(dir.to_owned()));
            }
            bytes => bytes?,
        };
        let manifest = Manifest::from_bytes(&path, &bytes)?;
        let files = &manifest.files;
        let damaged = |name: &str, what: String| FaultImageError::damaged(dir.join(name), what);
        let private = read_stored(dir, PRIVATE_FILE, &files.private, MAX_PRIVATE_BYTES)?;
        let private = pages_of(&private).ok_or_else(|| {
            damaged(
                PRIVATE_FILE,
                "its pages are none, or out of order".to_owned(),
            )
        })?;
        let symbols = read_stored(dir, SYMBOLS_FILE, &files.symbols, MAX_SYMBOLS_BYTES)?;
        let symbols = read_kallsyms(BufReader::new(symbols.as_slice()), |_| true)
            .map_err(|error| damaged(SYMBOLS_FILE, error.to_string()))?;
        let types = read_types(dir, &manifest)?;
        let map = read_stored(dir, MAP_FILE, &files.map, MAX_MAP_BYTES)?;
        let map = MemoryMap::from_bytes(&map, manifest.memory_bytes())
            .map_err(|what| damaged(MAP_FILE, what))?;
        let path = dir.join(MEMORY_FILE);
        let (memory, bytes) = open(&path)?;
        check_length(&path, bytes, &files.memory)?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            private,
            symbols,
            types,
            map,
            memory,
            runs: Mutex::default(),
        })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What failed.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The guest's symbols.
    pub fn symbols(&self) -> &SymbolTable {
        &self.symbols
    }

    /// Types of the kernel and the module, or of the kernel alone, if they are known.
    pub fn types(&self) -> Option<&Btf> {
        self.types.as_deref()
    }

    /// Guest physical addresses of the pages that the call had otherwise than the guest, in rising
    /// order.
    pub fn private_pages(&self) -> impl ExactSizeIterator<Item = u64> {
        self.private.keys().copied()
    }

    /// Pages that the guest has and that are not zero.
    pub fn stored_pages(&self) -> u64 {
        self.map.stored_pages()
    }

    /// The address space that the call ran in.
    pub fn space(&self) -> AddressSpace {
        let control = &self.manifest.control;
        let bits = self.manifest.physical_bits;
        AddressSpace::from_registers(control.cr3, control.cr4, control.efer, bits)
    }

    /// Memory as the call had it, by virtual addresses.
    pub fn virt(&self) -> VirtMemory<'_, Self> {
        VirtMemory {
            space: self.space(),
            memory: self,
        }
    }

    /// Memory as the guest had it, by virtual addresses.
    pub fn guests(&self) -> GuestsMemory<'_> {
        GuestsMemory(self)
    }

    /// Fills as much of `data` from virtual address `at` as there is; how much that is.
    ///
    /// # Errors
    /// There is nothing at all.
    pub fn read(&self, at: u64, data: &mut [u8]) -> Result<usize, VirtError> {
        let mut done = 0;
        while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let from = at.wrapping_add(done as u64);
            let in_page = (PAGE_SIZE - from % PAGE_SIZE) as usize;
            let part = rest.len().min(in_page);
            let Some(part) = rest.get_mut(..part) else {
                break;
            };
            match self.virt().read(Gva(from), part) {
                Ok(()) => done += part.len(),
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// `symbol+0x12 [module]` for an address with a symbol.
    pub fn name(&self, va: u64) -> Option<String> {
        // Absolute symbols and offsets in per-CPU areas are no places.
        if va < 1 << 47 {
            return None;
        }
        let (symbol, offset) = self.symbols.lookup(Gva(va))?;
        // No function and no object of a kernel is as long: what lies behind the last symbol has
        // none.
        if offset >= 1 << 24 {
            return None;
        }
        let module = symbol.module.map(|module| format!(" [{module}]"));
        let module = module.unwrap_or_default();
        Some(format!("{}+{offset:#x}{module}", symbol.name))
    }

    /// Reads all of the guest's memory, and compares it with its checksums.
    ///
    /// # Errors
    /// It is damaged.
    pub fn check(&self) -> Result<(), FaultImageError> {
        let mut buffer = Vec::new();
        for run in self.map.runs() {
            self.read_run(run, &mut buffer)?;
        }
        Ok(())
    }

    fn read_run(&self, run: &PageRun, buffer: &mut Vec<u8>) -> Result<(), FaultImageError> {
        let path = || self.dir.join(MEMORY_FILE);
        buffer.clear();
        buffer.resize(run.bytes(), 0);
        let Some(expected) = run.sum else {
            return Ok(());
        };
        let read = self.memory.read_exact_at(buffer, run.offset());
        read.map_err(FaultImageError::read(path()))?;
        if PAGE_SUMS.run(buffer) == expected {
            return Ok(());
        }
        let what = format!(
            "pages {:#x} to {:#x} are not those that were written",
            run.first,
            run.end() - 1
        );
        Err(FaultImageError::damaged(path(), what))
    }

    /// The guest's page at guest physical address `gpa`; `None` where there is none, or it is
    /// damaged.
    fn guests_page(&self, gpa: u64) -> Option<Page> {
        let mut before = 0;
        let inside = |start: u64, bytes: u64| gpa.checked_sub(start).filter(|at| *at < bytes);
        let offset = self.manifest.regions.iter().find_map(|region| {
            let found = inside(region.gpa, region.bytes).map(|at| before + at);
            before += region.bytes;
            found
        })?;
        let number = offset / PAGE_SIZE;
        let runs = self.map.runs();
        let index = runs.partition_point(|run| run.end() <= number);
        let Some(run) = runs.get(index).filter(|run| run.first <= number) else {
            return Some([0; PAGE_SIZE as usize]);
        };
        let pages = self.run(index, run)?;
        let at = usize::try_from((number - run.first) * PAGE_SIZE).ok()?;
        pages.get(at..)?.first_chunk().copied()
    }

    /// The pages of a run.
    fn run(&self, index: usize, run: &PageRun) -> Option<Arc<Vec<u8>>> {
        // What is in there is whole whenever it can panic.
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = runs.get(&index) {
            return known.clone();
        }
        if runs.len() >= RUNS_KEPT {
            runs.clear();
        }
        let mut buffer = Vec::new();
        let pages = match self.read_run(run, &mut buffer) {
            Ok(()) => Some(Arc::new(buffer)),
            Err(error) => {
                tracing::warn!("{error}");
                None
            }
        };
        runs.insert(index, pages.clone());
        pages
    }

    /// Fills `data` from guest physical address `at`, page by page.
    fn read_with(
        &self,
        at: GuestAddress,
        data: &mut [u8],
        page_at: impl Fn(u64) -> Option<Page>,
    ) -> Result<(), OutsideMemory> {
        let len = data.len();
        let outside = || OutsideMemory { at, len };
        let mut from = at.0;
        let mut rest = data;
        while !rest.is_empty() {
            let offset = (from % PAGE_SIZE) as usize;
            let page = page_at(from - from % PAGE_SIZE).ok_or_else(outside)?;
            let here = page.get(offset..).unwrap_or_default();
            let count = here.len().min(rest.len());
            let (part, later) = rest.split_at_mut(count);
            part.copy_from_slice(here.get(..count).unwrap_or_default());
            rest = later;
            from = match from.checked_add(count as u64) {
                Some(next) => next,
                None if rest.is_empty() => break,
                None => return Err(outside()),
            };
        }
        Ok(())
    }
}

impl fmt::Debug for FaultImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image of a fault in {}", self.dir.display())
    }
}

impl GuestPhys for FaultImage {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        self.read_with(at, data, |gpa| match self.private.get(&gpa) {
            Some(page) => Some(**page),
            None => self.guests_page(gpa),
        })
    }
}

/// Memory as the guest had it, without what the call had otherwise.
#[derive(Debug, Clone, Copy)]
pub struct GuestsMemory<'a>(&'a FaultImage);

impl GuestPhys for GuestsMemory<'_> {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        self.0.read_with(at, data, |gpa| self.0.guests_page(gpa))
    }
}

/// The images in a directory that they were kept in, by name; none if it is no such directory.
pub fn images_in(dir: &Path) -> Vec<PathBuf> {
    let entries = dir.read_dir().into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let is_hidden = |path: &Path| {
        let name = path.file_name().map(|name| name.as_encoded_bytes());
        name.is_none_or(|name| name.starts_with(b"."))
    };
    let mut images: Vec<PathBuf> = paths
        .filter(|path| !is_hidden(path) && path.join(MANIFEST_FILE).is_file())
        .take(MAX_IMAGES)
        .collect();
    images.sort();
    images
}

/// Pages by their addresses.
fn pages_of(bytes: &[u8]) -> Option<BTreeMap<u64, Box<Page>>> {
    let (records, rest) = bytes.as_chunks::<RECORD_BYTES>();
    let mut pages = BTreeMap::new();
    for record in records {
        let (gpa, page) = record.split_first_chunk()?;
        let gpa = u64::from_le_bytes(*gpa);
        let is_next = pages.last_key_value().is_none_or(|(last, _)| *last < gpa);
        if !is_next || !gpa.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        pages.insert(gpa, Box::new(*page.first_chunk()?));
    }
    rest.is_empty().then_some(pages)
}

/// Types of kernel and module, as far as there are any.
fn read_types(dir: &Path, manifest: &Manifest) -> Result<Option<Arc<Btf>>, FaultImageError> {
    let files = &manifest.files;
    let mut types: Option<Arc<Btf>> = None;
    for (name, stored) in [
        (KERNEL_TYPES_FILE, &files.kernel_types),
        (MODULE_TYPES_FILE, &files.module_types),
    ] {
        let Some(stored) = stored else { continue };
        let bytes = read_stored(dir, name, stored, MAX_TYPES_BYTES)?;
        let parsed = Btf::parse(&bytes, types.take());
        let damaged = |error: crate::guest::btf::BtfError| {
            FaultImageError::damaged(dir.join(name), error.to_string())
        };
        types = Some(Arc::new(parsed.map_err(damaged)?));
    }
    Ok(types)
}

/// Opens a file, and says how long it is.
fn open(path: &Path) -> Result<(File, u64), FaultImageError> {
    let mut options = OpenOptions::new();
    // A FIFO would be waited for.
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(FaultImageError::read(path))?;
    let metadata = file.metadata().map_err(FaultImageError::read(path))?;
    // A device would be read without end.
    match metadata.is_file() {
        true => Ok((file, metadata.len())),
        false => Err(FaultImageError::damaged(path, "it is no file")),
    }
}

/// Reads a file of at most `limit` bytes.
fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, FaultImageError> {
    let (file, length) = open(path)?;
    if length > limit {
        let what = format!("it has {length} bytes, more than any");
        return Err(FaultImageError::damaged(path, what));
    }
    let mut bytes = Vec::new();
    let read = file.take(limit).read_to_end(&mut bytes);
    read.map_err(FaultImageError::read(path))?;
    Ok(bytes)
}

/// Reads a file that the manifest tells of.
fn read_stored(
    dir: &Path,
    name: &str,
    stored: &StoredFile,
    limit: u64,
) -> Result<Vec<u8>, FaultImageError> {
    let path = dir.join(name);
    let bytes = read_limited(&path, limit)?;
    check_length(&path, bytes.len() as u64, stored)?;
    if stored.crc32 != Some(crc32fast::hash(&bytes)) {
        return Err(FaultImageError::damaged(path, "its checksum is wrong"));
    }
    Ok(bytes)
}

fn check_length(path: &Path, found: u64, stored: &StoredFile) -> Result<(), FaultImageError> {
    if found == stored.bytes {
        return Ok(());
    }
    let what = format!("it has {found} bytes instead of {}", stored.bytes);
    Err(FaultImageError::damaged(path, what))
}
