//! Whether a guest that ran on one processor can go on on another: its vendor and its features are
//! looked at; what is dynamic, or this machine's own doing, is not.

use kvm_bindings::kvm_cpuid_entry2;

use super::leaves::Leaves;

/// Registers of a leaf.
type Register = (&'static str, fn(&kvm_cpuid_entry2) -> u32);

const EAX: Register = ("EAX", |entry| entry.eax);
const EBX: Register = ("EBX", |entry| entry.ebx);
const ECX: Register = ("ECX", |entry| entry.ecx);
const EDX: Register = ("EDX", |entry| entry.edx);

/// Words of features (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E): leaf, sub-leaf,
/// register, and the bits of it that follow the guest's own settings or that this machine sets
/// whatever the host has.
const FEATURES: [(u32, u32, Register, u32); 13] = [
    // OSXSAVE, TSC deadline timer, hypervisor, MONITOR.
    (1, 0, ECX, 1 << 27 | 1 << 24 | 1 << 31 | 1 << 3),
    // HTT, APIC on.
    (1, 0, EDX, 1 << 28 | 1 << 9),
    (7, 0, EBX, 0),
    // OSPKE.
    (7, 0, ECX, 1 << 4),
    (7, 0, EDX, 0),
    (7, 1, EAX, 0),
    (7, 1, EDX, 0),
    (7, 2, EDX, 0),
    // Parts of the extended state.
    (0xd, 0, EAX, 0),
    (0xd, 0, EDX, 0),
    // XSAVEOPT, XSAVEC, XSAVES and the like.
    (0xd, 1, EAX, 0),
    // Cores on AMD.
    (0x8000_0001, 0, ECX, 1 << 1),
    (0x8000_0001, 0, EDX, 1 << 9),
];

/// What a guest that was shown `saved` would miss where KVM supports `here`: a part of a sentence.
pub(crate) fn missing(saved: &Leaves, here: &Leaves) -> Option<String> {
    let (was, is) = (vendor(saved), vendor(here));
    if was != is {
        return Some(format!("a processor of {was}; this one is of {is}"));
    }
    let missing = FEATURES
        .iter()
        .filter_map(|(leaf, index, register, ignored)| {
            let (name, value) = *register;
            let bits = |leaves: &Leaves| leaves.get(*leaf, *index).map_or(0, value);
            let lacks = bits(saved) & !bits(here) & !ignored;
            (lacks != 0).then(|| format!("CPUID leaf {leaf:#x}.{index} {name} {lacks:#x}"))
        });
    let missing: Vec<_> = missing.collect();
    (!missing.is_empty())
        .then(|| format!("features that this processor lacks: {}", missing.join(", ")))
}

/// Vendor of a processor (leaf 0), as far as it is text.
pub(crate) fn vendor(leaves: &Leaves) -> String {
    let order: [fn(&kvm_cpuid_entry2) -> u32; 3] = [EBX.1, EDX.1, ECX.1];
    leaves.get(0, 0).map_or_else(String::new, |entry| {
        text(order.iter().map(|register| register(entry)))
    })
}

/// Brand of a processor (leaves 0x8000_0002 to 0x8000_0004), as far as it is text.
pub(crate) fn brand(leaves: &Leaves) -> String {
    let entries = (0x8000_0002..=0x8000_0004).filter_map(|leaf| leaves.get(leaf, 0));
    text(entries.flat_map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]))
}

fn text(words: impl Iterator<Item = u32>) -> String {
    let bytes = words.flat_map(u32::to_le_bytes);
    let printable = bytes.filter(|byte| byte.is_ascii_graphic() || *byte == b' ');
    let text: String = printable.map(char::from).collect();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::leaves::Entry;
    use super::*;

    const INTEL: Entry = (0, 0, [13, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
    const AMD: Entry = (0, 0, [13, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);

    #[test]
    fn a_processor_with_as_much_or_more_will_do() {
        let old = Leaves::of(&[INTEL, (7, 0, [0, 0b0011, 0, 0])]);
        let new = Leaves::of(&[INTEL, (7, 0, [0, 0b0111, 0, 0])]);
        assert_eq!(missing(&old, &old), None);
        assert_eq!(missing(&old, &new), None);
        let lacks = missing(&new, &old).unwrap();
        assert!(lacks.contains("leaf 0x7.0 EBX 0x4"), "{lacks}");
        let nothing = Leaves::of(&[INTEL]);
        assert!(missing(&old, &nothing).is_some());
    }

    #[test]
    fn what_the_guest_or_this_machine_sets_is_not_asked_for() {
        let saved = Leaves::of(&[INTEL, (1, 0, [0, 0, 1 << 27 | 1 << 31, 1 << 28])]);
        assert_eq!(missing(&saved, &Leaves::of(&[INTEL])), None);
    }

    #[test]
    fn vendors_are_told_apart() {
        assert_eq!(vendor(&Leaves::of(&[INTEL])), "GenuineIntel");
        let missing = missing(&Leaves::of(&[INTEL]), &Leaves::of(&[AMD])).unwrap();
        assert!(
            missing.contains("GenuineIntel") && missing.contains("AuthenticAMD"),
            "{missing}"
        );
    }

    #[test]
    fn brands_are_text_only() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let brand = brand(&Leaves::of(&[
            (
                0x8000_0002,
                0,
                [word(b" Tes"), word(b"t\x1b\0\0"), word(b" CPU"), 0],
            ),
            (0x8000_0003, 0, [0; 4]),
        ]));
        assert_eq!(brand, "Test CPU");
    }
}
