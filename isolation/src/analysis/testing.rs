//! Modules made by hand, for tests: functions out of an assembler, tables with relocations, types.

use std::collections::HashMap;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions, Instruction};
use object::write::{Object, Relocation, SectionId, Symbol, SymbolId, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolKind,
    SymbolScope, elf,
};

/// An operand of this value and above stands for a symbol, and is replaced by a relocation.
const SYMBOLS: u64 = 0x1000_0000;
/// Symbols that there may be.
const MOST: u64 = 4096;

/// A module in the making.
pub(crate) struct Module {
    object: Object<'static>,
    text: SectionId,
    data: SectionId,
    symbols: Vec<SymbolId>,
    named: HashMap<String, u64>,
}

impl Module {
    pub(crate) fn new(name: &str) -> Self {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let add = |object: &mut Object<'static>, name: &str, kind| {
            object.add_section(Vec::new(), name.as_bytes().to_vec(), kind)
        };
        let text = add(&mut object, ".text", SectionKind::Text);
        let data = add(&mut object, ".data", SectionKind::Data);
        let info = add(&mut object, ".modinfo", SectionKind::ReadOnlyData);
        let pairs = format!("name={name}\0vermagic=6.1.0-48-amd64 SMP \0alias=pci:v00001234d*\0");
        object.append_section_data(info, pairs.as_bytes(), 1);
        Self {
            object,
            text,
            data,
            symbols: Vec::new(),
            named: HashMap::new(),
        }
    }

    /// What an operand has to be to stand for this symbol, which is the kernel's until it is
    /// defined.
    pub(crate) fn symbol(&mut self, name: &str) -> u64 {
        if let Some(number) = self.named.get(name) {
            return *number;
        }
        let id = self.object.add_symbol(Symbol {
            name: name.as_bytes().to_vec(),
            value: 0,
            size: 0,
            kind: SymbolKind::Unknown,
            scope: SymbolScope::Dynamic,
            weak: false,
            section: SymbolSection::Undefined,
            flags: SymbolFlags::None,
        });
        let number = SYMBOLS + self.symbols.len() as u64;
        self.symbols.push(id);
        self.named.insert(name.to_owned(), number);
        number
    }

    fn define(&mut self, name: &str, kind: SymbolKind, section: SectionId, value: u64, size: u64) {
        let number = self.symbol(name);
        let symbol = self
            .object
            .symbol_mut(self.symbols[(number - SYMBOLS) as usize]);
        (symbol.kind, symbol.value, symbol.size) = (kind, value, size);
        (symbol.section, symbol.scope) =
            (SymbolSection::Section(section), SymbolScope::Compilation);
    }

    /// A function that begins with the tracer's call, as the kernel's build has it.
    pub(crate) fn function(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut Self, &mut CodeAssembler),
    ) {
        let mut a = CodeAssembler::new(64).unwrap();
        let tracer = self.symbol("__fentry__");
        a.call(tracer).unwrap();
        write(self, &mut a);
        let code = a.assemble(0).unwrap();
        let at = self.object.append_section_data(self.text, &code, 16);
        self.define(name, SymbolKind::Text, self.text, at, code.len() as u64);
        for (offset, number, relative) in symbols_in(&code) {
            let symbol = self.symbols[(number - SYMBOLS) as usize];
            let (r_type, addend) = match relative {
                Some(behind) => (elf::R_X86_64_PLT32, -behind),
                None => (elf::R_X86_64_32S, 0),
            };
            let flags = RelocationFlags::Elf { r_type };
            let relocation = Relocation {
                offset: at + offset,
                symbol,
                addend,
                flags,
            };
            self.object.add_relocation(self.text, relocation).unwrap();
        }
    }

    /// An object with pointers at offsets.
    pub(crate) fn table(&mut self, name: &str, bytes: u64, pointers: &[(u64, &str)]) {
        let at = self
            .object
            .append_section_data(self.data, &vec![0; bytes as usize], 32);
        self.define(name, SymbolKind::Data, self.data, at, bytes);
        for (offset, to) in pointers {
            let symbol = self.symbol(to);
            let symbol = self.symbols[(symbol - SYMBOLS) as usize];
            let flags = RelocationFlags::Elf {
                r_type: elf::R_X86_64_64,
            };
            let relocation = Relocation {
                offset: at + offset,
                symbol,
                addend: 0,
                flags,
            };
            self.object.add_relocation(self.data, relocation).unwrap();
        }
    }

    /// The module's types.
    pub(crate) fn types(&mut self, btf: &[u8]) {
        let section =
            self.object
                .add_section(Vec::new(), b".BTF".to_vec(), SectionKind::ReadOnlyData);
        self.object.append_section_data(section, btf, 4);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.object.write().unwrap()
    }
}

/// Where in the code operands stand for symbols: offset of the field, which symbol, and for a
/// relative one the bytes from there to the end of the instruction.
fn symbols_in(code: &[u8]) -> Vec<(u64, u64, Option<i64>)> {
    let is_symbol = |value: u64| (SYMBOLS..SYMBOLS + MOST).contains(&value);
    let mut found = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut i = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut i);
        let offsets = decoder.get_constant_offsets(&i);
        let (start, end) = (i.ip(), i.next_ip());
        let (immediate, displacement) = (
            offsets.immediate_offset() as u64,
            offsets.displacement_offset() as u64,
        );
        if offsets.has_immediate() && is_symbol(i.near_branch_target()) {
            let at = start + immediate;
            found.push((at, i.near_branch_target(), Some((end - at) as i64)));
        } else if offsets.has_immediate() && i.op_count() == 2 && is_symbol(i.immediate(1)) {
            found.push((start + immediate, i.immediate(1), None));
        } else if offsets.has_displacement() && is_symbol(i.memory_displacement64()) {
            found.push((start + displacement, i.memory_displacement64(), None));
        }
    }
    found
}
