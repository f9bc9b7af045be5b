//! What a guest is made of, as it is asked for, and as `cofferdam run` takes it.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Code, Problem};
use crate::options::{
    DiskSpec, MacAddress, MemorySize, NetOption, NetSpec, NicOption, SerialSpec, VmName,
};
use crate::run::MAX_VCPUS;

/// Guest memory where nobody says.
const DEFAULT_MEMORY: &str = "256M";

/// What a guest is made of: options of `cofferdam run`, of the same names and in the same words.
/// Paths are absolute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSpec {
    /// Its name.
    #[schema(required)]
    pub name: String,
    /// Kernel: ELF vmlinux or bzImage. Needed where there is no snapshot.
    kernel: Option<String>,
    /// Initial RAM file system.
    initrd: Option<String>,
    /// Whole kernel command line, instead of the default one.
    cmdline: Option<String>,
    /// More for the kernel command line, after the rest.
    append: Vec<String>,
    /// Disk images: `PATH` or `PATH,ro`.
    disk: Vec<String>,
    /// NICs on wires: `user`, `tap=NAME` or `unix=PATH[,listen]`, then perhaps `,nic=MODEL` and
    /// `,mac=ADDRESS`.
    net: Vec<String>,
    /// Which NIC those are, `device=NAME[,mac=ADDRESS]`, or `vfio=ADDRESS`.
    nic: Vec<String>,
    /// Ethernet address of the first NIC.
    mac: Option<String>,
    /// Memory, such as `256M`, which it is when not given.
    memory: Option<String>,
    /// Memory in pages of 2 MiB that the host has set aside.
    large_pages: bool,
    /// Number of vCPUs; 1 when not given.
    vcpus: Option<u8>,
    /// Serial console: `control`, `file=PATH` or `unix=PATH`; `control` when not given. Only into
    /// that one can be typed at `/v1/guests/{name}/console`; it is read there whatever it is.
    serial: Option<String>,
    /// End when the guest reboots, instead of rebooting it.
    no_reboot: bool,
    /// Directory of a snapshot to go on from, instead of booting.
    snapshot: Option<String>,
    /// With `snapshot`: begin before the memory is there.
    lazy: bool,
    /// Folders that its process may read and write in, and in no other but the runtime folder; all
    /// but the system's when not given.
    allow_dir: Vec<String>,
}

/// Serial console where nobody says.
const DEFAULT_SERIAL: &str = "control";

/// A spec that can be tried: a name and words for `cofferdam`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The guest's name.
    pub name: VmName,
    /// The words, the same for the same spec.
    pub words: Vec<String>,
}

impl GuestSpec {
    /// Looks whether it can be a guest.
    pub fn check(&self) -> Result<Checked, Problem> {
        let name: VmName = value("name", &self.name)?;
        self.is_consistent()?;
        let mut words = vec!["run".to_owned(), format!("--name={name}")];
        let mut add = |option: &str, value: &str| words.push(format!("--{option}={value}"));
        self.add_payload(&mut add)?;
        self.add_devices(&mut add)?;
        if self.snapshot.is_none() {
            self.add_size(&mut add)?;
        }
        for (option, given) in [
            ("--large-pages", self.large_pages),
            ("--no-reboot", self.no_reboot),
            ("--lazy", self.lazy),
        ] {
            if given {
                words.push(option.to_owned());
            }
        }
        match words.iter().any(|word| word.contains('\0')) {
            true => Err(Problem::new(
                Code::WrongValues,
                "no value can have a NUL in it",
            )),
            false => Ok(Checked { name, words }),
        }
    }

    /// What is given goes together: a guest is booted or goes on from a snapshot.
    fn is_consistent(&self) -> Result<(), Problem> {
        let booted = [
            ("cmdline", self.cmdline.is_some()),
            ("append", !self.append.is_empty()),
            ("memory", self.memory.is_some()),
            ("large_pages", self.large_pages),
            ("vcpus", self.vcpus.is_some()),
        ];
        match (&self.snapshot, booted.iter().find(|(_, given)| *given)) {
            (Some(_), Some((field, _))) => Err(wrong(field, "it is the snapshot's")),
            (None, _) if self.kernel.is_none() => {
                Err(wrong("kernel", "it is needed where there is no snapshot"))
            }
            (None, _) if self.lazy => Err(wrong("lazy", "there is no snapshot")),
            _ => Ok(()),
        }
    }

    /// What is booted, or what it goes on from.
    fn add_payload(&self, add: &mut dyn FnMut(&str, &str)) -> Result<(), Problem> {
        for (field, path) in [
            ("kernel", &self.kernel),
            ("initrd", &self.initrd),
            ("snapshot", &self.snapshot),
        ] {
            is_absolute(field, path.as_deref())?;
            if let Some(path) = path {
                add(field, path);
            }
        }
        if let Some(cmdline) = &self.cmdline {
            add("cmdline", cmdline);
        }
        for more in &self.append {
            add("append", more);
        }
        Ok(())
    }

