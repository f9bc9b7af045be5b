//! Tables of a page.

use maud::{Markup, html};

use crate::report::Stat;

/// A table of text.
pub fn table(heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Markup {
    html! {
        table {
            tr { @for head in heads { th { (head) } } }
            @for row in rows {
                tr { @for cell in row { td { (cell) } } }
            }
        }
    }
}

/// A table of numbers, out of [`stat_row`]s.
pub fn stats(what: &str, unit: &str, rows: impl Iterator<Item = Markup>) -> Markup {
    let columns = ["smallest", "median", "p99", "largest"];
    html! {
        table {
            tr {
                th { (what) }
                th { "runs" }
                @for column in columns { th { (column) ", " (unit) } }
            }
            @for row in rows { (row) }
        }
    }
}

/// One line of such a table.
pub fn stat_row(name: Markup, stat: &Stat, unit_us: f64) -> Markup {
    let values = [stat.min, stat.p50, stat.p99, stat.max];
    html! {
        tr {
            td { (name) }
            td { (stat.n) }
            @for value in values { td { (format!("{:.3}", value / unit_us)) } }
        }
    }
}
