//! Messages between the host and the guest agent, and the host's client.
//!
//! The agent is a program in a guest (or in the lab's emulated server). It is reached through a
//! byte stream: a virtio-console port named [`PORT_NAME`] in a guest, a unix socket on a host. On
//! that stream travel frames ([`frame`]), in each frame one JSON message ([`message`]). The host
//! asks, the agent answers; [`client::Client`] is the host's side of it.
//!
//! Neither side trusts the other: a frame has a largest size, every wait has an end, and a message
//! that cannot be understood is an error, never a panic.
//!
//! ```text
//!  host                                         agent
//!  SYNC, Request{id:1, hello{nonce}}   ───────►  stops what an earlier client had started
//!                                      ◄───────  SYNC, Response{id:1, done(hello)}
//!  Request{id:2, exec{..}}             ───────►
//!                                      ◄───────  Response{id:2, stdout(..)}   any number
//!                                      ◄───────  Response{id:2, done(exec{status})}
//! ```

pub mod client;
pub mod clock;
pub mod frame;
pub mod init_config;
pub mod message;
pub mod traffic;

pub use client::{Client, ClientError};
pub use message::{Request, Response, Stamp};

/// Name of the virtio-console port that leads to the agent.
pub const PORT_NAME: &str = "org.cofferdam.agent.0";

/// Begins the first line that `/init` writes to the console, before it does anything else: a boot
/// is timed by it. The kernel's uptime in seconds follows.
pub const INIT_LINE: &str = "cofferdam-init: started";

/// Version of the messages. Host and agent must have the same one: they are built together.
pub const PROTOCOL_VERSION: u32 = 2;