    /// Disks, networks and the console, and the folders that they are in.
    fn add_devices(&self, add: &mut dyn FnMut(&str, &str)) -> Result<(), Problem> {
        for disk in &self.disk {
            let disk: DiskSpec = value("disk", disk)?;
            is_absolute("disk", disk.path.to_str())?;
            add("disk", &disk.to_string());
        }
        for net in &self.net {
            let net: NetOption = value("net", net)?;
            if let NetSpec::Unix { path, .. } = &net.wire {
                is_absolute("net", path.to_str())?;
            }
            add("net", &net.to_string());
        }
        for folder in &self.allow_dir {
            is_absolute("allow_dir", Some(folder))?;
            add("allow-dir", folder);
        }
        for nic in &self.nic {
            add("nic", &value::<NicOption>("nic", nic)?.to_string());
        }
        if let Some(mac) = &self.mac {
            add("mac", &value::<MacAddress>("mac", mac)?.to_string());
        }
        let serial = self.serial.as_deref().unwrap_or(DEFAULT_SERIAL);
        let serial: SerialSpec = value("serial", serial)?;
        match &serial {
            SerialSpec::Stdio => {
                return Err(wrong("serial", "a guest of the service has no terminal"));
            }
            SerialSpec::Control => {}
            SerialSpec::File(path) | SerialSpec::Unix(path) => {
                is_absolute("serial", path.to_str())?;
            }
        }
        add("serial", &serial.to_string());
        Ok(())
    }

    /// How much memory and how many processors it has.
    fn add_size(&self, add: &mut dyn FnMut(&str, &str)) -> Result<(), Problem> {
        let memory = self.memory.as_deref().unwrap_or(DEFAULT_MEMORY);
        add(
            "memory",
            &value::<MemorySize>("memory", memory)?.to_string(),
        );
        let vcpus = self.vcpus.unwrap_or(1);
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(wrong("vcpus", &format!("there are 1 to {MAX_VCPUS}")));
        }
        add("vcpus", &vcpus.to_string());
        Ok(())
    }
}

fn wrong(field: &str, why: &str) -> Problem {
    Problem::new(Code::WrongValues, format!("{field}: {why}"))
}

fn value<T: FromStr<Err: ToString>>(field: &str, text: &str) -> Result<T, Problem> {
    text.parse()
        .map_err(|error: T::Err| wrong(field, &error.to_string()))
}

/// Guests have no folder of their own that other paths could start from.
pub fn is_absolute(field: &str, path: Option<&str>) -> Result<(), Problem> {
    match path {
        Some(path) if !path.starts_with('/') => Err(wrong(field, "give an absolute path")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn spec(json: &str) -> GuestSpec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_is_asked_for_is_what_run_takes() {
        let whole = r#"{"name":"web","kernel":"/k","initrd":"/i","cmdline":"-x y","append":["a","-b"],
            "disk":["/d,ro"],"net":["user,nic=virtio","unix=/c,listen"],"nic":["e1000","device=lan"],
            "mac":"02:00:00:00:00:07","memory":"65536K","vcpus":2,"serial":"file=/s","no_reboot":true,
            "allow_dir":["/guests"]}"#;
        let checked = spec(whole).check().unwrap();
        assert!(checked.words.contains(&"--memory=64M".to_owned()));
        let words = std::iter::once("cofferdam".to_owned()).chain(checked.words);
        Cli::try_parse_from(words).unwrap();
        let snapshot = r#"{"name":"web","snapshot":"/s","lazy":true,"net":["user"]}"#;
        let checked = spec(snapshot).check().unwrap();
        let words = std::iter::once("cofferdam".to_owned()).chain(checked.words);
        Cli::try_parse_from(words).unwrap();
    }

    #[test]
    fn what_is_left_out_is_what_stands_for_it() {
        let short = spec(r#"{"name":"a","kernel":"/k"}"#).check().unwrap();
        let long = spec(
            r#"{"name":"a","kernel":"/k","memory":"256M","vcpus":1,"append":[],"serial":"control"}"#,
        );
        assert_eq!(short, long.check().unwrap());
    }

    #[test]
    fn what_no_guest_can_be_is_refused_by_field() {
        for (json, says) in [
            (r#"{}"#, "name"),
            (r#"{"name":"../x","kernel":"/k"}"#, "name"),
            (r#"{"name":"a"}"#, "kernel"),
            (r#"{"name":"a","kernel":"k"}"#, "kernel: give an absolute"),
            (r#"{"name":"a","kernel":"/k","disk":["d"]}"#, "disk"),
            (r#"{"name":"a","kernel":"/k","net":["unix=c"]}"#, "net"),
            (r#"{"name":"a","kernel":"/k","net":["vde"]}"#, "net"),
            (r#"{"name":"a","kernel":"/k","nic":["ne2k"]}"#, "nic"),
            (r#"{"name":"a","kernel":"/k","mac":"1"}"#, "mac"),
            (
                r#"{"name":"a","kernel":"/k","allow_dir":["d"]}"#,
                "allow_dir",
            ),
            (r#"{"name":"a","kernel":"/k","memory":"1M"}"#, "memory"),
            (r#"{"name":"a","kernel":"/k","vcpus":0}"#, "vcpus"),
            (r#"{"name":"a","kernel":"/k","serial":"stdio"}"#, "serial"),
            (r#"{"name":"a","kernel":"/k","serial":"file=x"}"#, "serial"),
            (r#"{"name":"a","kernel":"/k","lazy":true}"#, "lazy"),
            (r#"{"name":"a","snapshot":"/s","vcpus":1}"#, "vcpus"),
            (r#"{"name":"a","kernel":"/k\u0000"}"#, "NUL"),
        ] {
            let problem = serde_json::json!(spec(json).check().unwrap_err());
            assert_eq!(problem["code"], "wrong_values", "{json}");
            let detail = problem["detail"].as_str().unwrap();
            assert!(detail.contains(says), "{json}: {detail}");
        }
        serde_json::from_str::<GuestSpec>(r#"{"name":"a","kernle":"/k"}"#).unwrap_err();
    }
}
