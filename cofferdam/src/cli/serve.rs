//! `serve`: the service.

use std::path::PathBuf;
use std::time::Duration;

use super::{Ending, print_bytes};
use crate::runtime_dir::RuntimeRoot;
use crate::sandbox::SandboxOptions;
use crate::serve::{ServeConfig, document, serve};

/// `serve`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Only the user who started it and root may use it. Guests and device hosts go on when it ends, and are found again.

Examples:
  cofferdam serve &
  curl --unix-socket /run/cofferdam/service.sock http://localhost/v1/guests
  curl --unix-socket /run/cofferdam/service.sock -N http://localhost/v1/events")]
pub struct ServeOptions {
    /// Its socket; service.sock in the runtime folder when not given
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How long a client may take for a request's head, for its body, and for taking some of the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    client_time: u64,
    /// Print the OpenAPI document and end
    #[arg(long, conflicts_with = "socket")]
    openapi: bool,
    #[command(flatten)]
    sandbox: SandboxOptions,
}

impl ServeOptions {
    /// `serve`
    pub fn run(self) -> anyhow::Result<Ending> {
        if self.openapi {
            print_bytes(document()?.as_bytes())?;
            return Ok(Ending::SUCCESS);
        }
        serve(ServeConfig {
            root: RuntimeRoot::from_environment(),
            socket: self.socket,
            client_time: Duration::from_secs(self.client_time),
            sandbox: self.sandbox,
        })?;
        Ok(Ending::SUCCESS)
    }
}
