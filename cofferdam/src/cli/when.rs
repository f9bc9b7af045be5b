//! `--when`: which of the events that a fault is for it strikes at.

use devices::edge::{MILLION, When};

/// `once`, `always`, `nth=N`, `p=P`.
pub fn parse_when(text: &str) -> Result<When, String> {
    let wrong = || "give once, always, nth=N with N from 1, or p=P with P up to 1".to_owned();
    match text.split_once('=') {
        None if text == "once" => Ok(When::Once),
        None if text == "always" => Ok(When::Always),
        Some(("nth", n)) => match n.parse() {
            Ok(n) if n > 0 => Ok(When::Nth(n)),
            _ => Err(wrong()),
        },
        Some(("p", probability)) => {
            let parts = probability.parse::<f64>().map_err(|_| wrong())? * f64::from(MILLION);
            // Not a number is in no range.
            match (1.0..=f64::from(MILLION)).contains(&parts) {
                true => Ok(When::Chance(parts.round() as u32)),
                false => Err("a probability is from 0.000001 to 1".to_owned()),
            }
        }
        _ => Err(wrong()),
    }
}

/// A probability in millionths as people write it.
pub fn probability(millionths: u32) -> f64 {
    f64::from(millionths) / f64::from(MILLION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_is_a_word_a_number_or_a_probability() {
        assert_eq!(parse_when("once"), Ok(When::Once));
        assert_eq!(parse_when("always"), Ok(When::Always));
        assert_eq!(parse_when("nth=3"), Ok(When::Nth(3)));
        assert_eq!(parse_when("p=0.25"), Ok(When::Chance(MILLION / 4)));
        for wrong in [
            "", "nth=0", "nth=", "nth=-1", "3", "p=", "p=0", "p=1.5", "p=NaN",
        ] {
            assert!(parse_when(wrong).is_err(), "{wrong}");
        }
    }
}
