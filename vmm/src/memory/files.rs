//! The file that guest memory is: of small pages, huge ones where the host has them, or large ones
//! that were set aside.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FallocateFlags, MemfdFlags, Mode, OFlags, fallocate, ftruncate, memfd_create, openat,
    unlinkat,
};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::MemoryError;

/// Bytes of a large page.
pub(super) const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Name of the file, as the end of the path that `/proc/PID/maps` shows.
pub const FILE_NAME: &str = "cofferdam-guest";

/// A file of `size_bytes`, with huge pages if the host has them at that moment.
pub(super) fn small_page_file(size_bytes: u64) -> Result<OwnedFd, MemoryError> {
    let refused = |errno: rustix::io::Errno| MemoryError::Allocate(errno.into());
    let file = huge_page_file(size_bytes).or_else(|error| {
        // Not privileged, or a kernel without huge pages: slower, but the same otherwise.
        tracing::debug!(%error, "guest memory without huge pages");
        memfd_create(FILE_NAME, MemfdFlags::CLOEXEC).map_err(refused)
    })?;
    ftruncate(&file, size_bytes).map_err(refused)?;
    Ok(file)
}

/// A file of `size_bytes` in pages that the host has set aside. All are taken at once: a guest that
/// touched one that is not there would end this process.
pub(super) fn large_page_file(size_bytes: u64) -> Result<OwnedFd, MemoryError> {
    if !size_bytes.is_multiple_of(LARGE_PAGE_BYTES) {
        return Err(MemoryError::NotWholeLargePages(size_bytes));
    }
    let refused = |errno: rustix::io::Errno| MemoryError::LargePages {
        needed: size_bytes / LARGE_PAGE_BYTES,
        source: errno.into(),
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create(FILE_NAME, flags).map_err(refused)?;
    ftruncate(&file, size_bytes).map_err(refused)?;
    allocate_large_pages(&file, size_bytes)?;
    Ok(file)
}

pub(super) fn allocate_large_pages(
    file: impl std::os::fd::AsFd,
    size_bytes: u64,
) -> Result<(), MemoryError> {
    fallocate(file, FallocateFlags::empty(), 0, size_bytes).map_err(|errno| {
        MemoryError::LargePages {
            needed: size_bytes / LARGE_PAGE_BYTES,
            source: errno.into(),
        }
    })
}

/// A file for `size_bytes`, deleted at once, whose mappings can have huge pages, which save
/// most of the second stage's faults while a guest starts. An ordinary memfd has none on a host
/// with default settings (`transparent_hugepage/shmem_enabled` is `never`), so this one is made in
/// a tmpfs of its own, mounted nowhere.
fn huge_page_file(size_bytes: u64) -> rustix::io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "huge", "advise")?;
    // A page that is brought (`super::missing`) is taken before it is known that there is one.
    let limit = size_bytes.saturating_add(LARGE_PAGE_BYTES);
    fsconfig_set_string(&tmpfs, "size", limit.to_string())?;
    fsconfig_create(&tmpfs)?;
    let root = fsmount(
        &tmpfs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file = openat(&root, FILE_NAME, flags, Mode::RUSR | Mode::WUSR)?;
    unlinkat(&root, FILE_NAME, AtFlags::empty())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn mappings_are_found_under_the_name_of_the_file() {
        for file in [
            huge_page_file(4 << 20),
            memfd_create(FILE_NAME, MemfdFlags::CLOEXEC),
        ] {
            // Huge pages need privilege, which a test may lack.
            let Ok(file) = file else { continue };
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let path = std::fs::read_link(link).unwrap();
            assert!(
                path.to_string_lossy().contains(FILE_NAME),
                "{}",
                path.display()
            );
        }
    }
}
