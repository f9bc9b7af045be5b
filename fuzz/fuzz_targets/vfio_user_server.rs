//! What a server of a function makes of any bytes of a client: an answer, or the end of the
//! connection.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run -s none vfio_user_server` from the repository's root.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    devices::vfio_user::fuzzing::serve(input);
});
