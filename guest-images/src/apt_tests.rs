//! Packages, with programs in place of apt's.

use super::*;
use crate::kernels::DEFAULT;

/// A package with this name and dependencies.
fn package(name: &str, depends: &str) -> Vec<u8> {
    let control = format!("Package: {name}\nVersion: 1\nDepends: {depends}\n");
    crate::fixtures::deb(&control, &[])
}

#[test]
fn packages_that_are_here_need_no_apt() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = package("linux-image-6.1.0-1-amd64", "kmod");
    for (file, content) in [
        (
            "linux-image-6.1.0-1-amd64_6.1.2_amd64.deb",
            kernel.as_slice(),
        ),
        ("libc6_2.36-9_amd64.deb", b""),
    ] {
        std::fs::write(directory.path().join(file), content).unwrap();
    }
    let said = std::cell::RefCell::new(Vec::new());
    let progress = |line: &str| said.borrow_mut().push(line.to_string());
    let packages = Packages::open(directory.path(), &progress).unwrap();
    let found = packages.kernel(DEFAULT, None).unwrap();
    assert_eq!(found.release, "6.1.0-1-amd64");
    assert_eq!(found.files.len(), 1);
    assert_eq!(
        packages.fetch(&["libc6"]).unwrap(),
        [directory.path().join("libc6_2.36-9_amd64.deb")]
    );
    assert_eq!(said.borrow().len(), 0);
}

/// A kernel of another suite, whose package is empty and has parts: its lists are asked for once
/// and by themselves.
#[test]
fn kernel_of_another_suite_comes_with_its_parts_out_of_lists_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let made = directory.path().join("made");
    std::fs::create_dir(&made).unwrap();
    let release = "7.3.4+deb13-amd64";
    for (name, depends) in [
        (
            format!("linux-image-{release}"),
            format!("initramfs | other, linux-binary-{release} (= 1), linux-base (>= 4)"),
        ),
        (format!("linux-binary-{release}"), String::new()),
    ] {
        let file = made.join(format!("{name}_1_amd64.deb"));
        std::fs::write(file, package(&name, &depends)).unwrap();
    }
    let script = format!(
        r#"case "$*" in
        *indextargets*) echo http://archive.test/debian/ ;;
        *pkgnames*) case "$*" in *Dir::State::Lists=*) echo linux-image-{release} ;; esac ;;
        *download*) for name; do :; done; cp {}/"$name"_* . ;;
        esac"#,
        made.display()
    );
    let packages = with_apt(directory.path(), &script, &|_| ());
    let kernel = KernelSource::by_name("7-amd64").unwrap();
    for _ in 0..2 {
        let found = packages.kernel(kernel, None).unwrap();
        assert_eq!(found.release, release);
        let names: Vec<_> = found.files.iter().filter_map(|f| file_package(f)).collect();
        assert_eq!(
            names,
            [
                format!("linux-image-{release}"),
                format!("linux-binary-{release}")
            ]
        );
    }
    let asked = log(directory.path());
    assert_eq!(asked.len(), 4, "{asked:#?}");
    let sources = directory
        .path()
        .join("packages/suites/trixie-backports/sources.list");
    assert_eq!(
        std::fs::read_to_string(sources).unwrap(),
        "deb http://archive.test/debian/ trixie-backports main\n"
    );
    // Another kernel's packages stay when this one's are asked for anew.
    packages.refresh(DEFAULT).unwrap();
    assert!(
        packages
            .find(&format!("linux-binary-{release}"))
            .unwrap()
            .is_some()
    );
    packages.refresh(kernel).unwrap();
    assert!(
        packages
            .find(&format!("linux-binary-{release}"))
            .unwrap()
            .is_none()
    );
}

/// Programs in place of apt's: each writes its name and arguments to `log`, then runs `script`.
fn with_apt<'a>(directory: &Path, script: &str, progress: &'a dyn Fn(&str)) -> Packages<'a> {
    use std::os::unix::fs::PermissionsExt;
    let apt = directory.join("apt");
    let log = directory.join("log");
    std::fs::write(
        &apt,
        format!("#!/bin/sh\necho \"$*\" >>{}\n{script}\n", log.display()),
    )
    .unwrap();
    std::fs::set_permissions(&apt, std::fs::Permissions::from_mode(0o755)).unwrap();
    let packages = Packages::open(&directory.join("packages"), progress).unwrap();
    Packages {
        apt_get: apt.clone(),
        apt_cache: apt,
        ..packages
    }
}

