//! Any accesses of the image of a NIC that another guest has, with switches in between: the device
//! can always be given to the guest and to the next one, and the image does not grow.
//! The same runs with random bytes in `cargo test -p devices`.

/// One input.
pub fn run(input: &[u8]) {
    devices::pci::registers::parked::fuzzing::exercise(input);
}
