//! Connections over TCP: TLS always, and a token in each request.

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::access::{Access, guarded};
use super::connection::{self, ACCEPT_PAUSE, MAX_REFUSED, Patient};
use super::limits::{ClientTime, limited};
use super::tls::Certificate;
use super::tokens::Tokens;

/// Connections over TCP at one time. They take no room from those to the unix socket.
pub const MAX_CONNECTIONS: usize = 256;

/// How long a connection may be quiet before it is asked whether the other side is still there.
const QUIET: Duration = Duration::from_secs(30);

/// How long after that it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// How often, before it counts as gone.
const ASKS: u32 = 3;

/// How the service is reached over TCP.
#[derive(Debug)]
pub struct NetworkConfig {
    /// Where.
    pub address: SocketAddr,
    /// File with the tokens of those who may ask.
    pub tokens: PathBuf,
    /// Files with its certificate and key; both are made anew at each start otherwise.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// A socket over which nobody has come yet.
pub struct Network {
    listener: std::net::TcpListener,
    certificate: Certificate,
    tokens: Arc<Tokens>,
}

impl Network {
    /// Reads what there is to be read and listens: before the service gives up what it takes.
    ///
    /// # Errors
    /// The address is taken or not this host's, or a file is not what it should be.
    pub fn bind(config: &NetworkConfig) -> anyhow::Result<Self> {
        let tokens = Arc::new(Tokens::read(&config.tokens)?);
        let certificate = match &config.certificate {
            Some((certificate, key)) => Certificate::read(certificate, key)?,
            None => Certificate::make(config.address.ip())?,
        };
        let listen = || {
            let listener = std::net::TcpListener::bind(config.address)?;
            listener.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(listener)
        };
        let listener = listen().with_context(|| format!("cannot listen at {}", config.address))?;
        Ok(Self {
            listener,
            certificate,
            tokens,
        })
    }

    /// Says on standard output where it is and how its certificate is known.
    ///
    /// # Errors
    /// The socket has no address.
    pub fn tell(&self) -> anyhow::Result<()> {
        let address = self.listener.local_addr().context("cannot listen")?;
        let mut out = std::io::stdout().lock();
        let told = write!(out, "https://{address}/\n{}", self.certificate.text());
        // Who started it may want to know nothing of it.
        if let Err(error) = told.and_then(|()| out.flush()) {
            tracing::warn!("cannot write to standard output: {error}");
        }
        Ok(())
    }

    /// Accepts connections for ever, each of which has `client_time` for its handshake and for each
    /// part of a request.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub async fn accept(self, router: Router, client_time: Duration) -> anyhow::Result<Infallible> {
        let listener = tokio::net::TcpListener::from_std(self.listener).context("cannot listen")?;
        let open = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let refused = Arc::new(Semaphore::new(MAX_REFUSED));
        // Nothing of a request is waited for from somebody who is not known.
        let router = limited(router, ClientTime(client_time));
        let router = guarded(router, Access::Token(self.tokens));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("service over TCP: {error}");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (place, router) = match Arc::clone(&open).try_acquire_owned() {
                Ok(place) => (Ok(place), router.clone()),
                Err(_) => (
                    Arc::clone(&refused).try_acquire_owned(),
                    connection::full(MAX_CONNECTIONS),
                ),
            };
            let Ok(place) = place else { continue };
            let acceptor = self.certificate.acceptor().clone();
            tokio::spawn(async move {
                // Events are small and are to be there at once; without it they only come later.
                let _ = stream.set_nodelay(true);
                if let Err(error) = notice_the_end(&stream) {
                    tracing::debug!("a peer that is gone is not noticed: {error}");
                }
                let handshake = acceptor.accept(Patient::new(stream, client_time));
                match timeout(client_time, handshake).await {
                    Ok(Ok(stream)) => connection::serve(stream, router, client_time).await,
                    Ok(Err(error)) => tracing::debug!("no TLS: {error}"),
                    Err(_) => tracing::debug!("no TLS within {client_time:?}"),
                }
                drop(place);
            });
        }
    }
}

/// Has the kernel ask whether the other side is still there (tcp(7)): one that is gone without a
/// word would keep its place, and that of a reader of a console on which nothing is printed.
fn notice_the_end(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, QUIET)?;
    sockopt::set_tcp_keepintvl(stream, ASK_AGAIN)?;
    sockopt::set_tcp_keepcnt(stream, ASKS)
}
