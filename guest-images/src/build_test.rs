//! Whole builds, of small packages made here: no network, no apt.

use std::cell::RefCell;

use agent_protocol::init_config::{BootModule, InitConfig};

use std::path::PathBuf;

use super::*;
use crate::fixtures::*;
use crate::kernels::{KERNELS, KernelSource};
use crate::spec::{ImageSpec, Program};

const RELEASE: &str = "6.1.0-7-amd64";

/// A directory with packages and an agent, in which images can be built.
struct Place {
    directory: tempfile::TempDir,
    said: RefCell<Vec<String>>,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self {
            directory,
            said: RefCell::default(),
        };
        fs::create_dir_all(place.out("packages")).unwrap();
        let elf = small_elf(62);
        let image = bz_image(&xz(&elf), elf.len());
        let module = |name: &str| format!("./lib/modules/{RELEASE}/kernel/{name}.ko");
        let (nic, bus) = (module("net/nic-one"), module("bus"));
        let (nic_file, bus_file) = (module_file(b"depends=bus\0"), module_file(b"depends=\0"));
        let (kernel, config) = (
            format!("./boot/vmlinuz-{RELEASE}"),
            format!("./boot/config-{RELEASE}"),
        );
        place.package(
            &format!("linux-image-{RELEASE}_6.1.1-1_amd64.deb"),
            &deb(
                &format!("Package: linux-image-{RELEASE}\nVersion: 6.1.1-1\n"),
                &[
                    (&kernel, &image),
                    (&config, b"CONFIG_X=y\n"),
                    (&nic, &nic_file),
                    (&bus, &bus_file),
                ],
            ),
        );
        let program = small_elf(62);
        place.package(
            "tool_1.0_amd64.deb",
            &deb(
                "Package: tool\nVersion: 1.0\n",
                &[("./sbin/tool", &program)],
            ),
        );
        fs::write(place.agent(), b"agent").unwrap();
        place
    }

    fn out(&self, path: &str) -> PathBuf {
        self.directory.path().join("out").join(path)
    }

    fn agent(&self) -> PathBuf {
        self.directory.path().join("agent")
    }

    fn package(&self, name: &str, content: &[u8]) {
        fs::write(self.out("packages").join(name), content).unwrap();
    }

    fn build(&self, set: &ImageSet) -> Result<Manifest, Error> {
        self.said.borrow_mut().clear();
        build(
            set,
            &BuildOptions {
                out: self.out(""),
                packages: self.out("packages"),
                agent: self.agent(),
                refresh: false,
                progress: &|line| self.said.borrow_mut().push(line.into()),
            },
        )
    }

    fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.out(path)).unwrap()
    }
}

fn set() -> ImageSet {
    let full = ImageSpec {
        file: "full.cpio".into(),
        init: InitConfig {
            modules: vec![BootModule::new("nic-one")],
            ..InitConfig::default()
        },
        programs: vec![Program::new("tool", "/sbin/tool")],
        ..ImageSpec::default()
    };
    let other = ImageSpec {
        file: "other/small.cpio".into(),
        ..ImageSpec::default()
    };
    ImageSet {
        kernel: crate::kernels::DEFAULT,
        release: None,
        images: vec![full, other],
        host_modules: vec![],
    }
}

/// Paths of an archive with the sizes of their contents.
fn listing(archive: &[u8]) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    let mut input = archive;
    loop {
        let reader = cpio::newc::Reader::new(input).unwrap();
        if reader.entry().is_trailer() {
            return found;
        }
        found.push((
            reader.entry().name().to_string(),
            u64::from(reader.entry().file_size()),
        ));
        input = reader.finish().unwrap();
    }
}

