//! Where the host is: the virtio-console port with our name.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Opens the port named `name`, if the machine has it.
///
/// # Errors
/// `NotFound` when there is none; what the system reports otherwise.
pub fn open_port(name: &str) -> io::Result<File> {
    let device = find_port(Path::new("/sys/class/virtio-ports"), name)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new("/dev").join(device))
}

/// Name of the device of the port named `name`.
fn find_port(class: &Path, name: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir(class)? {
        let entry = entry?;
        // A port without a name has no such file.
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim_end() == name) {
            return Ok(entry.file_name().into());
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("no virtio-console port has the name {name}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        for (device, name) in [("vport0p1", "other\n"), ("vport1p2", "ours\n")] {
            fs::create_dir(class.path().join(device)).unwrap();
            fs::write(class.path().join(device).join("name"), name).unwrap();
        }
        fs::create_dir(class.path().join("vport2p0")).unwrap();
        assert_eq!(
            find_port(class.path(), "ours").unwrap(),
            Path::new("vport1p2")
        );
        assert_eq!(
            find_port(class.path(), "none").unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
