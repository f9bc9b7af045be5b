//! Debian packages: an `ar` archive of `control.tar.*` (what it is) and `data.tar.*` (its files).
//!
//! The package manager checked the download. A damaged or hostile file must still end in an error:
//! nothing is written outside the target directory.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use crate::{Error, unzstd};

/// What a package says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Its name.
    pub package: String,
    /// Its version.
    pub version: String,
    /// Names in `Depends` and `Pre-Depends`, alternatives included, without versions.
    pub depends: Vec<String>,
}

/// Reads what a package says about itself.
///
/// # Errors
/// [`Error::BadPackage`] when it is damaged.
pub fn control(deb: &Path) -> Result<Control, Error> {
    let mut text = None;
    with_member(deb, "control.tar", &mut |tar| {
        for entry in tar::Archive::new(tar).entries()? {
            let entry = entry?;
            if entry.path()?.file_name().is_some_and(|n| n == "control") {
                let mut content = String::new();
                entry.take(1 << 20).read_to_string(&mut content)?;
                text = Some(content);
                break;
            }
        }
        Ok(())
    })?;
    let bad = |reason: &str| Error::BadPackage {
        path: deb.into(),
        reason: reason.into(),
    };
    let control = parse_control(&text.ok_or_else(|| bad("no control file"))?);
    if control.package.is_empty() || control.version.is_empty() {
        return Err(bad("no name or version"));
    }
    Ok(control)
}

fn parse_control(text: &str) -> Control {
    let mut control = Control::default();
    for line in text.lines() {
        let Some((field, value)) = line.split_once(':') else {
            continue;
        };
        match field {
            "Package" => control.package = value.trim().into(),
            "Version" => control.version = value.trim().into(),
            "Depends" | "Pre-Depends" => {
                let names = value
                    .split([',', '|'])
                    .filter_map(|d| d.split_whitespace().next());
                control
                    .depends
                    .extend(names.map(|n| n.split(':').next().unwrap_or(n).to_string()));
            }
            _ => {}
        }
    }
    control
}

/// Unpacks those files and links of a package whose path (absolute, as installed) is wanted.
///
/// `progress` is told how many of the package's bytes were read, out of how many.
///
/// # Errors
/// [`Error::BadPackage`] when it is damaged.
pub fn unpack(
    deb: &Path,
    into: &Path,
    wanted: &dyn Fn(&str) -> bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<PathBuf>, Error> {
    let mut unpacked = Vec::new();
    std::fs::create_dir_all(into).map_err(Error::io(into))?;
    let size = std::fs::metadata(deb).map_err(Error::io(deb))?.len();
    with_member_progress(deb, "data.tar", &mut |n| progress(n, size), &mut |tar| {
        for entry in tar::Archive::new(tar).entries()? {
            let mut entry = entry?;
            let Some(path) = absolute(&entry.path()?) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a path leads out of the package",
                ));
            };
            let kind = entry.header().entry_type();
            if kind.is_dir() || !wanted(&path) {
                continue;
            }
            entry.set_preserve_mtime(false);
            if !entry.unpack_in(into)? {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{path} leads out of the package"),
                ));
            }
            unpacked.push(PathBuf::from(path));
        }
        Ok(())
    })?;
    Ok(unpacked)
}

/// `./usr/bin/x` as `/usr/bin/x`, or none when there is a `..` in it.
fn absolute(path: &Path) -> Option<String> {
    let mut text = String::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => {
                text.push('/');
                text.push_str(name.to_str()?);
            }
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(text)
}

type UseTar<'a> = &'a mut dyn FnMut(&mut dyn Read) -> io::Result<()>;

fn with_member(deb: &Path, stem: &str, use_tar: UseTar<'_>) -> Result<(), Error> {
    with_member_progress(deb, stem, &mut |_| {}, use_tar)
}

fn with_member_progress(
    deb: &Path,
    stem: &str,
    progress: &mut dyn FnMut(u64),
    use_tar: UseTar<'_>,
) -> Result<(), Error> {
    let file = File::open(deb).map_err(Error::io(deb))?;
    let counted = Counted {
        inner: io::BufReader::with_capacity(1 << 18, file),
        read: 0,
        progress,
    };
    let mut archive = ar::Archive::new(counted);
    let mut find = || -> io::Result<bool> {
        while let Some(entry) = archive.next_entry() {
            let mut entry = entry?;
            let name = String::from_utf8_lossy(entry.header().identifier())
                .trim_end_matches('/')
                .to_string();
            let Some(packing) = name.strip_prefix(stem) else {
                continue;
            };
            match packing {
                "" => to_the_end(&mut entry, use_tar)?,
                ".xz" => to_the_end(&mut liblzma::read::XzDecoder::new(&mut entry), use_tar)?,
                ".zst" => to_the_end(&mut unzstd::Decoder::new(&mut entry), use_tar)?,
                other => {
                    let text = format!("{stem}{other}: this packing is not known");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
            }
            return Ok(true);
        }
        Ok(false)
    };
    match find() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::BadPackage {
            path: deb.into(),
            reason: format!("no {stem} in it"),
        }),
        Err(error) => Err(Error::BadPackage {
            path: deb.into(),
            reason: error.to_string(),
        }),
    }
}

