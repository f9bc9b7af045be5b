//! Frames of made-up processes.

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use recovery::ladder::{LadderStatus, Rungs, State};

use super::*;
use crate::top::double::{Told1s, host_who, module, status, violations, who};

/// What is on a screen of this size, by line.
fn screen(model: &Model, ui: &mut Ui, columns: u16, rows: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    terminal.draw(|frame| draw(model, ui, frame)).unwrap();
    let buffer = terminal.backend().buffer();
    let lines = buffer.content().chunks(columns.into());
    lines
        .map(|cells| cells.iter().map(|cell| cell.symbol()).collect())
        .collect()
}

/// Two guests, one with an isolated driver that was restarted, one that hangs; a device host.
fn busy() -> Told1s {
    let mut told = Told1s::running(&[who("db"), who("web"), host_who("nic0")]);
    for n in [1, 2] {
        let mut web = status(1000 * n, 300 * n);
        web.isolation = vec![module(500 * n, 3)];
        let rungs = Rungs {
            restarts: n,
            ..Rungs::default()
        };
        let ladder = LadderStatus {
            state: State::Restarting,
            rungs,
            ..LadderStatus::default()
        };
        web.recovery.insert("e1000".to_owned(), ladder);
        told.guest("web", web, &[violations(3, 2 * crate::top::double::S)]);
    }
    told.no_answer("db", "its process is stopped; `kill -CONT 7` lets it go on");
    told.host("nic0");
    told
}

fn press(ui: &mut Ui, model: &Model, code: KeyCode) -> bool {
    ui.press(KeyEvent::new(code, KeyModifiers::NONE), model)
}

#[track_caller]
fn assert_shows(lines: &[String], words: &[&str]) {
    let text = lines.join("\n");
    for word in words {
        assert!(text.contains(word), "no {word:?} in:\n{text}");
    }
}

#[test]
fn a_terminal_of_80_by_24_shows_all_that_matters() {
    let told = busy();
    let lines = screen(&told.model, &mut Ui::default(), 80, 24);
    assert_shows(
        &lines,
        &[
            "2 guests, 1 device host, every 1 s",
            "db         does not answer: its process is stopped; `kill -CONT 7`",
            "out/s isolated",
            "restarting, restarts 2",
            "left parked, right has the turn",
            "nic0 12: left to right (asked for) in 1.5 us",
            "web e1000: restarts: 2",
            "(kmalloc-512)",
            "at e1000_tx_map+0x4c (3",
            "q end  ? help",
        ],
    );
    let web = lines.iter().find(|line| line.starts_with("web ")).unwrap();
    let cells: Vec<&str> = web.split_whitespace().collect();
    let right = [
        "web", "running", "2", "512M", "3M", "1000", "300", "150", "1",
    ];
    assert_eq!(cells, right);
    let module = lines
        .iter()
        .find(|line| line.starts_with("e1000 "))
        .unwrap();
    let cells: Vec<&str> = module.split_whitespace().take(5).collect();
    assert_eq!(cells, ["e1000", "web", "1", "500", "3"]);
}

#[test]
fn every_size_of_terminal_is_drawn_and_a_small_one_says_what_it_leaves_out() {
    let told = busy();
    for (columns, rows) in [(1, 1), (3, 2), (9, 3), (20, 4), (300, 2), (5, 100)] {
        for code in [
            KeyCode::Null,
            KeyCode::Char('?'),
            KeyCode::Esc,
            KeyCode::Enter,
        ] {
            let mut ui = Ui::default();
            press(&mut ui, &told.model, code);
            screen(&told.model, &mut ui, columns, rows);
        }
    }
    let lines = screen(&told.model, &mut Ui::default(), 40, 10);
    assert_shows(
        &lines,
        &[
            "GUEST",
            "+1",
            "db         does not answer",
            "e1000    web             3 restarting",
            "nic0     right",
            "HAPPENED",
            "db does not answer",
            "q end",
        ],
    );
    let lines = screen(&told.model, &mut Ui::default(), 200, 50);
    assert_shows(
        &lines,
        &[
            "e1000 on user",
            "that the call may not write, at e1000_tx_map+0x4c (3 times)",
        ],
    );
    assert!(!lines.join("\n").contains("more"));
}

#[test]
fn the_selected_guest_is_seen_however_many_there_are() {
    let all: Vec<_> = (0..100).map(|n| who(&format!("vm{n:02}"))).collect();
    let mut told = Told1s::running(&all);
    let mut ui = Ui::default();
    for _ in 0..70 {
        press(&mut ui, &told.model, KeyCode::Char('j'));
    }
    press(&mut ui, &told.model, KeyCode::Up);
    assert_eq!(ui.selected(&told.model), Some("vm69"));
    assert_shows(&screen(&told.model, &mut ui, 80, 24), &["vm69", "more"]);
    for _ in 0..200 {
        press(&mut ui, &told.model, KeyCode::Down);
    }
    assert_eq!(ui.selected(&told.model), Some("vm99"));
    assert_shows(&screen(&told.model, &mut ui, 40, 10), &["vm99"]);
    // It has gone: the first one is selected.
    told.run(&all[..50]);
    assert_eq!(ui.selected(&told.model), Some("vm00"));
}

