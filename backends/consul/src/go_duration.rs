//! Durations as Go's `time.Duration` writes them, which is how Consul takes and gives them: `10s`,
//! `1m0s`, `1.5s`, `500ms`.

use std::time::Duration;

/// Units, longest names first where one is the beginning of another.
const UNITS: [(&str, f64); 7] = [
    ("ns", 1e-9),
    ("us", 1e-6),
    ("µs", 1e-6),
    ("ms", 1e-3),
    ("s", 1.0),
    ("m", 60.0),
    ("h", 3600.0),
];

/// Whole seconds as `10s`, others in milliseconds.
pub(crate) fn format(duration: Duration) -> String {
    if duration.subsec_millis() == 0 {
        format!("{}s", duration.as_secs())
    } else {
        format!("{}ms", duration.as_millis())
    }
}

/// `None` if it is no duration, or a negative one.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let (unit, length) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        seconds += number * length;
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_written_and_read() {
        let ms = Duration::from_millis;
        assert_eq!(format(ms(10_000)), "10s");
        assert_eq!(format(ms(0)), "0s");
        assert_eq!(format(ms(1_500)), "1500ms");
        for (text, millis) in [
            ("10s", 10_000),
            ("1m0s", 60_000),
            ("1h2m3.5s", 3_723_500),
            ("500ms", 500),
            ("1500ms", 1_500),
        ] {
            assert_eq!(parse(text), Some(ms(millis)), "{text}");
        }
        for bad in [
            "",
            "10",
            "s",
            "-1s",
            "1.2.3s",
            "1x",
            "1e9s",
            &"9".repeat(400),
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(parse(&format!("{}h", "9".repeat(300))), None);
    }
}
