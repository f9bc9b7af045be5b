//! The file of a driver's new build.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;
use recovery::module_file::{MAX_MODULE_BYTES, ModuleFile};

/// Reads a module's file, so that what is wrong with it is known before a VM is asked.
///
/// # Errors
/// It cannot be read, or is no build of `module`.
pub fn read(path: &Path, module: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // A FIFO that nobody writes to would hold us up for ever; of one there is nothing to read then.
    let open = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = open.and_then(|file| {
        // One byte more than there may be.
        file.take(MAX_MODULE_BYTES + 1).read_to_end(&mut bytes)
    });
    file.with_context(|| format!("cannot read {}", path.display()))?;
    ModuleFile::parse(&bytes)
        .and_then(|file| file.is(module))
        .with_context(|| format!("cannot use {}", path.display()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_no_modules_are_refused_before_a_vm_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e1000.ko");
        assert!(
            read(&path, "e1000")
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
        std::fs::write(&path, "not a module").unwrap();
        let error = format!("{:#}", read(&path, "e1000").unwrap_err());
        assert!(error.contains("no kernel module"), "{error}");
        let fifo = folder.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let error = format!("{:#}", read(&fifo, "e1000").unwrap_err());
        assert!(error.contains("no kernel module"), "{error}");
        let endless = format!("{:#}", read(Path::new("/dev/zero"), "e1000").unwrap_err());
        assert!(endless.contains("at most"), "{endless}");
    }
}
