//! The terminal of an interactive run: the guest's while it runs, a person's again afterwards. That
//! of `top` too.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

mod common;

use common::{ECHO_CODE, EM_X86_64, elf};

const LIMIT: Duration = Duration::from_secs(30);

/// Local modes that a raw terminal has not and a person's has.
const COOKED: libc::tcflag_t = libc::ICANON | libc::ECHO | libc::ISIG;

/// A guest that echoes, run in a terminal of its own.
struct Session {
    child: Child,
    /// Our end of the terminal.
    keyboard: File,
    /// The other end, kept open to look at its modes.
    terminal: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
    folder: Arc<TempDir>,
}

impl Session {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("echo");
        std::fs::write(&kernel, elf(EM_X86_64, &ECHO_CODE)).unwrap();
        let words = ["run", "--name", "tty", "--kernel"].map(OsStr::new);
        let words = words.into_iter().chain([kernel.as_os_str()]);
        Self::open(Arc::new(folder), words)
    }

    /// `top` beside it, in another terminal.
    fn top(&self) -> Self {
        let words = ["top", "--interval", "0.1"].map(OsStr::new);
        Self::open(Arc::clone(&self.folder), words)
    }

    fn open<'a>(folder: Arc<TempDir>, words: impl IntoIterator<Item = &'a OsStr>) -> Self {
        let (mut ours, mut theirs) = (-1, -1);
        let size = libc::winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: both descriptors are written; the size is valid, and the other pointers may be
        // null.
        let made = unsafe {
            libc::openpty(
                &raw mut ours,
                &raw mut theirs,
                std::ptr::null_mut(),
                std::ptr::null(),
                &raw const size,
            )
        };
        assert_eq!(made, 0);
        // SAFETY: openpty gave it, and nobody else owns it.
        let keyboard = unsafe { File::from_raw_fd(ours) };
        // SAFETY: as above.
        let terminal = unsafe { OwnedFd::from_raw_fd(theirs) };
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        command
            .env("COFFERDAM_RUNTIME_DIR", folder.path().join("run"))
            .env("TERM", "xterm")
            .args(words)
            .stdin(terminal.try_clone().unwrap())
            .stdout(terminal.try_clone().unwrap())
            .stderr(terminal.try_clone().unwrap());
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // Whoever runs the tests may have these ignored, as nohup does.
                for signal in [libc::SIGINT, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, seen) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                seen.lock().unwrap().extend(&buffer[..count]);
            }
        });
        Self {
            child,
            keyboard,
            terminal,
            screen,
            folder,
        }
    }

    /// Whether the terminal is in the modes a person works in.
    fn cooked(&self) -> bool {
        let mut modes = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the memory is of a termios' size, and filled when the call succeeds.
        let modes = unsafe {
            assert_eq!(
                libc::tcgetattr(self.terminal.as_raw_fd(), modes.as_mut_ptr()),
                0
            );
            modes.assume_init()
        };
        modes.c_lflag & COOKED == COOKED
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds(self) {
            assert!(Instant::now() < deadline, "no {what}: {}", self.screen());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the guest has the terminal.
    #[track_caller]
    fn wait_until_raw(&self) {
        self.wait_for("raw terminal", |session| !session.cooked());
    }

    /// Waits until it has stopped itself: a signal to go on that comes before has no effect.
    #[track_caller]
    fn wait_until_stopped(&self) {
        let stat = format!("/proc/{}/stat", self.child.id());
        self.wait_for("stopped process", |_| {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit_once(") ")
                .is_some_and(|(_, fields)| fields.starts_with('T'))
        });
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: a plain system call; the child was not waited for, so its number is its own.
        let sent = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        assert_eq!(sent, 0);
    }

    /// Waits for the end; the terminal must be as it was.
    #[track_caller]
    fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() >= deadline {
                self.child.kill().unwrap();
                panic!("still runs: {}", self.screen());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(self.cooked(), "the terminal is still raw: {status}");
        status
    }

    fn assert_nothing_left(folder: &std::path::Path) {
        assert_eq!(folder.join("run").read_dir().unwrap().count(), 0);
    }
}

#[test]
fn keys_go_to_the_guest_and_ctrl_a_x_ends_it() {
    let mut session = Session::start();
    session.wait_until_raw();
    session.type_in(b"to the guest\x03still\x01h");
    session.wait_for("echo", |session| {
        session.screen().contains("to the guest\x03still")
    });
    session.wait_for("help", |session| session.screen().contains("Ctrl-A r"));
    session.type_in(b"\x01x");
    assert!(session.end().success());
}

#[test]
fn signals_give_the_terminal_back() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let session = Session::start();
        session.wait_until_raw();
        let folder = session.folder.path().to_path_buf();
        session.signal(signal);
        // The folder is the session's, which `end` takes.
        session.wait_for("end", |_| {
            folder
                .join("run")
                .read_dir()
                .is_ok_and(|mut left| left.next().is_none())
        });
        Session::assert_nothing_left(&folder);
        assert_eq!(session.end().signal(), Some(signal));
    }
}

