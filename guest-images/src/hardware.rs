//! The image for drivers of hardware: what the lab's emulated server has besides what it needs
//! itself, and our own model of a mouse.

use crate::full::full_image;
use crate::spec::ImageSpec;

/// Drivers of network cards, of a disk controller, of a USB controller with a network adapter behind
/// it, of sound cards (which two others make ones that are played to through a file), and of a
/// mouse, whose events are read from a file.
pub const DRIVERS: &[&str] = &[
    "8139cp",
    "e100",
    "pcnet32",
    "vmxnet3",
    "ne2k-pci",
    "nvme",
    "xhci-pci",
    "rndis_host",
    "snd-ens1370",
    "snd-intel8x0",
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
