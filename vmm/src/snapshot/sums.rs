//! Checksums of pages.

use std::hash::Hasher;

use twox_hash::XxHash64;

use super::PAGE_BYTES;

/// How pages are summed up: what is in memory is compared with it whenever it is read, so that it
/// must cost less than the reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSums {
    /// CRC-32 (IEEE 802.3) of all bytes of a run: snapshots of version 1, and faults that were
    /// kept.
    Crc32,
    /// XXH64 of each page, with seed 0; that of a run of several is XXH64 of the sum so far and the
    /// next page's, both in 8 bytes, the lowest first. As fast as CRC-32 where the processor
    /// multiplies polynomials, and faster where it does not, or where that is emulated.
    Xxh64,
}

impl PageSums {
    /// Of one page.
    pub fn page(self, page: &[u8]) -> u64 {
        match self {
            Self::Crc32 => crc32fast::hash(page).into(),
            Self::Xxh64 => XxHash64::oneshot(0, page),
        }
    }

    /// Of the pages that are summed up in `before`, and one behind them.
    pub(super) fn joined(self, before: u64, page: u64) -> u64 {
        match self {
            Self::Crc32 => {
                // Neither is longer, as `page` gives them.
                let [before, page] = [before, page].map(|sum| sum as u32);
                let mut all = crc32fast::Hasher::new_with_initial_len(before, 0);
                all.combine(&crc32fast::Hasher::new_with_initial_len(page, PAGE_BYTES));
                all.finalize().into()
            }
            Self::Xxh64 => {
                let mut all = XxHash64::with_seed(0);
                all.write(&before.to_le_bytes());
                all.write(&page.to_le_bytes());
                all.finish()
            }
        }
    }

    /// Of whole pages, one behind the other.
    pub fn run(self, pages: &[u8]) -> u64 {
        match self {
            Self::Crc32 => crc32fast::hash(pages).into(),
            Self::Xxh64 => {
                let mut sums = pages
                    .chunks(PAGE_BYTES as usize)
                    .map(|page| self.page(page));
                let first = sums.next().unwrap_or_default();
                sums.fold(first, |all, page| self.joined(all, page))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    #[test]
    fn a_run_is_summed_up_as_its_pages_are() {
        let pages: Vec<u8> = (0..5 * PAGE).map(|at| (at * at / 7) as u8).collect();
        for sums in [PageSums::Crc32, PageSums::Xxh64] {
            for count in 1..=5 {
                let run = &pages[..count * PAGE];
                let joined = run
                    .chunks(PAGE)
                    .map(|page| sums.page(page))
                    .reduce(|all, page| sums.joined(all, page));
                assert_eq!(Some(sums.run(run)), joined, "{sums:?} of {count}");
            }
            // Pages that have changed places are others.
            let turned = [&pages[PAGE..2 * PAGE], &pages[..PAGE]].concat();
            assert_ne!(sums.run(&turned), sums.run(&pages[..2 * PAGE]), "{sums:?}");
        }
    }

    #[test]
    fn what_is_written_can_be_read_for_good() {
        // By `xxhsum -H64` and `crc32`.
        let page = [b'a'; PAGE];
        assert_eq!(PageSums::Xxh64.page(&page), XXH64_OF_A);
        assert_eq!(PageSums::Crc32.page(&page), CRC32_OF_A);
    }

    const XXH64_OF_A: u64 = 0x89a5_5a10_892c_1603;
    const CRC32_OF_A: u64 = 0x9c99_dc73;
}
