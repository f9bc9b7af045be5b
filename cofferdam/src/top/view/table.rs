//! Rows of cells as lines of one width.

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;

use crate::top::text::{cut, width};

/// Columns between two cells.
const GAP: usize = 1;

/// A column of a table.
pub struct Column {
    /// Its head.
    pub head: &'static str,
    /// How wide it is; the widest cell where this is wider.
    pub columns: usize,
    /// Whether cells are at its right, as numbers are.
    pub right: bool,
    /// It is left out where the screen is narrower than this.
    pub from: usize,
}

/// A row.
pub struct Row {
    /// One for each column; where there are fewer, the last one takes the place of those that are
    /// missing.
    pub cells: Vec<String>,
    /// How it looks.
    pub style: Style,
}

impl Row {
    /// A row that looks like most.
    pub fn new(cells: Vec<String>) -> Self {
        let style = Style::new();
        Self { cells, style }
    }

    /// The same, to be noticed if this holds.
    pub fn alarming(mut self, alarming: bool) -> Self {
        if alarming {
            self.style = self.style.fg(Color::Red).add_modifier(Modifier::BOLD);
        }
        self
    }

    /// The same, marked as selected if this holds.
    pub fn selected(mut self, selected: bool) -> Self {
        if selected {
            self.style = self.style.add_modifier(Modifier::REVERSED);
        }
        self
    }
}

/// How heads look.
pub fn head_style() -> Style {
    Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD)
}

/// The head and the rows as lines of `columns` columns at most. The first column takes what the
/// others leave, but no more than its cells need; the last one has all of the rest.
pub fn lines(all: &[Column], rows: Vec<Row>, columns: usize) -> Vec<Line<'static>> {
    let shown = |column: &Column| column.from <= columns;
    let fixed = all.iter().skip(1).filter(|column| shown(column));
    let taken: usize = fixed.map(|column| column.columns + GAP).sum();
    let least = all.first().map_or(0, |column| column.columns);
    let firsts = rows.iter().filter_map(|row| row.cells.first());
    let needs = firsts.map(|cell| width(cell)).max().unwrap_or(0).max(least);
    let first = needs
        .min(columns.saturating_sub(taken))
        .max(least.min(columns));
    let heads = Row {
        cells: all.iter().map(|column| column.head.to_owned()).collect(),
        style: head_style(),
    };
    std::iter::once(heads)
        .chain(rows)
        .map(|row| {
            let mut text = String::new();
            let last = row.cells.len().saturating_sub(1);
            for (at, (column, cell)) in all.iter().zip(&row.cells).enumerate() {
                let takes_the_rest = at == last && row.cells.len() < all.len();
                if !shown(column) && !takes_the_rest {
                    continue;
                }
                if at > 0 {
                    text.push_str(&" ".repeat(GAP));
                }
                let room = match at {
                    0 => first,
                    _ if at == last && !column.right => columns.saturating_sub(width(&text)),
                    _ => column.columns,
                };
                let cell = cut(cell, room);
                let empty = " ".repeat(room.saturating_sub(width(&cell)));
                match column.right {
                    true => text.extend([empty, cell]),
                    false => text.extend([cell, empty]),
                }
            }
            Line::styled(cut(&text, columns), row.style)
        })
        .collect()
}