#[test]
fn a_crash_gives_the_terminal_back() {
    for signal in [libc::SIGSEGV, libc::SIGABRT, libc::SIGBUS] {
        let session = Session::start();
        session.wait_until_raw();
        session.signal(signal);
        assert_eq!(session.end().signal(), Some(signal));
    }
}

#[test]
fn a_stopped_run_gives_the_terminal_back_until_it_goes_on() {
    let mut session = Session::start();
    session.wait_until_raw();
    session.signal(libc::SIGTSTP);
    session.wait_until_stopped();
    assert!(session.cooked());
    session.signal(libc::SIGCONT);
    session.wait_until_raw();
    session.type_in(b"\x01x");
    assert!(session.end().success());
}

/// How a terminal is told to have another screen, to have its own one back, and to show its cursor
/// (xterm's sequences).
const OWN_SCREEN: &str = "\x1b[?1049h";
const BACK: &str = "\x1b[?1049l";
const CURSOR: &str = "\x1b[?25h";

#[test]
fn top_shows_a_guest_until_q_and_gives_the_terminal_back() {
    for key in [&b"q"[..], b"\x03"] {
        let guest = Session::start();
        guest.wait_until_raw();
        let mut top = guest.top();
        top.wait_for("guest", |top| top.screen().contains("tty"));
        assert!(!top.cooked());
        assert!(top.screen().contains(OWN_SCREEN));
        top.type_in(b"?");
        top.wait_for("help", |top| top.screen().contains("aborts"));
        top.type_in(key);
        top.wait_for("end", |top| top.screen().contains(BACK));
        top.wait_for("cursor", |top| {
            let screen = top.screen();
            screen.rfind(CURSOR) > screen.rfind("\x1b[?25l")
        });
        assert!(top.end().success());
        guest.signal(libc::SIGTERM);
        assert_eq!(guest.end().signal(), Some(libc::SIGTERM));
    }
}

#[test]
fn signals_end_top_and_stop_it_with_the_terminal_given_back() {
    let guest = Session::start();
    guest.wait_until_raw();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let top = guest.top();
        top.wait_for("guest", |top| top.screen().contains("tty"));
        top.signal(libc::SIGTSTP);
        top.wait_until_stopped();
        assert!(top.cooked());
        top.wait_for("screen", |top| top.screen().contains(BACK));
        top.signal(libc::SIGCONT);
        top.wait_until_raw();
        top.wait_for("guest again", |top| {
            let screen = top.screen();
            screen.matches(OWN_SCREEN).count() == 2 && screen.matches("tty").count() > 1
        });
        top.signal(signal);
        top.wait_for("end", |top| top.screen().matches(BACK).count() == 2);
        assert_eq!(top.end().signal(), Some(signal));
    }
    guest.signal(libc::SIGTERM);
    assert_eq!(guest.end().signal(), Some(libc::SIGTERM));
}
