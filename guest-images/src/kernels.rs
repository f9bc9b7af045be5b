//! Debian's kernels that images can be built of, by name.

use serde::Serialize;

/// A series of a kernel's packages: the newest of them is taken.
///
/// Debian's names are `linux-image-ABI-FLAVOUR`, the ABI beginning with the kernel's version:
/// `6.1.0-48`, `6.12.117+deb12`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelSource {
    /// What it is called here, and the directory of its images.
    pub name: &'static str,
    /// The numbers that its version begins with.
    pub series: &'static [u32],
    /// Debian's flavour: the end of the package's name.
    pub flavour: &'static str,
    /// The suite of Debian's archive that has it, where a Debian 12 does not know it by its own
    /// lists.
    pub suite: Option<&'static str>,
    /// Modules of the images that this kernel has not.
    pub lacks: &'static [&'static str],
    /// Whether `cargo xtask test` boots it.
    pub tested: bool,
}

/// Drivers of hardware, and of software that stands for some, that clouds do not have.
const NOT_IN_CLOUD: &[&str] = &[
    "e1000",
    "e1000e",
    "8139too",
    "r8169",
    "8139cp",
    "e100",
    "pcnet32",
    "ne2k-pci",
    "xhci-pci",
    "rndis_host",
    "snd-ens1370",
    "snd-intel8x0",
    "snd-pcm-oss",
    "snd-mixer-oss",
    "psmouse",
    "snd",
    "snd_timer",
    "snd_pcm",
    "snd_dummy",
    "snd_pcm_oss",
    "snd_mixer_oss",
    "vcan",
    "vxcan",
    "batman_adv",
];

const fn debian_12(
    name: &'static str,
    series: &'static [u32],
    flavour: &'static str,
) -> KernelSource {
    KernelSource {
        name,
        series,
        flavour,
        suite: None,
        lacks: &[],
        tested: false,
    }
}

/// All of them. The first is the one that everything is built of unless another is named.
pub const KERNELS: [KernelSource; 7] = [
    KernelSource {
        tested: true,
        ..debian_12("6.1-amd64", &[6, 1], "amd64")
    },
    KernelSource {
        lacks: NOT_IN_CLOUD,
        ..debian_12("6.1-cloud-amd64", &[6, 1], "cloud-amd64")
    },
    debian_12("6.1-rt-amd64", &[6, 1], "rt-amd64"),
    // Debian 13's kernel, which Debian 12's security archive has too.
    KernelSource {
        tested: true,
        ..debian_12("6.12-amd64", &[6, 12], "amd64")
    },
    KernelSource {
        lacks: NOT_IN_CLOUD,
        ..debian_12("6.12-cloud-amd64", &[6, 12], "cloud-amd64")
    },
    debian_12("6.12-rt-amd64", &[6, 12], "rt-amd64"),
    KernelSource {
        suite: Some("trixie-backports"),
        // Parts of the kernel's own library there.
        lacks: &["crc32c_generic", "ghash-generic"],
        ..debian_12("7-amd64", &[7], "amd64")
    },
];

/// The kernel that everything is built of unless another is named.
pub const DEFAULT: &KernelSource = &KERNELS[0];

/// Words of an ABI that are no numbers: Debian's releases and their backports.
const ABI_WORDS: [&str; 3] = ["", "deb", "bpo"];

