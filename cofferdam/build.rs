//! Tells the program which commit it is built from, for the reports it writes, and has it linked so
//! that it starts fast.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=COFFERDAM_COMMIT");
    // A hundred thousand addresses are put in place when it starts. As a bitmap (DT_RELR of the
    // System V ABI, glibc 2.36) they take 30 KiB of the file in place of 2.4 MiB, which each start
    // reads.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    if std::env::var_os("COFFERDAM_COMMIT").is_some() {
        // Whoever builds knows better, and `option_env!` sees it.
        return;
    }
    // A source archive has no commit; the program then says so.
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return;
    };
    println!("cargo::rustc-env=COFFERDAM_COMMIT={commit}");
    if let Some(log) = git(&[
        "rev-parse",
        "--path-format=absolute",
        "--git-path",
        "logs/HEAD",
    ]) {
        println!("cargo::rerun-if-changed={log}");
    }
}

/// What `git` answers, if there is a git and a repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
