//! Traffic through a guest's NIC: the `traffic` part of a report.

use serde::{Deserialize, Serialize};

use super::Stat;

/// Where the NIC of a guest is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum NicPlace {
    /// In the VMM's own process.
    #[default]
    Vmm,
    /// In a device host, by vfio-user
    DeviceHost,
}

impl NicPlace {
    /// What it is, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Vmm => "VMM",
            Self::DeviceHost => "device host",
        }
    }
}

/// One kind of traffic through a NIC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// What was sent: `ping_flood`, `tcp_echo`, ...
    pub kind: String,
    /// The guest's driver.
    pub driver: String,
    /// Where the NIC is.
    #[serde(default)]
    pub nic_at: NicPlace,
    /// How long it ran, in seconds.
    pub seconds: f64,
    /// Packets (datagrams) sent; absent for a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent: Option<u64>,
    /// Packets answered; absent for a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered: Option<u64>,
    /// Answers that came out of order; absent for a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reordered: Option<u64>,
    /// Answers that came more than once; absent for a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicated: Option<u64>,
    /// Payload bytes that went out and whose contents were checked at the far end or on return.
    pub bytes_to_peer: u64,
    /// Payload bytes that came in and whose contents were checked.
    pub bytes_from_peer: u64,
    /// Bytes or packets with wrong contents.
    pub corrupted: u64,
    /// Round trip of a packet; absent for a stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_us: Option<Stat>,
}

impl Traffic {
    /// Packets that were answered, or bytes of a stream, a second.
    fn rate(&self) -> f64 {
        let bytes = self.bytes_to_peer.saturating_add(self.bytes_from_peer);
        self.answered.unwrap_or(bytes) as f64 / self.seconds
    }
}

/// The rate of `one` as a part of that through the same NIC in the VMM's process, of the same run;
/// `None` where there is none.
pub fn of_own(all: &[Traffic], one: &Traffic) -> Option<f64> {
    let same = |other: &&Traffic| other.kind == one.kind && other.driver == one.driver;
    let mut own = all.iter().filter(|other| other.nic_at == NicPlace::Vmm);
    let own = own.find(same)?;
    let part = one.rate() / own.rate();
    (one.nic_at != NicPlace::Vmm && part.is_finite()).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(nic_at: NicPlace, seconds: f64, answered: Option<u64>, bytes: u64) -> Traffic {
        Traffic {
            kind: "kind".to_owned(),
            driver: "driver".to_owned(),
            nic_at,
            seconds,
            sent: answered,
            answered,
            reordered: None,
            duplicated: None,
            bytes_to_peer: bytes,
            bytes_from_peer: bytes,
            corrupted: 0,
            round_trip_us: None,
        }
    }

    #[test]
    fn packets_are_compared_by_their_number_and_streams_by_their_bytes() {
        let own = row(NicPlace::Vmm, 2.0, Some(200), 1);
        let other = row(NicPlace::DeviceHost, 1.0, Some(50), 1000);
        assert_eq!(of_own(&[own.clone(), other.clone()], &other), Some(0.5));
        assert_eq!(of_own(std::slice::from_ref(&other), &other), None);
        assert_eq!(of_own(&[own.clone(), other], &own), None);
        let own = row(NicPlace::Vmm, 2.0, None, 400);
        let other = row(NicPlace::DeviceHost, 1.0, None, 150);
        assert_eq!(of_own(&[own, other.clone()], &other), Some(0.75));
        let nothing = row(NicPlace::Vmm, 1.0, None, 0);
        assert_eq!(of_own(&[nothing, other.clone()], &other), None);
    }
}