impl KernelSource {
    /// The kernel called `name`.
    ///
    /// # Errors
    /// A line that names those there are.
    pub fn by_name(name: &str) -> Result<&'static Self, String> {
        KERNELS
            .iter()
            .find(|kernel| kernel.name == name)
            .ok_or_else(|| {
                let names: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
                format!(
                    "there is no kernel {name:?}: choose one of {}",
                    names.join(", ")
                )
            })
    }

    /// What a person calls a kernel: its name, with or without `debian:` before it and `-amd64`
    /// behind it (`debian:6.12`, `6.1-cloud`), or a release of one (`6.1.0-48-amd64`), which is
    /// then the second part.
    ///
    /// # Errors
    /// A line that names those there are.
    pub fn wanted(text: &str) -> Result<(&'static Self, Option<String>), String> {
        let name = text.strip_prefix("debian:").unwrap_or(text);
        let short = |kernel: &&Self| kernel.name.strip_suffix("-amd64") == Some(name);
        if let Some(kernel) = KERNELS.iter().find(short) {
            return Ok((kernel, None));
        }
        match KERNELS.iter().find(|kernel| kernel.has_release(name)) {
            Some(kernel) => Ok((kernel, Some(name.to_owned()))),
            None => Self::by_name(name).map(|kernel| (kernel, None)),
        }
    }

    /// Whether everything is built of it unless another is named.
    pub fn is_default(&self) -> bool {
        self == DEFAULT
    }

    /// What the names of its packages begin with.
    pub fn package_prefix(&self) -> String {
        let numbers: Vec<String> = self.series.iter().map(u32::to_string).collect();
        format!("linux-image-{}.", numbers.join("."))
    }

    /// The package's version in numbers, if it is one of this kernel's: `[6, 12, 117, 12]` for
    /// `linux-image-6.12.117+deb12-amd64`.
    fn version(&self, package: &str) -> Option<Vec<u32>> {
        let abi = package
            .strip_prefix("linux-image-")?
            .strip_suffix(self.flavour)?
            .strip_suffix('-')?;
        let known = abi
            .split(|c: char| c.is_ascii_digit() || ".-+".contains(c))
            .all(|word| ABI_WORDS.contains(&word));
        let numbers: Option<Vec<u32>> = abi
            .split(|c: char| !c.is_ascii_digit())
            .filter(|number| !number.is_empty())
            .map(|number| number.parse().ok())
            .collect();
        // A package without an image has a name without the version's last number.
        numbers.filter(|numbers| known && numbers.len() >= 3 && numbers.starts_with(self.series))
    }

    /// Whether a release, such as `6.12.117+deb12-amd64`, is one of this kernel's.
    pub fn has_release(&self, release: &str) -> bool {
        self.version(&format!("linux-image-{release}")).is_some()
    }

    /// The newest of these packages that is one of this kernel's.
    pub fn newest(&self, packages: impl Iterator<Item = String>) -> Option<String> {
        packages
            .filter_map(|name| Some((self.version(&name)?, name)))
            .max()
            .map(|(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn newest(kernel: &str, packages: &[&str]) -> Option<String> {
        let kernel = KernelSource::by_name(kernel).unwrap();
        kernel.newest(packages.iter().map(|name| (*name).to_string()))
    }

    #[test]
    fn newest_package_is_by_number_and_of_its_flavour() {
        let packages = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-57-cloud-amd64",
            "linux-image-6.1.0-58-amd64-dbg",
            "linux-image-6.1.0-59-amd64-unsigned",
            "linux-image-6.1.0-55-rt-amd64",
            "linux-image-6.10.0-60-amd64",
            "linux-image-6.12-amd64",
            "linux-image-6.12.9+deb12-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-6.12.118+deb12-cloud-amd64",
            "linux-image-7.2.12+deb13-amd64",
            "linux-image-7.10.1+deb13-amd64",
            "linux-image-amd64",
        ];
        for (kernel, wanted) in [
            ("6.1-amd64", Some("linux-image-6.1.0-56-amd64")),
            ("6.1-cloud-amd64", Some("linux-image-6.1.0-57-cloud-amd64")),
            ("6.1-rt-amd64", Some("linux-image-6.1.0-55-rt-amd64")),
            ("6.12-amd64", Some("linux-image-6.12.117+deb12-amd64")),
            ("6.12-rt-amd64", None),
            ("7-amd64", Some("linux-image-7.10.1+deb13-amd64")),
        ] {
            assert_eq!(newest(kernel, &packages).as_deref(), wanted, "{kernel}");
        }
    }

    #[test]
    fn names_are_of_one_kernel_each_and_others_are_told_which_there_are() {
        for (index, kernel) in KERNELS.iter().enumerate() {
            assert_eq!(KernelSource::by_name(kernel.name), Ok(&KERNELS[index]));
            assert!(kernel.name.ends_with(kernel.flavour), "{kernel:?}");
        }
        let failed = KernelSource::by_name("5.10").unwrap_err();
        assert!(failed.contains("6.1-amd64, "), "{failed}");
        assert!(failed.contains("6.12-cloud-amd64"), "{failed}");
    }

    #[test]
    fn a_person_names_a_kernel_by_its_series_its_name_or_its_release() {
        for (text, name, release) in [
            ("debian:6.1", "6.1-amd64", None),
            ("6.12", "6.12-amd64", None),
            ("debian:6.1-cloud", "6.1-cloud-amd64", None),
            ("6.12-rt-amd64", "6.12-rt-amd64", None),
            ("6.1.0-48-amd64", "6.1-amd64", Some("6.1.0-48-amd64")),
            (
                "debian:6.12.117+deb12-cloud-amd64",
                "6.12-cloud-amd64",
                Some("6.12.117+deb12-cloud-amd64"),
            ),
        ] {
            let (kernel, found) = KernelSource::wanted(text).unwrap();
            assert_eq!((kernel.name, found.as_deref()), (name, release), "{text}");
        }
        for wrong in ["", "debian:", "5.10", "6.1.0-48-arm64", "../6.1", "-amd64"] {
            let failed = KernelSource::wanted(wrong).unwrap_err();
            assert!(failed.contains("choose one of"), "{wrong}: {failed}");
        }
    }

    #[test]
    fn a_meta_package_has_no_kernel() {
        // `linux-image-6.12-amd64` depends on the newest of 6.12: no image is in it.
        assert_eq!(newest("6.12-amd64", &["linux-image-6.12-amd64"]), None);
    }
}
