//! A guest that counts words of a card's register up.

use std::sync::Arc;

use devices::edge::Edge;
use devices::pci::bus::SharedFunction;
use devices::pci::config::offset;
use vm_memory::{Bytes, GuestAddress};
use vmm::PciSlot;

use crate::common::{Guest, Running, config};
use crate::guest_code;

/// Where the test says what the guest is to do: an address, and how often.
const ORDER: u64 = 0x21_0000;
/// In the 32-bit PCI window.
pub const AT: u64 = 0xc000_0000;

// Counts a word up so many times, by a load and a store each; reports what it is then.
guest_code!(
    counts_up_code,
    // The GiB below 4 GiB is mapped, in a page directory at 0x1f0000.
    "mov edi, 0x1f0000",
    "mov eax, 0xc0000083",
    "mov ecx, 512",
    "1: mov [rdi], rax",
    "add rax, 0x200000",
    "add rdi, 8",
    "dec ecx",
    "jnz 1b",
    "mov rax, cr3",
    "and rax, -4096",
    "mov rax, [rax]",
    "and rax, -4096",
    "mov qword ptr [rax + 24], 0x1f0003",
    "mov edx, 0x500",
    "mov eax, 1",
    "out dx, eax",
    "2: mov rdi, [0x210000]",
    "test rdi, rdi",
    "jnz 3f",
    "pause",
    "jmp 2b",
    // Told last is the address.
    "3: mov ecx, [0x210008]",
    "mov qword ptr [0x210000], 0",
    "4: mov eax, [rdi]",
    "inc eax",
    "mov [rdi], eax",
    "dec ecx",
    "jnz 4b",
    "out dx, eax",
    "jmp 2b",
);

/// Its code.
pub fn counts_up() -> Vec<u8> {
    counts_up_code()
}

/// The guest, which runs.
pub struct Counting {
    pub running: Running,
    pub edge: Arc<Edge>,
    slot: u8,
}

impl Counting {
    /// With what `make` gives in a slot.
    pub fn start<T: devices::pci::PciFunction + 'static>(
        make: impl FnOnce(&mut Guest, &PciSlot) -> Arc<std::sync::Mutex<T>>,
    ) -> Self {
        let mut guest = Guest::new(config(counts_up(), 1));
        let slot = guest.vm.reserve_pci_slot().unwrap();
        let function: SharedFunction = make(&mut guest, &slot);
        guest.vm.add_pci(&slot, function).unwrap();
        let running = guest.start();
        // Whoever starts the machine has placed the registers.
        assert_eq!(running.report(), 1);
        Self {
            running,
            edge: slot.edge().clone(),
            slot: slot.number(),
        }
    }

    fn write(&self, register: u16, data: &[u8]) {
        let bus = self.running.handle.pci_bus();
        bus.config_write(self.slot, register, data);
    }

    /// Places the card's first register.
    pub fn move_to(&self, address: u64) {
        let bytes = address.to_le_bytes();
        self.write(offset::BAR0 + 4, &bytes[4..]);
        self.write(offset::BAR0, &bytes[..4]);
    }

    /// Has it decode its registers in memory, or not.
    pub fn decode(&self, on: bool) {
        self.write(offset::COMMAND, &[if on { 2 } else { 0 }, 0]);
    }

    /// Has the guest count the word at `address` up, and does not wait.
    pub fn order(&self, address: u64, times: u32) {
        let ram = self.running.handle.ram().memory().clone();
        ram.write_obj(times, GuestAddress(ORDER + 8)).unwrap();
        ram.write_obj(address, GuestAddress(ORDER)).unwrap();
    }

    /// Waits for that; gives what the word is then, and the guest's exits for memory.
    pub fn count_up(&self, address: u64, times: u32) -> (u32, u64) {
        let exits = || {
            let exits = self.running.handle.status().exits[0];
            exits.mmio_read + exits.mmio_write
        };
        let before = exits();
        self.order(address, times);
        let value = self.running.report();
        (value, exits() - before)
    }
}
