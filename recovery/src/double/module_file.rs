//! Module files made by hand.

/// Offset of the name in `struct module`: behind the state and a list head.
const NAME_OFFSET: usize = 24;

/// The bytes of a relocatable ELF file with these sections.
pub(crate) fn elf(sections: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut all: Vec<(&str, u32, Vec<u8>)> = vec![("", 0, Vec::new())];
    all.extend(sections.iter().map(|(name, data)| (*name, 1, data.clone())));
    let mut names = Vec::new();
    let mut offsets = Vec::new();
    for name in all.iter().map(|(name, ..)| *name).chain([".shstrtab"]) {
        offsets.push(u32::try_from(names.len()).unwrap());
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    all.push((".shstrtab", 3, names));
    let mut body = vec![0; 64];
    let mut headers = Vec::new();
    for ((_, kind, data), name) in all.iter().zip(offsets) {
        let (at, length) = (body.len() as u64, data.len() as u64);
        headers.extend(name.to_le_bytes());
        headers.extend(kind.to_le_bytes());
        for word in [0, 0, at, length, 0, 1, 0] {
            // Link and info are one word here: both zero.
            headers.extend(u64::to_le_bytes(word));
        }
        body.extend(data);
    }
    let table = body.len() as u64;
    body.extend(headers);
    body[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0");
    body[20] = 1;
    body[40..48].copy_from_slice(&table.to_le_bytes());
    body[52] = 64;
    body[58] = 64;
    body[60] = u8::try_from(all.len()).unwrap();
    body[62] = u8::try_from(all.len() - 1).unwrap();
    body
}

/// `struct module` as far as it tells the name.
pub(crate) fn this_module(name: &str) -> Vec<u8> {
    let mut module = vec![0; 0x380];
    module[NAME_OFFSET..NAME_OFFSET + name.len()].copy_from_slice(name.as_bytes());
    module
}

/// A build id as the linker notes it.
pub(crate) fn note(id: &[u8]) -> Vec<u8> {
    let mut note = vec![4, 0, 0, 0, u8::try_from(id.len()).unwrap(), 0, 0, 0];
    note.extend(b"\x03\0\0\0GNU\0");
    note.extend(id);
    note
}

/// A module's file.
pub(crate) fn module(name: &str, info: &str, build_id: &[u8]) -> Vec<u8> {
    elf(&[
        (".modinfo", info.as_bytes().to_vec()),
        (".gnu.linkonce.this_module", this_module(name)),
        (".note.gnu.build-id", note(build_id)),
    ])
}
