//! The package's units under a systemd that runs ([`System`]), with guests of this host's KVM.

use debian_package::{build, file_name};

use crate::common::{EM_X86_64, OBEDIENT_CODE, elf};
use crate::system::System;
use crate::{DATE, contents};

/// Where guests and the service are.
const RUN: &str = "/run/cofferdam";

/// A system with the package in it, and in the place of its script the program that was built.
fn installed(test: &str) -> Option<System> {
    let system = match System::start() {
        Ok(system) => system,
        Err(why) => {
            skipped::skip(&format!("package::units::{test}"), &why);
            return None;
        }
    };
    let contents = contents();
    let package = build(&contents, DATE).unwrap();
    let package = system.file(&file_name(&contents.version), &package);
    system.does(&format!("dpkg -i {package}"));
    let program = env!("CARGO_BIN_EXE_cofferdam");
    system.does(&format!("cp {program} /usr/bin/cofferdam"));
    let kernel = system.file("kernel", &elf(EM_X86_64, &OBEDIENT_CODE));
    system.does(&format!(
        "mkdir -p -m 700 /var/lib/cofferdam && cp {kernel} /var/lib/cofferdam/kernel"
    ));
    Some(system)
}

/// A property of a unit.
fn property(system: &System, unit: &str, name: &str) -> String {
    system.does(&format!("systemctl show --value -p {name} {unit}"))
}

/// Asks the service, with these words for curl.
fn api(words: &str) -> String {
    format!(
        "curl -sS --fail-with-body --unix-socket {RUN}/service.sock http://localhost/v1/{words}"
    )
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("no number: {text}"))
}

/// What a process of a unit may not do.
fn is_held(system: &System, process: u64) {
    let status = system.does(&format!("cat /proc/{process}/status"));
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{status}");
    }
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:\t"));
    let bounding = u64::from_str_radix(bounding.unwrap(), 16).unwrap();
    // CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_SYS_MODULE
    assert_eq!(bounding & (1 << 21 | 1 << 19 | 1 << 16), 0, "{bounding:x}");
    let mounts = system.does(&format!("cat /proc/{process}/mounts"));
    let writable = |point: &str| {
        let mut lines = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let mount = lines.rfind(|fields| fields[1] == point);
        mount.unwrap_or_else(|| panic!("no {point}: {mounts}"))[3].starts_with("rw")
    };
    assert!(
        !writable("/") && writable(RUN) && writable("/tmp"),
        "{mounts}"
    );
}

#[test]
fn the_service_runs_under_systemd_and_its_guests_go_on_without_it() {
    let test = "the_service_runs_under_systemd_and_its_guests_go_on_without_it";
    let Some(system) = installed(test) else {
        return;
    };
    // Nothing was started or enabled.
    assert_eq!(system.tries("systemctl is-enabled cofferdam").1, "disabled");
    assert_eq!(system.tries("systemctl is-active cofferdam").1, "inactive");
    system.does("systemctl start cofferdam");
    system.until(&api("guests"));
    let made = r#"guests --json '{"name": "made", "kernel": "/var/lib/cofferdam/kernel", "memory": "64M"}'"#;
    system.does(&api(made));
    let guest = |system: &System| {
        let status = system.until(&api("guests/made"));
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        assert_eq!(status["state"], "running", "{status}");
        status["pid"].as_u64().unwrap()
    };
    let first = guest(&system);
    let service = number(&property(&system, "cofferdam", "MainPID"));
    for process in [service, first] {
        is_held(&system, process);
    }
    // Killed, it is started again; so it is when it is asked to.
    system.does(&format!("kill -9 {service}"));
    let restarted = format!(
        "p=$(systemctl show --value -p MainPID cofferdam); test $p -gt 0 -a $p -ne {service}"
    );
    system.until(&restarted);
    assert_eq!(guest(&system), first);
    // It is counted from the last time on that somebody asked for a start.
    assert_eq!(property(&system, "cofferdam", "NRestarts"), "1");
    system.does("systemctl restart cofferdam");
    assert_eq!(guest(&system), first);
    // Its folder is root's alone, and there it makes campaigns' files.
    let modes = system.does("stat -c %a /run/cofferdam /var/lib/cofferdam/campaigns");
    assert_eq!(modes, "700\n700");
    system.does("systemctl stop cofferdam");
    assert_eq!(property(&system, "cofferdam", "Result"), "success");
    assert!(system.does("cofferdam status made").contains("running"));
    system.does("cofferdam stop made");
    assert_eq!(system.does(&format!("ls -A {RUN}")), "");
}

#[test]
fn a_guests_unit_starts_it_again_when_it_fails_and_not_when_it_shuts_down() {
    let test = "a_guests_unit_starts_it_again_when_it_fails_and_not_when_it_shuts_down";
    let Some(system) = installed(test) else {
        return;
    };
    // Without a file there is nothing to be started.
    system.does("systemctl start cofferdam@web");
    assert_eq!(property(&system, "cofferdam@web", "ConditionResult"), "no");
    let file = system.file(
        "web.toml",
        b"kernel = \"/var/lib/cofferdam/kernel\"\nmemory = \"64M\"\n",
    );
    system.does(&format!("cp {file} /etc/cofferdam/guests/web.toml"));
    system.does("systemctl enable --now cofferdam@web");
    system.does("test -L /etc/systemd/system/multi-user.target.wants/cofferdam@web.service");
    let runs = "cofferdam status web | grep -q running";
    system.until(runs);
    let first = number(&property(&system, "cofferdam@web", "MainPID"));
    is_held(&system, first);
    system.does(&format!("kill -9 {first}"));
    system.until(&format!(
        "p=$(systemctl show --value -p MainPID cofferdam@web); test $p -gt 0 -a $p -ne {first}"
    ));
    system.until(runs);
    assert_eq!(property(&system, "cofferdam@web", "NRestarts"), "1");
    // It turns itself off, and stays so.
    system.does("cofferdam stop web");
    system.until("test $(systemctl is-active cofferdam@web) = inactive");
    assert_eq!(property(&system, "cofferdam@web", "NRestarts"), "1");
    system.does("systemctl start cofferdam@web");
    system.until(runs);
    system.does("systemctl stop cofferdam@web");
    assert_eq!(property(&system, "cofferdam@web", "Result"), "success");
    // One whose file has a mistake says where it is, and is given up after a few times.
    let file = system.file(
        "bad.toml",
        b"kernel = \"/var/lib/cofferdam/kernel\"\nmemory = \"1M\"\n",
    );
    system.does(&format!("cp {file} /etc/cofferdam/guests/bad.toml"));
    system.does("systemctl start cofferdam@bad");
    system.until("test $(systemctl is-active cofferdam@bad) = failed");
    let said = system.does("journalctl --no-pager -o cat -u cofferdam@bad");
    assert!(said.contains("bad.toml: line 2, column 10"), "{said}");
    // Removed, it takes what runs with it.
    system.does("systemctl start cofferdam cofferdam@web");
    system.until(runs);
    system.until(&api("guests"));
    system.does("dpkg -P cofferdam");
    let left = system.tries("pgrep -x cofferdam");
    assert!(!left.0, "{left:?}");
    for path in [
        "/usr/bin/cofferdam",
        RUN,
        "/lib/systemd/system/cofferdam.service",
    ] {
        assert!(
            !system.tries(&format!("test -e {path}")).0,
            "{path} is left"
        );
    }
    assert!(
        system
            .tries("systemctl is-active cofferdam cofferdam@web")
            .1
            .starts_with("inactive\n")
    );
}
