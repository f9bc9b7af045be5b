use proptest::prelude::*;

use super::*;
use crate::pci::config::Command;

const ADDRESS: &str = "0000:00:02.0";

/// Configuration space and registers of an 82574L, as its data sheet (section 9) has them: power
/// management at 0xc8, MSI at 0xd0, PCI Express at 0xe0, MSI-X at 0xa0.
fn intel_82574l() -> ([u8; CONFIG_SPACE_BYTES], [u64; BAR_COUNT]) {
    let mut bytes = [0; CONFIG_SPACE_BYTES];
    let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
    put(0, &[0x86, 0x80, 0xd3, 0x10, 0x03, 0x00, 0x10, 0x00]);
    put(8, &[0x02, 0x00, 0x00, 0x02]);
    put(0x10, &0xfebc_0000_u32.to_le_bytes());
    put(0x14, &0xfeba_0000_u32.to_le_bytes());
    put(0x18, &0x0000_c001_u32.to_le_bytes());
    put(0x1c, &0xfebe_0000_u32.to_le_bytes());
    put(0x2c, &[0x86, 0x80, 0x1f, 0xa0]);
    put(0x30, &[1]);
    put(0x34, &[0xc8, 0, 0, 0]);
    put(0x3c, &[10, 1]);
    put(0xc8, &[0x01, 0xd0, 0x22, 0xc8, 0x0b, 0x21, 0x00, 0x00]);
    put(0xd0, &[0x05, 0xe0, 0x80, 0x00]);
    put(0xe0, &[0x10, 0xa0, 0x01, 0x00, 0xc1, 0x8c, 0x00, 0x10]);
    put(0xe8, &[0x10, 0x28, 0x00, 0x00, 0x11, 0x6c, 0x03, 0x00]);
    put(0xf0, &[0x40, 0x00, 0x11, 0x10]);
    put(
        0xa0,
        &[0x11, 0x00, 0x04, 0x00, 0x03, 0, 0, 0, 0x03, 0x20, 0, 0],
    );
    (bytes, [0x2_0000, 0x2_0000, 32, 0x4000, 0, 0])
}

fn view(bytes: &[u8; CONFIG_SPACE_BYTES], bars: [u64; BAR_COUNT]) -> Result<GuestView, VfioError> {
    HostView { bytes, bars }.for_guest(ADDRESS.parse().unwrap())
}

/// Offsets of the capabilities that a guest finds, with their IDs.
fn found(config: &ConfigSpace) -> Vec<(u8, u8)> {
    let mut all = Vec::new();
    let mut at = config.u16_at(offset::CAPABILITIES_POINTER) as u8;
    while at != 0 && all.len() < 64 {
        let [id, next] = config.u16_at(at.into()).to_le_bytes();
        all.push((at, id));
        at = next;
    }
    all
}

