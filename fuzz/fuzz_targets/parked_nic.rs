//! Any accesses of the image of a NIC that another guest has, with switches in between: the device
//! can always be given to the guest and to the next one, and the image does not grow.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run -s none parked_nic -- -len_control=0` from the repository's
//! root. The same runs with random bytes in `cargo test -p devices`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    devices::pci::registers::parked::fuzzing::exercise(input);
});
