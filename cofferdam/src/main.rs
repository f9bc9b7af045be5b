//! The `cofferdam` command: reads the command line, does it, says in one line what went wrong.

use std::process::ExitCode;

use cofferdam::cli::{Ending, dispatch, one_line, parse, usage_error};
use cofferdam::sandbox::keeper;

/// Exit status for a command line that cannot be understood.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    if let Some(status) = keeper(std::env::args_os()) {
        return status;
    }
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => match usage_error(&error) {
            Some(line) => {
                eprintln!("cofferdam: {line}");
                return ExitCode::from(USAGE);
            }
            // Help and version, which are no errors.
            None => error.exit(),
        },
    };
    match dispatch(cli) {
        Ok(Ending::Status(status)) => status,
        // Everything was dropped, and so cleaned up, when the command returned.
        Ok(Ending::Signal(signal)) => signal.end_process(),
        Err(error) => {
            eprintln!("cofferdam: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}
