//! The `cofferdam` command: reads the command line, does it, says in one line what went wrong.

use std::process::ExitCode;

use clap::Parser;
use cofferdam::cli::{Cli, Ending, dispatch};

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(Ending::Status(status)) => status,
        // Everything was dropped, and so cleaned up, when the command returned.
        Ok(Ending::Signal(signal)) => signal.end_process(),
        Err(error) => {
            eprintln!("cofferdam: {error:#}");
            ExitCode::FAILURE
        }
    }
}