#[test]
fn details_show_one_guest_and_scroll_to_their_end() {
    let mut told = busy();
    let mut ui = Ui::default();
    press(&mut ui, &told.model, KeyCode::Down);
    press(&mut ui, &told.model, KeyCode::Enter);
    let lines = screen(&told.model, &mut ui, 80, 30);
    assert_shows(
        &lines,
        &[
            "running, process 7, up 5.0 s, resets: 0",
            "NIC 0000:00:02.0 e1000 on user",
            "frames in 600 (300/s), out 300 (150/s)",
            "restarts: 2 (0 failed)",
            "e1000_xmit_frame",
            "hlt",
        ],
    );
    for _ in 0..1000 {
        press(&mut ui, &told.model, KeyCode::PageDown);
    }
    let lines = screen(&told.model, &mut ui, 40, 10);
    assert!(ui.scroll < 100, "{}", ui.scroll);
    assert_shows(&lines, &["(3 times)"]);
    told.run(&[]);
    ui.scroll = 0;
    assert_shows(&screen(&told.model, &mut ui, 80, 24), &["web", "has ended"]);
    press(&mut ui, &told.model, KeyCode::Esc);
    assert_shows(
        &screen(&told.model, &mut ui, 80, 24),
        &["no VM is running", "0 guests"],
    );
}

#[test]
fn the_help_fits_80_by_24_and_goes_away() {
    let told = busy();
    let mut ui = Ui::default();
    press(&mut ui, &told.model, KeyCode::Char('?'));
    let lines = screen(&told.model, &mut ui, 80, 24);
    assert_shows(&lines, &["details of the selected guest", "say more"]);
    assert!(HELP.iter().all(|line| line.len() <= 80));
    // Keys for what is under it do nothing.
    press(&mut ui, &told.model, KeyCode::Enter);
    press(&mut ui, &told.model, KeyCode::Esc);
    assert!(!ui.help && ui.details.is_none());
}

#[test]
fn q_and_control_c_end_it_wherever_it_is() {
    let told = busy();
    for before in [KeyCode::Null, KeyCode::Enter, KeyCode::Char('?')] {
        let mut ui = Ui::default();
        assert!(!press(&mut ui, &told.model, before));
        assert!(press(&mut ui, &told.model, KeyCode::Char('q')));
        let key = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert!(ui.press(key, &told.model));
        assert!(!press(&mut ui, &told.model, KeyCode::Char('c')));
    }
}

#[test]
fn no_text_of_a_guest_or_another_process_reaches_the_terminal_with_escapes() {
    let evil = "\x1b[2J\x1b]0;title\x07\r\n\u{9b}5A\u{202e}\u{200b}EVIL";
    let mut told = Told1s::running(&[who("db"), who("web")]);
    let mut web = status(1, 1);
    web.guest_panic = Some(evil.to_owned());
    web.config.kernel = evil.to_owned();
    web.nics[0].address = evil.to_owned();
    web.exits.insert(evil.to_owned(), 1);
    let mut isolated = module(1, 1);
    isolated.module = evil.to_owned();
    isolated.entries[0].name = evil.to_owned();
    isolated.broken = Some(evil.to_owned());
    web.isolation = vec![isolated, module(1, 1)];
    let gave_up = Some(evil.to_owned());
    let ladder = LadderStatus {
        gave_up,
        state: State::Stopped,
        ..LadderStatus::default()
    };
    web.recovery.insert("e1000".to_owned(), ladder);
    let mut wrong = violations(1, 1);
    wrong.text = evil.to_owned();
    told.guest("web", web, &[wrong]);
    told.no_answer("db", evil);
    let mut ui = Ui::default();
    let mut all = vec![plain(&told.model)];
    all.extend(screen(&told.model, &mut ui, 200, 50));
    press(&mut ui, &told.model, KeyCode::Down);
    press(&mut ui, &told.model, KeyCode::Enter);
    all.extend(screen(&told.model, &mut ui, 200, 50));
    let text = all.join("\n");
    assert!(text.matches("EVIL").count() > 10, "{text}");
    let bad = |c: &char| (c.is_control() && *c != '\n') || matches!(c, '\u{202e}' | '\u{200b}');
    assert_eq!(text.chars().find(bad), None, "{text:?}");
}

#[test]
fn text_for_no_terminal_leaves_nothing_out() {
    let told = busy();
    let text = plain(&told.model);
    for word in [
        "does not answer",
        "restarting, restarts 2",
        "e1000_tx_map+0x4c (3 times)",
        "nic0",
    ] {
        assert!(text.contains(word), "no {word:?} in:\n{text}");
    }
    assert!(!text.contains('\x1b') && !text.contains("more"), "{text}");
    let none = Told1s::running(&[]);
    let text = plain(&none.model);
    assert_eq!(
        text,
        "cofferdam top  0 guests, 0 device hosts, every 1 s\nno VM is running\n"
    );
}

#[test]
fn each_section_gets_some_rows_and_the_rest_is_shared() {
    assert_eq!(share(24, &[5, 2, 4, 3]), [5, 2, 4, 3]);
    assert_eq!(share(10, &[50, 2, 50]), [4, 2, 4]);
    assert_eq!(share(4, &[50, 50]), [2, 2]);
    assert_eq!(share(3, &[9, 9, 9, 9]), [1, 1, 1, 0]);
    assert_eq!(share(0, &[50]), [0]);
}
