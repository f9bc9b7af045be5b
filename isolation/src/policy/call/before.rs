//! Memory as it was when a call began, though something of the call is in the guest already.

use std::collections::BTreeMap;

use vm_memory::GuestAddress;

use crate::guest::phys::{GuestPhys, OutsideMemory};
use crate::policy::diff::{PAGE_BYTES, PageBytes};

/// The guest's memory, but for pages that a call changed in it since: those as they were.
///
/// Others are held while a call is atomic, so nobody else changes these pages but the device.
#[derive(Debug)]
pub struct MemoryBefore<'a, M> {
    guest: &'a M,
    pages: BTreeMap<u64, Box<PageBytes>>,
}

impl<'a, M> MemoryBefore<'a, M> {
    /// Of a call of which nothing is in the `guest` yet.
    pub fn new(guest: &'a M) -> Self {
        Self {
            guest,
            pages: BTreeMap::new(),
        }
    }

    /// Something of the call is put into the guest's page at `gpa`, which has been `page` until
    /// now.
    pub fn keep(&mut self, gpa: u64, page: &PageBytes) {
        let number = gpa / PAGE_BYTES as u64;
        self.pages.entry(number).or_insert_with(|| Box::new(*page));
    }

    /// Nothing of the call is in the guest any more.
    pub fn forget(&mut self) {
        self.pages.clear();
    }
}

impl<M: GuestPhys> GuestPhys for MemoryBefore<'_, M> {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        if self.pages.is_empty() {
            return self.guest.read(at, data);
        }
        let mut rest = data;
        let mut at = at.0;
        while !rest.is_empty() {
            let offset = (at % PAGE_BYTES as u64) as usize;
            let length = rest.len().min(PAGE_BYTES - offset);
            let (part, later) = rest.split_at_mut(length);
            match self.pages.get(&(at / PAGE_BYTES as u64)) {
                Some(page) => part.copy_from_slice(&page[offset..offset + length]),
                None => self.guest.read(GuestAddress(at), part)?,
            }
            rest = later;
            at = at.wrapping_add(length as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nines;

    impl GuestPhys for Nines {
        fn read(&self, _: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
            data.fill(9);
            Ok(())
        }
    }

    #[test]
    fn pages_that_were_kept_first_are_read_in_place_of_the_guests() {
        let mut before = MemoryBefore::new(&Nines);
        let mut data = [0; 4];
        before.read(GuestAddress(0x1ffe), &mut data).unwrap();
        assert_eq!(data, [9; 4]);
        before.keep(0x1000, &[1; PAGE_BYTES]);
        before.keep(0x1008, &[2; PAGE_BYTES]);
        before.read(GuestAddress(0x1ffe), &mut data).unwrap();
        assert_eq!(data, [1, 1, 9, 9]);
        before.read(GuestAddress(0xffe), &mut data).unwrap();
        assert_eq!(data, [9, 9, 1, 1]);
    }
}
