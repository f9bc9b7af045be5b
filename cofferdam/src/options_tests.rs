//! Values that a person types, right and wrong.

use super::*;

#[test]
fn memory_sizes_have_a_unit_and_a_least_value() {
    assert_eq!("256M".parse::<MemorySize>().unwrap().bytes(), 256 << 20);
    assert_eq!("256".parse::<MemorySize>().unwrap().bytes(), 256 << 20);
    assert_eq!("1g".parse::<MemorySize>().unwrap().bytes(), 1 << 30);
    assert_eq!("65536K".parse::<MemorySize>().unwrap().to_string(), "64M");
    for wrong in [
        "0",
        "0M",
        "1M",
        "",
        "M",
        "-1M",
        "1.5G",
        "256X",
        "99999999999999G",
        "16385K",
    ] {
        assert!(wrong.parse::<MemorySize>().is_err(), "{wrong}");
    }
}

#[test]
fn mac_addresses_are_of_one_station() {
    let mac: MacAddress = "02:cf:00:00:00:0A".parse().unwrap();
    assert_eq!(mac.to_string(), "02:cf:00:00:00:0a");
    for wrong in [
        "",
        "02:cf:00:00:00",
        "02:cf:00:00:00:01:02",
        "2:cf:0:0:0:1",
        "+2:cf:00:00:00:01",
        "01:00:5e:00:00:01",
        "00:00:00:00:00:00",
    ] {
        assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
    }
}

#[test]
fn guests_of_different_names_get_different_addresses() {
    let one = MacAddress::for_name("one");
    assert_eq!(one, MacAddress::for_name("one"));
    assert_ne!(one, MacAddress::for_name("two"));
    assert_eq!(one.to_string().parse::<MacAddress>().unwrap(), one);
}

#[test]
fn nics_are_parsed() {
    let parse = |text: &str| text.parse::<NetOption>().unwrap();
    assert_eq!(
        parse("user"),
        NetOption {
            wire: NetSpec::User,
            nic: None,
            mac: None
        }
    );
    let nic = parse("unix=/tmp/a,b,listen,mac=02:00:00:00:00:09,nic=virtio");
    assert_eq!(nic.wire, parse("unix=/tmp/a,b,listen").wire);
    assert_eq!(nic.nic.unwrap().name(), "virtio");
    assert_eq!(nic.mac.unwrap().0, [2, 0, 0, 0, 0, 9]);
    for wrong in [
        "user,nic=ne2000",
        "user,nic=",
        "user,mac=1",
        "nic=virtio",
        "user,nic=virtio,nic=virtio",
        "",
    ] {
        assert!(wrong.parse::<NetOption>().is_err(), "{wrong}");
    }
}

#[test]
fn wires_are_parsed() {
    assert_eq!("user".parse(), Ok(NetSpec::User));
    assert_eq!("tap=tap0".parse(), Ok(NetSpec::Tap("tap0".to_owned())));
    assert_eq!(
        "unix=/tmp/a,b,listen".parse(),
        Ok(NetSpec::Unix {
            path: "/tmp/a,b".into(),
            listen: true
        })
    );
    for wrong in [
        "",
        "tap",
        "tap=",
        "tap=a/b",
        "tap=abcdefghijklmnop",
        "unix=",
        "vde=x",
    ] {
        assert!(wrong.parse::<NetSpec>().is_err(), "{wrong}");
    }
    let long = format!("unix=/{}", "x".repeat(107));
    assert!(long.parse::<NetSpec>().is_err());
}

#[test]
fn disks_and_consoles_are_parsed() {
    let disk: DiskSpec = "a,b.img,ro".parse().unwrap();
    assert_eq!(
        disk,
        DiskSpec {
            path: "a,b.img".into(),
            read_only: true
        }
    );
    assert!(",ro".parse::<DiskSpec>().is_err());
    assert_eq!("stdio".parse(), Ok(SerialSpec::Stdio));
    assert_eq!("control".parse(), Ok(SerialSpec::Control));
    assert_eq!("file=x".parse(), Ok(SerialSpec::File("x".into())));
    assert!("file=".parse::<SerialSpec>().is_err());
    assert!("pty".parse::<SerialSpec>().is_err());
}

#[test]
fn a_name_cannot_leave_its_folder() {
    assert!("web-1.test".parse::<VmName>().is_ok());
    let long = "x".repeat(65);
    for wrong in [
        "", ".", "..", "../x", "a/b", "-x", ".hidden", "a b", "ä", &long,
    ] {
        assert!(wrong.parse::<VmName>().is_err(), "{wrong}");
    }
}
