//! Tables for people.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

/// A table with these column heads.
pub fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(heads);
    table
}

/// A cell with a number, at the right of its column.
pub fn number(value: impl std::fmt::Display) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}
