//! Network interfaces: what they are like, and setting them up without starting a program.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use agent_protocol::message::{Interface, Ipv4};
use rustix::event::{PollFd, PollFlags, poll};

use crate::fail::{Context, Result, error};
use crate::sys;

const CLASS: &str = "/sys/class/net";

/// A file of `/sys/class/net/INTERFACE`.
fn attribute(interface: &str, name: &str) -> Option<String> {
    // The name comes from the host: it must not lead elsewhere.
    if interface.contains('/') || interface.starts_with('.') {
        return None;
    }
    let text = fs::read_to_string(Path::new(CLASS).join(interface).join(name)).ok()?;
    Some(text.trim_end().to_string())
}

fn number<T: std::str::FromStr>(interface: &str, name: &str) -> Option<T> {
    attribute(interface, name)?.parse().ok()
}

/// Names of all interfaces.
pub fn names() -> BTreeSet<String> {
    let entries = fs::read_dir(CLASS).into_iter().flatten().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Everything about all interfaces.
pub fn interfaces() -> Result<Vec<Interface>> {
    let addresses = sys::interface_addresses().context(|| "list interface addresses".into())?;
    let ipv6 = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let mut found = Vec::new();
    for name in names() {
        let driver = fs::read_link(Path::new(CLASS).join(&name).join("device/driver/module"));
        let flags = attribute(&name, "flags")
            .and_then(|t| u32::from_str_radix(t.trim_start_matches("0x"), 16).ok());
        // `flags` in sysfs lacks IFF_RUNNING, which is computed.
        let computed = addresses
            .iter()
            .find(|(n, ..)| *n == name)
            .map(|(_, flags, _)| *flags);
        found.push(Interface {
            index: number(&name, "ifindex").unwrap_or(0),
            flags: flags.unwrap_or(0) | computed.unwrap_or(0),
            carrier: attribute(&name, "carrier").map(|t| t == "1"),
            operstate: attribute(&name, "operstate").unwrap_or_default(),
            mtu: number(&name, "mtu").unwrap_or(0),
            mac: attribute(&name, "address").unwrap_or_default(),
            driver: driver
                .ok()
                .and_then(|d| Some(d.file_name()?.to_string_lossy().into_owned())),
            ipv4: addresses
                .iter()
                .filter(|(n, ..)| *n == name)
                .filter_map(|(.., a)| *a)
                .collect(),
            ipv6: ipv6
                .lines()
                .filter_map(|line| parse_inet6(line, &name))
                .collect(),
            statistics: statistics(&name),
            name,
        });
    }
    Ok(found)
}

fn statistics(interface: &str) -> Vec<(String, u64)> {
    let directory = Path::new(CLASS).join(interface).join("statistics");
    let mut counters: Vec<(String, u64)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let value = fs::read_to_string(e.path()).ok()?.trim_end().parse().ok()?;
            Some((e.file_name().to_string_lossy().into_owned(), value))
        })
        .collect();
    counters.sort();
    counters
}

/// `fe80000000000000505400fffe123456 02 40 20 80     eth0`
fn parse_inet6(line: &str, interface: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [address, _, prefix, _, _, name] = words[..] else {
        return None;
    };
    if name != interface {
        return None;
    }
    let address = std::net::Ipv6Addr::from(u128::from_str_radix(address, 16).ok()?);
    Some(format!(
        "{address}/{}",
        u8::from_str_radix(prefix, 16).ok()?
    ))
}

/// Brings an interface up or down.
pub fn set_link(interface: &str, up: bool) -> Result<()> {
    sys::set_link(interface, up)
        .context(|| format!("bring {interface} {}", if up { "up" } else { "down" }))
}

/// Gives an interface another hardware address. Where its driver takes none while it is up, it is
/// brought down and up.
pub fn set_mac(interface: &str, mac: [u8; 6]) -> Result<()> {
    let what = || format!("give {interface} another hardware address");
    match sys::set_mac(interface, mac) {
        Err(busy) if busy.raw_os_error() == Some(libc::EBUSY) => {
            set_link(interface, false)?;
            let result = sys::set_mac(interface, mac).context(what);
            // Up again in any case.
            result.and(set_link(interface, true))
        }
        other => other.context(what),
    }
}

/// Gives an interface its address.
pub fn set_address(interface: &str, address: Ipv4) -> Result<()> {
    sys::set_address(interface, address).context(|| format!("set {interface} to {address}"))
}

/// Sets the default route.
pub fn set_gateway(gateway: Ipv4Addr) -> Result<()> {
    sys::add_default_route(gateway).context(|| format!("set the default route to {gateway}"))
}

/// Waits for interfaces to change, without asking again and again.
pub struct Watch {
    events: rustix::fd::OwnedFd,
}

impl Watch {
    /// Everything that happens from now on is seen.
    pub fn new() -> Result<Self> {
        Ok(Self {
            events: sys::link_events().context(|| "watch the interfaces".into())?,
        })
    }

    /// Waits until the interface is there.
    pub fn present(&self, interface: &str, limit: Duration) -> Result<()> {
        self.until(limit, || attribute(interface, "ifindex").is_some())
            .map_err(|()| error(format!("{interface} did not appear within {limit:?}")))
    }

    /// Waits until the interface has a carrier.
    pub fn carrier(&self, interface: &str, limit: Duration) -> Result<()> {
        self.until(limit, || {
            attribute(interface, "carrier").as_deref() == Some("1")
        })
        .map_err(|()| error(format!("{interface} had no carrier within {limit:?}")))
    }

    fn until(&self, limit: Duration, holds: impl Fn() -> bool) -> std::result::Result<(), ()> {
        // Should a message get lost, the condition is still looked at this often.
        const SLICE: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + limit;
        let mut buffer = [0u8; 8192];
        while !holds() {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .min(SLICE);
            if left.is_zero() {
                return Err(());
            }
            let timeout = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&self.events, PollFlags::IN)];
            // Interrupted or not: the condition is looked at again.
            let _ready = poll(&mut fds, Some(&timeout));
            while rustix::io::read(&self.events, &mut buffer).is_ok_and(|n| n > 0) {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_described() {
        let found = interfaces().unwrap();
        let loopback = found.iter().find(|i| i.name == "lo").unwrap();
        assert!(
            loopback.ipv4.contains(&"127.0.0.1/8".parse().unwrap()),
            "{loopback:?}"
        );
        assert_eq!(loopback.mac, "00:00:00:00:00:00");
        assert!(
            loopback
                .statistics
                .iter()
                .any(|(name, _)| name == "rx_packets")
        );
        assert_eq!(
            loopback.flags & libc::IFF_LOOPBACK as u32,
            libc::IFF_LOOPBACK as u32
        );
    }

    #[test]
    fn interface_that_never_comes_is_given_up() {
        let watch = Watch::new().unwrap();
        let failed = watch
            .present("cof-none", Duration::from_millis(1))
            .unwrap_err();
        assert!(failed.message.contains("did not appear"), "{failed:?}");
        watch.present("lo", Duration::ZERO).unwrap();
    }

    #[test]
    fn ipv6_lines_are_read() {
        let line = "fe80000000000000505400fffe123456 02 40 20 80     eth0";
        assert_eq!(
            parse_inet6(line, "eth0").as_deref(),
            Some("fe80::5054:ff:fe12:3456/64")
        );
        assert_eq!(parse_inet6(line, "eth1"), None);
        assert_eq!(parse_inet6("", "eth0"), None);
    }
}
