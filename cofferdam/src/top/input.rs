//! What is shown, and what keys do to it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::model::Model;

/// What a person has chosen to see.
#[derive(Debug, Default)]
pub struct Ui {
    /// Name of the guest that was selected.
    chosen: Option<String>,
    /// The guest whose details are shown.
    pub details: Option<String>,
    /// Lines of them that are above the screen; no more than the view finds there to be.
    pub scroll: usize,
    /// Whether the help is shown, over what was shown before.
    pub help: bool,
}

impl Ui {
    /// Name of the selected guest: the one that was chosen, or the first one.
    pub fn selected<'a>(&self, model: &'a Model) -> Option<&'a str> {
        let chosen = self.chosen.as_ref();
        let chosen = chosen.and_then(|name| model.guests.get_key_value(name));
        chosen
            .or_else(|| model.guests.first_key_value())
            .map(|(name, _)| name.as_str())
    }

    /// Does what a key says; whether it says to end.
    pub fn press(&mut self, key: KeyEvent, model: &Model) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return true,
            _ if control => {}
            KeyCode::Char('q') => return true,
            KeyCode::Char('?') | KeyCode::Char('h') => self.help = !self.help,
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Esc => self.details = None,
            _ if self.help => {}
            KeyCode::Enter if self.details.is_none() => {
                self.details = self.selected(model).map(str::to_owned);
                self.scroll = 0;
            }
            KeyCode::Up | KeyCode::Char('k') => self.go(model, -1),
            KeyCode::Down | KeyCode::Char('j') => self.go(model, 1),
            KeyCode::PageUp => self.go(model, -10),
            KeyCode::PageDown => self.go(model, 10),
            _ => {}
        }
        false
    }

    /// Selects another guest, or scrolls the details.
    fn go(&mut self, model: &Model, by: isize) {
        if self.details.is_some() {
            self.scroll = self.scroll.saturating_add_signed(by);
            return;
        }
        let selected = self.selected(model);
        let names: Vec<&String> = model.guests.keys().collect();
        let at = names
            .iter()
            .position(|name| Some(name.as_str()) == selected);
        let last = names.len().saturating_sub(1);
        let to = at.unwrap_or(0).saturating_add_signed(by).min(last);
        self.chosen = names.get(to).map(|name| (*name).clone());
    }
}
