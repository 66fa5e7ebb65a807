//! What every figure has to reach, as a table.

use super::figure::Figure;

/// What of a figure is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Its own value, in its own unit.
    Value,
    /// The value over the bare network's.
    OverBare,
    /// The value over tailscaled's.
    OverTailscaled,
    /// How much the value is more than the bare network's, in the figure's unit.
    BeyondBare,
}

/// The side of the bar that is right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

/// One thing that has to be so.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bar {
    /// Name of the figure.
    pub figure: &'static str,
    /// What of it.
    pub of: Of,
    /// How much.
    pub limit: Limit,
}

const fn bar(figure: &'static str, of: Of, limit: Limit) -> Bar {
    Bar { figure, of, limit }
}

/// Resident memory that a supervisor with so many pods may have, MiB: 20, and 50 KiB a pod.
const fn supervisor_mib(pods: f64) -> f64 {
    20.0 + pods * 50.0 / 1024.0
}

/// All of them.
pub const BARS: &[Bar] = &[
    bar("tcp1.v4", Of::OverTailscaled, Limit::AtLeast(1.8)),
    bar("tcp1.v4", Of::OverBare, Limit::AtLeast(0.22)),
    bar("tcp1.v4.cpu.sender", Of::Value, Limit::AtMost(0.18)),
    bar("tcp1.v4.cpu.receiver", Of::Value, Limit::AtMost(0.18)),
    bar("tcp8.v4", Of::OverTailscaled, Limit::AtLeast(1.6)),
    bar("udp1200.v4", Of::OverTailscaled, Limit::AtLeast(1.5)),
    bar("relay.v4", Of::OverTailscaled, Limit::AtLeast(1.0)),
    bar("ping.idle.p50", Of::BeyondBare, Limit::AtMost(0.15)),
    bar("ping.load.p50", Of::Value, Limit::AtMost(5.0)),
    bar("memory.idle", Of::Value, Limit::AtMost(1.5)),
    bar("memory.after_load", Of::Value, Limit::AtMost(3.0)),
    bar("memory.peer", Of::Value, Limit::AtMost(1.0)),
    bar("idle.pss", Of::Value, Limit::AtMost(3.0)),
    bar("idle.cpu", Of::Value, Limit::AtMost(2.0)),
    bar("idle.wakes", Of::Value, Limit::AtMost(1.0)),
    bar("joins.alone.p50", Of::Value, Limit::AtMost(150.0)),
    bar("joins.100.all", Of::Value, Limit::AtMost(5.0)),
    bar("joins.10.supervisor", Of::Value, Limit::AtMost(supervisor_mib(10.0))),
    bar("joins.50.supervisor", Of::Value, Limit::AtMost(supervisor_mib(50.0))),
    bar("joins.100.supervisor", Of::Value, Limit::AtMost(supervisor_mib(100.0))),
    bar("joins.250.supervisor", Of::Value, Limit::AtMost(supervisor_mib(250.0))),
    bar("joins.250.metrics", Of::Value, Limit::AtMost(200.0)),
    bar("start.ready", Of::Value, Limit::AtMost(10.0)),
    bar("recovery.p50", Of::Value, Limit::AtMost(50.0)),
    bar("recovery.p99", Of::Value, Limit::AtMost(200.0)),
];

/// The bars of the figure called `name`.
pub fn of(name: &str) -> impl Iterator<Item = &'static Bar> {
    BARS.iter().filter(move |bar| bar.figure == name)
}

impl Bar {
    /// Whether `figure` reaches it; `None` when what it is compared with was not measured.
    #[must_use]
    pub fn met(&self, figure: &Figure) -> Option<bool> {
        let seen = match self.of {
            Of::Value => figure.value(),
            Of::OverBare => figure.over_bare(),
            Of::OverTailscaled => figure.over_tailscaled(),
            Of::BeyondBare => figure.value().zip(figure.bare_value()).map(|(ours, bare)| ours - bare),
        }?;
        Some(match self.limit {
            Limit::AtLeast(least) => seen >= least,
            Limit::AtMost(most) => seen <= most,
        })
    }

    /// As in "≥ 1.8 × tailscaled".
    #[must_use]
    pub fn text(&self) -> String {
        let (sign, limit) = match self.limit {
            Limit::AtLeast(least) => ("≥", least),
            Limit::AtMost(most) => ("≤", most),
        };
        let digits = format!("{limit:.2}");
        let limit = format!("{sign} {}", digits.trim_end_matches('0').trim_end_matches('.'));
        match self.of {
            Of::Value => limit,
            Of::OverBare => format!("{limit} × bare"),
            Of::OverTailscaled => format!("{limit} × tailscaled"),
            Of::BeyondBare => format!("{limit} beyond bare"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ours: &[f64], bare: &[f64], stock: &[f64]) -> Figure {
        Figure { ours: ours.into(), bare: bare.into(), stock: stock.into(), ..Figure::new("x", "x", "ms") }
    }

    #[test]
    fn a_bar_is_met_missed_or_not_measured() {
        let all = figure(&[4.0], &[10.0], &[2.0]);
        let alone = figure(&[4.0], &[], &[]);
        let nothing = figure(&[], &[10.0], &[2.0]);
        for (of, limit, on_all, on_alone) in [
            (Of::Value, Limit::AtMost(4.0), Some(true), Some(true)),
            (Of::Value, Limit::AtLeast(4.1), Some(false), Some(false)),
            (Of::OverTailscaled, Limit::AtLeast(2.0), Some(true), None),
            (Of::OverTailscaled, Limit::AtLeast(2.1), Some(false), None),
            (Of::OverBare, Limit::AtLeast(0.4), Some(true), None),
            (Of::OverBare, Limit::AtLeast(0.5), Some(false), None),
            (Of::BeyondBare, Limit::AtMost(-6.0), Some(true), None),
            (Of::BeyondBare, Limit::AtMost(-6.1), Some(false), None),
        ] {
            let bar = bar("x", of, limit);
            assert_eq!((bar.met(&all), bar.met(&alone)), (on_all, on_alone), "{}", bar.text());
            assert_eq!(bar.met(&nothing), None, "{}", bar.text());
        }
    }

    #[test]
    fn no_bar_stands_twice() {
        for (n, bar) in BARS.iter().enumerate() {
            let same = |other: &&Bar| other.figure == bar.figure && other.of == bar.of;
            assert!(!BARS[..n].iter().any(|other| same(&other)), "{} {}", bar.figure, bar.text());
        }
    }
}
