//! The configuration of a network interface, read before its driver is restarted and put back
//! afterwards.
//!
//! Read from what `ip -j` and `ethtool` print in the guest, written as the same programs' command
//! lines. What a guest prints is hostile: sizes are bounded, and a word that becomes part of a
//! command line is of a form that cannot be taken for an option.
//!
//! Text, and not what the kernel tells an agent (`ETHTOOL_GFEATURES`, netlink): that has other
//! names than `ethtool -k` prints, and several generations of bits for the same features.

use std::fmt::Display;
use std::net::IpAddr;

use serde::Deserialize;

/// Longest text of one program that is read, in bytes.
const MAX_TEXT: usize = 256 << 10;
/// Most addresses, VLANs or routes of one interface.
const MAX_ITEMS: usize = 256;
/// Longest name of an interface (`IFNAMSIZ` without its end byte).
const MAX_NAME: usize = 15;
/// Longest name of a feature (`ETH_GSTRING_LEN`).
const MAX_FEATURE_NAME: usize = 32;

/// Why a configuration cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A program printed what is not understood.
    #[error("what `{0}` printed in the guest is not understood: {1}")]
    Text(&'static str, String),
    /// There is no such interface.
    #[error("the guest has no interface {0}")]
    NoInterface(String),
}

/// What programs in the guest print about an interface.
#[derive(Debug, Clone, Default)]
pub struct Printed {
    /// `ip -j -d addr show`: all interfaces.
    pub addresses: String,
    /// `ip -j route show dev INTERFACE`
    pub routes: String,
    /// `ethtool -g INTERFACE`; empty if the driver has no rings to set.
    pub rings: String,
    /// `ethtool -k INTERFACE`
    pub features: String,
}

