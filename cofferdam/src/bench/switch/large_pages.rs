//! Large pages of the host for the guests of a measurement (Linux,
//! Documentation/admin-guide/mm/hugetlbpage.rst).

use std::path::Path;

use anyhow::{Context, ensure};

/// How many pages of 2 MiB there are.
const FILE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// Size of one, in MiB.
const PAGE_MIB: u64 = 2;

/// Pages that the host has set aside; as many as before when it is dropped.
pub struct LargePages {
    before: Option<u64>,
}

impl LargePages {
    /// Has the host set aside enough for `mib` MiB, if it has not so many.
    ///
    /// # Errors
    /// It has no room for them, or this process may not ask for it.
    pub fn set_aside(mib: u64) -> anyhow::Result<Self> {
        let wanted = mib.div_ceil(PAGE_MIB);
        let before = count()?;
        if before >= wanted {
            return Ok(Self { before: None });
        }
        set(wanted)?;
        let pages = Self {
            before: Some(before),
        };
        let has = count()?;
        ensure!(
            has >= wanted,
            "the host has room for {has} of {wanted} large pages: give it more memory, or leave \
             --large-pages away"
        );
        Ok(pages)
    }
}

impl Drop for LargePages {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.before.map(set) {
            tracing::warn!(%error, "large pages stay set aside");
        }
    }
}

fn count() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(Path::new(FILE))
        .with_context(|| format!("the host has no large pages ({FILE})"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{FILE} has no number"))
}

fn set(pages: u64) -> anyhow::Result<()> {
    std::fs::write(FILE, pages.to_string())
        .with_context(|| format!("cannot set large pages aside ({FILE}): this needs root"))
}
