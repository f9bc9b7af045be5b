//! What a gateway is made with.

use std::net::Ipv4Addr;

use super::GatewayError;

/// One IP network that the gateway is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// VLAN identifier (1 to 4094) of its frames, or untagged.
    pub vlan: Option<u16>,
    /// The gateway's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, 8 to 30.
    pub prefix_len: u8,
    /// First address that DHCP gives out, and the one that is probed.
    pub guest_address: Ipv4Addr,
}

impl NetworkConfig {
    /// A VLAN: `10.64.ID.2/24`, where `ID` is `vlan` (from 256 on `10.65.…` and so on).
    pub fn for_vlan(vlan: u16) -> Self {
        let [high, low] = vlan.to_be_bytes();
        let high = 64 + (high & 0xf);
        Self {
            vlan: Some(vlan),
            address: Ipv4Addr::new(10, high, low, 2),
            prefix_len: 24,
            guest_address: Ipv4Addr::new(10, high, low, 15),
        }
    }
}

/// What a gateway is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayConfig {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its networks, each with another VLAN. The probe works on the first.
    pub networks: Vec<NetworkConfig>,
    /// Longest IP packet it sends, in bytes, 576 to 9000.
    pub mtu_bytes: u16,
    /// Frames that may wait for the guest before it is told to wait with its own.
    pub queue_frames: usize,
}

impl Default for GatewayConfig {
    /// `10.0.2.2/24` with the guest at `10.0.2.15`, untagged, as users of QEMU know it.
    fn default() -> Self {
        Self {
            mac: [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02],
            networks: vec![NetworkConfig {
                vlan: None,
                address: Ipv4Addr::new(10, 0, 2, 2),
                prefix_len: 24,
                guest_address: Ipv4Addr::new(10, 0, 2, 15),
            }],
            mtu_bytes: 1500,
            queue_frames: 256,
        }
    }
}

impl GatewayConfig {
    /// As the default one for number 0, and the networks behind it for more: `10.0.3.2/24` and so
    /// on.
    pub fn numbered(number: u8) -> Self {
        let mut config = Self::default();
        for network in &mut config.networks {
            for address in [&mut network.address, &mut network.guest_address] {
                let [a, b, c, d] = address.octets();
                *address = Ipv4Addr::new(a, b, c.wrapping_add(number), d);
            }
        }
        config
    }

    /// Its first network, if all makes sense.
    pub(super) fn check(&self) -> Result<&NetworkConfig, GatewayError> {
        if self.mac[0] & 1 != 0 || self.mac == [0; 6] {
            return Err(GatewayError::Config(
                "its MAC address must be a unicast address",
            ));
        }
        if !(576..=9000).contains(&self.mtu_bytes) {
            return Err(GatewayError::Config("its MTU must be 576 to 9000"));
        }
        for (index, network) in self.networks.iter().enumerate() {
            if network.vlan.is_some_and(|id| !(1..=4094).contains(&id)) {
                return Err(GatewayError::Config("a VLAN identifier must be 1 to 4094"));
            }
            if self.networks[..index]
                .iter()
                .any(|other| other.vlan == network.vlan)
            {
                return Err(GatewayError::Config("two networks have the same VLAN"));
            }
            if !(8..=30).contains(&network.prefix_len) {
                return Err(GatewayError::Config(
                    "a network's prefix length must be 8 to 30",
                ));
            }
            let mask = u32::MAX << (32 - network.prefix_len);
            let address = u32::from(network.address);
            let host = address & !mask;
            if host == 0 || host == !mask || network.address.is_multicast() || address >> 24 == 0 {
                return Err(GatewayError::Config(
                    "its address is not one a host can have",
                ));
            }
            if u32::from(network.guest_address) & mask != address & mask {
                return Err(GatewayError::Config(
                    "the guest's address is not on its network",
                ));
            }
        }
        self.networks
            .first()
            .ok_or(GatewayError::Config("it needs a network"))
    }
}
