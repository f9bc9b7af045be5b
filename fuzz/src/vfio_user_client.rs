//! What a client makes of any bytes of a server: something, or the end of the connection.

/// One input.
pub fn run(input: &[u8]) {
    devices::vfio_user::fuzzing::use_server(input);
}
