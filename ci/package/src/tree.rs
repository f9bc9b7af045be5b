//! Files as they are in one of a package's two archives.

use std::collections::BTreeMap;
use std::io;

/// Files by their paths, which are relative to the root.
#[derive(Debug, Default)]
pub struct Tree(BTreeMap<String, (u32, Vec<u8>)>);

impl Tree {
    /// Adds a file with these permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        self.0.insert(path.to_owned(), (mode, content.into()));
    }

    /// Paths that begin so, in their order.
    pub fn under(&self, folder: &str) -> impl Iterator<Item = &str> {
        let paths = self.0.keys().map(String::as_str);
        paths.filter(move |path| path.starts_with(folder))
    }

    /// What the files take when they are installed, in KiB, each rounded up as policy has it
    /// (section 5.6.20).
    pub fn installed_kib(&self) -> u64 {
        let sizes = self.0.values().map(|(_, content)| content.len() as u64);
        let folders = self.folders().len() as u64;
        sizes.map(|size| size.div_ceil(1024)).sum::<u64>() + folders
    }

    /// The folders that the files are in, each after those that it is in.
    fn folders(&self) -> Vec<String> {
        let mut folders: Vec<String> = Vec::new();
        for path in self.0.keys() {
            for (slash, _) in path.match_indices('/') {
                let folder = path[..slash].to_owned();
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
            }
        }
        folders.sort();
        folders
    }

    /// The archive: folders before what is in them, all of them root's and of one date in seconds
    /// since 1970.
    pub fn tar(&self, date: u64) -> io::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        let header = |kind: tar::EntryType, mode: u32, size: usize| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_size(size as u64);
            header.set_mtime(date);
            header.set_uid(0);
            header.set_gid(0);
            header
        };
        let named = |mut header: tar::Header| -> io::Result<tar::Header> {
            header.set_username("root")?;
            header.set_groupname("root")?;
            Ok(header)
        };
        let folder = |path: &str, tar: &mut tar::Builder<Vec<u8>>| {
            let mut header = named(header(tar::EntryType::Directory, 0o755, 0))?;
            tar.append_data(&mut header, path, io::empty())
        };
        folder("./", &mut tar)?;
        for path in self.folders() {
            folder(&format!("{path}/"), &mut tar)?;
        }
        for (path, (mode, content)) in &self.0 {
            let mut header = named(header(tar::EntryType::Regular, *mode, content.len()))?;
            tar.append_data(&mut header, path, content.as_slice())?;
        }
        tar.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_is_in_them_and_all_has_one_date() {
        let mut tree = Tree::default();
        tree.file("usr/share/a", 0o644, "a");
        tree.file("etc/b", 0o600, vec![0; 1025]);
        assert_eq!(tree.under("etc/").collect::<Vec<_>>(), ["etc/b"]);
        assert_eq!(tree.installed_kib(), 1 + 2 + 3);
        let bytes = tree.tar(7).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut paths = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 7);
            assert_eq!(entry.header().username().unwrap(), Some("root"));
            paths.push(String::from_utf8(entry.path_bytes().into_owned()).unwrap());
        }
        let right = ["./", "etc/", "usr/", "usr/share/", "etc/b", "usr/share/a"];
        assert_eq!(paths, right);
    }
}
