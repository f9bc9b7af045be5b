//! A kernel module's file made by hand: one function, a name and what it says of itself.

struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    data: Vec<u8>,
    link: u32,
    info: u32,
    entry: u64,
}

impl Section {
    fn new(name: &'static str, kind: u32, data: Vec<u8>) -> Self {
        Self {
            name,
            kind,
            flags: 0,
            data,
            link: 0,
            info: 0,
            entry: 0,
        }
    }
}

/// The module `name`, with these fields in its `.modinfo`.
pub fn module(name: &str, info: &[&str]) -> Vec<u8> {
    let mut this = vec![0; 0x380];
    // Behind the state and a list head of `struct module`.
    this[24..24 + name.len()].copy_from_slice(name.as_bytes());
    let info: Vec<u8> = info
        .iter()
        .flat_map(|field| [field.as_bytes(), b"\0"].concat())
        .collect();
    let function = "mine_open\0";
    // The null symbol, and a global function at the start of `.text`.
    let mut symbols = vec![0; 24];
    symbols.extend(1u32.to_le_bytes());
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0u64.to_le_bytes());
    symbols.extend(6u64.to_le_bytes());
    let mut sections = vec![
        Section::new("", 0, Vec::new()),
        Section {
            flags: 6,
            // xor eax, eax; ret, and room.
            ..Section::new(".text", 1, vec![0x31, 0xc0, 0xc3, 0x90, 0x90, 0x90])
        },
        Section::new(".modinfo", 1, info),
        Section::new(".gnu.linkonce.this_module", 1, this),
        Section {
            link: 5,
            info: 1,
            entry: 24,
            ..Section::new(".symtab", 2, symbols)
        },
        Section::new(".strtab", 3, format!("\0{function}").into_bytes()),
    ];
    let mut names = Vec::new();
    let mut at_names = Vec::new();
    for name in sections
        .iter()
        .map(|section| section.name)
        .chain([".shstrtab"])
    {
        at_names.push(u32::try_from(names.len()).unwrap());
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    sections.push(Section::new(".shstrtab", 3, names));
    let mut file = vec![0; 64];
    let mut headers = Vec::new();
    for (section, name) in sections.iter().zip(at_names) {
        let (at, length) = (file.len() as u64, section.data.len() as u64);
        headers.extend(name.to_le_bytes());
        headers.extend(section.kind.to_le_bytes());
        for word in [section.flags, 0, at, length] {
            headers.extend(u64::to_le_bytes(word));
        }
        headers.extend(section.link.to_le_bytes());
        headers.extend(section.info.to_le_bytes());
        headers.extend(8u64.to_le_bytes());
        headers.extend(section.entry.to_le_bytes());
        file.extend(&section.data);
        file.resize(file.len().next_multiple_of(8), 0);
    }
    let table = file.len() as u64;
    file.extend(headers);
    file[..24].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0\x01\0\0\0");
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[52] = 64;
    file[58] = 64;
    file[60] = u8::try_from(sections.len()).unwrap();
    file[62] = u8::try_from(sections.len() - 1).unwrap();
    file
}
