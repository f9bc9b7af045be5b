//! Connections: who may connect, how many, and how long each may take.

use std::convert::Infallible;
use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep};

use super::access::{Access, guarded};
use super::limits::{self, ClientTime};
use super::peer::Peers;
use super::problem::{Code, Problem};
use super::role::Role;

/// Connections at one time.
pub const MAX_CONNECTIONS: usize = 256;

/// Connections at one time of those who may only look: they take no room from the others.
const MAX_LOOKING: usize = 128;

/// Connections beyond these that are told that there is no room.
pub const MAX_REFUSED: usize = 16;

/// Buffer of a connection, in bytes; a request's head has to fit.
const BUFFER_BYTES: usize = 32 << 10;

/// Lines of a request's head.
const MAX_HEADERS: usize = 64;

/// How long to wait before accepting again when the process has no descriptors left.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections of `peers` for ever, each of which has `client_time` for each part of a
/// request.
pub async fn accept(
    listener: &UnixListener,
    router: Router,
    peers: Peers,
    client_time: Duration,
) -> Infallible {
    let open = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let looking = Arc::new(Semaphore::new(MAX_LOOKING));
    let refused = Arc::new(Semaphore::new(MAX_REFUSED));
    let router = limits::limited(router, ClientTime(client_time));
    let look = guarded(router.clone(), Access::Known(Role::Look));
    let router = guarded(router, Access::Known(Role::Do));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("service socket: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let full = |most| (Arc::clone(&refused).try_acquire_owned(), full(most));
        let (place, router) = match peers.role_of(&stream) {
            None => {
                let problem = Problem::new(Code::Forbidden, peers.words());
                (Arc::clone(&refused).try_acquire_owned(), only(problem))
            }
            Some(Role::Do) => match Arc::clone(&open).try_acquire_owned() {
                Ok(place) => (Ok(place), router.clone()),
                Err(_) => full(MAX_CONNECTIONS),
            },
            Some(Role::Look) => match Arc::clone(&looking).try_acquire_owned() {
                Ok(place) => (Ok(place), look.clone()),
                Err(_) => full(MAX_LOOKING),
            },
        };
        // Without a place not even the refusal can be told.
        let Ok(place) = place else { continue };
        tokio::spawn(async move {
            serve(Patient::new(stream, client_time), router, client_time).await;
            drop(place);
        });
    }
}

/// Answers everything with one problem.
fn only(problem: Problem) -> Router {
    Router::new()
        .fallback(move || async move { ([("connection", "close")], problem).into_response() })
}

/// Says that there are `most` connections already.
pub fn full(most: usize) -> Router {
    let detail = format!("there are {most} connections already: close one and try again");
    only(Problem::new(Code::Busy, detail))
}

/// Answers what comes over one connection, until it ends.
pub async fn serve<S>(stream: S, router: Router, client_time: Duration)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = TokioIo::new(stream);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(client_time)
        .max_headers(MAX_HEADERS)
        .max_buf_size(BUFFER_BYTES)
        .serve_connection(stream, TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!("connection ended: {error}");
    }
}

/// A connection that is given up when nothing of what it is sent is taken for a while.
pub struct Patient<S> {
    stream: S,
    limit: Duration,
    /// Runs while the connection takes no more.
    wait: Option<Wait>,
}

/// What is waited for.
struct Wait {
    end: Pin<Box<Sleep>>,
    /// What the connection held when this began, in bytes, as far as the kernel says.
    held: Option<c_int>,
}

impl Wait {
    fn begin(limit: Duration, held: Option<c_int>) -> Self {
        let end = Box::pin(sleep(limit));
        Self { end, held }
    }
}

impl<S: AsFd> Patient<S> {
    /// `stream`, of which something has to be taken within `limit`.
    pub fn new(stream: S, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            wait: None,
        }
    }

    fn or_time_up<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.wait = None;
            return polled;
        }
        let (limit, stream) = (self.limit, &self.stream);
        let wait = self
            .wait
            .get_or_insert_with(|| Wait::begin(limit, held(stream)));
        loop {
            ready!(wait.end.as_mut().poll(context));
            // A socket takes more only when most of what it holds is gone: of who takes it a little
            // at a time this alone is seen.
            let now = held(stream);
            if now.zip(wait.held).is_none_or(|(now, then)| now >= then) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            *wait = Wait::begin(limit, now);
        }
    }
}

/// Bytes that a socket holds and the other side has not taken (`SIOCOUTQ`, tcp(7); of a unix socket
/// with what the kernel needs to keep them).
fn held(stream: &impl AsFd) -> Option<c_int> {
    let mut bytes = 0;
    let socket = stream.as_fd().as_raw_fd();
    // SAFETY: the socket is open, and the kernel writes one int.
    let failed = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut bytes) } != 0;
    (!failed).then_some(bytes)
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + AsFd + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.or_time_up(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.or_time_up(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
