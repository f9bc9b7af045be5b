//! What is read once and looked at rarely: symbols and types of a guest, some ten million bytes of
//! which a report or a policy needs a few pages.
//!
//! It lies in a file without a name and is mapped. What is not looked at takes no memory of this
//! process: the host's kernel drops it and reads it again. Where no such file can be made it lies
//! on the heap.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;

use vm_memory::{FileOffset, MmapRegion};

/// Where such files are made, in this order.
const FOLDERS: [&str; 2] = ["/var/tmp", "/tmp"];

/// Fewer bytes stay on the heap.
const LEAST_BYTES: usize = 64 << 10;

/// Bytes that do not change any more.
pub struct ColdBytes(Place);

enum Place {
    Heap(Vec<u8>),
    File(MmapRegion),
}

impl ColdBytes {
    /// Puts `bytes` away.
    pub fn new(bytes: Vec<u8>) -> Self {
        if bytes.len() < LEAST_BYTES {
            return Self(Place::Heap(bytes));
        }
        match map(&bytes) {
            Ok(region) => Self(Place::File(region)),
            Err(error) => {
                tracing::debug!("{} bytes stay on the heap: {error}", bytes.len());
                Self(Place::Heap(bytes))
            }
        }
    }

    /// Gives up the memory of what was looked at until now.
    pub fn cool(&self) {
        let Place::File(region) = &self.0 else { return };
        // From now on single pages of it are looked at, and their neighbours are not wanted.
        for advice in [
            libc::MADV_DONTNEED,
            libc::MADV_RANDOM,
            libc::MADV_NOHUGEPAGE,
        ] {
            // SAFETY: the range is the whole of our own mapping of a file, which was never written
            // through it: what is dropped is read from the file again, with the same bytes.
            let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
            if result != 0 {
                let error = std::io::Error::last_os_error();
                tracing::debug!("what is not needed now may stay in memory: {error}");
            }
        }
    }
}

impl Deref for ColdBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Place::Heap(bytes) => bytes,
            // SAFETY: the region is mapped for reading as long as `self` lives. Its file has no
            // name, was opened by this process alone and is neither written nor cut after it was
            // mapped, so the bytes do not change.
            Place::File(region) => unsafe {
                std::slice::from_raw_parts(region.as_ptr(), region.size())
            },
        }
    }
}

impl Default for ColdBytes {
    fn default() -> Self {
        Self(Place::Heap(Vec::new()))
    }
}

impl std::fmt::Debug for ColdBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// Rows of `N` bytes each that do not change any more.
#[derive(Debug, Default)]
pub struct ColdRows<const N: usize>(ColdBytes);

impl<const N: usize> ColdRows<N> {
    /// Puts `rows` away.
    pub fn new(rows: Vec<[u8; N]>) -> Self {
        Self(ColdBytes::new(rows.into_flattened()))
    }

    /// Row `index`.
    pub fn get(&self, index: usize) -> Option<&[u8; N]> {
        self.rows().get(index)
    }

    /// All rows.
    pub fn rows(&self) -> &[[u8; N]] {
        self.0.as_chunks().0
    }

    /// See [`ColdBytes::cool`].
    pub fn cool(&self) {
        self.0.cool();
    }
}

/// Writes `bytes` to a file without a name and maps it.
fn map(bytes: &[u8]) -> std::io::Result<MmapRegion> {
    let mut file = nameless()?;
    file.write_all(bytes)?;
    MmapRegion::build(
        Some(FileOffset::new(file, 0)),
        bytes.len(),
        libc::PROT_READ,
        libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    )
    .map_err(std::io::Error::other)
}

/// A file without a name.
fn nameless() -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600);
    let [first, second] = FOLDERS;
    options.open(first).or_else(|_| options.open(second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_after_they_were_put_away() {
        for len in [0, 1, LEAST_BYTES - 1, LEAST_BYTES, 3 * LEAST_BYTES + 5] {
            let bytes: Vec<u8> = (0..len).map(|at| (at * 7 / 3) as u8).collect();
            let cold = ColdBytes::new(bytes.clone());
            assert!(*cold == *bytes);
            cold.cool();
            assert!(*cold == *bytes);
        }
    }

    #[test]
    fn rows_are_found_by_their_number() {
        let count = LEAST_BYTES;
        let cold = ColdRows::new((0..count as u32).map(u32::to_le_bytes).collect());
        assert_eq!(cold.rows().len(), count);
        assert_eq!(cold.get(777), Some(&777u32.to_le_bytes()));
        assert_eq!(cold.get(count), None);
    }

    /// Resident bytes of the mapping that `at` lies in (`Rss` of /proc/self/smaps).
    fn resident_kib(at: *const u8) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let first = line.split(' ').next().unwrap();
            if let Some((start, end)) = first.split_once('-') {
                let hex = |text| u64::from_str_radix(text, 16).unwrap();
                inside = (hex(start)..hex(end)).contains(&(at as u64));
            } else if inside && first == "Rss:" {
                let kib = line.split_whitespace().nth(1).unwrap();
                return kib.parse().unwrap();
            }
        }
        panic!("not mapped");
    }

    #[test]
    fn what_is_not_looked_at_takes_no_memory() {
        let cold = ColdBytes::new(vec![1; 4 << 20]);
        assert!(matches!(cold.0, Place::File(_)), "no folder for it");
        let sum: u64 = cold.iter().map(|byte| u64::from(*byte)).sum();
        assert_eq!(sum, 4 << 20);
        assert!(resident_kib(cold.as_ptr()) > 2000);
        cold.cool();
        // How much of it one look brings back is the host's affair.
        let after = resident_kib(cold.as_ptr());
        assert!(after < 1000, "{after} KiB");
        assert_eq!(cold[1 << 20], 1);
    }
}