#[test]
fn image_holds_what_was_asked_for() {
    let place = Place::new();
    let manifest = place.build(&set()).unwrap();
    assert_eq!(manifest.kernel_release, RELEASE);
    let packages: Vec<_> = manifest
        .packages
        .iter()
        .map(|p| (p.name.as_str(), p.version.as_str()))
        .collect();
    assert_eq!(
        packages,
        [("linux-image-6.1.0-7-amd64", "6.1.1-1"), ("tool", "1.0")]
    );
    let paths: Vec<_> = manifest.artefacts.iter().map(|a| a.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "vmlinux",
            "vmlinuz",
            "config",
            "modules/bus.ko",
            "modules/nic_one.ko",
            "full.cpio",
            "other/small.cpio",
            "other/vmlinuz",
        ]
    );
    assert_eq!(place.read("vmlinux"), small_elf(62));
    let files: Vec<String> = listing(&place.read("full.cpio"))
        .into_iter()
        .filter(|(_, size)| *size > 0)
        .map(|(path, _)| path)
        .collect();
    let modules = format!("lib/modules/{RELEASE}");
    assert_eq!(
        files,
        [
            "etc/cofferdam/init.json".to_string(),
            "init".into(),
            format!("{modules}/kernel/bus.ko"),
            format!("{modules}/kernel/net/nic-one.ko"),
            format!("{modules}/modules.dep"),
            "sbin/tool".into(),
        ]
    );
    assert!(
        !listing(&place.read("other/small.cpio"))
            .iter()
            .any(|(path, _)| path.contains("modules"))
    );
}

#[test]
fn same_input_gives_the_same_bytes() {
    let (one, other) = (Place::new(), Place::new());
    let hashes = |manifest: Manifest| -> Vec<_> {
        manifest
            .artefacts
            .into_iter()
            .map(|a| (a.path, a.size, a.sha256))
            .collect()
    };
    let (first, second) = (one.build(&set()).unwrap(), other.build(&set()).unwrap());
    assert_eq!(first.inputs, second.inputs);
    assert_eq!(hashes(first), hashes(second));
    assert_eq!(one.read("full.cpio"), other.read("full.cpio"));
}

#[test]
fn second_build_does_nothing() {
    let place = Place::new();
    let first = place.build(&set()).unwrap();
    assert!(!place.said.borrow().is_empty());
    // Nothing of it is needed any more.
    fs::remove_dir_all(place.out("packages")).unwrap();
    assert_eq!(place.build(&set()).unwrap(), first);
    assert!(place.said.borrow().is_empty(), "{:?}", place.said);
}

#[test]
fn new_agent_is_put_into_the_images_without_unpacking_anything_again() {
    let place = Place::new();
    let first = place.build(&set()).unwrap();
    fs::write(place.agent(), b"another agent").unwrap();
    let second = place.build(&set()).unwrap();
    assert_ne!(first.inputs, second.inputs);
    assert!(listing(&place.read("full.cpio")).contains(&("init".into(), 13)));
    assert!(
        place
            .said
            .borrow()
            .iter()
            .all(|line| line.starts_with("writing")),
        "{:?}",
        place.said
    );
}

#[test]
fn artefact_that_was_changed_or_removed_is_made_again() {
    let place = Place::new();
    place.build(&set()).unwrap();
    let good = place.read("full.cpio");
    fs::write(place.out("full.cpio"), b"spoilt").unwrap();
    fs::remove_file(place.out("vmlinux")).unwrap();
    place.build(&set()).unwrap();
    assert!(place.read("full.cpio") == good);
    assert_eq!(place.read("vmlinux"), small_elf(62));
}

#[test]
fn what_an_interrupted_build_left_is_swept_up() {
    let place = Place::new();
    fs::create_dir_all(place.out(".stages/partial-kernel/tree")).unwrap();
    fs::write(place.out(".stages/partial-kernel/tree/half"), "x").unwrap();
    place.build(&set()).unwrap();
    assert!(!place.out(".stages/partial-kernel").exists());
}

