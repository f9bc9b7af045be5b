//! What of its mappings a process has in memory, as `/proc/PID/smaps` says it
//! (proc_pid_smaps(5)).

use std::io::BufRead;

/// A line of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line<'a> {
    /// The head of a mapping: addresses, permissions, offset, device, inode, path.
    Mapping {
        /// Where it starts.
        start: Option<u64>,
        /// The file that is mapped, deleted or not, or what else is there; may be empty.
        path: &'a str,
    },
    /// A field of the mapping whose head came last.
    Field {
        /// Its name, without the colon.
        name: &'a str,
        /// Its value in KiB; 0 of those that are no sizes.
        kib: u64,
    },
}

/// Gives each line of `smaps` to `each`.
///
/// # Errors
/// It cannot be read.
pub fn read(smaps: impl BufRead, mut each: impl FnMut(Line<'_>)) -> std::io::Result<()> {
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        each(match first.strip_suffix(':') {
            Some(name) => {
                let kib = words.next().and_then(|kib| kib.parse().ok());
                let kib = kib.unwrap_or(0);
                Line::Field { name, kib }
            }
            None => {
                let start = first.split_once('-');
                let start = start.and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
                let path = line.splitn(6, ' ').nth(5).unwrap_or("").trim();
                let path = path.strip_suffix(" (deleted)").unwrap_or(path);
                Line::Mapping { start, path }
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_fields_are_told_apart_whatever_is_in_a_path() {
        let smaps = "\
7f1000000000-7f1010000000 rw-s 00000000 00:01 78                         /a b/c: d (deleted)
Rss:                4000 kB
VmFlags: rd wr
7f3000000000-7f3000100000 rw-p 00000000 00:00 0
Pss:                  12 kB
no line of it
";
        let mut seen = Vec::new();
        read(smaps.as_bytes(), |line| seen.push(format!("{line:?}"))).unwrap();
        let mapping = |start, path| format!("{:?}", Line::Mapping { start, path });
        let field = |name, kib| format!("{:?}", Line::Field { name, kib });
        assert_eq!(
            seen,
            [
                mapping(Some(0x7f10_0000_0000), "/a b/c: d"),
                field("Rss", 4000),
                field("VmFlags", 0),
                mapping(Some(0x7f30_0000_0000), ""),
                field("Pss", 12),
                mapping(None, ""),
            ]
        );
    }
}
