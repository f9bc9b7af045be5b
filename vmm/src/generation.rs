//! VM generation ID (Microsoft, *Virtual Machine Generation ID*, 2012): 16 bytes in reserved guest
//! memory that are others in each machine that goes on from a snapshot, so that its kernel does not
//! use the random numbers that another one uses.
//!
//! | when | the ID |
//! | --- | --- |
//! | a machine is made | random |
//! | reset | stays |
//! | a machine goes on from a snapshot | random again, and the guest is notified before it runs |
//! | rewind to a mark in the same process | the mark's, with the rest of memory |
//!
//! A rewind keeps it on purpose: trials that begin at the same mark are to be the same, random
//! numbers included, and no two of them exist at the same time.
//!
//! The guest finds the ID by the ACPI device `VGEN` and hears of a new one by the event device, see
//! [`crate::power`]. Linux then mixes it into its random number generator
//! (`drivers/virt/vmgenid.c`).

use std::fs::File;
use std::io::Read;

use vm_memory::Bytes;

use crate::error::Error;
use crate::layout;
use crate::memory::GuestRam;

/// An ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GenerationId([u8; 16]);

impl GenerationId {
    /// One that no other machine has.
    pub fn random() -> Result<Self, Error> {
        let mut id = [0; 16];
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut id))
            .map_err(|source| Error::Host {
                what: "read random numbers",
                source,
            })?;
        Ok(Self(id))
    }

    /// Puts it where the guest looks for it.
    pub fn write(self, ram: &GuestRam) -> Result<(), Error> {
        ram.memory()
            .write_slice(&self.0, layout::GENERATION_ID)
            .map_err(|error| Error::Boot(error.into()))
    }
}
