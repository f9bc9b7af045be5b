//! How this process takes memory, and giving back what only its start needed.

/// Allocations from this size on get pages of their own, in bytes.
const OWN_PAGES: libc::c_int = 32 << 10;

/// Lets large buffers take memory only as far as they are used, from the start of the process until
/// [`give_back_unused`]. Inside the heap the allocator clears them when they are made, and the
/// user-mode gateway has a buffer for each connection there could be. Where the kernel gives huge
/// pages to whoever touches 2 MiB of address space (Debian's default), one byte of a buffer would
/// take them all.
pub fn make_buffers_lazy() {
    // SAFETY: mallopt takes no pointer and may be called at any time.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES) } == 0 {
        tracing::debug!("the allocator keeps its threshold");
    }
    forbid_huge_pages(true);
}

/// Heaps that threads have among them in a process that keeps little.
const HEAPS: libc::c_int = 2;

/// Has all threads of this process use few heaps: each keeps what its threads have once needed.
pub fn share_heaps() {
    // SAFETY: mallopt takes no pointer and may be called at any time.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, HEAPS) } == 0 {
        tracing::debug!("each thread has a heap");
    }
}

/// Has `work` fill guest memory with huge pages while [`make_buffers_lazy`] forbids them.
pub fn with_huge_pages<T>(work: impl FnOnce() -> T) -> T {
    forbid_huge_pages(false);
    let result = work();
    forbid_huge_pages(true);
    result
}

/// Forbids transparent huge pages everywhere in this process, or allows them again.
fn forbid_huge_pages(forbidden: bool) {
    // SAFETY: prctl(PR_SET_THP_DISABLE) takes numbers only (prctl(2)).
    if unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, u64::from(forbidden), 0, 0, 0) } != 0 {
        tracing::debug!("huge pages stay: {}", std::io::Error::last_os_error());
    }
}

/// Gives back memory that only the start of the process, or what was just done, needed: freed heap,
/// and pages of program text and its constants, most of which are for command lines and reports. What of
/// them is needed comes back from the page cache by itself. Guest memory may have huge pages from now on,
/// what was allocated until now may not.
pub fn give_back_unused() {
    // SAFETY: malloc_trim takes no pointer and may be called at any time.
    unsafe { libc::malloc_trim(0) };
    advise(|kind| match kind {
        Mapping::Text | Mapping::Constants => Some(libc::MADV_DONTNEED),
        Mapping::Heap => Some(libc::MADV_NOHUGEPAGE),
    });
    forbid_huge_pages(false);
}

/// Lets guest memory have huge pages from now on, as far as it can (what is mapped from a snapshot
/// cannot until it is copied), and gives nothing back yet: who waits for the guest would wait for
/// what was given back, too.
pub fn let_guest_have_huge_pages() {
    advise(|kind| (kind == Mapping::Heap).then_some(libc::MADV_NOHUGEPAGE));
    forbid_huge_pages(false);
}

/// Gives the kernel the advice that `what` says about each mapping.
fn advise(what: impl Fn(Mapping) -> Option<libc::c_int>) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_else(|error| {
        tracing::debug!("memory of the start is kept: {error}");
        String::new()
    });
    let mut lines = maps.lines().peekable();
    while let Some(line) = lines.next() {
        let Some((start, end, kind)) = mapping(line, lines.peek().copied()) else {
            continue;
        };
        let Some(advice) = what(kind) else {
            continue;
        };
        let length = end.saturating_sub(start);
        let start = start as *mut libc::c_void;
        // SAFETY: dropped pages are those of a private mapping of a file that nobody has written
        // through, so that none differs from the file; they are read from it again when touched.
        // The size of pages changes no byte.
        if unsafe { libc::madvise(start, length, advice) } != 0 {
            tracing::debug!("{line}: {}", std::io::Error::last_os_error());
        }
    }
}

/// Mappings that something can be given back of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapping {
    /// Program text out of a file.
    Text,
    /// What of a program's file comes before its text and can only be read: tables, constants.
    Constants,
    /// What the allocator and threads have, in no file.
    Heap,
}

/// Start, end and kind of a mapping, out of its line of `/proc/self/maps` (proc(5)) and the next one.
fn mapping(line: &str, next: Option<&str>) -> Option<(usize, usize, Mapping)> {
    let mut words = line.split_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let path = words.nth(3);
    let kind = match (permissions, path) {
        ("r-xp", Some(path)) if path.starts_with('/') => Mapping::Text,
        // Behind the text there are pages that can only be read, too, once the loader has written
        // addresses into them (`PT_GNU_RELRO`).
        ("r--p", Some(path)) if path.starts_with('/') && is_text_of(path, range, next?) => {
            Mapping::Constants
        }
        ("rw-p", None | Some("[heap]")) => Mapping::Heap,
        _ => return None,
    };
    let (start, end) = range.split_once('-')?;
    Some((
        usize::from_str_radix(start, 16).ok()?,
        usize::from_str_radix(end, 16).ok()?,
        kind,
    ))
}

