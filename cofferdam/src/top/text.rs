//! Text of others, made fit for a terminal, and numbers as they are shown.

use ratatui::text::Span;

/// Longest text that is kept of others, in characters.
pub const MAX_CHARS: usize = 1000;

/// `text` without what a terminal would obey or could not show: control characters, and those that
/// turn the direction of writing or are not seen. Line ends and tabs become spaces. What is longer
/// than [`MAX_CHARS`] is cut off.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_whitespace() { ' ' } else { c })
        .filter(|c| !c.is_control() && !is_unseen(*c))
        .take(MAX_CHARS)
        .collect()
}

/// Characters of Unicode's categories Cf, Zl and Zp that matter to a terminal.
fn is_unseen(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Columns that `text` takes.
pub fn width(text: &str) -> usize {
    Span::raw(text).width()
}

fn char_width(c: char) -> usize {
    width(c.encode_utf8(&mut [0; 4]))
}

/// `text` in as many columns at most, with `…` where it is cut.
pub fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let room = columns.saturating_sub(1);
    let mut short = first_columns(text, room).to_owned();
    if columns > 0 {
        short.push('…');
    }
    short
}

/// The beginning of `text` that fits.
fn first_columns(text: &str, columns: usize) -> &str {
    let mut used = 0;
    for (at, c) in text.char_indices() {
        used += char_width(c);
        if used > columns {
            return text.get(..at).unwrap_or_default();
        }
    }
    text
}

/// `text` in lines of as many columns at most (at least 8), broken between words where that is
/// possible.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(8);
    let mut lines = Vec::new();
    let mut line = String::new();
    for mut word in text.split_whitespace() {
        let glue = usize::from(!line.is_empty());
        if width(&line) + glue + width(word) > columns && !line.is_empty() {
            lines.push(std::mem::take(&mut line));
        }
        while width(word) > columns {
            let part = first_columns(word, columns);
            lines.push(part.to_owned());
            word = word.get(part.len()..).unwrap_or_default();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() || lines.is_empty() {
        lines.push(line);
    }
    lines
}

/// A count in at most five columns; `-` where it is not known.
pub fn count(value: Option<u64>) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")];
    match value {
        None => "-".to_owned(),
        Some(value) if value < 10_000 => value.to_string(),
        Some(value) => UNITS
            .into_iter()
            .find(|(unit, _)| value >= *unit)
            .map_or_else(
                || value.to_string(),
                |(unit, name)| scaled(value, unit, name),
            ),
    }
}

/// An amount of memory, in KiB, in at most five columns.
pub fn memory(kib: u64) -> String {
    match kib {
        0..1024 => format!("{kib}K"),
        1024..1_048_576 => scaled(kib, 1024, "M"),
        1_048_576..1_073_741_824 => scaled(kib, 1_048_576, "G"),
        _ => scaled(kib, 1_073_741_824, "T"),
    }
}

/// With one digit behind the point where there are fewer than three before it.
fn scaled(value: u64, unit: u64, name: &str) -> String {
    let (whole, tenths) = (value / unit, value % unit * 10 / unit);
    match (whole, tenths) {
        (0..100, 1..) => format!("{whole}.{tenths}{name}"),
        _ => format!("{whole}{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_taken_out() {
        assert_eq!(clean("a\x1b[2J\x07b\r\n\tc\u{9b}31m"), "a[2Jb   c31m");
        assert_eq!(clean("x\u{202e}y\u{200b}z\u{2028}\u{feff}"), "xyz ");
        assert_eq!(clean("größer 中"), "größer 中");
        assert_eq!(clean(&"x".repeat(5000)).len(), MAX_CHARS);
    }

    #[test]
    fn text_is_cut_and_wrapped_by_columns() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
        assert_eq!(cut("中中中", 4), "中…");
        assert_eq!(cut("abc", 0), "");
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("0123456789 x", 8), ["01234567", "89 x"]);
        assert_eq!(wrap("a 0123456789", 8), ["a", "01234567", "89"]);
        assert_eq!(wrap("", 8), [""]);
        assert!(wrap(&"中".repeat(9), 9).iter().all(|line| width(line) <= 9));
    }

    #[test]
    fn numbers_are_short() {
        let counts = [0, 9999, 10_000, 12_345, 123_456, 1_500_000, u64::MAX];
        let said = counts.map(|value| count(Some(value)));
        assert_eq!(
            said[..6],
            ["0", "9999", "10k", "12.3k", "123k", "1.5M"].map(str::to_owned)
        );
        assert_eq!(count(None), "-");
        let sizes = [0, 1023, 1024, 1536, 524_288, 4_194_304].map(memory);
        assert_eq!(sizes, ["0K", "1023K", "1M", "1.5M", "512M", "4G"]);
    }
}
