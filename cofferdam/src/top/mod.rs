//! `top`: a live view of the guests and device hosts of this user.
//!
//! ```text
//! lister (thread) ── which processes run ────────────┐
//! poller (thread for each process) ── its reading ───┤
//! keys (thread) ── what is typed ────────────────────┼─► loop (main thread): Model ─► view ─► Screen
//! signals (thread) ── end, stop, go on ──────────────┘
//! ```
//!
//! A process that does not answer holds up its own poller and nothing else. All text that comes
//! from a guest or another process is cleaned where a [`reading`] is made of it: what is behind
//! that has no control characters.

mod happened;
mod input;
mod model;
mod poll;
mod rates;
mod reading;
mod screen;
pub(crate) mod text;
mod view;

#[cfg(test)]
mod double;

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use devices::clock::monotonic_ns;
use ratatui::crossterm::event::{self, Event};

use crate::ending::Ending;
use crate::runtime_dir::RuntimeRoot;
use crate::signals::{Asked, Signals, stop_process};
use input::Ui;
use model::Model;
use poll::Told;
use screen::Screen;

pub use text::clean;

/// Shortest time between two readings of a process.
pub const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Longest time between two readings of a process.
pub const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Messages that wait for the loop; who has more to tell waits.
const WAITING: usize = 64;
/// The screen is drawn anew at least so often: it says how long ago things were.
const TICK: Duration = Duration::from_secs(1);
/// How long one frame without a terminal waits for answers, beyond the interval.
const ONCE_TIME: Duration = Duration::from_secs(8);

/// What the loop is told.
enum Message {
    /// By the lister or a poller.
    Told(Told),
    /// What was typed, or that the terminal has another size now.
    Typed(std::io::Result<Event>),
    /// By a signal.
    Signal(Asked),
}

/// One frame of the processes in `root` as text, with rates over `interval`.
///
/// # Errors
/// The root cannot be read, or no thread can be started.
pub fn once(root: RuntimeRoot, interval: Duration) -> anyhow::Result<String> {
    let (sender, messages) = sync_channel(WAITING);
    let mut model = Model::new(interval);
    poll::start(root, interval, move |told| {
        sender.send(Message::Told(told)).is_ok()
    })?;
    let deadline = Instant::now() + interval + ONCE_TIME;
    while !model.is_settled() {
        let left = deadline.saturating_duration_since(Instant::now());
        match messages.recv_timeout(left) {
            Ok(Message::Told(told)) => model.take(told, monotonic_ns()),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    model.now_ns = monotonic_ns();
    match &model.trouble {
        Some(trouble) => bail!("{trouble}"),
        None => Ok(view::plain(&model)),
    }
}

/// Shows the processes in `root` on the terminal until a key or a signal ends it.
///
/// # Errors
/// The terminal cannot be read or written, or no thread can be started.
pub fn run(root: RuntimeRoot, interval: Duration) -> anyhow::Result<Ending> {
    let signals = Signals::block().context("cannot wait for signals")?;
    let (sender, messages) = sync_channel(WAITING);
    let screen = Screen::open().context("cannot use the terminal")?;
    let to_loop = sender.clone();
    poll::start(root, interval, move |told| {
        to_loop.send(Message::Told(told)).is_ok()
    })?;
    watch_signals(signals, sender.clone())?;
    watch_keys(sender)?;
    show(screen, &messages, Model::new(interval))
}

fn watch_signals(signals: Signals, sender: SyncSender<Message>) -> anyhow::Result<()> {
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            while let Ok(asked) = signals.wait() {
                if sender.send(Message::Signal(asked)).is_err() {
                    return;
                }
            }
        })
        .context("cannot start the thread for signals")?;
    Ok(())
}

fn watch_keys(sender: SyncSender<Message>) -> anyhow::Result<()> {
    thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || {
            loop {
                let typed = event::read();
                let ends = typed.is_err();
                if sender.send(Message::Typed(typed)).is_err() || ends {
                    return;
                }
            }
        })
        .context("cannot start the thread for keys")?;
    Ok(())
}

/// The loop. The terminal is as before when it returns.
fn show(
    mut screen: Screen,
    messages: &Receiver<Message>,
    mut model: Model,
) -> anyhow::Result<Ending> {
    let mut ui = Ui::default();
    loop {
        model.now_ns = monotonic_ns();
        screen
            .draw(|frame| view::draw(&model, &mut ui, frame))
            .context("cannot write to the terminal")?;
        let first = match messages.recv_timeout(TICK) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => bail!("all threads have ended"),
        };
        // All that waits is taken in before the next frame, and no more than can wait at one time.
        for message in std::iter::once(first).chain(messages.try_iter().take(WAITING)) {
            match message {
                Message::Told(told) => model.take(told, monotonic_ns()),
                Message::Typed(typed) => {
                    if let Event::Key(key) = typed.context("cannot read the terminal")?
                        && ui.press(key, &model)
                    {
                        return Ok(Ending::SUCCESS);
                    }
                }
                Message::Signal(Asked::End(signal)) => return Ok(Ending::Signal(signal)),
                Message::Signal(Asked::Stop) => {
                    screen.leave();
                    stop_process();
                }
                Message::Signal(Asked::Continued) => {
                    screen.enter().context("cannot use the terminal")?;
                }
            }
        }
    }
}
