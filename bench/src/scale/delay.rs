//! Replication delay, as in the table of replication, several times.

use std::path::Path;

use super::{MAKE_TABLE, Scale, Target, print};
use crate::Result;
use crate::cases::{self, Mode};
use crate::measure::{median, quantile};
use crate::replication;

pub fn run(scale: &Scale, work: &Path) -> Result<()> {
    let [primary_site, replica_site] = scale.sites(work)?;
    let (primary, replica) = (primary_site.start()?, replica_site.start()?);
    for mode in [Mode::Delete, Mode::Wal] {
        let (mut medians, mut tails) = (Vec::new(), Vec::new());
        for run in 0..scale.runs {
            let name = format!("delay-{mode}-{run}.db");
            let writer = cases::open(&primary.mount().join(&name), mode, true)?;
            writer.execute_batch(MAKE_TABLE)?;
            let delays = replication::delays(&writer, &replica.mount().join(&name))?;
            medians.push(median(&delays));
            tails.push(quantile(&delays, 0.99));
        }
        let row = format!("delay, {mode}, median");
        print(&row, "ms", &medians, Target::AtMost(0.8));
        let row = format!("delay, {mode}, 99th percentile");
        print(&row, "ms", &tails, Target::AtMost(3.0));
    }
    Ok(())
}
