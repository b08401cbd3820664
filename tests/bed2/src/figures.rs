//! Figures that a script on a host prints, and how they are shown.

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// The values of `names` in lines of a name and a value; each must be there, and above 0.
pub fn read<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Result<Vec<f64>> {
    let figure = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.unwrap_or_default().parse::<f64>();
        let value = value.with_context(|| format!("no {name} in:\n{text}"))?;
        if value <= 0.0 {
            bail!("{name} is {value} in:\n{text}");
        }
        Ok(value)
    };
    names.map(figure).collect()
}

/// What a figure was in several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Least.
    pub min: f64,
    /// Middle; of an even number, the mean of the two.
    pub median: f64,
    /// Most.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Self {
            min: values[0],
            median,
            max: values[values.len() - 1],
        }
    }

    /// Of figure `i` of each run.
    pub fn nth(runs: &[Vec<f64>], i: usize) -> Self {
        Self::of(runs.iter().map(|run| run[i]).collect())
    }

    /// For a table.
    pub fn cell(&self, digits: usize) -> String {
        let Self { min, median, max } = self;
        format!("{median:.digits$} ({min:.digits$} - {max:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_by_name_and_must_be_there() {
        let text = "a 1.5\nab 2\nc x\nd 0\n";
        assert_eq!(read(text, ["ab", "a"].into_iter()).unwrap(), [2.0, 1.5]);
        for missing in ["b", "c", "d"] {
            assert!(read(text, [missing].into_iter()).is_err(), "{missing}");
        }
    }

    #[test]
    fn a_spread_is_least_middle_and_most() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]).cell(0), "2 (1 - 3)");
        assert_eq!(
            Spread::nth(&[vec![0.0, 1.0], vec![0.0, 2.0]], 1).cell(1),
            "1.5 (1.0 - 2.0)"
        );
    }
}
