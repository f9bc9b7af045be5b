//! Tables for people.
//!
//! On a terminal they are as wide as it is, and 80 columns where it does not tell; cells that do
//! not fit have several lines. Elsewhere, for programs that look for a line, each row is one line,
//! unless `COLUMNS` says how wide.

use std::io::IsTerminal;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

/// Columns of a terminal that does not tell.
const COLUMNS: u16 = 80;

/// A table with these column heads.
pub fn table(heads: &[&str]) -> Table {
    let told = std::env::var("COLUMNS").ok();
    let told = told
        .and_then(|columns| columns.parse().ok())
        .filter(|columns| *columns > 0);
    table_for(heads, told)
}

fn table_for(heads: &[&str], columns: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    match columns {
        Some(columns) => {
            table.set_width(columns);
        }
        None if !std::io::stdout().is_terminal() => {
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
        None if table.width().is_none() => {
            table.set_width(COLUMNS);
        }
        None => {}
    }
    table.set_header(heads);
    table
}

/// A cell with a number, at the right of its column.
pub fn number(value: impl std::fmt::Display) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_it_may_be() {
        let long = "word ".repeat(40);
        let row = |mut table: Table| table.add_row(vec![Cell::new(&long), number(7)]).to_string();
        for columns in [40, 80] {
            let text = row(table_for(&["what", "count"], Some(columns)));
            let widest = text.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(columns.into()), "{text}");
        }
        // Not a terminal: one line.
        let text = row(table_for(&["what", "count"], None));
        assert!(
            text.lines().any(|line| line.contains(long.trim())),
            "{text}"
        );
    }
}
