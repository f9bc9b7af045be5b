//! An image that a person asks for: the full one, with modules and packages of their choice.

use crate::Error;
use crate::full::full_image;
use crate::kernels::KernelSource;
use crate::modules::normal_name;
use crate::spec::ImageSet;

/// File of a user's image in its folder.
pub const INITRD: &str = "initrd.cpio";

/// Longest name of a module or package, in bytes (`MODULE_NAME_LEN` is 56; no package of Debian's
/// comes near).
const MAX_NAME: usize = 100;

/// What a person wants in an image besides what all have.
#[derive(Clone, Debug, Default)]
pub struct Additions {
    /// Modules of the kernel's package.
    pub modules: Vec<String>,
    /// Packages, whole but for their documentation.
    pub packages: Vec<String>,
}

/// The image of a kernel, in `release` or else its newest, with additions.
///
/// # Errors
/// [`Error::Spec`] for a name that no module or package has, [`Error::NoModule`] for a module that
/// the kernel lacks.
pub fn user_image(
    kernel: &'static KernelSource,
    release: Option<String>,
    additions: Additions,
) -> Result<ImageSet, Error> {
    let Additions { modules, packages } = additions;
    let wrong = |reason: String| Error::Spec {
        image: kernel.name.into(),
        reason,
    };
    for name in &modules {
        if !is_module(name) {
            return Err(wrong(format!(
                "{name:?} is no name of a module, such as null_blk"
            )));
        }
        let is_it = |lacking: &&str| normal_name(lacking) == normal_name(name);
        if kernel.lacks.iter().any(is_it) {
            return Err(Error::NoModule(name.clone()));
        }
    }
    if let Some(name) = packages.iter().find(|name| !is_package(name)) {
        return Err(wrong(format!(
            "{name:?} is no name of a package, such as fio"
        )));
    }
    let mut image = full_image();
    image.file = INITRD.into();
    image.modules.extend(modules);
    image.packages = packages;
    image.packages.sort();
    image.packages.dedup();
    Ok(ImageSet {
        kernel,
        release,
        images: vec![image],
        host_modules: vec![],
    })
}

fn is_module(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    (1..MAX_NAME).contains(&name.len()) && !name.starts_with('-') && name.bytes().all(fits)
}

/// Debian policy, section 5.6.7.
fn is_package(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let fits = |byte: u8| plain(byte) || b"+-.".contains(&byte);
    (2..MAX_NAME).contains(&name.len())
        && name.bytes().next().is_some_and(plain)
        && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(kernel: &str, modules: &[&str], packages: &[&str]) -> Result<ImageSet, String> {
        let strings = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let additions = Additions {
            modules: strings(modules),
            packages: strings(packages),
        };
        let kernel = KernelSource::by_name(kernel).unwrap();
        user_image(kernel, None, additions).map_err(|error| error.to_string())
    }

    #[test]
    fn a_users_image_is_the_full_one_with_what_they_add() {
        let set = image("6.1-amd64", &["zram"], &["fio", "bc", "fio"]).unwrap();
        let [image] = set.images.as_slice() else {
            panic!("{set:?}");
        };
        assert!(image.modules.iter().any(|name| name == "zram"));
        assert!(image.modules.iter().any(|name| name == "null_blk"));
        assert_eq!(image.packages, ["bc", "fio"]);
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "-o", "../x", "a b", "a/b", "\n"] {
            let failed = image("6.1-amd64", &[name], &[]).unwrap_err();
            assert!(failed.contains("no name of a module"), "{name}: {failed}");
        }
        for name in ["", "-o=x", "Fio", "a", "fio=1", "./fio.deb", "fio/sid"] {
            let failed = image("6.1-amd64", &[], &[name]).unwrap_err();
            assert!(failed.contains("no name of a package"), "{name}: {failed}");
        }
    }

    #[test]
    fn a_module_that_the_kernel_lacks_is_not_left_out_silently() {
        let failed = image("6.1-cloud-amd64", &["e1000"], &[]).unwrap_err();
        assert!(failed.contains("no module e1000"), "{failed}");
    }
}
