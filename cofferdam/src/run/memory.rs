//! How much memory this process has, the guest's and its own apart.

use std::io::{BufRead, BufReader};

/// Part of the path of guest memory's mapping.
const GUEST_MAPPING: &str = "/memfd:cofferdam-guest";

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
            of_guest = line.contains(GUEST_MAPPING);
        }
    }
    Ok(total)
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
}