/// The configuration of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceConfig {
    /// Its name.
    pub name: String,
    mac: String,
    mtu: u32,
    up: bool,
    promiscuous: bool,
    all_multicast: bool,
    addresses: Vec<Address>,
    vlans: Vec<Vlan>,
    routes: Vec<Route>,
    /// `rx` and `tx` with the number of descriptors.
    rings: Vec<(&'static str, u32)>,
    /// Features that can be set, and whether they are.
    features: Vec<(String, bool)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    local: IpAddr,
    prefix: u8,
    broadcast: Option<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Vlan {
    name: String,
    id: u16,
    up: bool,
    addresses: Vec<Address>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    destination: String,
    gateway: Option<IpAddr>,
}

#[derive(Deserialize)]
struct LinkJson {
    ifname: Option<String>,
    link: Option<String>,
    #[serde(default)]
    flags: Vec<String>,
    mtu: Option<u32>,
    address: Option<String>,
    linkinfo: Option<LinkInfo>,
    #[serde(default)]
    addr_info: Vec<AddressJson>,
}

#[derive(Deserialize)]
struct LinkInfo {
    info_kind: Option<String>,
    info_data: Option<VlanData>,
}

#[derive(Deserialize)]
struct VlanData {
    id: Option<u16>,
}

#[derive(Deserialize)]
struct AddressJson {
    local: Option<IpAddr>,
    prefixlen: Option<u8>,
    broadcast: Option<IpAddr>,
    scope: Option<String>,
}

#[derive(Deserialize)]
struct RouteJson {
    dst: Option<String>,
    gateway: Option<IpAddr>,
    protocol: Option<String>,
}

impl InterfaceConfig {
    /// The configuration of `interface` as the guest printed it.
    pub fn parse(interface: &str, printed: &Printed) -> Result<Self, ConfigError> {
        let links: Vec<LinkJson> = json("ip -j -d addr show", &printed.addresses)?;
        let link = links
            .iter()
            .find(|link| link.ifname.as_deref() == Some(interface) && is_name(interface))
            .ok_or_else(|| ConfigError::NoInterface(interface.to_owned()))?;
        let flag = |link: &LinkJson, name: &str| link.flags.iter().any(|flag| flag == name);
        let not_understood = |what| ConfigError::Text("ip -j -d addr show", what);
        let mac = link.address.clone().filter(|mac| is_mac(mac));
        let vlans = links
            .iter()
            .filter(|other| other.link.as_deref() == Some(interface))
            .filter_map(|other| {
                let info = other.linkinfo.as_ref()?;
                let name = other.ifname.clone().filter(|name| is_name(name))?;
                Some(Vlan {
                    name,
                    id: match info.info_kind.as_deref() {
                        Some("vlan") => info.info_data.as_ref()?.id.filter(|id| *id < 4095)?,
                        _ => return None,
                    },
                    up: flag(other, "UP"),
                    addresses: addresses(other),
                })
            });
        let routes: Vec<RouteJson> = if printed.routes.trim().is_empty() {
            Vec::new()
        } else {
            json("ip -j route show", &printed.routes)?
        };
        Ok(Self {
            name: interface.to_owned(),
            mac: mac.ok_or_else(|| not_understood("no Ethernet address".to_owned()))?,
            mtu: link
                .mtu
                .ok_or_else(|| not_understood("no MTU".to_owned()))?,
            up: flag(link, "UP"),
            promiscuous: flag(link, "PROMISC"),
            all_multicast: flag(link, "ALLMULTI"),
            addresses: addresses(link),
            vlans: vlans.take(MAX_ITEMS).collect(),
            routes: routes
                .into_iter()
                .filter_map(route)
                .take(MAX_ITEMS)
                .collect(),
            rings: rings(&bounded("ethtool -g", &printed.rings)?),
            features: features(&bounded("ethtool -k", &printed.features)?),
        })
    }

    /// The command lines that make `fresh`, an interface of the same name, have this configuration,
    /// in order. What it has already is left out. Those whose second part is `false` may fail: a
    /// feature may depend on another that comes later.
    pub fn replay(&self, fresh: &Self) -> Vec<(Vec<String>, bool)> {
        let name = self.name.as_str();
        let mut all = Vec::new();
        let mut add = |words: &[&str], must: bool| {
            all.push((words.iter().map(|word| (*word).to_owned()).collect(), must));
        };
        if self.mac != fresh.mac {
            add(&set(name, "address", &self.mac), true);
        }
        if self.mtu != fresh.mtu {
            add(&set(name, "mtu", &self.mtu.to_string()), true);
        }
        for (ring, size) in missing(&self.rings, &fresh.rings) {
            add(&["ethtool", "-G", name, ring, &size.to_string()], false);
        }
        for (feature, on) in missing(&self.features, &fresh.features) {
            add(&["ethtool", "-K", name, feature, on_off(*on)], false);
        }
        if self.promiscuous != fresh.promiscuous {
            add(&set(name, "promisc", on_off(self.promiscuous)), true);
        }
        if self.all_multicast != fresh.all_multicast {
            add(&set(name, "allmulticast", on_off(self.all_multicast)), true);
        }
        if self.up && !fresh.up {
            add(&["ip", "link", "set", "dev", name, "up"], true);
        }
        for address in missing(&self.addresses, &fresh.addresses) {
            let words = address.give(name);
            add(&words.iter().map(String::as_str).collect::<Vec<_>>(), true);
        }
        for vlan in missing(&self.vlans, &fresh.vlans) {
            let (own, id) = (vlan.name.as_str(), vlan.id.to_string());
            add(
                &[
                    "ip", "link", "add", "link", name, "name", own, "type", "vlan", "id", &id,
                ],
                true,
            );
            if vlan.up {
                add(&["ip", "link", "set", "dev", own, "up"], true);
            }
            for address in &vlan.addresses {
                let words = address.give(own);
                add(&words.iter().map(String::as_str).collect::<Vec<_>>(), true);
            }
        }
        for route in missing(&self.routes, &fresh.routes) {
            let gateway = route.gateway.map(|gateway| gateway.to_string());
            let mut words = vec!["ip", "route", "replace", route.destination.as_str()];
            if let Some(gateway) = &gateway {
                words.extend(["via", gateway]);
            }
            words.extend(["dev", name]);
            add(&words, true);
        }
        all
    }

    /// What of this configuration an interface that has `now` lacks, in words; nothing if it has
    /// all.
    pub fn lost(&self, now: &Self) -> Vec<String> {
        let mut lost = Vec::new();
        let mut differs = |what: &str, before: &dyn Display, now: &dyn Display| {
            let (before, now) = (before.to_string(), now.to_string());
            if before != now {
                lost.push(format!("{what} {before} is {now} now"));
            }
        };
        differs("address", &self.mac, &now.mac);
        differs("MTU", &self.mtu, &now.mtu);
        differs("up", &on_off(self.up), &on_off(now.up));
        differs(
            "promisc",
            &on_off(self.promiscuous),
            &on_off(now.promiscuous),
        );
        differs(
            "allmulticast",
            &on_off(self.all_multicast),
            &on_off(now.all_multicast),
        );
        for (ring, size) in missing(&self.rings, &now.rings) {
            lost.push(format!("{ring} ring of {size}"));
        }
        for (feature, on) in missing(&self.features, &now.features) {
            lost.push(format!("{feature} {}", on_off(*on)));
        }
        for address in missing(&self.addresses, &now.addresses) {
            lost.push(format!("{}/{}", address.local, address.prefix));
        }
        for vlan in missing(&self.vlans, &now.vlans) {
            lost.push(format!("VLAN {} ({})", vlan.id, vlan.name));
        }
        for route in missing(&self.routes, &now.routes) {
            lost.push(format!("route to {}", route.destination));
        }
        lost
    }
}

/// Those of `wanted` that are not in `there`.
fn missing<'a, T: PartialEq>(wanted: &'a [T], there: &'a [T]) -> impl Iterator<Item = &'a T> {
    wanted.iter().filter(|item| !there.contains(item))
}

impl Address {
    /// The command line that gives it to `interface`.
    fn give(&self, interface: &str) -> Vec<String> {
        let mut words = vec![
            "ip".to_owned(),
            "addr".to_owned(),
            "replace".to_owned(),
            format!("{}/{}", self.local, self.prefix),
        ];
        if let Some(broadcast) = self.broadcast {
            words.extend(["broadcast".to_owned(), broadcast.to_string()]);
        }
        words.extend(["dev".to_owned(), interface.to_owned()]);
        words
    }
}

/// The command line that sets something of an interface.
fn set<'a>(name: &'a str, what: &'a str, value: &'a str) -> [&'a str; 7] {
    ["ip", "link", "set", "dev", name, what, value]
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn bounded(program: &'static str, text: &str) -> Result<String, ConfigError> {
    if text.len() > MAX_TEXT {
        return Err(ConfigError::Text(program, format!("{} bytes", text.len())));
    }
    Ok(text.to_owned())
}

fn json<T: for<'a> Deserialize<'a>>(program: &'static str, text: &str) -> Result<T, ConfigError> {
    let text = bounded(program, text)?;
    serde_json::from_str(&text).map_err(|error| ConfigError::Text(program, error.to_string()))
}

/// Addresses that a person or a DHCP client gave; those of link scope the kernel makes itself.
fn addresses(link: &LinkJson) -> Vec<Address> {
    let given = link
        .addr_info
        .iter()
        .filter(|address| address.scope.as_deref() != Some("link"));
    given
        .filter_map(|address| {
            Some(Address {
                local: address.local?,
                prefix: address.prefixlen.filter(|prefix| *prefix <= 128)?,
                broadcast: address.broadcast,
            })
        })
        .take(MAX_ITEMS)
        .collect()
}

/// A route that does not come with an address by itself.
fn route(route: RouteJson) -> Option<Route> {
    if route.protocol.as_deref() == Some("kernel") {
        return None;
    }
    let destination = route.dst?;
    let (address, prefix) = destination.split_once('/').unwrap_or((&destination, "0"));
    let is_route = destination == "default"
        || (address.parse::<IpAddr>().is_ok() && prefix.parse::<u8>().is_ok_and(|p| p <= 128));
    is_route.then_some(Route {
        destination,
        gateway: route.gateway,
    })
}

/// `RX: 256` and `TX: 256` of the second part, the current settings.
fn rings(text: &str) -> Vec<(&'static str, u32)> {
    let current = text
        .lines()
        .skip_while(|line| !line.starts_with("Current hardware settings"));
    current
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let name = match name.trim() {
                "RX" => "rx",
                "TX" => "tx",
                _ => return None,
            };
            Some((name, value.trim().parse().ok()?))
        })
        .take(2)
        .collect()
}

/// Lines such as `rx-checksumming: on` that do not say `[fixed]`.
fn features(text: &str) -> Vec<(String, bool)> {
    text.lines()
        .filter(|line| !line.contains("[fixed]"))
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let name = name.trim();
            let on = match value.split_whitespace().next()? {
                "on" => true,
                "off" => false,
                _ => return None,
            };
            is_feature(name).then(|| (name.to_owned(), on))
        })
        .take(MAX_ITEMS)
        .collect()
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-@:".contains(&b))
}

fn is_feature(name: &str) -> bool {
    (1..=MAX_FEATURE_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn is_mac(mac: &str) -> bool {
    mac.len() == 17
        && mac.split(':').count() == 6
        && mac
            .split(':')
            .all(|byte| byte.len() == 2 && byte.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
