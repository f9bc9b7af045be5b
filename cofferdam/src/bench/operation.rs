//! What makes a guest's kernel call an entry point of its driver.

use super::network::INTERFACE;

/// What makes the kernel call an entry point.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    /// The gateway's pings.
    Traffic,
    /// A command.
    Command(&'static [&'static str]),
    /// Two commands in turn, the second of which undoes the first.
    Toggle(&'static [&'static str], &'static [&'static str]),
}

impl Operation {
    /// What makes it call `entry`, if that is known.
    pub fn of(entry: &str) -> Option<Self> {
        Some(match entry {
            "e1000_xmit_frame" | "e1000_clean" | "e1000_intr" => Self::Traffic,
            "e1000_get_ethtool_stats" => Self::Command(&["ethtool", "-S", INTERFACE]),
            "e1000_get_regs" => Self::Command(&["ethtool", "-d", INTERFACE]),
            "e1000_get_drvinfo" => Self::Command(&["ethtool", "-i", INTERFACE]),
            "e1000_set_rx_mode" => Self::Toggle(
                &["ip", "link", "set", INTERFACE, "promisc", "on"],
                &["ip", "link", "set", INTERFACE, "promisc", "off"],
            ),
            // To the address that it has: what goes wrong must not cut the guest off.
            "e1000_set_mac" => Self::Command(&[
                "sh",
                "-c",
                "ip link set eth0 address $(cat /sys/class/net/eth0/address)",
            ]),
            "e1000_set_ringparam" => Self::Toggle(
                &["ethtool", "-G", INTERFACE, "rx", "128"],
                &["ethtool", "-G", INTERFACE, "rx", "256"],
            ),
            "e1000_change_mtu" => Self::Toggle(
                &["ip", "link", "set", INTERFACE, "mtu", "1400"],
                &["ip", "link", "set", INTERFACE, "mtu", "1500"],
            ),
            "e1000_set_features" => Self::Toggle(
                &["ethtool", "-K", INTERFACE, "rx", "off"],
                &["ethtool", "-K", INTERFACE, "rx", "on"],
            ),
            // The link comes up again, and the driver looks at it.
            "e1000_watchdog" => Self::Command(&["ethtool", "-r", INTERFACE]),
            "e1000_open" | "e1000_close" => Self::Toggle(
                &["ip", "link", "set", INTERFACE, "down"],
                &["ip", "link", "set", INTERFACE, "up"],
            ),
            _ => return None,
        })
    }

    /// The command of its first or its second half; `None` if there is nothing to do.
    pub fn command(self, forth: bool) -> Option<&'static [&'static str]> {
        match self {
            Self::Traffic => None,
            Self::Command(argv) => Some(argv),
            Self::Toggle(first, second) => Some(if forth { first } else { second }),
        }
    }

    /// Whether the interface stays up all the time.
    pub fn keeps_interface_up(self) -> bool {
        !matches!(self, Self::Toggle(first, _) if first.contains(&"down"))
    }

    /// Whether one command is all of it.
    pub fn is_one(self) -> bool {
        matches!(self, Self::Command(_))
    }
}
