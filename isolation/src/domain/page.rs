//! A page of guest memory: its size, its bytes, its number.

/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The bytes of one page.
pub type Page = [u8; PAGE_SIZE as usize];

/// Number of a guest physical page: guest physical address divided by [`PAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The page that holds guest physical address `gpa`.
    pub fn of(gpa: u64) -> Self {
        Self(gpa / PAGE_SIZE)
    }

    /// Guest physical address of the page's first byte.
    pub fn gpa(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}
