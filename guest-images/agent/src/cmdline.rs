//! The kernel command line's `cofferdam.*` words.

use std::net::Ipv4Addr;

use agent_protocol::message::Ipv4;

/// What the command line asks of `/init`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `cofferdam.shell=on|off`.
    pub shell: Option<bool>,
    /// `cofferdam.modules=a,b`: loaded after the image's own.
    pub modules: Vec<String>,
    /// `cofferdam.net=MODULE,ADDRESS/PREFIX|dhcp[,GATEWAY]`.
    pub networks: Vec<Network>,
    /// `cofferdam.exit=poweroff|reboot`: right after the first line, to time a boot.
    pub exit: Option<Exit>,
    /// Words that begin with `cofferdam.` and were not understood.
    pub unknown: Vec<String>,
}

/// A network interface to set up.
#[derive(Debug, PartialEq, Eq)]
pub struct Network {
    /// The driver.
    pub module: String,
    /// A fixed address, or by DHCP.
    pub address: Option<Ipv4>,
    /// Default route.
    pub gateway: Option<Ipv4Addr>,
}

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Power off.
    PowerOff,
    /// Reboot.
    Reboot,
}

/// Reads a command line.
pub fn parse(line: &str) -> Options {
    let mut options = Options::default();
    for word in line.split_whitespace() {
        let Some(option) = word.strip_prefix("cofferdam.") else {
            continue;
        };
        if parse_option(option, &mut options).is_none() {
            options.unknown.push(word.into());
        }
    }
    options
}

fn parse_option(option: &str, options: &mut Options) -> Option<()> {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    match (name, value) {
        ("shell", "on" | "") => options.shell = Some(true),
        ("shell", "off") => options.shell = Some(false),
        ("exit", "poweroff") => options.exit = Some(Exit::PowerOff),
        ("exit", "reboot") => options.exit = Some(Exit::Reboot),
        ("modules", list) => options.modules.extend(
            list.split(',')
                .filter(|n| !n.is_empty())
                .map(str::to_string),
        ),
        ("net", value) => options.networks.push(parse_network(value)?),
        _ => return None,
    }
    Some(())
}

fn parse_network(value: &str) -> Option<Network> {
    let mut parts = value.split(',');
    let module = parts.next().filter(|m| !m.is_empty())?.to_string();
    let address = match parts.next()? {
        "dhcp" => None,
        address => Some(address.parse().ok()?),
    };
    let gateway = match parts.next() {
        Some(gateway) => Some(gateway.parse().ok()?),
        None => None,
    };
    parts.next().is_none().then_some(Network {
        module,
        address,
        gateway,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_is_read_and_others_left_to_the_kernel() {
        let options = parse(
            "console=ttyS0 quiet cofferdam.net=e1000,10.0.2.15/24,10.0.2.2 cofferdam.net=virtio_net,dhcp \
             cofferdam.shell=off cofferdam.modules=dummy,8021q cofferdam.exit=reboot\n",
        );
        let fixed = Network {
            module: "e1000".into(),
            address: Some("10.0.2.15/24".parse().unwrap()),
            gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
        };
        let dhcp = Network {
            module: "virtio_net".into(),
            address: None,
            gateway: None,
        };
        assert_eq!(options.networks, [fixed, dhcp]);
        assert_eq!(options.modules, ["dummy", "8021q"]);
        assert_eq!(
            (options.shell, options.exit),
            (Some(false), Some(Exit::Reboot))
        );
        assert_eq!(options.unknown, [""; 0]);
    }

    #[test]
    fn words_that_make_no_sense_are_kept_apart() {
        let words = [
            "cofferdam.net=e1000",
            "cofferdam.net=,dhcp",
            "cofferdam.net=e1000,10.0.2.15",
            "cofferdam.net=e1000,dhcp,10.0.2.2,more",
            "cofferdam.shell=perhaps",
            "cofferdam.",
        ];
        assert_eq!(parse(&words.join(" ")).unknown, words);
    }
}
