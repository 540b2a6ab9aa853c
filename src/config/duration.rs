//! Durations as configuration files write them: `10s`, `1m30s`, `500ms`, `1.5h`, and `0`.
//!
//! The notation is Go's: decimal numbers, each with a unit, added up. A number without a unit is
//! refused (but for 0), and so is a sign: nothing in the configuration is a negative time.

use std::time::Duration;

/// The longest duration that is accepted, 100 years: short enough that a few of them can be added
/// to any clock without overflow.
const MAX: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Units and their length in nanoseconds. A unit that begins another one stands after it.
const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000), // U+00B5, the micro sign
    ("μs", 1_000), // U+03BC, the Greek letter
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// The duration that `text` says, or what is wrong with it.
pub fn parse(text: &str) -> Result<Duration, String> {
    let bad = |why: &str| {
        Err(format!(
            "\"{text}\" is no duration ({why}); write it like 500ms, 10s or 1m30s"
        ))
    };
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if text.is_empty() {
        return bad("it is empty");
    }
    if text.starts_with('-') {
        return bad("it is negative");
    }
    let mut rest = text;
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        if after.is_empty() {
            return bad("a unit is missing");
        }
        let Some((unit, nanos)) = UNITS.iter().find(|(u, _)| after.starts_with(u)) else {
            return bad("a unit is unknown");
        };
        match scaled(number, *nanos) {
            Some(n) => total += n,
            None => return bad("a number is malformed or too large"),
        }
        if total > MAX.as_nanos() {
            return bad("it is longer than 100 years");
        }
        rest = &after[unit.len()..];
    }
    // At most 100 years, some 3.2e18 ns: it fits.
    Ok(Duration::from_nanos(
        u64::try_from(total).unwrap_or(u64::MAX),
    ))
}

/// `number` times `unit`, the fraction rounded down; `None` unless it is `digits[.digits]` (one
/// side may be empty) of bounded size.
fn scaled(number: &str, unit: u64) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    // Beyond 15 digits a fraction is less than a nanosecond in every unit.
    let fraction = &fraction[..fraction.len().min(15)];
    let part: u64 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let divisor = 10u128.pow(fraction.len() as u32);
    Some(u128::from(whole) * u128::from(unit) + u128::from(part) * u128::from(unit) / divisor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_add_up() {
        for (text, nanos) in [
            ("0", 0),
            ("0s", 0),
            ("10s", 10_000_000_000),
            ("1m30s", 90_000_000_000),
            ("500ms", 500_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("2.s", 2_000_000_000),
            ("3us4ns", 3_004),
            ("7µs", 7_000),
            ("7μs", 7_000),
            ("1h0m0.000000001s", 3_600_000_000_001),
        ] {
            assert_eq!(parse(text).unwrap().as_nanos(), nanos, "{text}");
        }
    }

    #[test]
    fn the_rest_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("10", "unit is missing"),
            ("1m30", "unit is missing"),
            ("-1s", "negative"),
            ("s", "malformed"),
            (".s", "malformed"),
            ("1.2.3s", "malformed"),
            ("1d", "unknown"),
            ("1 s", "unknown"),
            ("é", "unknown"),
            ("99999999999999999999999s", "too large"),
            ("18446744073709551615h", "100 years"),
            ("876001h", "100 years"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }
}
