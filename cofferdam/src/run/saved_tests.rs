use super::*;

fn config(nets: &[&str]) -> RunConfig {
    let net = |(index, text): (usize, &&str)| {
        let nic = match text.parse::<NetOption>() {
            Ok(NetOption { wire, nic, .. }) => NicSpec::Model {
                model: nic.unwrap_or_default(),
                wire,
            },
            Err(_) => NicSpec::Device(text.strip_prefix("device=").unwrap().parse().unwrap()),
        };
        NetConfig {
            nic,
            mac: Some(MacAddress([2, 0, 0, 0, 0, index as u8 + 1])),
            is_another_wire: false,
            saved_model: None,
        }
    };
    RunConfig {
        name: "web".parse().unwrap(),
        kernel: "/boot/vmlinux".into(),
        initrd: Some("/boot/initrd".into()),
        cmdline: None,
        append: vec!["quiet".to_owned()],
        disks: vec!["/images/root.img,ro".parse().unwrap()],
        nets: nets.iter().enumerate().map(net).collect(),
        mouse: false,
        memory: "256M".parse().unwrap(),
        large_pages: false,
        vcpus: 2,
        serial: SerialSpec::Stdio,
        no_reboot: true,
        restored: None,
        sandbox: MachineSandbox::default(),
        jail: false,
        group: crate::sandbox::GroupOptions::default(),
    }
}

fn from() -> Restored {
    Restored {
        dir: "/snapshots/web".into(),
        lazy: false,
    }
}

fn again(config: &RunConfig, changes: Changes) -> anyhow::Result<RunConfig> {
    let text = serde_json::to_value(SavedVm::new(config)?)?;
    let saved: SavedVm = serde_json::from_value(text)?;
    saved.configure(changes, from())
}

fn macs(config: &RunConfig) -> Vec<MacAddress> {
    config.nets.iter().map(|net| net.mac.unwrap()).collect()
}

#[test]
fn a_vm_goes_on_with_what_it_was_started_with() {
    let before = config(&["user,nic=virtio", "unix=/tmp/cable,listen", "device=lan"]);
    let after = again(&before, Changes::default()).unwrap();
    assert_eq!(after.name, before.name);
    assert_eq!((after.kernel, after.initrd), (before.kernel, before.initrd));
    assert_eq!(after.disks, before.disks);
    assert_eq!(after.memory, before.memory);
    assert_eq!((after.vcpus, after.no_reboot), (2, true));
    for (after, before) in after.nets.iter().zip(&before.nets) {
        assert_eq!(after.nic, before.nic);
        assert_eq!(after.mac, before.mac);
    }
}

#[test]
fn a_clone_has_addresses_of_its_own_where_it_may_meet_others() {
    let before = config(&["user", "tap=t0", "unix=/tmp/cable"]);
    let clone = |name: &str| Changes {
        name: Some(name.parse().unwrap()),
        ..Changes::default()
    };
    let one = macs(&again(&before, clone("one")).unwrap());
    let two = macs(&again(&before, clone("two")).unwrap());
    let old = macs(&before);
    assert_eq!((one[0], two[0]), (old[0], old[0]));
    for other in 1..3 {
        assert!(one[other] != two[other] && one[other] != old[other]);
    }
    let given = Changes {
        nets: vec![
            "user,mac=02:00:00:00:00:09".parse().unwrap(),
            "user".parse().unwrap(),
            "tap=t1".parse().unwrap(),
        ],
        ..clone("three")
    };
    let three = again(&before, given).unwrap();
    assert_eq!(macs(&three)[0].to_string(), "02:00:00:00:00:09");
    assert_eq!(macs(&three)[1], old[1]);
    assert_eq!(three.nets[2].nic.wire(), "tap=t1");
    let others = ["tap=t0", "tap=t1", "unix=/tmp/other"];
    let given = Changes {
        nets: others.iter().map(|wire| wire.parse().unwrap()).collect(),
        ..Changes::default()
    };
    let four = again(&before, given).unwrap();
    let another: Vec<_> = four.nets.iter().map(|net| net.is_another_wire).collect();
    assert_eq!(another, [true, false, false]);
}

#[test]
fn other_hardware_is_refused() {
    let before = config(&["user"]);
    let nets = |text: &[&str]| Changes {
        nets: text.iter().map(|text| text.parse().unwrap()).collect(),
        ..Changes::default()
    };
    for (changes, word) in [
        (nets(&["user", "user"]), "1 NICs"),
        (nets(&["user,nic=virtio"]), "another one"),
        (
            Changes {
                nics: vec!["device=lan".parse().unwrap()],
                ..Changes::default()
            },
            "0 NICs that live elsewhere",
        ),
        (
            Changes {
                disks: vec!["/a".parse().unwrap(), "/b".parse().unwrap()],
                ..Changes::default()
            },
            "1 disks",
        ),
    ] {
        let error = again(&before, changes).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
