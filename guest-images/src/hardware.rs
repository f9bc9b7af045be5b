//! The image for drivers of hardware: what the lab's emulated server has besides what it needs
//! itself, and our own model of a mouse.

use crate::full::full_image;
use crate::spec::ImageSpec;

/// Drivers of network cards, of a disk controller, of a sound card (which two others make one that
/// is played to through a file), and of a mouse, whose events are read from a file.
pub const DRIVERS: &[&str] = &[
    "8139cp",
    "e100",
    "pcnet32",
    "vmxnet3",
    "ne2k-pci",
    "nvme",
    "snd-ens1370",
    "snd-pcm-oss",
    "snd-mixer-oss",
    "psmouse",
    "evdev",
];

/// `initrd-hardware.cpio`: as `initrd.cpio`, with these drivers.
pub fn hardware_image() -> ImageSpec {
    let mut image = ImageSpec {
        file: "initrd-hardware.cpio".into(),
        ..full_image()
    };
    let drivers = DRIVERS.iter().map(|driver| (*driver).to_owned());
    image.modules.extend(drivers);
    image
}
