//! The figures as one HTML page with curves (SVG), to be looked at or kept.

use std::fmt::Write;

use bed1::report::Table;

use crate::measure::{Gaps, Outcome};

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
const MARGIN: f64 = 50.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A page of tables, each with its name.
pub fn tables(tables: impl Iterator<Item = (&'static str, Table)>) -> String {
    let one = |(name, table): (&str, Table)| format!("<h2>{name}</h2><pre>{}</pre>", escape(&table.to_string()));
    head() + &tables.map(one).collect::<String>() + "</html>\n"
}

/// Points joined by a line, on axes from 0 on.
pub fn curve(title: &str, x: &str, y: &str, points: &[(f64, f64)]) -> String {
    let mut points: Vec<(f64, f64)> = points
        .iter()
        .copied()
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let most = |f: fn(&(f64, f64)) -> f64| points.iter().map(f).fold(0.0, f64::max).max(1e-9) * 1.05;
    let (right, top) = (most(|p| p.0), most(|p| p.1));
    let at = |(px, py): (f64, f64)| {
        let x = MARGIN + px / right * (WIDTH - 2.0 * MARGIN);
        (x, HEIGHT - MARGIN - py / top * (HEIGHT - 2.0 * MARGIN))
    };
    let mut svg =
        format!("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-size=\"12\">");
    let (left, bottom) = (MARGIN, HEIGHT - MARGIN);
    let _ = write!(
        svg,
        "<text x=\"{left}\" y=\"20\" font-weight=\"bold\">{}</text><path d=\"M{left} 30V{bottom}H{}\" fill=\"none\" stroke=\"black\"/>\
         <text x=\"{left}\" y=\"{}\">{}</text><text x=\"5\" y=\"42\">{}</text>",
        escape(title),
        WIDTH - MARGIN,
        HEIGHT - 10.0,
        escape(x),
        escape(y),
    );
    let line: Vec<String> = points
        .iter()
        .map(|p| at(*p))
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = write!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"steelblue\"/>",
        line.join(" ")
    );
    for point in &points {
        let (x, y) = at(*point);
        let _ = write!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"steelblue\"/><text x=\"{:.1}\" y=\"{:.1}\">{:.0}; {:.2}</text>",
            x + 4.0,
            y - 4.0,
            point.0,
            point.1
        );
    }
    svg + "</svg>"
}

/// How every page begins.
pub fn head() -> String {
    "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>What fault tolerance costs</title>\
     <style>body{font-family:sans-serif;max-width:70em;margin:auto}</style><h1>What fault tolerance costs</h1>\
     <p>FT off and on in turns on the same guest; median (least - most) of the rounds.</p>"
        .into()
}

/// The whole page.
pub fn html(outcomes: &[Outcome], gaps: Option<&Gaps>) -> String {
    let mut page = head();
    let pauses: Vec<(f64, f64)> = outcomes.iter().map(Outcome::pause).collect();
    page += &curve("Pause of an epoch", "dirty pages (median)", "ms (median)", &pauses);
    let rates: Vec<(f64, f64)> = outcomes
        .iter()
        .filter_map(|o| Some((o.dirty_rate()?, o.ratio().median)))
        .collect();
    page += &curve(
        "Progress of a guest that dirties memory",
        "MiB/s with FT off",
        "on / off",
        &rates,
    );
    for outcome in outcomes {
        let table = escape(&outcome.table().to_string());
        let _ = write!(
            page,
            "<h2>{}</h2><p>{}</p><pre>{table}</pre>",
            outcome.name,
            escape(&outcome.what)
        );
    }
    if let Some(gaps) = gaps {
        let mut table = Table::default();
        gaps.rows(&mut table);
        let _ = write!(page, "<h2>failovers</h2><pre>{}</pre>", escape(&table.to_string()));
    }
    page + "</html>\n"
}
