//! `cofferdam try`: a module's file in a guest, with one command.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::options;

fn module_file(name: &str) -> PathBuf {
    options().images.join("modules").join(format!("{name}.ko"))
}

/// `cofferdam try` of a file, with words and a command for the guest.
fn trying(file: &Path, words: &str, run: Option<&str>) -> Command {
    let options = options();
    let mut command = Command::new(&options.program);
    command
        .env("COFFERDAM_IMAGES", &options.images)
        .arg("try")
        .arg(file)
        .args(["--budget-us", "10000000"])
        .args(words.split_whitespace());
    if let Some(run) = run {
        command.args(["--run", run]);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn report(output: &Output) -> Value {
    let error = text(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|why| panic!("{why}: {error}"))
}

/// Folders of trials that are there.
fn folders(temporary: &Path) -> usize {
    temporary.read_dir().unwrap().count()
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_modules_file_is_tried_and_said_what_became_of_its_calls() {
    let temporary = tempfile::tempdir().unwrap();
    let run = "ip link add d0 type dummy && ip link set d0 up && ip addr add 10.9.0.1/24 dev d0 && \
               for i in 1 2 3; do ping -c 1 -W 1 10.9.0.2; done; echo done";
    let output = trying(&module_file("dummy"), "--isolate all --json", Some(run))
        .env("TMPDIR", temporary.path())
        .output()
        .unwrap();
    let found = report(&output);
    assert_eq!(output.status.code(), Some(0), "{found:#}");
    assert_eq!(found["module"], "dummy");
    assert_eq!(found["command"]["status"], 0, "{found:#}");
    let said = found["command"]["stdout"].as_str().unwrap();
    assert!(said.contains("done"), "{said}");
    let entries = found["entries"].as_array().unwrap();
    let xmit = entries.iter().find(|entry| entry["name"] == "dummy_xmit");
    let xmit = xmit.unwrap_or_else(|| panic!("{found:#}"));
    assert!(xmit["calls"].as_u64() >= Some(1), "{xmit}");
    assert_eq!(xmit["calls"], xmit["commits"], "{xmit}");
    assert_eq!(found["taken_back"], 0, "{found:#}");
    assert_eq!(found["violations"], serde_json::json!([]), "{found:#}");
    assert_eq!(folders(temporary.path()), 0, "it leaves nothing");
}

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_trial_that_is_interrupted_ends_with_its_guest_and_leaves_nothing() {
        let temporary = tempfile::tempdir().unwrap();
        let mut child = trying(&module_file("dummy"), "", Some("echo now; sleep 1000"))
            .env("TMPDIR", temporary.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        assert_eq!(line, "now\n");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let status = child.wait().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(libc::SIGINT), "{status:?}");
        assert_eq!(folders(temporary.path()), 0, "it leaves nothing");
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_module_that_the_guests_kernel_does_not_take_is_explained() {
        // Looks like a module of this kernel, and imports what that has not. Without the mark of a
        // signature at its end, which would not fit any more.
        let mut file = std::fs::read(module_file("dummy")).unwrap();
        let mark = b"~Module signature appended~\n";
        if file.ends_with(mark) {
            file.truncate(file.len() - mark.len());
        }
        let symbol = b"register_netdevice\0";
        let at: Vec<usize> = (0..file.len() - symbol.len())
            .filter(|at| file[*at..].starts_with(symbol))
            .collect();
        for at in at {
            file[at] = b'q';
        }
        let folder = tempfile::tempdir().unwrap();
        let wrong = folder.path().join("dummy.ko");
        std::fs::write(&wrong, file).unwrap();
        let output = trying(&wrong, "", None).output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        let last = error.lines().last().unwrap();
        assert!(last.contains("dummy cannot be inserted"), "{error}");
        assert!(last.contains("qegister_netdevice"), "{error}");
    }
}