#[test]
fn a_guest_sees_what_is_safe_of_an_82574l_where_it_is() {
    let (bytes, bars) = intel_82574l();
    let mut view = view(&bytes, bars).unwrap();
    let config = &mut view.config;
    assert_eq!(config.u32_at(offset::VENDOR_ID), 0x10d3_8086);
    assert_eq!(config.u32_at(offset::REVISION_ID), 0x0200_0002);
    assert_eq!(config.u32_at(offset::SUBSYSTEM_VENDOR_ID), 0xa01f_8086);
    assert_eq!(config.command(), Command::empty(), "as at power-on");
    assert_eq!(config.u32_at(offset::EXPANSION_ROM), 0, "hidden");
    // MSI is hidden.
    assert_eq!(found(config), [(0xa0, 0x11), (0xc8, 0x01), (0xe0, 0x10)]);
    assert_eq!((view.pmcsr, view.has_pin), (Some(0xcc), true));
    let msix = view.msix.unwrap();
    assert_eq!((msix.vectors, msix.capability), (5, 0xa0));
    let layout = MsixLayout {
        bar: 3,
        table_offset: 0,
        pba_bar: 3,
        pba_offset: 0x2000,
    };
    assert_eq!(msix.layout, layout);
    // The power state can be written, PME is not there; that registers outlive a sleep is the
    // function's.
    config.write(0xcc, &[0xff, 0xff]);
    assert_eq!((config.u16_at(0xca), config.u16_at(0xcc)), (0x0022, 0x000b));
    // An endpoint of the root complex that cannot be reset alone, without a link.
    assert_eq!(config.u16_at(0xe2), 0x0091);
    assert_eq!(config.u32_at(0xe4), 0x0000_8cc1);
    assert_eq!((config.u32_at(0xec), config.u32_at(0xf0)), (0, 0));
    // Registers have the function's sizes.
    for (bar, mask) in [
        (0, 0xfffe_0000),
        (1, 0xfffe_0000),
        (2, 0xffff_ffe1),
        (3, 0xffff_c000_u32),
    ] {
        let at = offset::BAR0 + 4 * bar;
        config.write(at, &[0xff; 4]);
        assert_eq!(config.u32_at(at), mask, "register {bar}");
    }
}

#[test]
fn a_register_of_64_bits_takes_two() {
    let (mut bytes, _) = intel_82574l();
    bytes[0x10] = 0x0c;
    bytes[0x34] = 0;
    let mut view = view(&bytes, [1 << 32, 7, 0, 0, 0, 0]).unwrap();
    view.config.write(offset::BAR0, &[0xff; 8]);
    assert_eq!(view.config.u32_at(offset::BAR0), 4);
    assert_eq!(view.config.u32_at(offset::BAR0 + 4), 0xffff_ffff);
}

#[test]
fn functions_that_contradict_themselves_are_refused() {
    let error = |change: &dyn Fn(&mut [u8; CONFIG_SPACE_BYTES], &mut [u64; BAR_COUNT])| {
        let (mut bytes, mut bars) = intel_82574l();
        change(&mut bytes, &mut bars);
        view(&bytes, bars).unwrap_err().to_string()
    };
    assert!(error(&|bytes, _| bytes[0x0e] = 1).contains("a bridge"));
    assert!(error(&|bytes, _| bytes[0xa4] = 7).contains("MSI-X table"));
    assert!(error(&|_, bars| bars[3] = 0x40).contains("MSI-X table"));
    assert!(error(&|_, bars| bars[0] = 3 << 16).contains("0x30000"));
    assert!(error(&|_, bars| bars[0] = u64::MAX).contains("base address register"));
    // The capability of PCI Express would reach over the end.
    assert!(error(&|bytes, _| bytes[0xe2] = 2).contains("capability"));
}

#[test]
fn a_list_of_capabilities_that_is_a_circle_ends() {
    let (mut bytes, bars) = intel_82574l();
    bytes[0xa1] = 0xc8;
    let view = view(&bytes, bars).unwrap();
    assert_eq!(found(&view.config).len(), 3);
}

proptest! {
    #[test]
    fn whatever_a_function_says_is_laid_out_or_refused(
        changes in prop::collection::vec((0..CONFIG_SPACE_BYTES, any::<u8>()), 0..40),
        sizes in prop::collection::vec((0..BAR_COUNT, 0u32..64), 0..4),
    ) {
        let (mut bytes, mut bars) = intel_82574l();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        for (bar, shift) in sizes {
            bars[bar] = 1 << shift;
        }
        if let Ok(view) = view(&bytes, bars) {
            let capabilities = found(&view.config);
            prop_assert!(capabilities.len() <= 3);
            prop_assert!(capabilities.iter().all(|(_, id)| [0x01, 0x10, 0x11].contains(id)));
            if let Some(msix) = view.msix {
                let table = u64::from(msix.layout.table_offset) + 16 * u64::from(msix.vectors);
                prop_assert!(table <= bars[usize::from(msix.layout.bar)]);
            }
        }
    }
}
