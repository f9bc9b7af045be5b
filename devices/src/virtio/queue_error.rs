//! What a driver can do wrong with a queue.

/// What is wrong with a ring.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Indices or addresses of the ring itself.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// A loop, too many buffers, or a descriptor that is not there.
    #[error("a descriptor chain has no end")]
    Endless,
    /// A buffer to read comes after one to write.
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
    /// A buffer is outside guest memory.
    #[error("a buffer is outside guest memory")]
    Unreachable,
}