#[test]
fn artefact_that_is_not_wanted_any_more_goes_away() {
    let place = Place::new();
    let mut set = set();
    place.build(&set).unwrap();
    set.images.truncate(1);
    place.build(&set).unwrap();
    assert!(!place.out("other/small.cpio").exists());
    assert!(place.out("full.cpio").exists());
}

#[test]
fn damaged_package_fails_and_leaves_no_artefact() {
    let place = Place::new();
    let name = format!("linux-image-{RELEASE}_6.1.1-1_amd64.deb");
    let whole = place.read(&format!("packages/{name}"));
    place.package(&name, &whole[..whole.len() / 2]);
    let failed = place.build(&set()).unwrap_err();
    assert!(matches!(failed, Error::BadPackage { .. }), "{failed}");
    assert!(!place.out("manifest.json").exists());
    assert!(!place.out("vmlinux").exists());
}

#[test]
fn wishes_that_cannot_be_fulfilled_are_named() {
    let place = Place::new();
    let mut wrong = set();
    wrong.images[0].modules.push("absent".into());
    assert!(matches!(place.build(&wrong), Err(Error::NoModule(name)) if name == "absent"));
    let mut wrong = set();
    wrong.images[0]
        .programs
        .push(Program::new("tool", "/bin/absent"));
    assert!(matches!(place.build(&wrong), Err(Error::NoFile(path)) if path == "/bin/absent"));
}

/// A kernel that is said to lack what it has.
static MISJUDGED: KernelSource = KernelSource {
    lacks: &["bus"],
    ..KERNELS[0]
};

#[test]
fn what_a_kernel_is_said_to_lack_is_left_out_only_if_it_does() {
    let place = Place::new();
    let wrong = ImageSet {
        kernel: &MISJUDGED,
        ..set()
    };
    let failed = place.build(&wrong).unwrap_err().to_string();
    assert!(failed.contains("has the module bus"), "{failed}");
    let mut right = set();
    right.kernel = KernelSource::by_name("6.1-cloud-amd64").unwrap();
    let name = "linux-image-6.1.0-7-cloud-amd64";
    let control = format!("Package: {name}\nVersion: 1\n");
    let elf = small_elf(62);
    let files = [
        ("vmlinuz-", bz_image(&xz(&elf), elf.len())),
        ("config-", vec![]),
    ]
    .map(|(kind, content)| (format!("./boot/{kind}6.1.0-7-cloud-amd64"), content));
    let module = module_file(b"depends=\0");
    let nic = "./lib/modules/6.1.0-7-cloud-amd64/kernel/nic-one.ko";
    let package = deb(
        &control,
        &[
            (&files[0].0, &files[0].1),
            (&files[1].0, &files[1].1),
            (nic, &module),
        ],
    );
    place.package(&format!("{name}_1_amd64.deb"), &package);
    right.images[0].modules.push("e1000".into());
    let manifest = place.build(&right).unwrap();
    assert_eq!(manifest.kernel_release, "6.1.0-7-cloud-amd64");
    assert!(!place.out("modules/e1000.ko").exists());
}

#[test]
fn two_builds_at_once_give_one_result() {
    let place = Place::new();
    let (out, agent) = (place.out(""), place.agent());
    let manifests: Vec<Manifest> = std::thread::scope(|scope| {
        let one = || {
            let options = BuildOptions {
                out: out.clone(),
                packages: out.join("packages"),
                agent: agent.clone(),
                refresh: false,
                progress: &|_| (),
            };
            build(&set(), &options).unwrap()
        };
        let builds = [scope.spawn(one), scope.spawn(one)];
        builds.into_iter().map(|b| b.join().unwrap()).collect()
    });
    assert_eq!(manifests[0], manifests[1]);
}

