//! Tokens by which those who ask over TCP are known.
//!
//! A file has one a line, with its role: `look TOKEN` or `do TOKEN`. Of the tokens only SHA-256
//! hashes are kept, which are compared in a time that does not depend on where they differ. None is
//! ever in an error or the log.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use super::role::Role;

/// Longest file of tokens, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Tokens in one.
const MAX_TOKENS: usize = 256;

/// Characters of a token: fewer can be guessed.
const TOKEN_LENGTHS: std::ops::RangeInclusive<usize> = 32..=128;

/// Random bytes of a new one.
const NEW_BYTES: usize = 32;

/// Bits of a file's mode that let others than its owner at it.
const OTHERS: u32 = 0o077;

type Hash = [u8; 32];

/// The tokens of a service, as hashes.
#[derive(Debug)]
pub struct Tokens(Vec<(Role, Hash)>);

impl Tokens {
    /// Reads a file of tokens.
    ///
    /// # Errors
    /// Others may read it or have made it, or it is not what it should be; which line, and nothing
    /// of what is there.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = private_file(path, MAX_FILE_BYTES, OTHERS).and_then(|bytes| {
            String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("it is no text"))
        });
        text.and_then(|text| Self::parse(&text))
            .with_context(|| format!("cannot use the tokens in {}", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut tokens: Vec<(Role, Hash)> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let role = match line.split_once(' ') {
                Some(("look", token)) => Some((Role::Look, token.trim())),
                Some(("do", token)) => Some((Role::Do, token.trim())),
                _ => None,
            };
            let (role, token) =
                role.with_context(|| format!("line {number} is neither look TOKEN nor do TOKEN"))?;
            let (least, most) = (TOKEN_LENGTHS.start(), TOKEN_LENGTHS.end());
            ensure!(
                TOKEN_LENGTHS.contains(&token.len()) && token.bytes().all(fits),
                "line {number}: a token has {least} to {most} letters, digits or -._~+/="
            );
            let hash = hash(token.as_bytes());
            ensure!(
                !tokens.iter().any(|(_, other)| same(other, &hash)),
                "line {number} has a token that is there already"
            );
            ensure!(
                tokens.len() < MAX_TOKENS,
                "there are more than {MAX_TOKENS}"
            );
            tokens.push((role, hash));
        }
        ensure!(
            !tokens.is_empty(),
            "there are none: add a line with cofferdam serve --new-token look"
        );
        Ok(Self(tokens))
    }

    /// The role that `token` has here.
    pub fn role_of(&self, token: &[u8]) -> Option<Role> {
        let sought = hash(token);
        // All of them each time.
        self.0.iter().fold(None, |found, (role, hash)| {
            if same(hash, &sought) {
                Some(*role)
            } else {
                found
            }
        })
    }
}

/// Characters that a header can carry as a token (RFC 6750, 2.1).
fn fits(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte)
}

fn hash(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

/// Whether two hashes are the same, in a time that does not depend on them.
fn same(one: &Hash, other: &Hash) -> bool {
    let differ = one.iter().zip(other).fold(0, |bits, (a, b)| bits | (a ^ b));
    black_box(differ) == 0
}

/// A line for a file of tokens, with a new one.
///
/// # Errors
/// The kernel has no random numbers.
pub fn new_line(role: Role) -> anyhow::Result<String> {
    let mut bytes = [0; NEW_BYTES];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("there are no random numbers")?;
    Ok(format!(
        "{} {}\n",
        role.name(),
        URL_SAFE_NO_PAD.encode(bytes)
    ))
}

/// Reads a file with a secret in it: one of this user or root, that lets nobody do what is in
/// `closed` of its mode.
///
/// # Errors
/// It is not such a file, or has more than `most` bytes.
pub fn private_file(path: &Path, most: u64, closed: u32) -> anyhow::Result<Vec<u8>> {
    // A FIFO would be waited for.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .context("cannot open it")?;
    let about = file.metadata().context("cannot look at it")?;
    ensure!(about.is_file(), "it is no file");
    let own = rustix::process::geteuid().as_raw();
    ensure!(
        about.uid() == own || about.uid() == 0,
        "it belongs to another user"
    );
    if about.mode() & closed != 0 {
        let mode = about.mode() & 0o777;
        bail!("others may use it (mode {mode:04o}): chmod it to 0600");
    }
    let mut bytes = Vec::new();
    let read = file.take(most + 1).read_to_end(&mut bytes);
    read.context("cannot read it")?;
    ensure!(bytes.len() as u64 <= most, "it has more than {most} bytes");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "fedcba9876543210fedcba9876543210";

    #[test]
    fn a_token_has_the_role_of_its_line() {
        let text = format!("# people\nlook {ONE}\n\n  do   {OTHER}\r\n");
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.role_of(ONE.as_bytes()), Some(Role::Look));
        assert_eq!(tokens.role_of(OTHER.as_bytes()), Some(Role::Do));
        for wrong in ["", "x", &ONE[..31], &format!("{ONE} "), &ONE.to_uppercase()] {
            assert_eq!(tokens.role_of(wrong.as_bytes()), None, "{wrong}");
        }
        assert!(!format!("{tokens:?}").contains(ONE));
    }

    #[test]
    fn a_file_that_is_none_is_refused_by_its_line_and_says_no_token() {
        for (text, says) in [
            ("", "there are none"),
            (ONE, "line 1"),
            (&format!("look {ONE}\nroot {OTHER}"), "line 2"),
            (&format!("look {}", &ONE[1..]), "line 1"),
            (&format!("look {ONE}\ndo {ONE}"), "line 2"),
            (&format!("look {ONE} do"), "line 1"),
            (&format!("do {}", "x".repeat(129)), "line 1"),
        ] {
            let error = format!("{:#}", Tokens::parse(text).unwrap_err());
            assert!(error.contains(says), "{error}");
            assert!(!error.contains(&ONE[1..]), "{error}");
        }
        let many: String = (0..257).map(|n| format!("look {n:032}\n")).collect();
        let error = Tokens::parse(&many).unwrap_err().to_string();
        assert!(error.contains("256"), "{error}");
    }

    #[test]
    fn a_new_token_is_another_one_each_time_and_can_be_used() {
        let (one, other) = (new_line(Role::Look).unwrap(), new_line(Role::Do).unwrap());
        let tokens = Tokens::parse(&format!("{one}{other}")).unwrap();
        let token = one.trim_end().strip_prefix("look ").unwrap();
        assert_eq!(token.len(), 43);
        assert_eq!(tokens.role_of(token.as_bytes()), Some(Role::Look));
    }
}
