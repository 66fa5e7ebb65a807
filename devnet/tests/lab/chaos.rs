//! A short seeded schedule; `make chaos` runs longer ones and holds them to times as well.

use std::path::Path;
use std::time::Duration;

use podtether_devnet::chaos::{self, Counts, Options};

use crate::lab_test;

#[test]
fn half_a_minute_of_chaos_loses_nothing_that_may_not_be_lost() {
    lab_test("chaos::half_a_minute_of_chaos_loses_nothing_that_may_not_be_lost", |dir| {
        let options = Options {
            seed: std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(5),
            pods: 4,
            counts: Counts {
                kills: 8,
                stops: 1,
                bombs: 0,
                handovers: 2,
                supervisor_kills: 3,
                everything: 1,
                outages: 1,
            },
            repeats: false,
            // Far more than it takes, so that a loaded machine does every event too.
            limit: Duration::from_secs(300),
            cgroup_root: String::new(),
        };
        let programs = Path::new(env!("CARGO_BIN_EXE_podtether-devnet"));
        let report = chaos::run(dir, programs, &options, &mut |line| println!("{line}")).unwrap();
        println!("{}", report.table());
        assert_eq!(report.breaches, [""; 0]);
        // Every kind happened; hangs and supervisors have two lines, and pods came and went. How long it took is no test's
        // business.
        assert_eq!(report.rows.len(), 12);
        assert_eq!(report.rows.iter().map(|row| row.others.0).sum::<u64>(), 0);
    });
}
