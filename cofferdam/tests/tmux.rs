//! `top` in a real terminal of others' making: tmux, of 80 columns and 24 lines, as over ssh.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

mod common;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::place::{LIMIT, Place, end};

/// A tmux server of its own, with one session in it.
struct Tmux<'a> {
    place: &'a Place,
}

impl<'a> Tmux<'a> {
    /// Starts one that runs these words of `cofferdam` in a screen of this size.
    fn start(place: &'a Place, columns: u16, lines: u16, words: &str) -> Self {
        let tmux = Self { place };
        let (columns, lines) = (columns.to_string(), lines.to_string());
        let program = env!("CARGO_BIN_EXE_cofferdam");
        // What it ends with stays on the screen.
        let command = format!("{program} {words}; echo ended $?; sleep 600");
        let words = ["new-session", "-d", "-s", "x", "-x", &columns, "-y", &lines];
        let output = tmux.tmux(&[&words[..], &[&command]].concat());
        assert!(output.status.success(), "{output:?}");
        tmux
    }

    fn tmux(&self, words: &[&str]) -> Output {
        Command::new("tmux")
            .arg("-S")
            .arg(self.place.path("tmux"))
            // Its user's own settings are not part of this.
            .args(["-f", "/dev/null"])
            .args(words)
            .env("COFFERDAM_RUNTIME_DIR", self.place.path("run"))
            .env("LANG", "C.UTF-8")
            // Not its user's, which may be one that runs nothing.
            .env("SHELL", "/bin/sh")
            .env_remove("TMUX")
            .output()
            .unwrap()
    }

    /// What is on the screen. A line that went on in the next one is one line: too long.
    fn screen(&self) -> String {
        let output = self.tmux(&["capture-pane", "-p", "-J", "-t", "x"]);
        String::from_utf8(output.stdout).unwrap()
    }

    fn key(&self, key: &str) {
        let output = self.tmux(&["send-keys", "-t", "x", key]);
        assert!(output.status.success(), "{output:?}");
    }

    /// The screen when all of this is on it.
    #[track_caller]
    fn wait_for(&self, all: &[&str]) -> String {
        let what = format!("{all:?}");
        self.wait_until(&what, |screen| all.iter().all(|text| screen.contains(text)))
    }

    /// The screen when this is so.
    #[track_caller]
    fn wait_until(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let screen = self.screen();
            if is_so(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "no {what} in:\n{screen}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Tmux<'_> {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

/// What the last line says.
const KEYS: &str = "q end";

/// All of it is there, from the first line to the last one, and none is longer than the screen.
#[track_caller]
fn assert_fits(screen: &str, columns: usize, lines: usize) {
    let all: Vec<&str> = screen.trim_end().lines().collect();
    assert_eq!(all.len(), lines, "{screen}");
    assert!(all[0].contains("cofferdam"), "{screen}");
    assert!(all[lines - 1].contains(KEYS), "{screen}");
    let longest = all.iter().map(|line| line.chars().count()).max();
    assert!(longest <= Some(columns), "{longest:?} columns:\n{screen}");
}

#[test]
fn top_fits_a_terminal_of_80_columns_and_24_lines_and_gives_it_back() {
    let name = "tmux::top_fits_a_terminal_of_80_columns_and_24_lines_and_gives_it_back";
    if Command::new("tmux").arg("-V").output().is_err() {
        return skipped::skip(name, "there is no tmux");
    }
    let place = Place::new();
    let vm = place.idle("");
    let tmux = Tmux::start(&place, 80, 24, "top --interval 0.2");
    let screen = tmux.wait_for(&["idle", "running", KEYS]);
    assert_fits(&screen, 80, 24);
    // One that is paused is shown so while it is looked at; the columns stay where they are.
    let column = |screen: &str, text: &str| screen.lines().find_map(|line| line.find(text));
    place.ask("pause idle");
    let paused = tmux.wait_for(&["idle", "paused"]);
    assert_eq!(
        column(&paused, "paused"),
        column(&screen, "running"),
        "{paused}"
    );
    place.ask("resume idle");
    tmux.wait_for(&["idle", "running"]);
    tmux.key("Enter");
    tmux.wait_for(&["idle", "process ", "up "]);
    tmux.key("Escape");
    tmux.wait_until("list", |screen| !screen.contains("process "));
    tmux.key("?");
    tmux.wait_for(&["aborts"]);
    tmux.key("?");
    // Another size, as when a window is changed.
    let output = tmux.tmux(&["resize-window", "-t", "x", "-x", "60", "-y", "12"]);
    assert!(output.status.success(), "{output:?}");
    // The last line of the larger one is not on it any more until all is drawn anew.
    let small = tmux.wait_for(&["idle", "running", KEYS]);
    assert_fits(&small, 60, 12);
    tmux.key("q");
    let after = tmux.wait_for(&["ended 0"]);
    assert!(!after.contains("running"), "{after}");
    drop(tmux);
    end(&place, vm, &[]);
}
