//! An initramfs as a newc cpio archive, the same bytes for the same content.
//!
//! Entries are sorted by path, owned by root, dated 1970 and numbered in order; parent directories
//! are made. The archive is not compressed: the guest's kernel would spend more time on unpacking
//! it than the host on giving it.

use std::collections::BTreeMap;
use std::io::{self, Write};

use cpio::newc::{self, ModeFileType};

enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    CharDevice { major: u32, minor: u32 },
}

struct Entry {
    permissions: u32,
    kind: Kind,
}

/// The content of an initramfs. Paths are absolute.
#[derive(Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

impl Initramfs {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory, and those above it.
    pub fn directory(&mut self, path: &str) {
        self.insert(
            path,
            Entry {
                permissions: 0o755,
                kind: Kind::Directory,
            },
        );
    }

    /// A file.
    pub fn file(&mut self, path: &str, permissions: u32, content: Vec<u8>) {
        self.insert(
            path,
            Entry {
                permissions: permissions & 0o7777,
                kind: Kind::File(content),
            },
        );
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.insert(
            path,
            Entry {
                permissions: 0o777,
                kind: Kind::Symlink(target.into()),
            },
        );
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) {
        self.insert(
            path,
            Entry {
                permissions,
                kind: Kind::CharDevice { major, minor },
            },
        );
    }

    /// Whether there is something at `path`.
    pub fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_matches('/'))
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        for (slash, _) in path.match_indices('/') {
            let parent = Entry {
                permissions: 0o755,
                kind: Kind::Directory,
            };
            self.entries
                .entry(path[..slash].to_string())
                .or_insert(parent);
        }
        self.entries.insert(path.to_string(), entry);
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// What `out` reports; `InvalidData` for a file of 4 GiB or more, which the format cannot hold.
    pub fn write_to(&self, mut out: impl Write) -> io::Result<()> {
        for (ino, (path, entry)) in (1..).zip(&self.entries) {
            let (kind, data): (_, &[u8]) = match &entry.kind {
                Kind::Directory => (ModeFileType::Directory, &[]),
                Kind::File(content) => (ModeFileType::Regular, content),
                Kind::Symlink(target) => (ModeFileType::Symlink, target.as_bytes()),
                Kind::CharDevice { .. } => (ModeFileType::Char, &[]),
            };
            let mut builder = newc::Builder::new(path)
                .ino(ino)
                .mode(entry.permissions)
                .set_mode_file_type(kind)
                .nlink(if matches!(entry.kind, Kind::Directory) {
                    2
                } else {
                    1
                });
            if let Kind::CharDevice { major, minor } = entry.kind {
                builder = builder.rdev_major(major).rdev_minor(minor);
            }
            let size = u32::try_from(data.len()).map_err(|_| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{path} is too large for cpio"),
                )
            })?;
            let mut writer = builder.write(&mut out, size);
            writer.write_all(data)?;
            writer.finish()?;
        }
        newc::trailer(&mut out)?;
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn bytes(image: &Initramfs) -> Vec<u8> {
        let mut out = Vec::new();
        image.write_to(&mut out).unwrap();
        out
    }

    #[test]
    fn order_of_insertion_does_not_change_the_bytes() {
        let mut one = Initramfs::new();
        one.file("/init", 0o755, b"program".to_vec());
        one.directory("/proc");
        one.symlink("/bin/sh", "busybox");
        let mut other = Initramfs::new();
        other.symlink("/bin/sh", "busybox");
        other.file("/init", 0o755, b"program".to_vec());
        other.directory("/proc/");
        assert_eq!(bytes(&one), bytes(&other));
    }

    #[test]
    fn archive_reads_back_with_parents_before_children() {
        let mut image = Initramfs::new();
        image.file("/lib/modules/a.ko", 0o644, vec![7; 1001]);
        image.char_device("/dev/console", 0o600, 5, 1);
        let archive = bytes(&image);
        let mut input = archive.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(input).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let entry = reader.entry();
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            let line = format!(
                "{} {:o} {}:{}",
                entry.name(),
                entry.mode(),
                entry.rdev_major(),
                entry.rdev_minor()
            );
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            found.push((line, content.len()));
            input = reader.finish().unwrap();
        }
        let wanted = [
            ("dev 40755 0:0", 0),
            ("dev/console 20600 5:1", 0),
            ("lib 40755 0:0", 0),
            ("lib/modules 40755 0:0", 0),
            ("lib/modules/a.ko 100644 0:0", 1001),
        ];
        assert_eq!(found, wanted.map(|(l, n)| (l.to_string(), n)));
    }
}
