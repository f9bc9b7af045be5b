//! Layouts, byte by byte, and that any bytes give a value or an error.

use proptest::prelude::*;

use super::*;

fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pairs = digits
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).unwrap());
    pairs
        .map(|pair| u8::from_str_radix(pair, 16).unwrap())
        .collect()
}

fn is<T: Payload + PartialEq + std::fmt::Debug>(value: T, text: &str) {
    let bytes = bytes(text);
    assert_eq!(value.to_bytes(), bytes);
    assert_eq!(T::parse(&bytes), Ok(value));
    for cut in 0..bytes.len() {
        if let Ok(value) = T::parse(&bytes[..cut]) {
            // One without its data.
            assert_eq!(value.to_bytes(), bytes[..cut]);
        }
    }
}

#[test]
fn layouts_are_those_of_the_specification() {
    let header = Header {
        id: 0x1234,
        command: 9,
        size: 0x20,
        flags: Header::FLAG_REPLY | Header::FLAG_ERROR,
        error: 22,
    };
    assert_eq!(
        header.to_bytes().to_vec(),
        bytes("3412 0900 20000000 21000000 16000000")
    );
    assert_eq!(Header::parse(header.to_bytes()), Ok(header));
    let map = DmaMap {
        flags: MAP_READ | MAP_WRITE,
        offset: 0x1000,
        address: 0x2_0000_0000,
        size: 0x3000,
    };
    is(
        map,
        "20000000 03000000 0010000000000000 0000000002000000 0030000000000000",
    );
    let unmap = DmaUnmap {
        flags: UNMAP_ALL,
        address: 1,
        size: 2,
    };
    is(unmap, "18000000 02000000 0100000000000000 0200000000000000");
    let info = DeviceInfo {
        argsz: 16,
        flags: DEVICE_FLAGS_RESET | DEVICE_FLAGS_PCI,
        regions: 9,
        irqs: 5,
    };
    is(info, "10000000 03000000 09000000 05000000");
    let irq = IrqInfo {
        argsz: 16,
        flags: IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED,
        index: 0,
        count: 1,
    };
    is(irq, "10000000 07000000 00000000 01000000");
    let set = |action, data| SetIrqs {
        action,
        data,
        index: 2,
        start: 1,
        count: 3,
    };
    is(
        set(IrqAction::Trigger, IrqData::Events),
        "14000000 24000000 02000000 01000000 03000000",
    );
    is(
        set(IrqAction::Mask, IrqData::None),
        "14000000 09000000 02000000 01000000 03000000",
    );
    let bools = IrqData::Bools(vec![true, false, true]);
    is(
        set(IrqAction::Unmask, bools),
        "17000000 12000000 02000000 01000000 03000000 010001",
    );
}

#[test]
fn layouts_of_accesses_and_states_are_those_of_the_specification() {
    let access = RegionAccess {
        offset: 0x10,
        region: 7,
        count: 2,
        data: vec![0xab, 0xcd],
    };
    is(access.clone(), "1000000000000000 07000000 02000000 abcd");
    is(
        RegionWrites(vec![access]),
        "0100000000000000 1000000000000000 07000000 02000000 abcd000000000000",
    );
    let dma = DmaAccess {
        address: 0x10,
        count: 1,
        data: vec![0xab],
    };
    is(dma, "1000000000000000 0100000000000000 ab");
    is(MigData::new(vec![1, 2]), "0a000000 02000000 0102");
    let feature = Feature {
        argsz: 16,
        flags: FEATURE_SET | FEATURE_MIG_STATE,
        data: MigState(DeviceState::StopCopy).to_bytes(),
    };
    is(feature, "10000000 02000200 03000000 00000000");
    let fds = RegionIoFds {
        argsz: 16,
        index: 1,
        count: 0,
    };
    is(fds, "10000000 00000000 01000000 00000000");
}

