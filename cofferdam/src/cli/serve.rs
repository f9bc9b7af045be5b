//! `serve`: the service.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::images::Images;
use super::{Ending, print_bytes};
use crate::runtime_dir::RuntimeRoot;
use crate::sandbox::SandboxOptions;
use crate::serve::{NetworkConfig, Role, ServeConfig, document, new_line, serve};

/// `serve`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
At its socket only the user who started it and root may use it, and a group may look if it is named; over TCP whoever has a token. Guests and device hosts go on when it ends, and are found again.

Examples:
  cofferdam serve &
  curl --unix-socket /run/cofferdam/service.sock http://localhost/v1/guests
  curl --unix-socket /run/cofferdam/service.sock -N http://localhost/v1/events
  (umask 077; cofferdam serve --new-token look >> tokens)
  cofferdam serve --listen 127.0.0.1:8443 --tokens tokens")]
pub struct ServeOptions {
    /// Its socket; service.sock in the runtime folder when not given
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Let members of this group (its name in /etc/group, or its number) look at everything over
    /// the socket, and change nothing. The socket is theirs to connect to then, and a folder around
    /// it that is this user's alone is theirs to pass through
    #[arg(long, value_name = "GROUP")]
    look_group: Option<String>,
    /// Be there over TCP, too, with TLS, for browsers and those who have a token
    #[arg(long, value_name = "ADDRESS:PORT", requires = "tokens")]
    listen: Option<SocketAddr>,
    /// Tokens of those who may ask over TCP: lines of `look TOKEN` (may only look) or `do TOKEN`,
    /// in a file of mode 0600
    #[arg(long, value_name = "FILE", requires = "listen")]
    tokens: Option<PathBuf>,
    /// Certificate for TLS, in PEM; one is made at each start when not given
    #[arg(long, value_name = "FILE", requires_all = ["listen", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// Its key, in PEM
    #[arg(long, value_name = "FILE", requires_all = ["listen", "tls_cert"])]
    tls_key: Option<PathBuf>,
    /// Print a line with a new token for --tokens, and end
    #[arg(long, value_name = "ROLE", value_enum, conflicts_with_all = ["socket", "look_group", "listen", "openapi"])]
    new_token: Option<Role>,
    /// How long a client may take for a request's head, for its body, and for taking some of the
    /// answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    client_time: u64,
    /// Print the OpenAPI document and end
    #[arg(long, conflicts_with_all = ["socket", "look_group", "listen"])]
    openapi: bool,
    /// Make campaigns (see `cofferdam campaign`), with their files in this folder
    #[arg(long, value_name = "DIR")]
    campaigns: Option<PathBuf>,
    #[command(flatten)]
    images: Images,
    #[command(flatten)]
    sandbox: SandboxOptions,
    /// Put each guest that is made into a jail (see `cofferdam run --jail`). The service itself is
    /// not behind Landlock then, which would not let them be made
    #[arg(long)]
    jail: bool,
    /// Put each guest that is made into a control group of its own below this one (see `cofferdam
    /// run --cgroup`)
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
}

impl ServeOptions {
    /// `serve`
    pub fn run(self) -> anyhow::Result<Ending> {
        if self.openapi {
            print_bytes(document()?.as_bytes())?;
            return Ok(Ending::SUCCESS);
        }
        if let Some(role) = self.new_token {
            print_bytes(new_line(role)?.as_bytes())?;
            return Ok(Ending::SUCCESS);
        }
        let network = self.listen.zip(self.tokens);
        serve(ServeConfig {
            root: RuntimeRoot::from_environment(),
            socket: self.socket,
            look_group: self.look_group,
            network: network.map(|(address, tokens)| NetworkConfig {
                address,
                tokens,
                certificate: self.tls_cert.zip(self.tls_key),
            }),
            client_time: Duration::from_secs(self.client_time),
            sandbox: self.sandbox,
            jail: self.jail,
            cgroup: self.cgroup,
            campaigns: self.campaigns.map(|folder| (folder, self.images.images)),
        })?;
        Ok(Ending::SUCCESS)
    }
}
