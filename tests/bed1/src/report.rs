//! Tables for people.

use load::stats::Summary;

/// Two columns: what, and how much.
#[derive(Default)]
pub struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    /// Adds a row.
    pub fn row(&mut self, what: impl Into<String>, value: impl Into<String>) {
        self.rows.push((what.into(), value.into()));
    }

    /// A row of a number that may be missing.
    pub fn number(&mut self, what: &str, value: Option<f64>, unit: &str) {
        let text = value.map_or("not reported".into(), |v| format!("{v:.1} {unit}"));
        self.row(what, text.trim_end());
    }

    /// A row of a summary.
    pub fn summary(&mut self, what: &str, s: &Summary, unit: &str) {
        let text = format!(
            "median {:.1}  p99 {:.1}  max {:.1} {unit}  (n = {})",
            s.median, s.p99, s.max, s.count
        );
        self.row(what, text);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self
            .rows
            .iter()
            .map(|(what, _)| what.chars().count())
            .max()
            .unwrap_or(0);
        self.rows
            .iter()
            .try_for_each(|(what, value)| writeln!(f, "  {what:width$}  {value}"))
    }
}

/// Bytes with a unit.
pub fn bytes(n: u64) -> String {
    match n {
        0..10_240 => format!("{n} B"),
        10_240..10_485_760 => format!("{:.1} KiB", n as f64 / 1024.0),
        _ => format!("{:.1} MiB", n as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let mut table = Table::default();
        table.row("a", "1");
        table.number("longer", None, "ms");
        table.number("x", Some(2.25), "ms");
        assert_eq!(
            table.to_string(),
            "  a       1\n  longer  not reported\n  x       2.2 ms\n"
        );
        assert_eq!(
            (bytes(5), bytes(20_480), bytes(20 << 20)),
            ("5 B".into(), "20.0 KiB".into(), "20.0 MiB".into())
        );
    }
}
