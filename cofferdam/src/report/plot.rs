//! Plots of a report: bars and boxes, a row each.

use plotters::prelude::RGBColor;
use plotters::style::text_anchor::{HPos, VPos};

use super::axis::Axis;
use super::canvas::{GREY, INK, LEFT, Plot, RIGHT};
use super::{Method, OtherBoot, Phase, Recovery, Report, Stat};

/// Samples of one row of a plot: what a box and its whiskers are drawn from.
struct Row {
    name: String,
    color: RGBColor,
    stat: Stat,
    samples: Vec<f64>,
}

/// The colour of a phase, the same in every plot and table.
pub fn phase_color(phase: Phase) -> RGBColor {
    match phase {
        Phase::Detect => RGBColor(0xcc, 0x78, 0x1c),
        Phase::Memory => RGBColor(0x2a, 0x9d, 0x8f),
        Phase::Compensate => RGBColor(0xb0, 0x5c, 0xc6),
        Phase::Device => RGBColor(0xd6, 0x45, 0x50),
        Phase::Returned => RGBColor(0x3d, 0x84, 0xd6),
        Phase::IrqLive => RGBColor(0x8a, 0x8f, 0x2e),
        Phase::LinkUp => RGBColor(0xe0, 0x8e, 0x45),
        Phase::FirstTx => RGBColor(0x4c, 0xa6, 0x5a),
        Phase::FirstRx => RGBColor(0x7d, 0x7a, 0xd9),
    }
}

/// A colour as HTML takes it.
pub fn css(color: RGBColor) -> String {
    format!("#{:02x}{:02x}{:02x}", color.0, color.1, color.2)
}

/// A row of a plot of bars.
pub struct Bar {
    /// On the left.
    pub name: String,
    /// Its parts, one behind the other, from the left.
    pub parts: Vec<(RGBColor, f64)>,
    /// Behind it.
    pub says: String,
}

/// Bars on a linear axis. `key` says what the colours are.
pub fn bars(bars: &[Bar], key: &[(&str, RGBColor)], label: &str) -> anyhow::Result<String> {
    let length = |bar: &Bar| bar.parts.iter().map(|(_, part)| part).sum::<f64>();
    let longest = bars.iter().map(length).fold(0.0, f64::max);
    let axis = Axis::linear(longest, LEFT, RIGHT);
    let key_rows = Plot::rows_of_key(key);
    let mut plot = Plot::new(bars.len() + key_rows, &axis, label);
    plot.key(key);
    for (bar, row) in bars.iter().zip(key_rows..) {
        plot.name(row, &bar.name);
        let y = Plot::center(row);
        let mut from = 0.0;
        for (color, part) in &bar.parts {
            let to = from + part;
            plot.block(axis.pixel(from), axis.pixel(to), y, 13, *color);
            from = to;
        }
        let behind = (axis.pixel(from) + 8, y);
        plot.text(behind, HPos::Left, VPos::Center, bar.says.as_str());
    }
    plot.svg()
}

/// One bar for each way of recovery: its phases one after the other, each at its median.
pub fn recovery_bars(recoveries: &[Recovery]) -> anyhow::Result<String> {
    let rows: Vec<Bar> = recoveries
        .iter()
        .map(|recovery| {
            let phases = ordered_medians(recovery).into_iter();
            let parts: Vec<_> = phases
                .map(|(phase, us)| (phase_color(phase), us / 1e6))
                .collect();
            let total: f64 = parts.iter().map(|(_, s)| s).sum();
            Bar {
                name: recovery.name(),
                parts,
                says: format!("{total:.3} s"),
            }
        })
        .collect();
    bars(&rows, &[], "s since the start (each phase at its median)")
}

/// Boxes and whiskers for times in microseconds by name, on a logarithmic axis.
pub fn boxes_by_name(times: &[(String, RGBColor, Vec<f64>)]) -> anyhow::Result<String> {
    let rows: Vec<Row> = times
        .iter()
        .filter_map(|(name, color, samples)| {
            Some(Row {
                name: name.clone(),
                color: *color,
                stat: Stat::from_samples(samples)?,
                samples: samples.clone(),
            })
        })
        .collect();
    boxes_of_times(&rows)
}

