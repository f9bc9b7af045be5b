//! What a server of a function makes of any bytes of a client: an answer, or the end of the
//! connection.

/// One input.
pub fn run(input: &[u8]) {
    devices::vfio_user::fuzzing::serve(input);
}
