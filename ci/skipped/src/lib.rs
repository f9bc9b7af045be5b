//! A test that lacks a privilege on this machine says so here: a test runner would count it as
//! passed.
//!
//! `cargo xtask test` names a file in [`LIST`]; each test that did not run adds a line to it, and
//! the run counts them as skipped. Without the variable the line goes to standard error only.

use std::fs::OpenOptions;
use std::io::Write;

/// Environment variable with the path of the file to which lines are added.
pub const LIST: &str = "COFFERDAM_SKIPPED";

/// Says that `test` (its path, as `module_path!()` and its name) is not run, and why. The test
/// returns after it.
pub fn skip(test: &str, why: &str) {
    eprintln!("skipped: {test}: {why}");
    let Some(path) = std::env::var_os(LIST) else {
        return;
    };
    // One write of one line: tests run side by side, and append is atomic.
    let line = format!("{test}: {}\n", why.replace('\n', " "));
    let added = OpenOptions::new().create(true).append(true).open(&path);
    if let Err(error) = added.and_then(|mut file| file.write_all(line.as_bytes())) {
        panic!("{} cannot be written: {error}", path.display());
    }
}
