//! Loading and removing kernel modules.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use agent_protocol::message::{Done, ModuleSource, Stamp};

use crate::fail::{Context, Result, error};
use crate::sys::stamp;

/// When a system call began and ended.
pub type Span = (Stamp, Stamp);

/// Loads a module. For a name, what it depends on is loaded before; the times are of the module
/// itself.
///
/// # Errors
/// When there is no such module or the kernel refuses it (`EEXIST`: it is loaded already).
pub fn load(source: &ModuleSource, params: &str) -> Result<Span> {
    let text = CString::new(params).map_err(|_| error("module parameters with a zero byte"))?;
    match source {
        ModuleSource::Image(image) => {
            let begin = stamp();
            rustix::system::init_module(&image.0, &text)
                .context(|| "load the module given".into())?;
            Ok((begin, stamp()))
        }
        ModuleSource::Path(path) => insert(Path::new(path), &text),
        ModuleSource::Name(name) => {
            let (directory, list) = modules_dep()?;
            let Some((module, needs)) = find(&list, name) else {
                return Err(error(format!(
                    "there is no module {name} in {}",
                    directory.display()
                )));
            };
            for needed in needs {
                match insert(&directory.join(needed), c"") {
                    Err(error) if error.errno == Some(libc::EEXIST) => {}
                    other => drop(other?),
                }
            }
            insert(&directory.join(module), &text)
        }
    }
}

/// Loads a module unless it is loaded already.
///
/// # Errors
/// As [`load`].
pub fn ensure(name: &str, params: &str) -> Result<()> {
    match load(&ModuleSource::Name(name.into()), params) {
        Err(error) if error.errno == Some(libc::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

fn insert(path: &Path, params: &std::ffi::CStr) -> Result<Span> {
    let file = File::open(path).context(|| format!("open {}", path.display()))?;
    let begin = stamp();
    rustix::system::finit_module(&file, params, 0)
        .context(|| format!("load {}", path.display()))?;
    Ok((begin, stamp()))
}

/// Removes a module.
///
/// # Errors
/// When it is not loaded or in use.
pub fn remove(name: &str) -> Result<Span> {
    let text = CString::new(normal(name)).map_err(|_| error("a module name with a zero byte"))?;
    let begin = stamp();
    rustix::system::delete_module(&text, libc::O_NONBLOCK)
        .context(|| format!("remove module {name}"))?;
    Ok((begin, stamp()))
}

/// The result of a load or a removal.
pub fn done((begin, end): Span) -> Done {
    Done::Module { begin, end }
}

/// Directory of the running kernel's modules, and its `modules.dep`.
fn modules_dep() -> Result<(PathBuf, String)> {
    let release = rustix::system::uname();
    let directory = Path::new("/lib/modules").join(release.release().to_string_lossy().as_ref());
    let file = directory.join("modules.dep");
    let list = fs::read_to_string(&file).context(|| format!("read {}", file.display()))?;
    Ok((directory, list))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The module's path and the paths of what has to be loaded before it, in order.
fn find<'a>(list: &'a str, name: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let name = normal(name);
    list.lines().find_map(|line| {
        let (path, needs) = line.split_once(':')?;
        let file = path.rsplit('/').next()?;
        if normal(file.strip_suffix(".ko")?) != name {
            return None;
        }
        Some((path, needs.split_whitespace().rev().collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_are_loaded_from_right_to_left() {
        let list = "kernel/kvm/kvm-amd.ko: kernel/kvm/kvm.ko kernel/virt/irqbypass.ko\nkernel/kvm/kvm.ko:\n";
        let needs = vec!["kernel/virt/irqbypass.ko", "kernel/kvm/kvm.ko"];
        assert_eq!(
            find(list, "kvm_amd"),
            Some(("kernel/kvm/kvm-amd.ko", needs.clone()))
        );
        assert_eq!(
            find(list, "kvm-amd"),
            Some(("kernel/kvm/kvm-amd.ko", needs))
        );
        assert_eq!(find(list, "kvm"), Some(("kernel/kvm/kvm.ko", vec![])));
        assert_eq!(find(list, "vm"), None);
    }

    #[test]
    fn kernel_refusal_carries_its_number() {
        let failed = remove("no_such_module_here").unwrap_err();
        assert!(
            matches!(
                failed.errno,
                Some(libc::ENOENT | libc::EPERM | libc::ENOSYS)
            ),
            "{failed:?}"
        );
        assert!(failed.message.contains("no_such_module_here"));
    }
}
