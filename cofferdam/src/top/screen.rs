//! The terminal, with a screen of its own while this runs; put back when it ends, panics or is
//! stopped.

use std::io::stdout;

use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode, size};
use ratatui::layout::Rect;
use ratatui::{DefaultTerminal, Frame, TerminalOptions, Viewport};

/// Size of a terminal that does not tell, as a serial line.
const SIZE: Rect = Rect::new(0, 0, 80, 24);

/// The terminal. Dropping it puts it back.
pub struct Screen(DefaultTerminal);

impl Screen {
    /// Takes the terminal. A panic puts it back before its message is printed.
    pub fn open() -> std::io::Result<Self> {
        let viewport = match size()? {
            (0, _) | (_, 0) => Viewport::Fixed(SIZE),
            _ => Viewport::Fullscreen,
        };
        let opened = ratatui::try_init_with_options(TerminalOptions { viewport });
        let mut screen = match opened {
            Ok(terminal) => Self(terminal),
            Err(error) => {
                // It may be half taken.
                ratatui::restore();
                return Err(error);
            }
        };
        screen.enter()?;
        Ok(screen)
    }

    /// Draws a frame.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame)) -> std::io::Result<()> {
        self.0.draw(draw).map(|_| ())
    }

    /// Takes the terminal, also again after [`Self::leave`].
    pub fn enter(&mut self) -> std::io::Result<()> {
        enable_raw_mode()?;
        execute!(stdout(), EnterAlternateScreen)?;
        // Drawn anew as a whole. `Terminal::clear` would ask the terminal where its cursor is and
        // wait for what it says.
        let area = self.0.get_frame().area();
        self.0.resize(area)
    }

    /// Puts the terminal back.
    pub fn leave(&mut self) {
        // Where the terminal has gone there is nothing to put back, and nobody to tell.
        let _ = execute!(stdout(), Show);
        let _ = ratatui::try_restore();
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.leave();
    }
}
