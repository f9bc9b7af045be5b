use std::os::unix::fs::symlink;

use super::*;
use crate::vfio::error::VfioError;

/// A sysfs of files: writes arrive, and nothing comes of them.
struct Fake {
    folder: tempfile::TempDir,
    sysfs: Sysfs,
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

impl Fake {
    /// A host with an IOMMU, `vfio-pci` and no function.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        for path in ["bus/pci/devices", "bus/pci/drivers/vfio-pci", "vfio"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        fs::write(root.join("bus/pci/drivers_probe"), "").unwrap();
        let sysfs = Sysfs {
            groups: root.join("vfio"),
            root,
        };
        Self { folder, sysfs }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn of(&self, function: &str, file: &str) -> PathBuf {
        self.path(&format!("bus/pci/devices/{function}/{file}"))
    }

    fn text(&self, path: PathBuf) -> String {
        fs::read_to_string(path).unwrap()
    }

    fn add(&self, function: &str, class: &str, driver: Option<&str>, group: Option<u32>) {
        fs::create_dir_all(self.of(function, "")).unwrap();
        fs::write(self.of(function, "class"), class).unwrap();
        fs::write(self.of(function, "driver_override"), "(null)\n").unwrap();
        if let Some(driver) = driver {
            let folder = self.path(&format!("bus/pci/drivers/{driver}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("unbind"), "").unwrap();
            symlink(folder, self.of(function, "driver")).unwrap();
        }
        if let Some(group) = group {
            let devices = self.path(&format!("kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&devices).unwrap();
            symlink(self.of(function, ""), devices.join(function)).unwrap();
            symlink(devices.parent().unwrap(), self.of(function, "iommu_group")).unwrap();
        }
    }

    fn error(&self, function: &str, force: bool) -> String {
        let error = self.sysfs.bind(address(function), force).unwrap_err();
        error.to_string()
    }

    fn untouched(&self, function: &str) {
        assert_eq!(self.text(self.of(function, "driver_override")), "(null)\n");
        assert_eq!(self.text(self.path("bus/pci/drivers_probe")), "");
    }
}

const NIC: &str = "0000:00:02.0";

#[test]
fn what_cannot_be_given_away_is_left_alone() {
    let fake = Fake::new();
    assert!(fake.error(NIC, true).contains("no PCI function"));
    fake.add(NIC, "0x020000\n", Some("e1000e"), None);
    assert!(fake.error(NIC, true).contains("no IOMMU"));
    fake.untouched(NIC);
    fake.add("0000:00:1c.0", "0x060400\n", Some("pcieport"), Some(3));
    assert!(fake.error("0000:00:1c.0", true).contains("a bridge"));
    fake.untouched("0000:00:1c.0");
}

#[test]
fn a_function_in_use_is_not_taken_without_force() {
    let fake = Fake::new();
    fake.add(NIC, "0x020000\n", Some("virtio-pci"), Some(1));
    fs::create_dir_all(fake.of(NIC, "virtio0/net/eth7")).unwrap();
    fs::create_dir_all(fake.path("class/net/eth7")).unwrap();
    let flags = fake.path("class/net/eth7/flags");
    fs::write(&flags, "0x1003\n").unwrap();
    assert!(fake.error(NIC, false).contains("interface eth7 is up"));
    fake.untouched(NIC);
    // Down, it is tried; no kernel is behind these files, so it is put back.
    fs::write(&flags, "0x1002\n").unwrap();
    assert!(fake.error(NIC, false).contains("does not take"));
    let disk = "0000:00:1f.2";
    fake.add(disk, "0x010601\n", Some("ahci"), Some(5));
    assert!(fake.error(disk, false).contains("a storage controller"));
    assert!(fake.error(disk, true).contains("does not take"));
}

#[test]
fn a_function_that_vfio_pci_does_not_take_is_given_back() {
    let fake = Fake::new();
    fake.add(NIC, "0x020000\n", Some("e1000e"), Some(1));
    assert!(fake.error(NIC, false).contains("does not take"));
    assert!(fake.text(fake.of(NIC, "driver_override")).starts_with("\n"));
    assert_eq!(fake.text(fake.path("bus/pci/drivers_probe")), NIC);
    assert_eq!(fake.text(fake.of(NIC, "driver/unbind")), NIC);
}

#[test]
fn without_the_module_nothing_is_tried() {
    let fake = Fake::new();
    fake.add(NIC, "0x020000\n", None, Some(1));
    fs::remove_dir(fake.path("bus/pci/drivers/vfio-pci")).unwrap();
    assert!(fake.error(NIC, false).contains("modprobe vfio-pci"));
    fake.untouched(NIC);
}

#[test]
fn binding_twice_changes_nothing_and_others_of_the_group_are_named() {
    let fake = Fake::new();
    fake.add(NIC, "0x020000\n", Some(DRIVER), Some(1));
    let bound = fake.sysfs.bind(address(NIC), false).unwrap();
    assert_eq!((bound.from, bound.group), (Some(DRIVER.into()), Some(1)));
    fake.untouched(NIC);
    fake.add("0000:00:02.1", "0x020000\n", Some("e1000e"), Some(1));
    fake.add("0000:00:02.2", "0x020000\n", None, Some(1));
    fake.add("0000:00:02.3", "0x020000\n", Some(DRIVER), Some(1));
    let others = fake.sysfs.others_of_group(1, address(NIC));
    assert_eq!(others, [("0000:00:02.1".into(), "e1000e".into())]);
}

#[test]
fn unbinding_is_for_what_vfio_pci_has() {
    let fake = Fake::new();
    fake.add(NIC, "0x020000\n", Some("e1000e"), Some(1));
    let error = fake.sysfs.unbind(address(NIC), true).unwrap_err();
    assert!(error.to_string().contains("but to e1000e"), "{error}");
    fake.untouched(NIC);
    let other = "0000:00:03.0";
    fake.add(other, "0x020000\n", Some(DRIVER), Some(2));
    fake.sysfs.unbind(address(other), false).unwrap();
    assert_eq!(fake.text(fake.of(other, "driver/unbind")), other);
    assert_eq!(fake.text(fake.path("bus/pci/drivers_probe")), other);
    assert!(
        fake.text(fake.of(other, "driver_override"))
            .starts_with("\n")
    );
}

/// Which functions have to be given away too is said, and only those.
#[test]
fn a_group_that_others_are_in_is_refused_with_their_names() {
    let fake = Fake::new();
    fake.add("0000:00:02.0", "0x020000", Some("vfio-pci"), Some(7));
    fake.add("0000:00:02.1", "0x040300", Some("snd_hda_intel"), Some(7));
    fake.add("0000:00:02.2", "0x020000", Some("vfio-pci"), Some(7));
    fake.add("0000:00:02.3", "0x0c0500", None, Some(7));
    fake.add("0000:00:03.0", "0x020000", Some("e1000e"), Some(8));
    fake.add("0000:00:02.4", "0x0c8000", Some("xhci_hcd"), Some(7));
    let not_viable = |function, group| {
        let others = fake.sysfs.others_of_group(group, address(function));
        VfioError::not_viable(address(function), group, &others).to_string()
    };
    let said = |function| not_viable(function, 7);
    assert_eq!(
        said("0000:00:02.0"),
        "0000:00:02.0 cannot be told from 0000:00:02.1 (snd_hda_intel), 0000:00:02.4 (xhci_hcd) by the IOMMU (group \
         7): these must be given away, or have no driver, too"
    );
    // It has let go meanwhile.
    let alone = not_viable("0000:00:03.0", 8);
    assert!(alone.contains("another function"), "{alone}");
}