#[test]
fn a_region_that_can_be_mapped_in_parts_says_which() {
    let region = RegionInfo {
        argsz: 80,
        flags: 0xf,
        index: 2,
        size: 0x4000,
        offset: 0x1000,
        areas: Some(vec![
            Area {
                offset: 0,
                size: 0x1000,
            },
            Area {
                offset: 0x2000,
                size: 0x2000,
            },
        ]),
    };
    assert_eq!(region.whole(), 80);
    let text = "50000000 0f000000 02000000 20000000 0040000000000000 0010000000000000
                0100 0100 00000000 02000000 00000000
                0000000000000000 0010000000000000 0020000000000000 0020000000000000";
    let whole = bytes(text);
    assert_eq!(region.to_bytes(), whole);
    assert_eq!(RegionInfo::parse(&whole).as_ref(), Ok(&region));
    assert_eq!(region.mappable().unwrap(), [0..0x1000, 0x2000..0x4000]);
    // Too short for its capabilities: they are to be asked for again.
    let cut = RegionInfo::parse(&whole[..32]).unwrap();
    assert_eq!(cut.areas, None);
    // As long as they are not known, nothing of it is mapped, and not all.
    assert_eq!(cut.mappable().unwrap(), []);
    // A list of no areas says that nothing can be, as no list says that all can.
    let mut none = whole[..48].to_vec();
    none[0] = 48;
    none[40] = 0;
    let listed = RegionInfo::parse(&none).unwrap();
    assert_eq!(listed.mappable().unwrap(), []);
    assert_eq!(listed.to_bytes(), none);
    none[12] = 0;
    let not_listed = RegionInfo::parse(&none).unwrap();
    let all = std::iter::once(0..0x4000).collect::<Vec<_>>();
    assert_eq!(not_listed.mappable().unwrap(), all);
    // Lists that go in circles, backwards, or out of the message; areas without end.
    for (at, value) in [
        (12, 31_u32),
        (12, 79),
        (12, 1000),
        (36, 32),
        (36, 33),
        (40, 257),
        (40, 3),
    ] {
        let mut changed = whole.clone();
        changed[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(RegionInfo::parse(&changed).is_err(), "{value} at {at}");
    }
}

#[test]
fn what_is_not_said_of_capabilities_is_the_specifications() {
    let version = |json: &str| Version::parse(&[&[0, 0, 1, 0], json.as_bytes(), &[0]].concat());
    let defaults = Capabilities::default();
    assert_eq!(version("{}").unwrap().capabilities, defaults);
    assert_eq!(
        Version::parse(&[0, 0, 1, 0]).unwrap().capabilities,
        defaults
    );
    assert_eq!(
        (defaults.max_msg_fds, defaults.max_data_xfer_size),
        (1, 1 << 20)
    );
    assert_eq!((defaults.max_dma_maps, defaults.pgsizes), (65535, 4096));
    let some = version(r#"{"capabilities":{"max_msg_fds":8,"migration":{"pgsize":4096}}}"#);
    assert_eq!(some.unwrap().capabilities.max_msg_fds, 8);
    let ours = Version {
        major: 0,
        minor: 1,
        capabilities: defaults,
    };
    assert_eq!(Version::parse(&ours.to_bytes()), Ok(ours));
}

/// Whatever is read is the same when it is written and read again.
fn stays<T: Payload + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(value) = T::parse(bytes) {
        assert_eq!(T::parse(&value.to_bytes()), Ok(value));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_value_or_an_error(
        mut bytes in prop::collection::vec(prop_oneof![0_u8..4, any::<u8>()], 0..120),
        small in any::<bool>(),
    ) {
        if small && let Some(argsz) = bytes.get_mut(..4) {
            argsz.copy_from_slice(&[120, 0, 0, 0]);
        }
        stays::<Version>(&bytes);
        stays::<DmaMap>(&bytes);
        stays::<DmaUnmap>(&bytes);
        stays::<DeviceInfo>(&bytes);
        let _ = RegionInfo::parse(&bytes);
        stays::<RegionIoFds>(&bytes);
        stays::<IrqInfo>(&bytes);
        stays::<SetIrqs>(&bytes);
        stays::<RegionAccess>(&bytes);
        stays::<RegionWrites>(&bytes);
        stays::<DmaAccess>(&bytes);
        stays::<Feature>(&bytes);
        stays::<MigState>(&bytes);
        stays::<MigData>(&bytes);
        if let Some(first) = bytes.first_chunk() {
            let _ = Header::parse(*first);
        }
    }
}
