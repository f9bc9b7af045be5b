use proptest::prelude::*;

use super::*;

const IDENTITY: PciIdentity = PciIdentity {
    vendor_id: 0x8086,
    device_id: 0x100e,
    revision_id: 2,
    class_code: 0x02_0000,
    subsystem_vendor_id: 0x8086,
    subsystem_id: 0x001e,
};

fn nic() -> ConfigSpace {
    let mut space = ConfigSpace::new(IDENTITY);
    space.add_bar(0, BarSpace::Memory32, 0x2_0000).unwrap();
    space.add_bar(1, BarSpace::Io, 0x40).unwrap();
    space.add_bar(2, BarSpace::Memory64, 0x4000).unwrap();
    space.set_interrupt_pin(InterruptPin::A);
    space
        .add_capability_at(0xdc, 0x01, &[0x22, 0xc8, 0, 0, 0, 0], &[0, 0, 0x03])
        .unwrap();
    space
        .add_capability(0x05, &[0x80, 0, 0, 0, 0, 0], &[0x71, 0, 0xfc, 0xff])
        .unwrap();
    space
}

#[test]
fn header_shows_identity_and_capability_list() {
    let space = nic();
    assert_eq!(space.u32_at(0x00), 0x100e_8086);
    assert_eq!(space.u32_at(0x08), 0x0200_0002);
    assert_eq!(space.u32_at(0x2c), 0x001e_8086);
    assert_eq!(space.u16_at(0x06) & 0x10, 0x10);
    assert_eq!(space.u16_at(0x34) & 0xff, 0xdc);
    assert_eq!(space.u16_at(0xdc), 0xe401);
    assert_eq!(space.u16_at(0xe4), 0x0005);
}

#[test]
fn sizing_a_bar_gives_its_size_and_type() {
    let mut space = nic();
    for (at, expected) in [
        (0x10, 0xfffe_0000),
        (0x14, 0xffff_ffc1),
        (0x18, 0xffff_c004),
        (0x1c, 0xffff_ffff),
    ] {
        space.write(at, &[0xff; 4]);
        assert_eq!(space.u32_at(at), expected, "register at {at:#x}");
    }
    space.write(0x20, &[0xff; 4]);
    space.write(0x30, &[0xff; 4]);
    assert_eq!(
        space.u32_at(0x20),
        0,
        "a register that is not there stays zero"
    );
    assert_eq!(space.u32_at(0x30), 0, "no expansion ROM");
}

#[test]
fn ranges_are_decoded_only_when_enabled_and_assigned() {
    let mut space = nic();
    space.write(0x10, &0xc000_0000u32.to_le_bytes());
    space.write(0x14, &0xc040u32.to_le_bytes());
    space.write(0x1c, &1u32.to_le_bytes());
    assert_eq!(space.decoded(), []);
    space.write(0x04, &[0x01]);
    let io = BarRange {
        bar: 1,
        space: BarSpace::Io,
        address: 0xc040,
        size_bytes: 0x40,
    };
    assert_eq!(space.decoded(), [io]);
    space.write(0x04, &[0x02]);
    let low = BarRange {
        bar: 0,
        space: BarSpace::Memory32,
        address: 0xc000_0000,
        size_bytes: 0x2_0000,
    };
    let high = BarRange {
        bar: 2,
        space: BarSpace::Memory64,
        address: 1 << 32,
        size_bytes: 0x4000,
    };
    assert_eq!(space.decoded(), [low, high]);
    space.write(0x1c, &[0; 4]);
    assert_eq!(space.decoded(), [low]);
}

#[test]
fn status_errors_are_cleared_by_writing_one() {
    let mut space = nic();
    space.set(offset::STATUS, &[0x10, 0xf9]);
    space.set_interrupt_status(true);
    space.write(offset::STATUS, &[0xff, 0x80]);
    assert_eq!(space.u16_at(offset::STATUS), 0x7918);
}

#[test]
fn bad_layouts_are_refused() {
    let mut space = nic();
    assert_eq!(
        space.add_bar(0, BarSpace::Io, 4),
        Err(ConfigError::BarIndex(0))
    );
    assert_eq!(
        space.add_bar(3, BarSpace::Io, 4),
        Err(ConfigError::BarIndex(3))
    );
    assert_eq!(
        space.add_bar(5, BarSpace::Memory64, 16),
        Err(ConfigError::BarIndex(5))
    );
    assert_eq!(
        space.add_bar(6, BarSpace::Io, 4),
        Err(ConfigError::BarIndex(6))
    );
    assert_eq!(
        space.add_bar(4, BarSpace::Io, 24),
        Err(ConfigError::BarSize(24))
    );
    assert_eq!(
        space.add_bar(4, BarSpace::Memory32, 8),
        Err(ConfigError::BarSize(8))
    );
    assert!(
        space.add_capability_at(0x40, 9, &[0; 2], &[]).is_err(),
        "offsets must rise"
    );
    assert!(space.add_capability(9, &[0; 64], &[]).is_err(), "no room");
}

#[test]
fn saved_state_of_another_device_is_refused() {
    let mut other = ConfigSpace::new(PciIdentity {
        device_id: 0x100f,
        ..IDENTITY
    });
    let before = other.save();
    assert_eq!(other.restore(&nic().save()), Err(ConfigError::ForeignState));
    assert_eq!(other.save(), before);
}

proptest! {
    #[test]
    fn guest_writes_change_only_writable_bits(
        writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..40),
        flip in any::<usize>(),
    ) {
        let mut space = nic();
        let power_on = space.save();
        for (at, data) in &writes {
            space.write(*at, data);
            for range in space.decoded() {
                prop_assert_eq!(range.address % range.size_bytes, 0);
                prop_assert!(range.address.checked_add(range.size_bytes - 1).is_some());
            }
        }
        for (at, &original) in power_on.bytes.iter().enumerate() {
            prop_assert_eq!(space.bytes[at] & !space.writable[at], original & !space.writable[at]);
        }
        let saved = space.save();
        let mut other = nic();
        other.restore(&saved).unwrap();
        prop_assert_eq!(other.save(), saved.clone());
        // A change of what nobody can change is refused, and nothing is taken over.
        let mut wrong = saved;
        let at = flip % CONFIG_SPACE_BYTES;
        wrong.bytes[at] ^= 1 << (flip % 8);
        let mut third = nic();
        let changes = third.writable[at] | third.write_one_to_clear[at];
        if changes & 1 << (flip % 8) == 0 && at != usize::from(offset::STATUS) {
            prop_assert_eq!(third.restore(&wrong), Err(ConfigError::ForeignState));
            prop_assert_eq!(third.save(), power_on.clone());
        }
        space.reset();
        prop_assert_eq!(space.save(), power_on);
    }

    #[test]
    fn a_wide_read_equals_its_bytes(at in any::<u16>(), len in 0usize..9) {
        let space = nic();
        let mut wide = vec![0; len];
        space.read(at, &mut wide);
        for (i, byte) in wide.into_iter().enumerate() {
            let mut single = [0];
            space.read(at.saturating_add(i as u16), &mut single);
            prop_assert_eq!(byte, single[0]);
        }
    }
}
