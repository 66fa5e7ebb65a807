//! One figure: samples of ours and of its peers, and what they come to.

use serde_json::{Value, json};

use super::bars;

/// Samples of one thing, those of the same index taken one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Short and lasting: how bars, and readers of the JSON file, name it.
    pub name: String,
    /// For a person.
    pub what: String,
    /// Of the samples.
    pub unit: &'static str,
    /// Podtether's.
    pub ours: Vec<f64>,
    /// Those of the same without a tunnel, where there is such a thing.
    pub bare: Vec<f64>,
    /// Tailscaled's, where it was measured.
    pub stock: Vec<f64>,
}

impl Figure {
    /// Without samples.
    #[must_use]
    pub fn new(name: impl Into<String>, what: impl Into<String>, unit: &'static str) -> Self {
        let (ours, bare, stock) = (Vec::new(), Vec::new(), Vec::new());
        Self { name: name.into(), what: what.into(), unit, ours, bare, stock }
    }

    /// One sample of ours alone.
    #[must_use]
    pub fn of(name: impl Into<String>, what: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self { ours: vec![value], ..Self::new(name, what, unit) }
    }

    /// The median of ours.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        median(&self.ours)
    }

    /// The median without a tunnel.
    #[must_use]
    pub fn bare_value(&self) -> Option<f64> {
        median(&self.bare)
    }

    /// The median of tailscaled's.
    #[must_use]
    pub fn stock_value(&self) -> Option<f64> {
        median(&self.stock)
    }

    /// Median over median.
    #[must_use]
    pub fn over_bare(&self) -> Option<f64> {
        ratio(self.value(), self.bare_value())
    }

    /// Median over median.
    #[must_use]
    pub fn over_tailscaled(&self) -> Option<f64> {
        ratio(self.value(), self.stock_value())
    }

    /// What became of its bars: false when one is missed, `None` when it has none or one was not measured.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        let mut all = None;
        let mut unknown = false;
        for bar in bars::of(&self.name) {
            match bar.met(self) {
                Some(false) => return Some(false),
                Some(true) => all = Some(true),
                None => unknown = true,
            }
        }
        if unknown { None } else { all }
    }

    /// Its bars in words, empty without any.
    #[must_use]
    pub fn bar_text(&self) -> String {
        bars::of(&self.name).map(bars::Bar::text).collect::<Vec<_>>().join(", ")
    }

    /// As in the file: what was not measured is null or absent.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut ratios = serde_json::Map::new();
        let mut ratio_spread = serde_json::Map::new();
        for (side, over, samples) in
            [("bare", self.over_bare(), &self.bare), ("tailscaled", self.over_tailscaled(), &self.stock)]
        {
            if let Some(over) = over {
                ratios.insert(side.into(), json!(round(over)));
                ratio_spread.insert(side.into(), json!(spread(&paired(&self.ours, samples)).map(pair)));
            }
        }
        let bar = self.bar_text();
        json!({
            "name": self.name,
            "what": self.what,
            "value": self.value().map(round),
            "unit": self.unit,
            "spread": spread(&self.ours).map(pair),
            "samples": self.ours.len(),
            "bare": self.bare_value().map(round),
            "tailscaled": self.stock_value().map(round),
            "ratios": ratios,
            "ratio_spread": ratio_spread,
            "bar": (!bar.is_empty()).then_some(bar),
            "met": self.met(),
        })
    }
}

fn pair((least, most): (f64, f64)) -> [f64; 2] {
    [round(least), round(most)]
}

/// To five digits: more than a measurement has.
fn round(value: f64) -> f64 {
    format!("{value:.4e}").parse().unwrap_or(value)
}

fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    let (ours, theirs) = ours.zip(theirs)?;
    (theirs > 0.0).then(|| ours / theirs)
}

/// Ratios of samples that were taken one after another.
#[must_use]
pub fn paired(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).filter_map(|(a, b)| ratio(Some(*a), Some(*b))).collect()
}

/// The middle one, or the mean of the middle two.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(sorted.len() / 2 - 1)?;
    Some(f64::midpoint(lower, upper))
}

/// The smallest sample that `percent` of all do not exceed.
#[must_use]
pub fn percentile(samples: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.max(1) - 1).copied()
}

/// The smallest and the largest.
#[must_use]
pub fn spread(samples: &[f64]) -> Option<(f64, f64)> {
    let least = samples.iter().copied().min_by(f64::total_cmp)?;
    let most = samples.iter().copied().max_by(f64::total_cmp)?;
    Some((least, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_percentiles_and_spreads() {
        for (samples, middle, p99, least_most) in [
            (&[][..], None, None, None),
            (&[3.0], Some(3.0), Some(3.0), Some((3.0, 3.0))),
            (&[3.0, 1.0], Some(2.0), Some(3.0), Some((1.0, 3.0))),
            (&[9.0, 1.0, 2.0], Some(2.0), Some(9.0), Some((1.0, 9.0))),
        ] {
            assert_eq!(median(samples), middle);
            assert_eq!(percentile(samples, 99), p99);
            assert_eq!(spread(samples), least_most);
        }
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&hundred, 99), Some(99.0));
        assert_eq!(percentile(&hundred, 50), Some(50.0));
        assert_eq!(percentile(&hundred, 0), Some(1.0));
    }

    #[test]
    fn ratios_are_of_medians_and_nothing_is_divided_by_nothing() {
        let figure = Figure {
            ours: vec![4.0, 6.0, 5.0],
            bare: vec![20.0, 25.0, 30.0],
            stock: vec![2.0, 3.0, 2.5],
            ..Figure::new("tcp1.v4", "TCP", "Gbit/s")
        };
        assert_eq!(figure.over_tailscaled(), Some(2.0));
        assert_eq!(figure.over_bare(), Some(0.2));
        assert_eq!(paired(&figure.ours, &figure.stock), [2.0, 2.0, 2.0]);
        assert_eq!(Figure::new("x", "x", "s").over_bare(), None);
        assert_eq!(paired(&[1.0], &[0.0]), [0.0; 0]);
    }

    #[test]
    fn one_missed_bar_is_missed_and_one_unmeasured_is_not_met() {
        let with = |stock: &[f64], bare: &[f64]| Figure {
            ours: vec![4.0],
            bare: bare.to_vec(),
            stock: stock.to_vec(),
            ..Figure::new("tcp1.v4", "TCP", "Gbit/s")
        };
        assert_eq!(with(&[2.0], &[10.0]).met(), Some(true));
        assert_eq!(with(&[3.0], &[10.0]).met(), Some(false));
        assert_eq!(with(&[], &[10.0]).met(), None);
        assert_eq!(with(&[], &[100.0]).met(), Some(false));
        assert_eq!(Figure::of("nobody.asks", "x", "s", 1.0).met(), None);
    }

    #[test]
    fn the_file_has_null_for_what_is_not_known() {
        let figure = Figure { stock: vec![2.0], ..Figure::of("tcp1.v4", "TCP", "Gbit/s", 4.000_04) };
        let json = figure.json();
        assert_eq!(json["value"], 4.0);
        assert_eq!(json["ratios"], json!({ "tailscaled": 2.0 }));
        assert_eq!((&json["bare"], &json["met"]), (&Value::Null, &Value::Null));
        assert_eq!(json["spread"], json!([4.0, 4.0]));
        assert_eq!(json["bar"], "≥ 1.8 × tailscaled, ≥ 0.22 × bare");
    }
}
