//! A kernel module's file, as far as it has to be known before it takes another one's place.
//!
//! The file comes from a person or from the guest and may be anything: its size is bounded, and
//! what it says of itself is checked before a guest gets it.

use object::elf;
use object::read::elf::{ElfFile64, FileHeader};
use object::{Endianness, Object, ObjectKind, ObjectSection};

/// Largest file, in bytes.
pub const MAX_MODULE_BYTES: u64 = 8 << 20;
/// Longest name with its end byte (`MODULE_NAME_LEN`).
const NAME_BYTES: usize = 56;
/// Offset of the name in `struct module`: behind the state and a list head.
const NAME_OFFSET: usize = 24;
/// Longest value of a field of `.modinfo` that is kept, in bytes.
const MAX_FIELD: usize = 256;
/// Longest build id, in bytes; linkers make 20.
const MAX_BUILD_ID: usize = 64;

/// Why a file cannot be used as a module.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleFileError {
    /// It is longer than any module.
    #[error("it has {0} bytes; a module has at most {MAX_MODULE_BYTES}")]
    TooLong(u64),
    /// It is no relocatable ELF file for x86-64.
    #[error("it is no kernel module for x86-64 (an uncompressed .ko file): {0}")]
    NotElf(String),
    /// Something that every module has is not in it.
    #[error("it is no kernel module: it has no {0}")]
    Lacks(&'static str),
    /// It is a module, but another one.
    #[error("it is the module {found}, not {wanted}")]
    OtherModule {
        /// Which one it is.
        found: String,
        /// Which one it should be.
        wanted: String,
    },
    /// It was built for another kernel.
    #[error("it was built for `{found}`, and the guest's own file for `{wanted}`")]
    OtherKernel {
        /// What it was built for.
        found: String,
        /// What it should have been built for.
        wanted: String,
    },
}

/// What a module's file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleFile {
    /// Name of the module, with `_` for `-`.
    pub name: String,
    /// Kernel release and properties that it was built for.
    pub vermagic: String,
    /// The linker's number of this build, if it has one.
    pub build_id: Option<Vec<u8>>,
}

impl ModuleFile {
    /// Reads the file's own description.
    pub fn parse(bytes: &[u8]) -> Result<Self, ModuleFileError> {
        let length = bytes.len() as u64;
        if length > MAX_MODULE_BYTES {
            return Err(ModuleFileError::TooLong(length));
        }
        let not_elf = |error: object::Error| ModuleFileError::NotElf(error.to_string());
        let file = ElfFile64::<Endianness>::parse(bytes).map_err(not_elf)?;
        let machine = file.elf_header().e_machine(file.endian());
        if file.kind() != ObjectKind::Relocatable || machine != elf::EM_X86_64 {
            let what = "another kind of ELF file".to_owned();
            return Err(ModuleFileError::NotElf(what));
        }
        let section = |name: &'static str| {
            let section = file.section_by_name(name);
            section.and_then(|section| section.data().ok())
        };
        let info = section(".modinfo").ok_or(ModuleFileError::Lacks(".modinfo"))?;
        let field = |name: &'static str| {
            let mut fields = info.split(|byte| *byte == 0);
            let value = fields.find_map(|field| field.strip_prefix(name.as_bytes()))?;
            let value = std::str::from_utf8(value.strip_prefix(b"=")?).ok()?;
            let fits = value.len() <= MAX_FIELD && value.chars().all(|c| matches!(c, ' '..='~'));
            fits.then(|| value.to_owned())
        };
        let name = section(".gnu.linkonce.this_module")
            .and_then(|module| module.get(NAME_OFFSET..NAME_OFFSET + NAME_BYTES))
            .and_then(|name| name.split(|byte| *byte == 0).next())
            .and_then(|name| std::str::from_utf8(name).ok())
            .filter(|name| is_name(name))
            .ok_or(ModuleFileError::Lacks("name in .gnu.linkonce.this_module"))?;
        // The kernel goes by the first, tools by the second.
        if let Some(found) = field("name").filter(|other| normal(other) != normal(name)) {
            return Err(ModuleFileError::OtherModule {
                found,
                wanted: name.to_owned(),
            });
        }
        Ok(Self {
            name: normal(name),
            vermagic: field("vermagic").ok_or(ModuleFileError::Lacks("vermagic"))?,
            build_id: section(".note.gnu.build-id").and_then(build_id),
        })
    }

    /// Whether this file may take the place of `old`'s: the same module, built for the same kernel.
    pub fn fits(&self, old: &Self) -> Result<(), ModuleFileError> {
        self.is(&old.name)?;
        if self.vermagic != old.vermagic {
            return Err(ModuleFileError::OtherKernel {
                found: self.vermagic.clone(),
                wanted: old.vermagic.clone(),
            });
        }
        Ok(())
    }

    /// Whether it is the module `name`.
    pub fn is(&self, name: &str) -> Result<(), ModuleFileError> {
        if self.name == normal(name) {
            return Ok(());
        }
        Err(ModuleFileError::OtherModule {
            found: self.name.clone(),
            wanted: name.to_owned(),
        })
    }
}

