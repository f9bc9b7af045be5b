//! What plots are drawn on: SVG that can be put into a page of any colour.
//!
//! Text and axes are drawn in the page's own text colour; bars and boxes in colours that stand out
//! on white and on black.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::Axis;

/// Width of every plot, in pixels.
const WIDTH: i32 = 860;
/// Height of one row, in pixels.
const ROW: i32 = 40;
/// Where the rows' names end and the plot begins, in pixels.
pub(super) const LEFT: i32 = 200;
/// Where the plot ends, in pixels.
pub(super) const RIGHT: i32 = WIDTH - 80;
/// Room above the rows, in pixels.
const TOP: i32 = 8;
/// Room below the rows for the axis, in pixels.
const BOTTOM: i32 = 54;
/// Size of the text, in pixels.
const TEXT: i32 = 17;

/// Stands for the page's text colour until the SVG is finished.
pub(super) const INK: RGBColor = RGBColor(1, 2, 3);
/// How it looks in the SVG.
const INK_TEXT: &str = "#010203";
/// What is not the subject.
pub(super) const GREY: RGBColor = RGBColor(0x88, 0x88, 0x88);
/// Side of a square that shows a colour, in pixels.
const SWATCH: i32 = 14;
/// A letter is about so wide, in pixels.
const LETTER: i32 = 9;

/// A plot in the making: rows with names on the left, an axis below.
pub(super) struct Plot {
    rows: usize,
    elements: Vec<Element>,
}

/// Something to draw, in pixels.
enum Element {
    Line {
        from: (i32, i32),
        to: (i32, i32),
        color: RGBColor,
        width: u32,
    },
    Block {
        from: (i32, i32),
        to: (i32, i32),
        color: RGBColor,
    },
    Text {
        at: (i32, i32),
        anchor: Pos,
        text: String,
    },
}

impl Plot {
    pub(super) fn new(rows: usize, axis: &Axis, label: &str) -> Self {
        let mut plot = Self {
            rows,
            elements: Vec::new(),
        };
        let floor = Self::top(rows);
        for tick in axis.ticks() {
            let x = axis.pixel(tick);
            let color = GREY;
            plot.elements.push(Element::Line {
                from: (x, TOP),
                to: (x, floor),
                color,
                width: 1,
            });
            plot.text((x, floor + 6), HPos::Center, VPos::Top, axis.label(tick));
        }
        plot.line((LEFT, floor), (RIGHT, floor), INK, 1);
        plot.text(
            (i32::midpoint(LEFT, RIGHT), floor + 30),
            HPos::Center,
            VPos::Top,
            label,
        );
        plot
    }

    /// Upper edge of a row.
    fn top(row: usize) -> i32 {
        i32::try_from(row)
            .unwrap_or(i32::MAX)
            .saturating_mul(ROW)
            .saturating_add(TOP)
    }

    /// Middle of a row.
    pub(super) fn center(row: usize) -> i32 {
        Self::top(row).saturating_add(ROW / 2)
    }

    pub(super) fn name(&mut self, row: usize, name: &str) {
        self.text(
            (LEFT - 10, Self::center(row)),
            HPos::Right,
            VPos::Center,
            name,
        );
    }

    pub(super) fn text(&mut self, at: (i32, i32), h: HPos, v: VPos, text: impl Into<String>) {
        self.elements.push(Element::Text {
            at,
            anchor: Pos::new(h, v),
            text: text.into(),
        });
    }

    pub(super) fn line(&mut self, from: (i32, i32), to: (i32, i32), color: RGBColor, width: u32) {
        self.elements.push(Element::Line {
            from,
            to,
            color,
            width,
        });
    }

    pub(super) fn block(&mut self, from: i32, to: i32, y: i32, half: i32, color: RGBColor) {
        let (from, to) = ((from, y - half), (to.max(from + 1), y + half));
        self.elements.push(Element::Block { from, to, color });
    }

    /// How many rows it takes to say what colours are.
    pub(super) fn rows_of_key(key: &[(&str, RGBColor)]) -> usize {
        place(key).last().map_or(0, |(row, _)| row + 1)
    }

    /// Says in the first rows what colours are.
    pub(super) fn key(&mut self, key: &[(&str, RGBColor)]) {
        for ((name, color), (row, x)) in key.iter().zip(place(key)) {
            let y = Self::center(row);
            self.block(x, x + SWATCH, y, SWATCH / 2, *color);
            self.text((x + SWATCH + 6, y), HPos::Left, VPos::Center, *name);
        }
    }

    pub(super) fn svg(self) -> anyhow::Result<String> {
        let mut svg = String::new();
        {
            let width = WIDTH.unsigned_abs();
            let height = Self::top(self.rows).saturating_add(BOTTOM).unsigned_abs();
            let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
            for element in &self.elements {
                draw(&root, element).map_err(|error| anyhow!("cannot draw a plot: {error}"))?;
            }
            root.present()
                .map_err(|error| anyhow!("cannot draw a plot: {error}"))?;
        }
        Ok(svg.replace(INK_TEXT, "currentColor"))
    }
}

/// Row and pixel at which each name of a key begins.
fn place(key: &[(&str, RGBColor)]) -> Vec<(usize, i32)> {
    let (mut row, mut x) = (0, LEFT);
    let each = key.iter().map(|(name, _)| {
        let letters = i32::try_from(name.len()).unwrap_or(i32::MAX);
        let width = letters.saturating_mul(LETTER).saturating_add(2 * SWATCH);
        if x > LEFT && x.saturating_add(width) > WIDTH {
            (row, x) = (row + 1, LEFT);
        }
        let at = (row, x);
        x = x.saturating_add(width).saturating_add(SWATCH);
        at
    });
    each.collect()
}

/// Draws one element.
fn draw<B: DrawingBackend>(
    root: &DrawingArea<B, Shift>,
    element: &Element,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    match element {
        Element::Line {
            from,
            to,
            color,
            width,
        } => {
            let faint = if *color == GREY && *width == 1 {
                0.35
            } else {
                1.0
            };
            let style = color.mix(faint).stroke_width(*width);
            root.draw(&PathElement::new([*from, *to], style))
        }
        Element::Block { from, to, color } => {
            root.draw(&Rectangle::new([*from, *to], color.filled()))
        }
        Element::Text { at, anchor, text } => {
            let font = ("sans-serif", TEXT).into_font().color(&INK);
            root.draw_text(text, &font.pos(*anchor), *at)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_on_in_the_next_row() {
        assert_eq!(Plot::rows_of_key(&[]), 0);
        assert_eq!(Plot::rows_of_key(&[("one", INK)]), 1);
        let long = "x".repeat(30);
        let key = [(long.as_str(), INK), ("two", INK), (long.as_str(), INK)];
        let rows: Vec<_> = place(&key).into_iter().map(|(row, _)| row).collect();
        assert_eq!(rows, [0, 0, 1]);
    }
}