/// A package with a script, a program, a link, data and documentation.
fn whole_package() -> Vec<u8> {
    let elf = small_elf(62);
    let mut tar = tar::Builder::new(Vec::new());
    let files: [(&str, u32, &[u8]); 6] = [
        ("./usr/bin/program", 0o755, &elf),
        ("./usr/bin/script", 0o755, b"#!/bin/sh\n"),
        ("./etc/kit.conf", 0o640, b"a=b\n"),
        ("./usr/share/doc/kit/README", 0o644, b"long"),
        ("./usr/share/man/man1/kit.1", 0o644, b"long"),
        ("./init", 0o755, b"not the agent"),
    ];
    for (path, mode, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, path, content).unwrap();
    }
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    link.set_mode(0o777);
    tar.append_link(&mut link, "./usr/bin/alias", "script")
        .unwrap();
    let control = tar_of(&[("./control", b"Package: kit\nVersion: 2\n")]);
    deb_of(&[
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.xz", xz(&control)),
        ("data.tar.xz", xz(&tar.into_inner().unwrap())),
    ])
}

#[test]
fn a_whole_package_is_in_an_image_without_its_documentation() {
    let place = Place::new();
    place.package("kit_2_amd64.deb", &whole_package());
    let mut set = set();
    set.images[0].packages = vec!["kit".into()];
    let manifest = place.build(&set).unwrap();
    assert!(manifest.packages.iter().any(|used| used.name == "kit"));
    let archive = place.read("full.cpio");
    let mut input = archive.as_slice();
    let mut found = Vec::new();
    loop {
        let mut reader = cpio::newc::Reader::new(input).unwrap();
        if reader.entry().is_trailer() {
            break;
        }
        let (name, mode) = (reader.entry().name().to_string(), reader.entry().mode());
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut content).unwrap();
        found.push((name, mode, content));
        input = reader.finish().unwrap();
    }
    let at = |path: &str| found.iter().find(|(name, ..)| name == path);
    let file = |mode: u32, content: &[u8]| Some((0o100_000 | mode, content.to_vec()));
    let is = |path: &str| at(path).map(|(_, mode, content)| (*mode, content.clone()));
    assert_eq!(is("usr/bin/program"), file(0o755, &small_elf(62)));
    assert_eq!(is("usr/bin/script"), file(0o755, b"#!/bin/sh\n"));
    assert_eq!(is("etc/kit.conf"), file(0o644, b"a=b\n"));
    let link = Some((0o120_777, b"script".to_vec()));
    assert_eq!(is("usr/bin/alias"), link);
    assert_eq!(is("init"), file(0o755, b"agent"));
    assert!(!found.iter().any(|(name, ..)| name.starts_with("usr/share")));
    // The same again, and without it.
    place.build(&set).unwrap();
    assert_eq!(place.read("full.cpio"), archive);
    place.build(&self::set()).unwrap();
    assert!(
        !listing(&place.read("full.cpio"))
            .iter()
            .any(|(name, _)| name == "usr/bin/script")
    );
}

#[test]
fn a_release_that_is_named_is_taken_though_there_is_a_newer_one() {
    let place = Place::new();
    let newer = "6.1.0-8-amd64";
    let elf = small_elf(62);
    let image = bz_image(&xz(&elf), elf.len());
    place.package(
        &format!("linux-image-{newer}_6.1.2-1_amd64.deb"),
        &deb(
            &format!("Package: linux-image-{newer}\nVersion: 6.1.2-1\n"),
            &[
                (&format!("./boot/vmlinuz-{newer}"), image.as_slice()),
                (&format!("./boot/config-{newer}"), b"CONFIG_X=y\n"),
                (
                    &format!("./lib/modules/{newer}/kernel/bus.ko"),
                    &module_file(b"depends=\0"),
                ),
            ],
        ),
    );
    let mut set = set();
    set.images[0].init.modules.clear();
    let newest = place.build(&set).unwrap();
    assert_eq!(newest.kernel_release, newer);
    set.release = Some(RELEASE.into());
    assert_eq!(place.build(&set).unwrap().kernel_release, RELEASE);
}
