//! Axes of plots: from values to pixels, and where the ticks are.

/// A horizontal axis.
#[derive(Debug, Clone)]
pub struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    left: i32,
    right: i32,
}

/// Ticks that a linear axis has at least.
const LEAST_TICKS: f64 = 4.0;

impl Axis {
    /// From zero to a little more than `high`.
    pub fn linear(high: f64, left: i32, right: i32) -> Self {
        let high = if high > 0.0 { high * 1.03 } else { 1.0 };
        Self {
            low: 0.0,
            high,
            logarithmic: false,
            left,
            right,
        }
    }

    /// The decades around `low` and `high`, which are above zero.
    pub fn logarithmic(low: f64, high: f64, left: i32, right: i32) -> Self {
        let low = 10_f64.powf(low.log10().floor());
        let high = 10_f64.powf(high.log10().ceil()).max(low * 10.0);
        Self {
            low,
            high,
            logarithmic: true,
            left,
            right,
        }
    }

    /// Where `value` is; what is outside is at the edge.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "clamped to the width of a plot"
    )]
    pub fn pixel(&self, value: f64) -> i32 {
        let part = if self.logarithmic {
            (value / self.low).log10() / (self.high / self.low).log10()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        let width = f64::from(self.right - self.left);
        self.left + (part.clamp(0.0, 1.0) * width).round() as i32
    }

    /// Values that get a tick.
    pub fn ticks(&self) -> Vec<f64> {
        let mut ticks = Vec::new();
        if self.logarithmic {
            let mut tick = self.low;
            while tick <= self.high * 1.001 && ticks.len() < 20 {
                ticks.push(tick);
                tick *= 10.0;
            }
        } else {
            let step = self.step();
            let mut tick = 0.0;
            while tick <= self.high && ticks.len() < 20 {
                ticks.push(tick);
                tick += step;
            }
        }
        ticks
    }

    /// A tick's text.
    pub fn label(&self, tick: f64) -> String {
        let unit = if self.logarithmic { tick } else { self.step() };
        let decimals = (-unit.log10()).ceil();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 20"
        )]
        let decimals = decimals.clamp(0.0, 20.0) as usize;
        format!("{tick:.decimals$}")
    }

    /// 1, 2 or 5 times a power of ten, so that there are enough ticks.
    fn step(&self) -> f64 {
        let decade = 10_f64.powf((self.high / LEAST_TICKS).log10().floor());
        [5.0, 2.0, 1.0]
            .into_iter()
            .map(|n| n * decade)
            .find(|step| self.high / step >= LEAST_TICKS)
            .unwrap_or(decade)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_axis_begins_at_zero_and_has_round_ticks() {
        let axis = Axis::linear(3.5, 100, 200);
        assert_eq!(axis.pixel(0.0), 100);
        assert!(axis.pixel(3.5) < 200);
        assert_eq!(axis.pixel(9.0), 200);
        let labels: Vec<String> = axis.ticks().into_iter().map(|t| axis.label(t)).collect();
        assert_eq!(
            labels,
            ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "3.0", "3.5"]
        );
    }

    #[test]
    fn a_logarithmic_axis_has_whole_decades() {
        let axis = Axis::logarithmic(0.03, 450.0, 0, 100);
        let labels: Vec<String> = axis.ticks().into_iter().map(|t| axis.label(t)).collect();
        assert_eq!(labels, ["0.01", "0.1", "1", "10", "100", "1000"]);
        assert_eq!(axis.pixel(0.01), 0);
        assert_eq!(axis.pixel(1000.0), 100);
    }

    #[test]
    fn nothing_measured_still_makes_an_axis() {
        assert_eq!(Axis::linear(0.0, 0, 10).pixel(0.5), 5);
        assert!(!Axis::logarithmic(1.0, 1.0, 0, 10).ticks().is_empty());
    }
}
