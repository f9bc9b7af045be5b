//! How much memory this process has, the guest's and its own apart, and giving back what only its start
//! needed.

use std::io::{BufRead, BufReader};

/// Resident memory of a process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resident {
    /// Guest memory.
    pub guest_kib: u64,
    /// Everything else, shared libraries and the program itself included.
    pub own_kib: u64,
}

/// Resident memory of this process now.
pub fn resident() -> std::io::Result<Resident> {
    sum(BufReader::new(std::fs::File::open("/proc/self/smaps")?))
}

/// Adds up the mappings of an `smaps` (proc(5)).
fn sum(smaps: impl BufRead) -> std::io::Result<Resident> {
    let mut total = Resident::default();
    let mut of_guest = false;
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        if first == "Rss:" {
            let kib: u64 = second.parse().unwrap_or(0);
            let part = if of_guest {
                &mut total.guest_kib
            } else {
                &mut total.own_kib
            };
            *part = part.saturating_add(kib);
        } else if !first.ends_with(':') {
            // The head of a mapping: addresses, permissions, offset, device, inode, path.
            of_guest = line.contains(vmm::memory::FILE_NAME);
        }
    }
    Ok(total)
}

/// Allocations from this size on get pages of their own, in bytes.
const OWN_PAGES: libc::c_int = 32 << 10;

/// Lets large buffers take memory only as far as they are used. Inside the heap the allocator clears
/// them when they are made, and the user-mode gateway has a buffer for each connection there could be.
pub fn make_buffers_lazy() {
    // SAFETY: mallopt takes no pointer and may be called at any time.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES) } == 0 {
        tracing::debug!("the allocator keeps its threshold");
    }
}

/// Gives back memory that only the start of the process needed: freed heap, and pages of program text,
/// most of which reads command lines and draws reports. Text that is needed comes back from the page
/// cache by itself.
pub fn give_back_startup() {
    // SAFETY: malloc_trim takes no pointer and may be called at any time.
    unsafe { libc::malloc_trim(0) };
    let maps = match std::fs::read_to_string("/proc/self/maps") {
        Ok(maps) => maps,
        Err(error) => {
            tracing::debug!("memory of the start is kept: {error}");
            return;
        }
    };
    for (start, end) in maps.lines().filter_map(text_of_file) {
        let length = end.saturating_sub(start);
        let start = start as *mut libc::c_void;
        // SAFETY: the range is a private mapping of a file that cannot be written through, so no page
        // of it differs from the file; dropped pages are read from the file again when touched.
        if unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } != 0 {
            tracing::debug!("text is kept: {}", std::io::Error::last_os_error());
        }
    }
}

/// Start and end of a mapping of a file's text, out of a line of `/proc/self/maps` (proc(5)).
fn text_of_file(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let path = words.nth(3)?;
    if permissions != "r-xp" || !path.starts_with('/') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some((
        usize::from_str_radix(start, 16).ok()?,
        usize::from_str_radix(end, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_counted_apart() {
        let smaps = "\
55e0c0a00000-55e0c0b00000 r-xp 00000000 08:01 1234 /usr/bin/cofferdam
Size:               1024 kB
Rss:                 900 kB
Pss:                 900 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-s 00000000 00:01 77 /memfd:cofferdam-guest (deleted)
Size:             262144 kB
Rss:               70000 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  40 kB
";
        let resident = sum(smaps.as_bytes()).unwrap();
        assert_eq!(
            resident,
            Resident {
                guest_kib: 70_000,
                own_kib: 940
            }
        );
    }

    #[test]
    fn this_process_has_some() {
        assert!(resident().unwrap().own_kib > 100);
    }

    #[test]
    fn only_text_of_files_is_given_back() {
        let text = "55e0c0a00000-55e0c0b00000 r-xp 00001000 08:01 1234      /usr/bin/cofferdam";
        assert_eq!(
            text_of_file(text),
            Some((0x55e0_c0a0_0000, 0x55e0_c0b0_0000))
        );
        for other in [
            "7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0     [stack]",
            "7ffd1bd000-7ffd1bf000 r-xp 00000000 00:00 0         [vdso]",
            "7f0000000000-7f0000001000 rwxp 00000000 00:00 0",
            "55e0c0a00000-55e0c0b00000 r--p 00001000 08:01 1234  /usr/bin/cofferdam",
            "",
        ] {
            assert_eq!(text_of_file(other), None, "{other}");
        }
    }

    #[test]
    fn a_process_goes_on_without_its_text() {
        give_back_startup();
        assert!(resident().unwrap().own_kib > 0);
    }
}
