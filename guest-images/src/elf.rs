//! What the builder wants to know of an ELF file: libraries it needs, and what a kernel module says
//! of itself.

use object::elf::{self, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSection};

/// A program or library: the loader and the libraries it needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// `PT_INTERP`: path of the dynamic loader.
    pub interpreter: Option<String>,
    /// `DT_NEEDED` in order.
    pub libraries: Vec<String>,
}

/// Reads what a program or library needs.
pub fn needs(data: &[u8]) -> Result<Needs, String> {
    let text = |error: object::Error| error.to_string();
    let header = FileHeader64::<LittleEndian>::parse(data).map_err(text)?;
    let endian = header.endian().map_err(text)?;
    let mut needs = Needs::default();
    for segment in header.program_headers(endian, data).map_err(text)? {
        if segment.p_type(endian) == elf::PT_INTERP {
            let bytes = segment
                .data(endian, data)
                .map_err(|()| "its PT_INTERP lies outside")?;
            let path = String::from_utf8_lossy(bytes);
            needs.interpreter = Some(path.trim_end_matches('\0').to_string());
        }
    }
    let sections = header.sections(endian, data).map_err(text)?;
    let Some((entries, link)) = sections.dynamic(endian, data).map_err(text)? else {
        return Ok(needs);
    };
    let strings = sections.strings(endian, data, link).map_err(text)?;
    for entry in entries {
        if entry.tag(endian) == elf::DT_NEEDED {
            let name = entry.string(endian, strings).map_err(text)?;
            needs
                .libraries
                .push(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(needs)
}

/// What a kernel module says of itself in `.modinfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModInfo {
    /// Modules whose symbols it uses.
    pub depends: Vec<String>,
    /// Modules it would like to have loaded before it (`softdep=pre: ...`).
    pub soft_pre: Vec<String>,
}

/// Reads a kernel module.
pub fn modinfo(data: &[u8]) -> Result<ModInfo, String> {
    let file = object::File::parse(data).map_err(|error| error.to_string())?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or("it is no kernel module (no .modinfo)")?;
    Ok(parse_modinfo(
        section.data().map_err(|error| error.to_string())?,
    ))
}

fn parse_modinfo(data: &[u8]) -> ModInfo {
    let mut info = ModInfo::default();
    for field in data.split(|b| *b == 0) {
        let Ok(field) = std::str::from_utf8(field) else {
            continue;
        };
        match field.split_once('=') {
            Some(("depends", names)) => {
                info.depends.extend(
                    names
                        .split(',')
                        .filter(|n| !n.is_empty())
                        .map(str::to_string),
                );
            }
            Some(("softdep", value)) => {
                let mut before = false;
                for word in value.split_whitespace() {
                    match word {
                        "pre:" => before = true,
                        "post:" => before = false,
                        name if before => info.soft_pre.push(name.into()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modinfo_fields_are_read() {
        let info = parse_modinfo(
            b"license=GPL\0depends=kvm,ccp\0softdep=pre: crc32c a post: b\0depends=\0\xff\0",
        );
        assert_eq!(info.depends, ["kvm", "ccp"]);
        assert_eq!(info.soft_pre, ["crc32c", "a"]);
    }

    #[test]
    fn this_test_program_needs_the_c_library() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let needs = needs(&own).unwrap();
        assert!(
            needs.libraries.iter().any(|l| l == "libc.so.6"),
            "{needs:?}"
        );
        assert!(needs.interpreter.is_some_and(|i| i.contains("ld-linux")));
    }

    #[test]
    fn damaged_files_are_refused() {
        assert!(needs(b"").is_err());
        assert!(needs(b"\x7fELF").is_err());
        assert!(modinfo(&[0; 200]).is_err());
    }
}