fn log(directory: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(directory.join("log")).unwrap();
    text.lines().map(str::to_string).collect()
}

#[test]
fn unknown_package_is_asked_for_again_after_an_update_and_then_named() {
    let directory = tempfile::tempdir().unwrap();
    let script = r#"case "$*" in *download*) echo "E: Unable to locate package nosuch" >&2; exit 100;; esac"#;
    let packages = with_apt(directory.path(), script, &|_| ());
    let failed = packages.fetch(&["nosuch"]).unwrap_err().to_string();
    assert_eq!(
        failed,
        "package nosuch cannot be fetched: Unable to locate package nosuch"
    );
    let download = "-q -o APT::Sandbox::User=root download nosuch";
    assert_eq!(log(directory.path()), [download, "-q update", download]);
}

#[test]
fn downloaded_package_is_kept_and_asked_for_once() {
    let directory = tempfile::tempdir().unwrap();
    let script = r#"case "$*" in *download*) echo deb >libx1_2.0_amd64.deb;; esac"#;
    let packages = with_apt(directory.path(), script, &|_| ());
    for _ in 0..2 {
        let file = packages.fetch(&["libx1"]).unwrap().remove(0);
        assert_eq!(std::fs::read(file).unwrap(), b"deb\n");
    }
    assert_eq!(log(directory.path()).len(), 1);
}

#[test]
fn machine_without_kernels_or_without_apt_is_told_what_it_lacks() {
    let directory = tempfile::tempdir().unwrap();
    let packages = with_apt(directory.path(), "true", &|_| ());
    let failed = packages.newest_kernel(DEFAULT).unwrap_err().to_string();
    assert!(failed.contains("is this Debian 12"), "{failed}");
    let packages = Packages {
        apt_cache: "/no/such/program".into(),
        ..packages
    };
    let failed = packages.newest_kernel(DEFAULT).unwrap_err().to_string();
    assert!(failed.contains("apt-get"), "{failed}");
}

#[test]
fn failed_update_says_what_it_needs() {
    let directory = tempfile::tempdir().unwrap();
    let packages = with_apt(
        directory.path(),
        "echo 'E: Permission denied' >&2; exit 100",
        &|_| (),
    );
    let failed = packages.fetch(&["x"]).unwrap_err().to_string();
    assert!(
        failed.contains("Permission denied (it needs root and the network)"),
        "{failed}"
    );
}

#[test]
fn kernel_that_left_the_archive_is_replaced_by_its_successor() {
    let directory = tempfile::tempdir().unwrap();
    let updated = directory.path().join("updated");
    let file = "linux-image-6.1.0-2-amd64_6.1.2_amd64.deb";
    std::fs::write(
        directory.path().join(file),
        package("linux-image-6.1.0-2-amd64", "kmod"),
    )
    .unwrap();
    let script = format!(
        r#"case "$*" in
        *update*) touch {0} ;;
        pkgnames*) test -e {0} && echo linux-image-6.1.0-2-amd64 || echo linux-image-6.1.0-1-amd64 ;;
        *6.1.0-2-amd64*) cp {1}/{file} . ;;
        *) echo "E: 404  Not Found" >&2; exit 100 ;;
        esac"#,
        updated.display(),
        directory.path().display()
    );
    let packages = with_apt(directory.path(), &script, &|_| ());
    let found = packages.kernel(DEFAULT, None).unwrap();
    assert_eq!(found.release, "6.1.0-2-amd64");
    assert!(found.files[0].exists());
}

#[test]
fn failed_refresh_keeps_the_packages() {
    let directory = tempfile::tempdir().unwrap();
    let packages = with_apt(directory.path(), "exit 100", &|_| ());
    let file = directory.path().join("packages/libx1_2.0_amd64.deb");
    std::fs::write(&file, "").unwrap();
    assert!(packages.refresh(DEFAULT).is_err());
    assert!(file.exists());
}