/// Boxes and whiskers for each phase of one way of recovery, and for its total.
pub fn recovery_boxes(recovery: &Recovery) -> anyhow::Result<String> {
    let mut rows: Vec<Row> = ordered_medians(recovery)
        .into_iter()
        .filter_map(|(phase, _)| {
            Some(Row {
                name: phase.name().to_owned(),
                color: phase_color(phase),
                stat: *recovery.phases_us.get(&phase)?,
                samples: recovery
                    .runs
                    .iter()
                    .flat_map(|run| run.durations_us())
                    .filter(|(p, _)| *p == phase)
                    .map(|(_, us)| us)
                    .collect(),
            })
        })
        .collect();
    rows.push(Row {
        name: "total".to_owned(),
        color: GREY,
        stat: recovery.total_us,
        samples: recovery
            .runs
            .iter()
            .filter_map(|run| run.total_us())
            .collect(),
    });
    boxes_of_times(&rows)
}

/// Boxes and whiskers for when `phase` ended, in microseconds since the fault or the start: a row
/// for each entry point and each baseline. `None` where nothing has that phase.
pub fn end_boxes(recoveries: &[Recovery], phase: Phase) -> anyhow::Result<Option<String>> {
    let mut samples: Vec<(String, Method, Vec<f64>)> = Vec::new();
    for recovery in recoveries {
        let name = match (recovery.entry.as_deref(), recovery.spilled) {
            (None, _) => recovery.method.name().to_owned(),
            (Some(entry), false) => entry.to_owned(),
            (Some(entry), true) => format!("{entry}, spilled"),
        };
        let ends = recovery.ends_us(phase);
        match samples.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, _, all)) => all.extend(ends),
            None => samples.push((name, recovery.method, ends)),
        }
    }
    let rows: Vec<Row> = samples
        .into_iter()
        .filter_map(|(name, method, samples)| {
            Some(Row {
                name,
                color: if method == Method::Rollback {
                    phase_color(phase)
                } else {
                    GREY
                },
                stat: Stat::from_samples(&samples)?,
                samples,
            })
        })
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    boxes_of_times(&rows).map(Some)
}

/// Boxes and whiskers for the boots of this monitor and of others.
pub fn boot_boxes(report: &Report) -> anyhow::Result<Option<String>> {
    let Some(boot) = &report.boot else {
        return Ok(None);
    };
    let mut rows = vec![Row {
        name: "cofferdam".to_owned(),
        color: phase_color(Phase::Returned),
        stat: boot.to_init_us,
        samples: boot.runs.iter().map(|run| run.to_init_us).collect(),
    }];
    rows.extend(report.boot_others.iter().map(
        |OtherBoot {
             vmm,
             to_init_us,
             runs,
         }| Row {
            name: vmm.clone(),
            color: GREY,
            stat: *to_init_us,
            samples: runs.iter().map(|run| run.to_init_us).collect(),
        },
    ));
    let in_s = |us: f64| us / 1e6;
    let longest = rows.iter().map(|r| in_s(r.stat.max)).fold(0.0, f64::max);
    let axis = Axis::linear(longest, LEFT, RIGHT);
    boxes(
        &rows,
        &axis,
        "s from the start of the process to the first line of /init",
        in_s,
    )
    .map(Some)
}

/// Boxes of times in milliseconds, on a logarithmic axis as wide as they are.
fn boxes_of_times(rows: &[Row]) -> anyhow::Result<String> {
    let low = rows
        .iter()
        .map(|r| ms(r.stat.min))
        .fold(f64::INFINITY, f64::min);
    let high = rows.iter().map(|r| ms(r.stat.max)).fold(0.0, f64::max);
    boxes(
        rows,
        &Axis::logarithmic(low, high, LEFT, RIGHT),
        "ms, logarithmic",
        ms,
    )
}