/// The build id in an ELF note of the linker (`NT_GNU_BUILD_ID`): the section of a file, or what
/// the kernel shows of a loaded module in `/sys/module/NAME/notes/.note.gnu.build-id`.
pub fn build_id(note: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| {
        let bytes = note.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let (name, length) = (word(0)?, word(4)?);
    if name != 4 || word(8)? != 3 || note.get(12..16)? != b"GNU\0" || length > MAX_BUILD_ID {
        return None;
    }
    note.get(16..16 + length).map(<[u8]>::to_vec)
}

/// A module's name as the kernel has it.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn is_name(name: &str) -> bool {
    (1..NAME_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::double::module_file::{elf, note};

    fn module(name: &str, info: &str) -> Vec<u8> {
        crate::double::module_file::module(name, info, &[7; 20])
    }

    const INFO: &str = "license=GPL\0depends=\0name=snd-pcm\0vermagic=6.1.0-9 SMP mod_unload \0";

    #[test]
    fn a_module_says_what_it_is() {
        let file = ModuleFile::parse(&module("snd_pcm", INFO)).unwrap();
        assert_eq!(file.name, "snd_pcm");
        assert_eq!(file.vermagic, "6.1.0-9 SMP mod_unload ");
        assert_eq!(file.build_id, Some(vec![7; 20]));
        assert_eq!(file.is("snd-pcm"), Ok(()));
    }

    #[test]
    fn only_the_same_module_for_the_same_kernel_fits() {
        let old = ModuleFile::parse(&module("snd_pcm", INFO)).unwrap();
        assert_eq!(old.fits(&old), Ok(()));
        let other = ModuleFile::parse(&module("dummy", "vermagic=6.1.0-9 SMP mod_unload \0"));
        let other = other.unwrap().fits(&old).unwrap_err().to_string();
        assert_eq!(other, "it is the module dummy, not snd_pcm");
        let newer = ModuleFile::parse(&module("snd_pcm", "vermagic=6.2\0")).unwrap();
        let error = newer.fits(&old).unwrap_err();
        assert!(matches!(error, ModuleFileError::OtherKernel { .. }));
    }

    #[test]
    fn a_file_that_is_none_is_refused() {
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0xfd, b'7', b'z', b'X', b'Z', 0]] {
            let error = ModuleFile::parse(bytes).unwrap_err();
            assert!(matches!(error, ModuleFileError::NotElf(_)), "{error}");
        }
        let mut program = module("snd_pcm", INFO);
        program[16] = 2;
        let error = ModuleFile::parse(&program).unwrap_err();
        assert!(matches!(error, ModuleFileError::NotElf(_)), "{error}");
        let object = elf(&[(".text", vec![0xc3])]);
        let lacks = ModuleFile::parse(&object).unwrap_err();
        assert_eq!(lacks, ModuleFileError::Lacks(".modinfo"));
        let two_names = module("dummy", "name=veth\0vermagic=6.1\0");
        let error = ModuleFile::parse(&two_names).unwrap_err();
        assert!(matches!(error, ModuleFileError::OtherModule { .. }));
        let odd = module("a;b", "vermagic=6.1\0");
        assert!(ModuleFile::parse(&odd).is_err());
        let long = vec![0; usize::try_from(MAX_MODULE_BYTES).unwrap() + 1];
        let error = ModuleFile::parse(&long).unwrap_err();
        assert!(matches!(error, ModuleFileError::TooLong(_)));
    }

    #[test]
    fn notes_of_others_are_no_build_id() {
        assert_eq!(build_id(&note(b"12")), Some(b"12".to_vec()));
        assert_eq!(build_id(&note(b"12")[..17]), None);
        assert_eq!(build_id(&note(&[0; 65])), None);
        let mut other = note(b"12");
        other[8] = 1;
        assert_eq!(build_id(&other), None);
    }

    proptest! {
        #[test]
        fn damaged_files_are_refused_or_read_but_nothing_worse(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut file = module("snd_pcm", INFO);
            for (at, value) in changes {
                let length = file.len();
                file[at.index(length)] = value;
            }
            let _ = ModuleFile::parse(&file);
            let _ = ModuleFile::parse(&file[..cut.index(file.len())]);
        }
    }
}
