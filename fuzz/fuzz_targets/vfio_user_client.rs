//! What a client makes of any bytes of a server: something, or the end of the connection.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run -s none vfio_user_client` from the repository's root.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    devices::vfio_user::fuzzing::use_server(input);
});
