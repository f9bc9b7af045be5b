//! What is in the package, and where.

use std::io::Write;

use flate2::{Compression, GzBuilder};
use memchr::memmem;

use crate::tree::Tree;
use crate::{ARCHITECTURE, Error, NAME};

/// What is made elsewhere and goes into the package.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    /// Its version.
    pub version: String,
    /// The `cofferdam` program.
    pub program: Vec<u8>,
    /// The guest agent's program.
    pub agent: Vec<u8>,
    /// Manual pages by their files' names, such as `cofferdam-run.1`.
    pub pages: Vec<(String, Vec<u8>)>,
    /// The shells' completions.
    pub completions: Completions,
    /// Documents by their files' names.
    pub documents: Vec<(String, Vec<u8>)>,
}

/// Scripts that complete command lines.
#[derive(Debug, Clone, Default)]
pub struct Completions {
    /// Of bash.
    pub bash: Vec<u8>,
    /// Of zsh.
    pub zsh: Vec<u8>,
    /// Of fish.
    pub fish: Vec<u8>,
}

const SERVICE: &str = include_str!("../assets/cofferdam.service");
const GUEST: &str = include_str!("../assets/cofferdam@.service");
const TMPFILES: &str = include_str!("../assets/cofferdam.tmpfiles");
const EXAMPLE: &str = include_str!("../assets/example.toml");
const DASHBOARD: &str = include_str!("../../../cofferdam/dashboard/cofferdam.json");
const COPYRIGHT: &str = include_str!("../assets/copyright");
const POSTINST: &str = include_str!("../assets/postinst");
const PRERM: &str = include_str!("../assets/prerm");
const POSTRM: &str = include_str!("../assets/postrm");

/// Where files are that an administrator changes.
const CONFIGURATION: &str = "etc/";

impl Contents {
    /// The package's files.
    pub(crate) fn data(&self) -> Result<Tree, Error> {
        for (what, is_there) in [
            ("the program", !self.program.is_empty()),
            ("the guest agent", !self.agent.is_empty()),
            ("manual pages", !self.pages.is_empty()),
            ("bash's completions", !self.completions.bash.is_empty()),
            ("zsh's completions", !self.completions.zsh.is_empty()),
            ("fish's completions", !self.completions.fish.is_empty()),
        ] {
            if !is_there {
                return Err(Error::Lacks(what));
            }
        }
        let mut tree = Tree::default();
        tree.file("usr/bin/cofferdam", 0o755, self.program.as_slice());
        tree.file(
            "usr/lib/cofferdam/guest-agent",
            0o755,
            self.agent.as_slice(),
        );
        for (name, page) in &self.pages {
            tree.file(&format!("usr/share/man/man1/{name}.gz"), 0o644, gzip(page)?);
        }
        let completions = &self.completions;
        for (path, script) in [
            ("bash-completion/completions/cofferdam", &completions.bash),
            ("zsh/vendor-completions/_cofferdam", &completions.zsh),
            (
                "fish/vendor_completions.d/cofferdam.fish",
                &completions.fish,
            ),
        ] {
            tree.file(&format!("usr/share/{path}"), 0o644, script.as_slice());
        }
        tree.file("lib/systemd/system/cofferdam.service", 0o644, SERVICE);
        tree.file("lib/systemd/system/cofferdam@.service", 0o644, GUEST);
        tree.file("usr/lib/tmpfiles.d/cofferdam.conf", 0o644, TMPFILES);
        tree.file("etc/cofferdam/guests/example.toml", 0o644, EXAMPLE);
        tree.file("usr/share/cofferdam/dashboard.json", 0o644, DASHBOARD);
        let documents = format!("usr/share/doc/{NAME}");
        tree.file(&format!("{documents}/copyright"), 0o644, COPYRIGHT);
        for (name, document) in &self.documents {
            tree.file(&format!("{documents}/{name}"), 0o644, document.as_slice());
        }
        Ok(tree)
    }