/// The packing's checksum comes last: a file that is cut short shows only there.
fn to_the_end(unpacked: &mut dyn Read, use_tar: UseTar<'_>) -> io::Result<()> {
    use_tar(unpacked)?;
    io::copy(unpacked, &mut io::sink()).map(|_| ())
}

struct Counted<'a, R> {
    inner: R,
    read: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.read += n as u64;
        (self.progress)(self.read);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::*;

    fn on_disk(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("small.deb");
        std::fs::write(&path, content).unwrap();
        (directory, path)
    }

    fn unpack_all(deb: &Path, into: &Path) -> Result<Vec<PathBuf>, Error> {
        unpack(deb, into, &|_| true, &mut |_, _| ())
    }

    #[test]
    fn wanted_files_are_unpacked_and_others_not() {
        let (directory, deb) = on_disk(&small_deb(&[("./bin/a", b"A"), ("./doc/b", b"B")]));
        let into = directory.path().join("tree");
        let mut read = (0, 0);
        let paths = unpack(&deb, &into, &|p| p.starts_with("/bin/"), &mut |n, all| {
            read = (n, all)
        })
        .unwrap();
        assert_eq!(paths, [Path::new("/bin/a")]);
        assert_eq!(std::fs::read(into.join("bin/a")).unwrap(), b"A");
        assert!(!into.join("doc").exists());
        assert_eq!(read.0, read.1);
    }

    #[test]
    fn control_gives_name_version_and_dependencies() {
        let (_directory, deb) = on_disk(&small_deb(&[]));
        let control = control(&deb).unwrap();
        assert_eq!(
            (control.package.as_str(), control.version.as_str()),
            ("small", "1:2-3")
        );
        assert_eq!(control.depends, ["a", "b", "c"]);
    }

    #[test]
    fn package_cut_anywhere_is_refused() {
        let whole = small_deb(&[("./bin/a", &[7; 5000])]);
        // The last byte may be ar's padding.
        for length in (0..whole.len() - 1).step_by(7) {
            let (directory, deb) = on_disk(&whole[..length]);
            let result = unpack_all(&deb, &directory.path().join("tree"));
            assert!(
                matches!(result, Err(Error::BadPackage { .. })),
                "{length}: {result:?}"
            );
        }
    }

    #[test]
    fn flipped_bytes_never_panic() {
        let whole = small_deb(&[("./bin/a", &[7; 500])]);
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            let (directory, deb) = on_disk(&damaged);
            // Some flips change nothing that matters; what counts is that none ends badly.
            let _either = unpack_all(&deb, &directory.path().join("tree"));
            let _either = control(&deb);
        }
    }

    #[test]
    fn paths_and_links_cannot_leave_the_target() {
        for path in ["../escaped", "./a/../../escaped"] {
            let (directory, deb) = on_disk(&small_deb(&[(path, b"x")]));
            assert!(
                unpack_all(&deb, &directory.path().join("tree")).is_err(),
                "{path}"
            );
            assert!(!directory.path().join("escaped").exists());
        }
        // A link to a directory outside, and then a file "in" it.
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "way", &outside).unwrap();
        let mut file = tar::Header::new_gnu();
        file.set_size(1);
        builder
            .append_data(&mut file, "way/escaped", &b"x"[..])
            .unwrap();
        let deb = directory.path().join("link.deb");
        std::fs::write(&deb, deb_of(&[("data.tar", builder.into_inner().unwrap())])).unwrap();
        assert!(unpack_all(&deb, &directory.path().join("tree")).is_err());
        assert!(!outside.join("escaped").exists());
    }

    #[test]
    fn unknown_packing_and_missing_parts_are_named() {
        for (members, said) in [
            (vec![("data.tar.lzma", vec![1])], ".lzma"),
            (vec![("debian-binary", b"2.0\n".to_vec())], "no data.tar"),
        ] {
            let (directory, deb) = on_disk(&deb_of(&members));
            let error = unpack_all(&deb, &directory.path().join("tree")).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
