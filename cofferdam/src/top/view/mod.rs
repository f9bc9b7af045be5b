//! What is on the screen: a function of what is known and what was chosen to be seen.
//!
//! ```text
//! cofferdam top   2 guests, 1 device host   every 1 s          a line
//! GUEST  STATE ...                                             sections: each has its most important lines
//! ISOLATED  IN ...                                             first, gets a few of them however small the
//! DEVICE  TURN ...                                             screen is, and says how many it could not show
//! WHAT HAPPENED
//! q end  ? help ...                                            a line
//! ```

mod details;
mod sections;
mod table;

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;

use super::input::Ui;
use super::model::Model;
use super::text::{cut, width};
use crate::words::counted;

/// Columns of a frame without a terminal.
const PLAIN_COLUMNS: u16 = 160;
/// Lines that a section gets before others get more of them, its head too, where there are so many.
const FEW: usize = 3;

const HELP: [&str; 21] = [
    "q, Ctrl-C   end",
    "up, k       select the guest above; scroll up",
    "down, j     select the guest below; scroll down",
    "Enter       details of the selected guest",
    "Esc         back",
    "?           this help",
    "",
    "exits/s     exits of all vCPUs to the VM's process, per second",
    "in/s out/s  frames of its NICs, per second; - where the",
    "            device host counts them, or two readings are missing",
    "rss         memory of the VM's process that is resident, the",
    "            guest's and its own",
    "calls/s     calls of isolated functions, per second",
    "aborts      calls that were taken back since it was isolated",
    "",
    "What happens again and again is one line, with how often it did",
    "and when last. A VM that does not answer says so in its line;",
    "the others go on.",
    "",
    "cofferdam status VM, cofferdam violations VM MODULE and",
    "cofferdam device status NAME say more.",
];

/// Draws a frame.
pub fn draw(model: &Model, ui: &mut Ui, frame: &mut Frame) {
    let area = frame.area();
    let buffer = frame.buffer_mut();
    let Some(rows) = usize::from(area.height)
        .checked_sub(2)
        .filter(|rows| *rows > 0)
    else {
        return;
    };
    let columns = usize::from(area.width);
    let mut lines = vec![title(model, columns)];
    let keys = match (&ui.details, ui.help) {
        (_, true) => {
            let help = HELP.iter().take(rows);
            lines.extend(help.map(|line| Line::from(cut(line, columns))));
            "Esc back  q end"
        }
        (Some(name), false) => {
            let all = details::lines(model, name, columns);
            ui.scroll = ui.scroll.min(all.len().saturating_sub(rows));
            lines.extend(all.into_iter().skip(ui.scroll).take(rows));
            "Esc back  up/down scroll  ? help  q end"
        }
        (None, false) => {
            lines.extend(overview(model, ui.selected(model), columns, rows));
            "q end  ? help  up/down select  Enter details"
        }
    };
    lines.truncate(rows + 1);
    lines.resize(rows + 1, Line::default());
    lines.push(Line::styled(
        cut(keys, columns),
        Style::new().add_modifier(Modifier::DIM),
    ));
    put(&lines, area, buffer);
}

/// All that there is, as text for no terminal.
pub fn plain(model: &Model) -> String {
    let columns = usize::from(PLAIN_COLUMNS);
    let sections = sections::all(model, None, columns);
    let lines = std::iter::once(title(model, columns)).chain(sections.into_iter().flatten());
    lines
        .map(|line| format!("{}\n", line.to_string().trim_end()))
        .collect()
}

fn put(lines: &[Line], area: Rect, buffer: &mut Buffer) {
    for (line, y) in lines.iter().zip(area.y..area.bottom()) {
        buffer.set_line(area.x, y, line, area.width);
    }
}

fn title(model: &Model, columns: usize) -> Line<'static> {
    let guests = counted(model.guests.len() as u64, "guest", "guests");
    let hosts = counted(model.hosts.len() as u64, "device host", "device hosts");
    let every = model.interval.as_secs_f64();
    let text = match &model.trouble {
        Some(trouble) => format!("cofferdam top  {trouble}"),
        None => format!("cofferdam top  {guests}, {hosts}, every {every} s"),
    };
    Line::styled(
        cut(&text, columns),
        Style::new().add_modifier(Modifier::BOLD),
    )
}

/// The sections in so many rows.
fn overview(
    model: &Model,
    selected: Option<&str>,
    columns: usize,
    rows: usize,
) -> Vec<Line<'static>> {
    let sections = sections::all(model, selected, columns);
    let wanted: Vec<usize> = sections.iter().map(Vec::len).collect();
    let given = share(rows, &wanted);
    let at = model
        .guests
        .keys()
        .position(|name| Some(name.as_str()) == selected);
    let mut lines = Vec::new();
    for (number, (section, given)) in sections.into_iter().zip(given).enumerate() {
        // The guests come first; the selected one is to be seen.
        let must = if number == 0 {
            at.map_or(0, |at| at + 1)
        } else {
            0
        };
        lines.extend(fit(section, given, must, columns));
    }
    lines
}

/// How many of `rows` each section gets, of those that it wants.
fn share(rows: usize, wanted: &[usize]) -> Vec<usize> {
    let few = FEW.min(rows / wanted.len().max(1)).max(1);
    let mut left = rows;
    let mut given = vec![0; wanted.len()];
    for (given, wanted) in given.iter_mut().zip(wanted) {
        *given = few.min(*wanted).min(left);
        left -= *given;
    }
    while left > 0 {
        let mut all_have = true;
        for (given, wanted) in given.iter_mut().zip(wanted) {
            if *given < *wanted && left > 0 {
                *given += 1;
                left -= 1;
                all_have = false;
            }
        }
        if all_have {
            break;
        }
    }
    given
}

/// The head of a section and as many lines as fit, that with the number `must` among them. Where
/// some do not fit, the last line says so, if there is room for one beside it.
fn fit(
    section: Vec<Line<'static>>,
    rows: usize,
    must: usize,
    columns: usize,
) -> Vec<Line<'static>> {
    if section.len() <= rows || rows == 0 {
        return section.into_iter().take(rows).collect();
    }
    let says = rows > 2;
    let shown = rows - 1 - usize::from(says);
    let hidden = section.len() - 1 - shown;
    let skipped = must.saturating_sub(shown);
    let mut section = section.into_iter();
    let mut lines: Vec<_> = section.next().into_iter().collect();
    lines.extend(section.skip(skipped).take(shown));
    if says {
        lines.push(Line::from(cut(&format!("  … {hidden} more"), columns)));
    } else if let Some(head) = lines.first_mut() {
        let more = format!(" +{hidden}");
        let head_text = cut(&head.to_string(), columns.saturating_sub(width(&more)));
        *head = Line::styled(format!("{head_text}{more}"), head.style);
    }
    lines
}

#[cfg(test)]
mod tests;