    /// What the package says of itself, and its scripts; its files take `installed_kib`.
    pub(crate) fn control(&self, installed_kib: u64) -> Result<Tree, Error> {
        let libc = glibc(&self.program).unwrap_or_else(|| "2.36".to_owned());
        let control = format!(
            "Package: {NAME}\n\
             Version: {}\n\
             Architecture: {ARCHITECTURE}\n\
             Maintainer: The Cofferdam developers <cofferdam@localhost>\n\
             Installed-Size: {installed_kib}\n\
             Depends: libc6 (>= {libc}), libgcc-s1\n\
             Recommends: systemd\n\
             Suggests: bash-completion, gdb\n\
             Section: admin\n\
             Priority: optional\n\
             Description: virtual machine monitor with driver fault isolation\n \
             Cofferdam runs Linux guests with KVM and puts functions of a driver of a\n \
             running guest into a domain of their own: a call that goes wrong there is\n \
             taken back as a whole, and driver, device and guest go on. Kernel and driver\n \
             are stock. NICs are shared and switched between guests.\n",
            self.version
        );
        let mut tree = Tree::default();
        tree.file("control", 0o644, control);
        let conffiles: String = self
            .data()?
            .under(CONFIGURATION)
            .map(|path| format!("/{path}\n"))
            .collect();
        tree.file("conffiles", 0o644, conffiles);
        for (name, script) in [("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)] {
            tree.file(name, 0o755, script);
        }
        Ok(tree)
    }
}

/// As `gzip -9n` does it (Debian policy, section 12.1): without a name and a date.
fn gzip(content: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().write(Vec::new(), Compression::best());
    encoder.write_all(content)?;
    encoder.finish()
}

/// The newest version of the C library that a program's symbols need (`GLIBC_2.34`), as far as its
/// file names any.
pub fn glibc(program: &[u8]) -> Option<String> {
    const MARK: &[u8] = b"GLIBC_2.";
    let mut newest = None;
    let mut rest = program;
    while let Some(at) = memmem::find(rest, MARK) {
        rest = rest.get(at + MARK.len()..).unwrap_or_default();
        let digits = rest.iter().take(3).take_while(|byte| byte.is_ascii_digit());
        let minor = digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
        newest = newest.max(Some(minor));
    }
    newest.map(|minor| format!("2.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents() -> Contents {
        Contents {
            version: "0.1.0".to_owned(),
            program: b"\x7fELF GLIBC_2.34\0GLIBC_2.9\0GLIBC_2.2.5\0GLIBC_PRIVATE\0".to_vec(),
            agent: b"agent".to_vec(),
            pages: vec![("cofferdam.1".to_owned(), b".TH".to_vec())],
            completions: Completions {
                bash: b"b".to_vec(),
                zsh: b"z".to_vec(),
                fish: b"f".to_vec(),
            },
            documents: Vec::new(),
        }
    }

    #[test]
    fn what_the_program_needs_of_the_c_library_is_its_newest_symbols() {
        assert_eq!(glibc(&contents().program).as_deref(), Some("2.34"));
        assert_eq!(glibc(b"static"), None);
    }

    #[test]
    fn every_file_that_an_administrator_changes_is_a_conffile() {
        let control = contents().control(1).unwrap();
        let tar = control.tar(0).unwrap();
        let text = String::from_utf8_lossy(&tar);
        assert!(text.contains("/etc/cofferdam/guests/example.toml\n"));
        assert!(text.contains("Depends: libc6 (>= 2.34)"));
    }

    #[test]
    fn the_same_contents_give_the_same_bytes_and_another_date_others() {
        let first = crate::build(&contents(), 1_700_000_000).unwrap();
        assert_eq!(first, crate::build(&contents(), 1_700_000_000).unwrap());
        assert_ne!(first, crate::build(&contents(), 1_700_000_001).unwrap());
    }
}
