//! Writes BTF, for tests.

use super::{Btf, TypeId};

/// Collects types and strings; the mirror image of the reader.
#[derive(Debug, Clone)]
pub(crate) struct Encoder {
    types: Vec<u8>,
    strings: Vec<u8>,
    next: u32,
    first_string: u32,
}

impl Encoder {
    /// A kernel's BTF, or with a base a module's.
    pub(crate) fn new(base: Option<&Btf>) -> Self {
        let (next, first_string) = base.map_or((1, 0), |base| (base.end_id(), base.end_string()));
        // Only a BTF without base begins with the empty string.
        let strings = if base.is_some() { Vec::new() } else { vec![0] };
        Self {
            types: Vec::new(),
            strings,
            next,
            first_string,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        for word in [24, 0, types, types, strings] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.strings);
        bytes
    }

    fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.first_string + self.strings.len() as u32;
        self.strings.extend(name.as_bytes());
        self.strings.push(0);
        at
    }

    /// A record: kind, entries, kind flag, size or type, and the words behind it.
    pub(crate) fn raw(
        &mut self,
        name: &str,
        info: u32,
        size_or_type: u32,
        words: &[u32],
    ) -> TypeId {
        let name = self.name(name);
        for word in [name, info, size_or_type].iter().chain(words) {
            self.types.extend(word.to_le_bytes());
        }
        self.next += 1;
        TypeId(self.next - 1)
    }

    pub(crate) fn int(&mut self, name: &str, bytes: u32, encoding: u32) -> TypeId {
        self.raw(name, 1 << 24, bytes, &[(encoding << 24) | (bytes * 8)])
    }

    /// Kinds that only refer to another type: pointer 2, typedef 8, volatile 9, const 10,
    /// restrict 11, function 12, tag 18.
    pub(crate) fn refer(&mut self, kind: u32, name: &str, to: TypeId) -> TypeId {
        self.raw(name, kind << 24, to.0, &[])
    }

    pub(crate) fn pointer(&mut self, to: TypeId) -> TypeId {
        self.refer(2, "", to)
    }

    pub(crate) fn typedef(&mut self, name: &str, to: TypeId) -> TypeId {
        self.refer(8, name, to)
    }

    pub(crate) fn array(&mut self, element: TypeId, count: u32) -> TypeId {
        self.raw("", 3 << 24, 0, &[element.0, element.0, count])
    }

    /// Members: name, type, offset in bytes.
    pub(crate) fn structure(
        &mut self,
        name: &str,
        bytes: u32,
        members: &[(&str, TypeId, u32)],
    ) -> TypeId {
        self.composite(4, name, bytes, members)
    }

    /// The kernel's structures of pages and slabs, 64 bytes each, and what it marks them by.
    pub(crate) fn memory_management(&mut self) {
        let long = self.int("long unsigned int", 8, 0);
        let int = self.int("unsigned int", 4, 0);
        let byte = self.int("unsigned char", 1, 0);
        let pointer = self.pointer(TypeId::VOID);
        let page = [
            ("flags", long, 0),
            ("compound_head", long, 8),
            ("compound_order", byte, 17),
            ("_refcount", int, 52),
        ];
        self.structure("page", 64, &page);
        let slab = [("slab_cache", pointer, 24), ("freelist", pointer, 32)];
        self.structure("slab", 64, &slab);
        let cache = [
            ("size", int, 0),
            ("object_size", int, 4),
            ("offset", int, 8),
            ("name", pointer, 16),
            ("refcount", int, 24),
        ];
        self.structure("kmem_cache", 64, &cache);
        self.enumeration_of("pageflags", &[("PG_slab", 9), ("PG_head", 16)]);
    }

    /// A structure of which some members are bits: name, type, offset in bits, and how many bits
    /// they are, 0 for all of the type.
    pub(crate) fn structure_with_bits(
        &mut self,
        name: &str,
        bytes: u32,
        members: &[(&str, TypeId, u32, u32)],
    ) -> TypeId {
        let mut words = Vec::new();
        for (name, id, offset, bits) in members {
            words.extend([self.name(name), id.0, bits << 24 | offset]);
        }
        let info = 1 << 31 | 4 << 24 | members.len() as u32;
        self.raw(name, info, bytes, &words)
    }

    pub(crate) fn composite(
        &mut self,
        kind: u32,
        name: &str,
        bytes: u32,
        members: &[(&str, TypeId, u32)],
    ) -> TypeId {
        let mut words = Vec::new();
        for (name, id, offset) in members {
            words.extend([self.name(name), id.0, offset * 8]);
        }
        self.raw(name, kind << 24 | members.len() as u32, bytes, &words)
    }

    pub(crate) fn enumeration(&mut self, name: &str, bytes: u32) -> TypeId {
        self.raw(name, 6 << 24, bytes, &[])
    }

    pub(crate) fn enumeration_of(&mut self, name: &str, values: &[(&str, i32)]) -> TypeId {
        let mut words = Vec::new();
        for (name, value) in values {
            words.extend([self.name(name), *value as u32]);
        }
        self.raw(name, 6 << 24 | values.len() as u32, 4, &words)
    }

    pub(crate) fn enumeration64(&mut self, name: &str, values: &[(&str, i64)]) -> TypeId {
        let mut words = Vec::new();
        for (name, value) in values {
            words.extend([self.name(name), *value as u32, (*value >> 32) as u32]);
        }
        self.raw(name, 19 << 24 | values.len() as u32, 8, &words)
    }

    pub(crate) fn function(
        &mut self,
        name: &str,
        returns: TypeId,
        params: &[(&str, TypeId)],
    ) -> TypeId {
        let mut words = Vec::new();
        for (name, id) in params {
            words.extend([self.name(name), id.0]);
        }
        let proto = self.raw("", 13 << 24 | params.len() as u32, returns.0, &words);
        self.refer(12, name, proto)
    }
}
