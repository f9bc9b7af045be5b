//! A make-believe guest for tests: memory in a map, and page tables built by hand.

use std::collections::BTreeMap;

use vm_memory::GuestAddress;

use super::{
    AddressSpace, Entry, Levels, PageSize, TABLE_BYTES, VirtMemory, entry_address, entry_index,
};
use crate::guest::addr::Gva;
use crate::guest::phys::{GuestPhys, OutsideMemory};

/// Pages that were written; every other address is outside memory.
#[derive(Debug, Default, Clone)]
pub(crate) struct TestMemory {
    pub(crate) pages: BTreeMap<u64, Box<[u8; 4096]>>,
}

impl TestMemory {
    pub(crate) fn write(&mut self, at: GuestAddress, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let at = at.0 + i as u64;
            let page = self
                .pages
                .entry(at >> 12)
                .or_insert_with(|| Box::new([0; 4096]));
            page[at as usize & 0xfff] = *byte;
        }
    }

    pub(crate) fn write_u64(&mut self, at: GuestAddress, word: u64) {
        self.write(at, &word.to_le_bytes());
    }
}

impl GuestPhys for TestMemory {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        let len = data.len();
        for (i, byte) in data.iter_mut().enumerate() {
            let here =
                at.0.checked_add(i as u64)
                    .ok_or(OutsideMemory { at, len })?;
            let page = self
                .pages
                .get(&(here >> 12))
                .ok_or(OutsideMemory { at, len })?;
            *byte = page[here as usize & 0xfff];
        }
        Ok(())
    }
}

/// A guest with page tables.
#[derive(Debug, Clone)]
pub(crate) struct TestGuest {
    pub(crate) memory: TestMemory,
    pub(crate) space: AddressSpace,
    next_table: u64,
    next_page: u64,
}

impl TestGuest {
    pub(crate) const TABLES: u64 = 0x10_0000;

    pub(crate) fn new(levels: Levels) -> Self {
        let root = GuestAddress(Self::TABLES);
        let space = AddressSpace {
            root,
            levels,
            no_execute: true,
            physical_bits: 46,
        };
        let next_table = root.0 + TABLE_BYTES;
        let mut memory = TestMemory::default();
        memory.write_u64(root, 0);
        Self {
            memory,
            space,
            next_table,
            next_page: 0x4000_0000,
        }
    }

    pub(crate) fn virt(&self) -> VirtMemory<'_, TestMemory> {
        VirtMemory {
            space: self.space,
            memory: &self.memory,
        }
    }

    pub(crate) fn new_table(&mut self) -> GuestAddress {
        let table = GuestAddress(self.next_table);
        self.next_table += TABLE_BYTES;
        self.memory.write_u64(table, 0);
        table
    }

    /// Where the entry of `level` for `at` is; makes the tables down to it.
    pub(crate) fn entry_at(&mut self, at: Gva, level: u8) -> GuestAddress {
        let mut table = self.space.root;
        let mut here = self.space.levels.top();
        loop {
            let entry_gpa = entry_address(table, entry_index(here, at));
            if here == level {
                return entry_gpa;
            }
            let entry = Entry(self.memory.read_u64(entry_gpa).unwrap());
            table = if entry.is_present() && entry.page(here).is_none() {
                entry.table()
            } else {
                let new = self.new_table();
                self.memory.write_u64(entry_gpa, new.0 | 0x67);
                new
            };
            here -= 1;
        }
    }

    /// Maps one page with these flags (PS and P are added).
    pub(crate) fn map(&mut self, at: Gva, gpa: GuestAddress, size: PageSize, flags: u64) {
        let (level, large) = match size {
            PageSize::Size4K => (1, 0),
            PageSize::Size2M => (2, Entry::LARGE),
            PageSize::Size1G => (3, Entry::LARGE),
        };
        let entry = self.entry_at(at, level);
        self.memory
            .write_u64(entry, gpa.0 | flags | large | Entry::PRESENT);
    }

    /// Maps `data`'s pages from `at` on, where there are none yet, and writes it there.
    pub(crate) fn put(&mut self, at: Gva, data: &[u8], flags: u64) {
        let mut rest = data;
        let mut at = at;
        while !rest.is_empty() {
            let gpa = match self.space.walk(&self.memory, at) {
                Ok(found) => found.gpa,
                Err(_) => {
                    let page = GuestAddress(self.next_page);
                    self.next_page += 0x1000;
                    self.map(at.page(), page, PageSize::Size4K, flags);
                    GuestAddress(page.0 | (at.0 & 0xfff))
                }
            };
            let (part, later) = rest.split_at(rest.len().min(0x1000 - (at.0 as usize & 0xfff)));
            self.memory.write(gpa, part);
            at = Gva(at.0.wrapping_add(part.len() as u64));
            rest = later;
        }
    }
}

/// Where a random entry leads: most often to one of the first tables, or to a place that a large
/// page may have, with either PAT bit.
pub(crate) fn random_target(next: u64, flags: u64) -> u64 {
    if flags & Entry::LARGE != 0 && flags & 0x600 != 0 {
        next << 30 | (flags & 0x400) << 2
    } else {
        TestGuest::TABLES + next * TABLE_BYTES
    }
}