/// Whether a line is of the text of the file at `path`, which begins where `range` ends.
fn is_text_of(path: &str, range: &str, line: &str) -> bool {
    let mut words = line.split_whitespace();
    let begins = words.next().and_then(|range| range.split_once('-'));
    let ends = range.split_once('-');
    matches!((begins, ends), (Some((begin, _)), Some((_, end))) if begin == end)
        && words.next() == Some("r-xp")
        && words.nth(3) == Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::resident::walk;

    #[test]
    fn text_of_files_and_what_is_in_no_file_are_told_from_the_rest() {
        let text = "55e0c0a00000-55e0c0b00000 r-xp 00001000 08:01 1234      /usr/bin/cofferdam";
        let (start, end) = (0x55e0_c0a0_0000, 0x55e0_c0b0_0000);
        assert_eq!(mapping(text, None), Some((start, end, Mapping::Text)));
        for heap in [
            "55e0c0a00000-55e0c0b00000 rw-p 00000000 00:00 0     [heap]",
            "55e0c0a00000-55e0c0b00000 rw-p 00000000 00:00 0 ",
        ] {
            assert_eq!(mapping(heap, None), Some((start, end, Mapping::Heap)));
        }
        for other in [
            "7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0     [stack]",
            "7ffd1bd000-7ffd1bf000 r-xp 00000000 00:00 0         [vdso]",
            "7f0000000000-7f0000001000 rwxp 00000000 00:00 0",
            "7f0000000000-7f0000001000 ---p 00000000 00:00 0",
            "55e0c0a00000-55e0c0b00000 r--p 00001000 08:01 1234  /usr/bin/cofferdam",
            "55e0c0a00000-55e0c0b00000 rw-p 00001000 08:01 1234  /usr/bin/cofferdam",
            "",
        ] {
            for next in [None, Some(text), Some(other)] {
                assert_eq!(mapping(other, next), None, "{other}");
            }
        }
    }

    #[test]
    fn constants_are_what_comes_right_before_the_text_of_their_file() {
        let before = "55e0c0900000-55e0c0a00000 r--p 00000000 08:01 1234      /usr/bin/cofferdam";
        let text = "55e0c0a00000-55e0c0b00000 r-xp 00001000 08:01 1234      /usr/bin/cofferdam";
        let constants = Some((0x55e0_c090_0000, 0x55e0_c0a0_0000, Mapping::Constants));
        assert_eq!(mapping(before, Some(text)), constants);
        for other in [
            // Of another file, elsewhere, no text, nothing.
            text.replace("cofferdam", "other"),
            text.replace("55e0c0a00000", "55e0c0a01000"),
            text.replace("r-xp", "r--p"),
            text.replace("r-xp", "rw-p"),
            String::new(),
        ] {
            assert_eq!(mapping(before, Some(&other)), None, "{other}");
        }
        // What is written into at the start comes behind it.
        assert_eq!(mapping(before, None), None);
        assert_eq!(mapping(&before.replace("r--p", "rw-p"), Some(text)), None);
    }

    #[test]
    fn a_byte_of_a_large_buffer_takes_a_small_page_and_the_process_goes_on() {
        make_buffers_lazy();
        let mut buffer: Vec<u8> = Vec::with_capacity(8 << 20);
        // For kernels that give huge pages only to who asks for them. Whole pages in the middle of
        // the buffer.
        let middle = buffer.spare_capacity_mut()[4096..].as_mut_ptr();
        let middle = middle.map_addr(|at| at & !0xfff).cast();
        // SAFETY: the pages are the buffer's; their size changes no byte.
        unsafe { libc::madvise(middle, 7 << 20, libc::MADV_HUGEPAGE) };
        // The program's own pages that it takes to look are there from now on.
        walk(&[]).unwrap();
        let before = walk(&[]).unwrap().own_kib;
        buffer.spare_capacity_mut()[4 << 20].write(1);
        let one = walk(&[]).unwrap().own_kib;
        assert!(one < before + 1024, "{before} KiB, then {one}");
        give_back_unused();
        buffer.resize(8 << 20, 7);
        assert!(buffer.iter().skip(1).all(|byte| *byte == 7));
    }
}
