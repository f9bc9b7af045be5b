//! Entry point.

mod traffic;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((word, rest)) if word == "traffic" => ExitCode::from(traffic::main(rest)),
        _ => ExitCode::SUCCESS,
    }
}
