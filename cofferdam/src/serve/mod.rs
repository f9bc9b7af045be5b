//! The service: all guests and devices of a runtime folder over HTTP, on a unix socket and, with
//! TLS, over TCP.
//!
//! ```text
//!  curl ──HTTP/1.1──► service.sock    connection   one task each, bounded in number and time
//!  browser ──TLS──► TCP   │           network, tls, tokens, access: who asks, and may it
//!                         │           limits       whole and bounded bodies, as problems where they are not
//!                         │           api          paths; the OpenAPI document is made of the same list
//!                         ▼           ask          requests to sockets, in a bounded number of threads
//!          NAME/control.sock  .devices/NAME/control.sock
//! ```
//!
//! It stands in front of the sockets of VM processes and device hosts and keeps nothing that it
//! cannot find again from the runtime folder: it may be killed and started anew at any time, and
//! guests know nothing of it. Only jobs, which are requests under way, end with it.

mod access;
mod api;
mod app;
mod ask;
mod asked_at_length;
mod campaigns;
mod code_faults;
mod connection;
mod console;
mod create;
mod devices;
mod disturbances;
mod events;
mod exec;
mod extract;
mod guests;
mod inject;
mod isolate;
mod jobs;
mod kept;
mod limits;
mod little;
mod look;
mod marks;
mod metrics;
mod network;
mod nics;
mod page;
mod peer;
mod problem;
mod role;
mod socket;
mod spec;
mod suspend;
mod tls;
mod tokens;
mod upgrade;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use axum::Router;

pub use api::document;
pub use network::NetworkConfig;
pub use role::Role;
pub use tokens::new_line;

use crate::asked_to_end::asked_to_end;
use crate::run::memory;
use crate::runtime_dir::RuntimeRoot;
use crate::sandbox::{Guests, SandboxOptions, can_jail, divide, divide_delegated};
use app::App;
use ask::Asks;
use campaigns::Campaigns;
use network::Network;
use peer::Peers;
use socket::Socket;

/// Threads that wait for answers of other processes: for requests, jobs and looks at all guests.
const THREADS: usize = ask::MAX_REQUESTS + jobs::MAX_RUNNING + 8;

/// Stack of one of them, in bytes.
const STACK_BYTES: usize = 512 << 10;

/// How long one of them is kept that has nothing to do.
const THREAD_IDLE: Duration = Duration::from_secs(2);

/// How long the service keeps memory that a request has needed, most of it pages of its program,
/// and connections to guests.
const KEEP_TIME: Duration = Duration::from_secs(10);

/// How the service is started.
#[derive(Debug)]
pub struct ServeConfig {
    /// Which guests and devices it serves.
    pub root: RuntimeRoot,
    /// Its socket; `service.sock` in the runtime folder otherwise.
    pub socket: Option<PathBuf>,
    /// The group whose members may look over the socket: its name or number.
    pub look_group: Option<String>,
    /// Where it is reached over TCP, if it is.
    pub network: Option<NetworkConfig>,
    /// How long a client has for each part of a request, and for taking what it is sent.
    pub client_time: Duration,
    /// What it gives up.
    pub sandbox: SandboxOptions,
    /// The guests that it makes are in jails.
    pub jail: bool,
    /// The control group in which each guest that it makes has one.
    pub cgroup: Option<PathBuf>,
    /// The folder of campaigns' files, if it makes any, and that of images for their guests.
    pub campaigns: Option<(PathBuf, PathBuf)>,
}

/// Serves until a signal asks for the end.
///
/// # Errors
/// The socket cannot be made, or another service has it.
pub fn serve(config: ServeConfig) -> anyhow::Result<()> {
    // Guests are started in another folder.
    let root = std::path::absolute(config.root.path()).context("cannot name the runtime folder")?;
    let path = match config.socket {
        Some(path) => path,
        None => root.join("service.sock"),
    };
    if config.jail
        && let Err(why) = can_jail()
    {
        bail!(
            "guests cannot be jailed on this host ({why}): see `cofferdam doctor`, or leave --jail away"
        );
    }
    let cgroup = group_of_guests(config.cgroup.as_deref(), config.jail)?;
    let campaigns = config
        .campaigns
        .map(|(folder, images)| Campaigns::new(&folder, &images, &root))
        .transpose()?;
    let look = config.look_group.as_deref().map(peer::group).transpose()?;
    let network = config.network.as_ref().map(Network::bind).transpose()?;
    // Before there are other threads, which inherit it.
    let guests = match config.jail {
        true => Guests::Jailed,
        false => Guests::Free,
    };
    config.sandbox.enter_service(guests)?;
    memory::share_heaps();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .thread_stack_size(STACK_BYTES)
        .thread_keep_alive(THREAD_IDLE)
        .thread_name("service-ask")
        .build()
        .context("cannot start the service's threads")?;
    let of_campaigns = campaigns.clone();
    let ended = runtime.block_on(async {
        // Before anybody can see that it is there.
        let asked_to_end = asked_to_end()?;
        let socket = Socket::bind(&path)?;
        if let Some(group) = look {
            peer::open_to(socket.path(), socket.file(), group)?;
        }
        let listener = socket.listener()?;
        let peers = Peers::new(look);
        let app = App::new(RuntimeRoot::new(root), config.jail, cgroup, campaigns);
        let asks = app.asks.clone();
        let router = api::router(app);
        tracing::info!("serving at {}", path.display());
        tokio::select! {
            never = connection::accept(&listener, router.clone(), peers, config.client_time) => match never {},
            never = keep_little(&asks) => match never {},
            failed = accept_over_tcp(network, router, config.client_time) => failed.map(|never| match never {}),
            () = asked_to_end => Ok(()),
        }
    });
    // Who is still waited for is a process that does not answer.
    runtime.shutdown_background();
    if let Some(campaigns) = of_campaigns {
        campaigns.leave();
    }
    ended
}

/// Gives memory and connections to guests back that nobody has needed since, for ever. What is
/// needed again comes from the page cache, in which the guests' processes have it, too. Where much
/// is needed it is given back sooner ([`little`]).
async fn keep_little(asks: &Asks) -> Infallible {
    loop {
        asks.close_idle(KEEP_TIME);
        little::give_back();
        tokio::time::sleep(KEEP_TIME).await;
    }
}

/// The control group in which guests have theirs: the one that was named, or the service's own
/// where guests are jailed and it may be divided. Where it may not, that is said: nobody reads what
/// a guest says of it.
fn group_of_guests(named: Option<&Path>, jail: bool) -> anyhow::Result<Option<String>> {
    let dir = match named {
        Some(dir) => divide(dir)?,
        None if jail => match divide_delegated() {
            Ok(dir) => dir,
            Err(why) => {
                let why = crate::error_text::one_line(&why);
                tracing::warn!(
                    "no control groups around guests, their memory, tasks and processor time are as this user's: {why}"
                );
                return Ok(None);
            }
        },
        None => return Ok(None),
    };
    let name = dir.into_os_string().into_string();
    let name = name.map_err(|dir| anyhow!("the control group {} is no UTF-8", dir.display()))?;
    Ok(Some(name))
}

/// Accepts connections over TCP for ever, if there are to be any.
async fn accept_over_tcp(
    network: Option<Network>,
    router: Router,
    client_time: Duration,
) -> anyhow::Result<Infallible> {
    match network {
        Some(network) => {
            network.tell()?;
            network.accept(router, client_time).await
        }
        None => std::future::pending().await,
    }
}
