//! Rounds, medians and the table.
//!
//! A round runs one case once on each side, the plain side first in even rounds and last in odd
//! ones. The ratio is the median of the rounds' own ratios, not the ratio of the medians.

use std::fmt;
use std::path::Path;

use crate::Result;
use crate::cases::{Case, Rate, Settings};

/// The first two lines of the Markdown table.
pub const TABLE_HEAD: &str = "\
| case | unit | plain, median | plain, min–max | mount, median | mount, min–max | ratio | ratio, min–max |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |";

/// One line of the table: one rate of one case over all rounds.
pub struct Row {
    name: String,
    unit: &'static str,
    plain: Vec<f64>,
    mount: Vec<f64>,
}

/// Prepares `case` on both sides, runs it `rounds` times on each, and removes its databases.
pub fn run_rounds(
    case: &Case,
    plain: &Path,
    mount: &Path,
    rounds: usize,
    settings: &Settings,
) -> Result<Vec<Row>> {
    let both = [(plain, "plain directory"), (mount, "mount")];
    for (dir, side) in both {
        case.prepare(dir, settings)
            .map_err(|e| format!("prepare in the {side}: {e}"))?;
    }
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..rounds {
        let mut results: [Vec<Rate>; 2] = [Vec::new(), Vec::new()];
        for i in 0..2 {
            let at = (round + i) % 2;
            let (dir, side) = both[at];
            results[at] = case
                .run(dir, settings, round as u64)
                .map_err(|e| format!("round {} in the {side}: {e}", round + 1))?;
        }
        let [plain_rates, mount_rates] = results;
        for (i, (p, m)) in plain_rates.iter().zip(&mount_rates).enumerate() {
            if rows.len() == i {
                rows.push(Row {
                    name: format!("{}{}", case.name(), p.suffix),
                    unit: p.unit,
                    plain: Vec::new(),
                    mount: Vec::new(),
                });
            }
            rows[i].plain.push(p.per_second);
            rows[i].mount.push(m.per_second);
        }
    }
    for (dir, _) in both {
        case.clean(dir)?;
    }
    Ok(rows)
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratios: Vec<f64> = self
            .mount
            .iter()
            .zip(&self.plain)
            .map(|(m, p)| m / p)
            .collect();
        write!(
            f,
            "| {} | {} | {} | {} | {} | {} | **{:.2}** | {:.2}–{:.2} |",
            self.name,
            self.unit,
            number(median(&self.plain)),
            spread(&self.plain),
            number(median(&self.mount)),
            spread(&self.mount),
            median(&ratios),
            quantile(&ratios, 0.0),
            quantile(&ratios, 1.0),
        )
    }
}

fn spread(values: &[f64]) -> String {
    format!(
        "{}–{}",
        number(quantile(values, 0.0)),
        number(quantile(values, 1.0))
    )
}

/// Three significant digits are more than these figures deserve; integers from 100 on.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The middle value; the mean of the two middle ones when their number is even; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    if values.len() % 2 == 1 {
        return quantile(values, 0.5);
    }
    let sorted = sorted(values);
    match sorted.len() {
        0 => f64::NAN,
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The value below which a share `q` of the values lies (nearest rank); NaN of none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let sorted = sorted(values);
    match sorted.len() {
        0 => f64::NAN,
        n => sorted[((n - 1) as f64 * q).round() as usize],
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quantiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(quantile(&hundred, 0.99), 99.0);
        assert_eq!(quantile(&hundred, 0.0), 0.0);
        assert_eq!(quantile(&hundred, 1.0), 100.0);
    }

    #[test]
    fn the_ratio_is_taken_within_rounds() {
        let row = Row {
            name: "x".into(),
            unit: "1/s",
            plain: vec![100.0, 1000.0, 10.0],
            mount: vec![50.0, 500.0, 5.0],
        };
        assert!(row.to_string().contains("**0.50** | 0.50–0.50"), "{row}");
    }
}
