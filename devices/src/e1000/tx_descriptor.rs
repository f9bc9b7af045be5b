//! What the transmitter's ring and its packets share: the command bits of descriptors, and how much
//! one call may do.

/// Bits of the command, in the third 32-bit word of every descriptor (3.3.3.1, 3.3.6, 3.3.7).
pub mod command {
    /// End of packet (legacy, data).
    pub const EOP: u32 = 1 << 24;
    /// Insert checksum (legacy).
    pub const IC: u32 = 1 << 26;
    /// TCP segmentation enable (context, data).
    pub const TSE: u32 = 1 << 26;
    /// Report status.
    pub const RS: u32 = 1 << 27;
    /// Report packet sent (legacy).
    pub const RPS: u32 = 1 << 28;
    /// Extended descriptor.
    pub const DEXT: u32 = 1 << 29;
    /// Insert VLAN tag.
    pub const VLE: u32 = 1 << 30;
    /// Delay the interrupt.
    pub const IDE: u32 = 1 << 31;
    /// Packet is TCP, not UDP (context).
    pub const TCP: u32 = 1 << 24;
    /// Packet is IPv4, not IPv6 (context).
    pub const IP: u32 = 1 << 25;
}

/// What one call of the transmitter may still do.
#[derive(Debug)]
pub struct Budget {
    /// Descriptors.
    descriptors: u32,
    /// Bytes read from guest memory or sent.
    bytes: usize,
}

impl Default for Budget {
    /// What a whole call may do.
    fn default() -> Self {
        Self {
            descriptors: 1024,
            bytes: 4 << 20,
        }
    }
}

impl Budget {
    /// Takes a descriptor off.
    pub fn spend_descriptor(&mut self) {
        self.descriptors = self.descriptors.saturating_sub(1);
    }

    /// Takes `bytes` off.
    pub fn spend_bytes(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Whether nothing is left.
    pub fn is_spent(&self) -> bool {
        self.descriptors == 0 || self.bytes == 0
    }
}
