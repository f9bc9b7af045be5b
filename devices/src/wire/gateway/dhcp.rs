//! A DHCP server (RFC 2131) for the one guest at the other end of the wire.
//!
//! Leases are remembered by hardware address, so that a guest that was rebooted gets its address
//! back. What a guest sends is hostile: what does not parse is not answered.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress};

/// Port that the server listens on.
pub(super) const SERVER_PORT: u16 = 67;
/// Port that clients listen on.
pub(super) const CLIENT_PORT: u16 = 68;

/// Leases at one time: a guest with macvlans has more than one.
const LEASES: usize = 16;
/// A BOOTP message's least length (RFC 1542, section 2.1); some clients insist on it.
const MIN_MESSAGE_BYTES: usize = 300;
const LEASE_SECONDS: u32 = 24 * 3600;

/// A message to send and where.
pub(super) struct Answer {
    pub(super) to: Ipv4Addr,
    pub(super) message: Vec<u8>,
}

pub(super) struct DhcpServer {
    address: Ipv4Addr,
    netmask: Ipv4Addr,
    first_lease: Ipv4Addr,
    /// The lease at index `n` has the address `first_lease + n`.
    leases: Vec<EthernetAddress>,
}

impl DhcpServer {
    pub(super) fn new(address: Ipv4Addr, netmask: Ipv4Addr, first_lease: Ipv4Addr) -> Self {
        Self {
            address,
            netmask,
            first_lease,
            leases: Vec::new(),
        }
    }

    /// First address that is given out.
    pub(super) fn first(&self) -> Ipv4Addr {
        self.first_lease
    }

    /// Clients that have a lease.
    pub(super) fn known(&self) -> Vec<[u8; 6]> {
        self.leases.iter().map(|client| client.0).collect()
    }

    /// These clients have a lease and no other; `false`, and nothing changes, if there are too many
    /// or one is no client.
    pub(super) fn set_known(&mut self, clients: &[[u8; 6]]) -> bool {
        let clients: Vec<_> = clients.iter().copied().map(EthernetAddress).collect();
        if clients.len() > LEASES || !clients.iter().all(EthernetAddress::is_unicast) {
            return false;
        }
        self.leases = clients;
        true
    }

    /// Answers a client's `message`, or keeps silent.
    pub(super) fn answer(&mut self, message: &[u8]) -> Option<Answer> {
        let packet = DhcpPacket::new_checked(message).ok()?;
        let request = DhcpRepr::parse(&packet).ok()?;
        if !request.relay_agent_ip.is_unspecified() {
            return None;
        }
        if request
            .server_identifier
            .is_some_and(|server| server != self.address)
        {
            // The client chose another server.
            return None;
        }
        match request.message_type {
            DhcpMessageType::Discover => {
                let lease = self.lease(request.client_hardware_address)?;
                Some(self.reply(&request, DhcpMessageType::Offer, Some(lease)))
            }
            DhcpMessageType::Request => {
                let wanted = request.requested_ip.unwrap_or(request.client_ip);
                match self.lease(request.client_hardware_address) {
                    Some(lease) if lease == wanted => {
                        Some(self.reply(&request, DhcpMessageType::Ack, Some(lease)))
                    }
                    _ => Some(self.reply(&request, DhcpMessageType::Nak, None)),
                }
            }
            DhcpMessageType::Inform => Some(self.reply(&request, DhcpMessageType::Ack, None)),
            _ => None,
        }
    }

    /// The address of `client`, given to it now if it has none.
    fn lease(&mut self, client: EthernetAddress) -> Option<Ipv4Addr> {
        if !client.is_unicast() {
            return None;
        }
        let index = match self.leases.iter().position(|known| *known == client) {
            Some(index) => index,
            None if self.leases.len() < LEASES => {
                self.leases.push(client);
                self.leases.len() - 1
            }
            None => return None,
        };
        let lease = Ipv4Addr::from(u32::from(self.first_lease).checked_add(index as u32)?);
        let mask = u32::from(self.netmask);
        let on_our_network = u32::from(lease) & mask == u32::from(self.address) & mask;
        (on_our_network && lease != self.address).then_some(lease)
    }

    fn reply(
        &self,
        request: &DhcpRepr<'_>,
        message_type: DhcpMessageType,
        lease: Option<Ipv4Addr>,
    ) -> Answer {
        let acknowledges = message_type != DhcpMessageType::Nak;
        let reply = DhcpRepr {
            message_type,
            transaction_id: request.transaction_id,
            secs: 0,
            client_hardware_address: request.client_hardware_address,
            client_ip: if acknowledges {
                request.client_ip
            } else {
                Ipv4Addr::UNSPECIFIED
            },
            your_ip: lease.unwrap_or(Ipv4Addr::UNSPECIFIED),
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: acknowledges.then_some(self.address),
            subnet_mask: acknowledges.then_some(self.netmask),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: request.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(self.address),
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: lease.map(|_| LEASE_SECONDS),
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut message = vec![0; reply.buffer_len().max(MIN_MESSAGE_BYTES)];
        let mut packet = DhcpPacket::new_unchecked(&mut message[..]);
        if let Err(error) = reply.emit(&mut packet) {
            // `buffer_len` is the library's own answer to how much room it needs.
            tracing::error!(%error, "a DHCP reply did not fit its own length");
        }
        // A client without an address cannot be reached by ARP: those replies are broadcast
        // (RFC 2131, section 4.1), as a NAK always is.
        let to = if acknowledges && !request.client_ip.is_unspecified() {
            request.client_ip
        } else {
            Ipv4Addr::BROADCAST
        };
        Answer { to, message }
    }
}