/// Boxes (quartiles), medians and whiskers (smallest, largest). `unit` turns microseconds into what
/// the axis shows.
fn boxes(
    rows: &[Row],
    axis: &Axis,
    label: &str,
    unit: impl Fn(f64) -> f64,
) -> anyhow::Result<String> {
    let label = format!("{label}; box: quartiles, line: median, whiskers: smallest and largest");
    let mut plot = Plot::new(rows.len(), axis, &label);
    let pixel = |us: f64| axis.pixel(unit(us));
    for (index, row) in rows.iter().enumerate() {
        let y = Plot::center(index);
        plot.name(index, &row.name);
        let (min, max) = (pixel(row.stat.min), pixel(row.stat.max));
        plot.line((min, y), (max, y), row.color, 2);
        for end in [min, max] {
            plot.line((end, y - 6), (end, y + 6), row.color, 2);
        }
        if let Some((q1, q3)) = quartiles(&row.samples) {
            plot.block(pixel(q1), pixel(q3), y, 11, row.color);
        }
        let p50 = pixel(row.stat.p50);
        plot.line((p50, y - 13), (p50, y + 13), INK, 2);
    }
    plot.svg()
}

/// Phases with their median durations, in the order in which they end.
pub fn ordered_medians(recovery: &Recovery) -> Vec<(Phase, f64)> {
    let mut phases: Vec<(Phase, f64)> = recovery
        .phases_us
        .iter()
        .map(|(phase, stat)| (*phase, stat.p50))
        .collect();
    let end = |phase: Phase| {
        let ends: Vec<f64> = recovery
            .runs
            .iter()
            .filter_map(|run| run.at_us.get(&phase).copied())
            .collect();
        Stat::from_samples(&ends).map_or(f64::INFINITY, |stat| stat.p50)
    };
    // Without the single runs the phases keep the order of their definition.
    phases.sort_by(|a, b| end(a.0).total_cmp(&end(b.0)));
    phases
}

/// First and third quartile, nearest rank.
fn quartiles(samples: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = |quarter: usize| sorted.get((sorted.len() * quarter).div_ceil(4).checked_sub(1)?);
    Some((*rank(1)?, *rank(3)?))
}

/// Microseconds in milliseconds; never zero, which a logarithmic axis does not have.
fn ms(us: f64) -> f64 {
    (us / 1e3).max(1e-3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Method, RecoveryRun};

    fn restart() -> Recovery {
        let run = |at: f64| RecoveryRun {
            at_us: [(Phase::Returned, at), (Phase::LinkUp, at * 2.0)].into(),
            ..Default::default()
        };
        Recovery::from_runs("e1000", Method::Restart, vec![run(1e6), run(2e6), run(4e6)]).unwrap()
    }

    #[test]
    fn plots_name_their_phases_and_take_the_pages_text_colour() {
        let svg = recovery_boxes(&restart()).unwrap();
        for part in ["link_up", "returned", "total", "currentColor"] {
            assert!(svg.contains(part), "{part}");
        }
        assert!(!svg.contains("#010203"));
    }

    #[test]
    fn bars_are_as_long_as_their_phases() {
        let svg = recovery_bars(&[restart()]).unwrap();
        assert!(svg.contains("restart (e1000)"));
        // 2 s and 2 s: both blocks have the same width, but for rounding.
        let widths: Vec<i32> = svg
            .lines()
            .filter(|line| line.starts_with("<rect"))
            .filter_map(|line| {
                line.split("width=\"")
                    .nth(1)?
                    .split('"')
                    .next()?
                    .parse()
                    .ok()
            })
            .collect();
        let [first, second] = widths[..] else {
            panic!("{widths:?}")
        };
        assert!(first > 200 && (first - second).abs() <= 1, "{widths:?}");
    }

    #[test]
    fn phases_stand_in_the_order_in_which_they_ended() {
        let order: Vec<Phase> = ordered_medians(&restart()).iter().map(|p| p.0).collect();
        assert_eq!(order, [Phase::Returned, Phase::LinkUp]);
    }

    #[test]
    fn quartiles_are_samples() {
        assert_eq!(quartiles(&[5.0, 1.0, 2.0, 4.0, 3.0]), Some((2.0, 4.0)));
        assert_eq!(quartiles(&[7.0]), Some((7.0, 7.0)));
        assert_eq!(quartiles(&[]), None);
    }
}
