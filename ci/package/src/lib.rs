//! Makes the Debian package: an `ar` archive of what it is (`control.tar.xz`) and its files
//! (`data.tar.xz`), deb(5).
//!
//! ```text
//!  program, agent ─┐
//!  pages, shells'  ├─► Tree: path ─► file ─► tar, xz ─┐
//!  completions     │   sorted, root's, one date       ├─► ar ─► NAME_VERSION_amd64.deb
//!  units, scripts ─┘   control, conffiles, postinst ──┘
//! ```
//!
//! The same files and the same date give the same bytes: entries are sorted, owned by root and
//! dated alike, and nothing of this machine is asked for. What is in the package but for programs
//! and pages are the files in `assets/`.

mod contents;
mod tree;

use std::io::{self, Write};

pub use contents::{Completions, Contents, glibc};
use tree::Tree;

/// What the package is called.
pub const NAME: &str = "cofferdam";

/// The architecture, in Debian's word.
pub const ARCHITECTURE: &str = "amd64";

/// Why there is no package.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that belongs into it was not given.
    #[error("the package lacks {0}")]
    Lacks(&'static str),
    /// A version that dpkg would refuse.
    #[error("{0:?} is no version: it begins with a digit and has letters, digits and . + ~ -")]
    Version(String),
    /// An archive could not be written.
    #[error("cannot write the package: {0}")]
    Archive(#[from] io::Error),
}

/// The name of the package's file.
pub fn file_name(version: &str) -> String {
    format!("{NAME}_{version}_{ARCHITECTURE}.deb")
}

/// The package; `date` in seconds since 1970 is that of all its files (`SOURCE_DATE_EPOCH`).
///
/// # Errors
/// See [`Error`].
pub fn build(contents: &Contents, date: u64) -> Result<Vec<u8>, Error> {
    check_version(&contents.version)?;
    let data = contents.data()?;
    let control = contents.control(data.installed_kib())?;
    let mut archive = ar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.xz", packed(&control, date)?),
        ("data.tar.xz", packed(&data, date)?),
    ] {
        let mut header = ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64);
        header.set_mtime(date);
        header.set_mode(0o100_644);
        archive.append(&header, bytes.as_slice())?;
    }
    Ok(archive.into_inner()?)
}

fn packed(tree: &Tree, date: u64) -> io::Result<Vec<u8>> {
    // One thread and one block: more would depend on the machine.
    let mut packed = liblzma::write::XzEncoder::new(Vec::new(), 6);
    packed.write_all(&tree.tar(date)?)?;
    packed.finish()
}

/// Debian policy, section 5.6.12, without an epoch.
fn check_version(version: &str) -> Result<(), Error> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".+~-".contains(&byte);
    let right = version
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_digit())
        && version.bytes().all(fits);
    right
        .then_some(())
        .ok_or_else(|| Error::Version(version.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_policy() {
        for right in ["0.1.0", "1:2".trim_start_matches("1:"), "0.1.0~rc1+b2-1"] {
            check_version(right).unwrap();
        }
        for wrong in ["", "v1", "1 2", "1/2", "1_2", "1:2", "1\n"] {
            check_version(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_package_without_its_program_is_none() {
        let contents = Contents {
            version: "1".to_owned(),
            ..Contents::default()
        };
        assert!(matches!(build(&contents, 0), Err(Error::Lacks(_))));
    }
}
