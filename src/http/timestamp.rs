//! Times as LiteFS writes them into JSON: RFC 3339 in UTC, without trailing zeros of the fraction.

/// `ms`, milliseconds since the Unix epoch, as for example `2026-11-22T20:45:53.54Z`.
pub(crate) fn rfc3339(ms: i64) -> String {
    let (days, in_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    let (year, month, day) = civil(days);
    let (seconds, milli) = (in_day / 1000, in_day % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if milli != 0 {
        text.push_str(format!(".{milli:03}").trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// The date of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years are counted from 1 March of the year 0, so that the leap day is a year's last.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn as_litefs_writes_them() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (1_795_380_353_507, "2026-11-22T20:45:53.507Z"),
            (1_795_380_353_540, "2026-11-22T20:45:53.54Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (4_107_542_400_100, "2100-03-01T00:00:00.1Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
        // Whatever a peer's header says, there is a text for it.
        rfc3339(i64::MIN);
        rfc3339(i64::MAX);
    }
}
