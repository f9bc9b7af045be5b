//! Configurations as a guest prints them, good and bad.

use super::*;

fn printed() -> Printed {
    Printed {
        addresses: r#"[
            {"ifname":"lo","flags":["LOOPBACK","UP"],"mtu":65536,"address":"00:00:00:00:00:00","addr_info":[]},
            {"ifname":"eth0","flags":["BROADCAST","MULTICAST","PROMISC","UP"],"mtu":1400,
             "address":"52:54:00:12:34:57","promiscuity":1,
             "addr_info":[{"family":"inet","local":"10.0.2.15","prefixlen":24,"broadcast":"10.0.2.255","scope":"global"},
                          {"family":"inet6","local":"fe80::1","prefixlen":64,"scope":"link"}]},
            {"ifname":"eth0.5","link":"eth0","flags":["UP"],"mtu":1400,"address":"52:54:00:12:34:57",
             "linkinfo":{"info_kind":"vlan","info_data":{"protocol":"802.1Q","id":5,"flags":[]}},
             "addr_info":[{"local":"10.0.5.15","prefixlen":24,"scope":"global"}]}]"#
            .to_owned(),
        routes: r#"[{"dst":"default","gateway":"10.0.2.2","flags":[]},
                    {"dst":"10.0.2.0/24","protocol":"kernel","scope":"link"}]"#
            .to_owned(),
        rings: "Ring parameters for eth0:\nPre-set maximums:\nRX:\t\t4096\nTX:\t\t4096\n\
                Current hardware settings:\nRX:\t\t128\nRX Mini:\tn/a\nTX:\t\t256\n"
            .to_owned(),
        features: "Features for eth0:\nrx-checksumming: off\ntx-checksumming: on\n\
                   \ttx-checksum-ipv4: off [fixed]\n\ttx-checksum-ip-generic: on\n"
            .to_owned(),
    }
}

/// The interface as its driver makes it.
fn fresh() -> InterfaceConfig {
    let mut printed = printed();
    printed.addresses = r#"[{"ifname":"eth0","flags":["BROADCAST","MULTICAST"],"mtu":1500,
        "address":"52:54:00:12:34:56","addr_info":[]}]"#
        .to_owned();
    printed.routes = String::new();
    printed.rings = printed.rings.replace("RX:\t\t128", "RX:\t\t256");
    printed.features = printed
        .features
        .replace("rx-checksumming: off", "rx-checksumming: on");
    InterfaceConfig::parse("eth0", &printed).unwrap()
}

fn lines(config: &InterfaceConfig) -> Vec<String> {
    let replay = config.replay(&fresh());
    replay
        .into_iter()
        .map(|(words, _)| words.join(" "))
        .collect()
}

#[test]
fn all_that_was_set_is_set_again() {
    let config = InterfaceConfig::parse("eth0", &printed()).unwrap();
    assert_eq!(
        lines(&config),
        [
            "ip link set dev eth0 address 52:54:00:12:34:57",
            "ip link set dev eth0 mtu 1400",
            "ethtool -G eth0 rx 128",
            "ethtool -K eth0 rx-checksumming off",
            "ip link set dev eth0 promisc on",
            "ip link set dev eth0 up",
            "ip addr replace 10.0.2.15/24 broadcast 10.0.2.255 dev eth0",
            "ip link add link eth0 name eth0.5 type vlan id 5",
            "ip link set dev eth0.5 up",
            "ip addr replace 10.0.5.15/24 dev eth0.5",
            "ip route replace default via 10.0.2.2 dev eth0",
        ]
    );
}

#[test]
fn what_is_there_already_is_not_set_again_and_what_is_lost_is_told() {
    let config = InterfaceConfig::parse("eth0", &printed()).unwrap();
    assert_eq!(config.replay(&config), []);
    assert_eq!(config.lost(&config), [""; 0]);
    assert_eq!(
        config.lost(&fresh()),
        [
            "address 52:54:00:12:34:57 is 52:54:00:12:34:56 now",
            "MTU 1400 is 1500 now",
            "up on is off now",
            "promisc on is off now",
            "rx ring of 128",
            "rx-checksumming off",
            "10.0.2.15/24",
            "VLAN 5 (eth0.5)",
            "route to default",
        ]
    );
}

#[test]
fn an_interface_that_is_down_stays_down() {
    let mut printed = printed();
    printed.addresses = printed
        .addresses
        .replace("\"PROMISC\",\"UP\"", "\"PROMISC\"");
    let config = InterfaceConfig::parse("eth0", &printed).unwrap();
    assert!(
        !lines(&config)
            .iter()
            .any(|line| line == "ip link set dev eth0 up")
    );
}

#[test]
fn what_a_guest_prints_cannot_become_an_option_or_another_command() {
    let mut hostile = printed();
    hostile.addresses = hostile.addresses.replace("\"eth0.5\"", "\"--help\"");
    hostile.routes = r#"[{"dst":"-batch"},{"dst":"1.2.3.4/999"},{"dst":"x;y"}]"#.to_owned();
    hostile.features = "--json: on\na b: on\n-K: off\n".to_owned();
    let config = InterfaceConfig::parse("eth0", &hostile).unwrap();
    for line in lines(&config) {
        assert!(!line.contains("--") && !line.contains("batch"), "{line}");
        assert!(!line.contains("999") && !line.contains(';'), "{line}");
    }
    let mut hostile = printed();
    hostile.addresses = hostile
        .addresses
        .replace("52:54:00:12:34:57", "-52:54:00:12:34:5");
    assert!(InterfaceConfig::parse("eth0", &hostile).is_err());
}

#[test]
fn nonsense_is_refused_with_the_programs_name() {
    for text in ["", "{}", "[1]", "[{\"ifname\":1}]", "[[[["] {
        let printed = Printed {
            addresses: text.to_owned(),
            ..Printed::default()
        };
        let error = InterfaceConfig::parse("eth0", &printed).unwrap_err();
        assert!(error.to_string().contains("ip -j"), "{error}");
    }
    let gone = InterfaceConfig::parse("eth1", &printed()).unwrap_err();
    assert_eq!(gone, ConfigError::NoInterface("eth1".to_owned()));
    let long = Printed {
        features: "x".repeat(MAX_TEXT + 1),
        ..printed()
    };
    assert!(InterfaceConfig::parse("eth0", &long).is_err());
}
