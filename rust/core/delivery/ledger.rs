//! The log of what was decided, from which it is known again after a restart.
//!
//! Now and then all that is known is written as a snapshot: entries between `SnapshotBegun` and
//! `SnapshotEnded` from which it follows alone, so that the log may lose what stands before.

use super::entry::{Entry, SCHEMA, VERSION, unknown};
use super::mutants::{Mutant, is_broken};
use crate::store::{Committed, LogReader, Object, Records, Storage, StoreError};
use std::sync::Arc;

/// Bytes of entries before a snapshot is worth it, and how many snapshots' worth of them.
const SNAPSHOT_AFTER: u64 = 256 << 10;
const SNAPSHOTS_WORTH: u64 = 2;
/// About how many bytes an entry has.
const ENTRY: u64 = 48;

pub(crate) struct Ledger<S: Storage> {
    committed: Arc<Committed<S>>,
    /// Bytes of entries since the last snapshot, and those of that.
    since: u64,
    snapshot: u64,
    snapshot_after: u64,
    /// The last snapshot has no end, so that nothing may follow but another one.
    is_cut_short: bool,
    /// Where the last snapshot begins and ends, until what stands before it was retired.
    superseding: Option<(u64, u64)>,
}

impl<S: Storage> Ledger<S> {
    pub(crate) fn new(committed: Arc<Committed<S>>) -> Self {
        let (since, snapshot, snapshot_after) = (0, 0, SNAPSHOT_AFTER);
        let (is_cut_short, superseding) = (false, None);
        Self { committed, since, snapshot, snapshot_after, is_cut_short, superseding }
    }

    /// Has snapshots be written after so many bytes of entries.
    #[cfg(test)]
    pub(crate) fn snapshot_after(mut self, bytes: u64) -> Self {
        self.snapshot_after = bytes;
        self
    }

    /// Returns the entries from which all follows: those since the last snapshot, and that.
    pub(crate) fn read(&mut self) -> Result<Vec<Entry>, StoreError> {
        let (storage, first, limit) = {
            let log = self.committed.log();
            let first = log.segments().first().map_or(0, |first| first.base);
            (log.storage().clone(), first, log.written())
        };
        let mut reader = LogReader::new(storage, first);
        let mut entries = Vec::new();
        // Where a snapshot stands that has no end so far.
        let mut begun: Option<usize> = None;
        while let Some(batch) = reader.next_below(limit)? {
            let Records::Objects(objects) = batch.records else {
                return Err(unknown(batch.sequence));
            };
            for (sequence, object) in (batch.sequence..).zip(objects.iter()) {
                let entry = Entry::of(&object, sequence)?;
                self.since += object.bytes.len() as u64;
                match entry {
                    Entry::SnapshotBegun { .. } if !is_broken(Mutant::TrustsHalfSnapshot) => {
                        entries.truncate(begun.unwrap_or(entries.len()));
                        begun = Some(entries.len());
                    }
                    Entry::SnapshotBegun { .. } => entries.clear(),
                    _ => {}
                }
                if entry == Entry::SnapshotEnded {
                    entries.drain(..begun.take().unwrap_or_default());
                    (self.snapshot, self.since) = (entries.len() as u64 * ENTRY, 0);
                }
                entries.push(entry);
            }
        }
        if let Some(begun) = begun {
            entries.truncate(begun);
            self.is_cut_short = true;
        }
        Ok(entries)
    }

    /// Appends entries, and returns how many of them, with the sequence behind them.
    pub(crate) fn append(&mut self, entries: &[Entry]) -> (usize, Result<u64, StoreError>) {
        let mut log = self.committed.log();
        let mut appended = 0;
        for entry in entries {
            if is_broken_for(entry) {
                appended += 1;
                continue;
            }
            let bytes = entry.encode();
            let (timestamp, topic, is_replayed) = (log.storage().now(), None, false);
            let (schema, version) = (SCHEMA, VERSION);
            let object = Object { timestamp, topic, schema, version, bytes: &bytes, is_replayed };
            if let Err(error) = log.append_object(&object) {
                return (appended, Err(error));
            }
            self.since += bytes.len() as u64;
            appended += 1;
        }
        (appended, Ok(log.next()))
    }

    /// Returns whether a snapshot should come before other entries.
    pub(crate) fn wants_snapshot(&self) -> bool {
        let enough = self.snapshot_after.max(SNAPSHOTS_WORTH * self.snapshot);
        self.is_cut_short || self.since >= enough
    }

    /// Appends a snapshot.
    pub(crate) fn append_snapshot(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        self.since = 0;
        self.is_cut_short = true;
        let begin = self.next();
        let (_, appended) = self.append(entries);
        self.superseding = Some((begin, appended?));
        self.is_cut_short = false;
        self.snapshot = std::mem::take(&mut self.since);
        Ok(())
    }

    /// Retires what stands before the last snapshot, once that is durable.
    pub(crate) fn retire(&mut self, durable: u64) {
        let Some((begin, _)) = self.superseding.take_if(|(_, end)| *end <= durable) else { return };
        let begin = if is_broken(Mutant::RetiresSnapshot) { u64::MAX } else { begin };
        let job = self.committed.log().begin_retire(begin);
        if let Ok(Some(job)) = job {
            let result = job.run();
            // What could not be retired is when the next snapshot is there.
            _ = self.committed.log().end_retire(&job, result);
        }
    }

    /// Returns the sequence of the next entry.
    pub(crate) fn next(&self) -> u64 {
        self.committed.log().next()
    }
}

/// Returns whether this thread runs with a fault by which the entry is not written.
fn is_broken_for(entry: &Entry) -> bool {
    match entry {
        Entry::Published { .. } => is_broken(Mutant::LosesPublished),
        Entry::AttemptBegun { .. } => is_broken(Mutant::LosesAttempts),
        Entry::Acked { .. } => is_broken(Mutant::LosesAcks),
        Entry::GroupDone { .. } => is_broken(Mutant::LosesDone),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::log::Limits;
    use crate::store::sim::SimDisk;
    use crate::store::workload::open_log;

    const LIMITS: Limits = Limits { segment_bytes: 4096 + 2000, max_bytes: None };

    fn ledger(disk: &SimDisk) -> Ledger<SimDisk> {
        let (log, _) = open_log(disk, LIMITS).expect("it opens");
        Ledger::new(Arc::new(Committed::new(log, false))).snapshot_after(400)
    }

    #[test]
    fn what_stands_before_a_snapshot_is_retired_and_the_rest_says_all() {
        let disk = SimDisk::new(1);
        let mut written = ledger(&disk);
        let begun = Entry::SnapshotBegun { next_group: 1, next_consumer: 1, published: None };
        let snapshot =
            |id| [begun.clone(), Entry::Published { id, key: None }, Entry::SnapshotEnded];
        let mut last = 0;
        for id in 0..2_000 {
            if written.wants_snapshot() {
                written.append_snapshot(&snapshot(id)).expect("it has room");
                last = id;
            }
            let (_, end) = written.append(&[Entry::Published { id, key: None }]);
            written.committed.commit(end.expect("it has room")).expect("the disk is whole");
            written.retire(written.committed.durable());
        }
        assert!(last > 1_000, "the last snapshot was at {last}");
        let segments = written.committed.log().segments().len();
        // Each holds a few entries only.
        assert!(segments < 20, "{segments} segments");
        let mut again = ledger(&disk.settled());
        let expected: Vec<Entry> = snapshot(last)
            .into_iter()
            .chain((last..2_000).map(|id| Entry::Published { id, key: None }))
            .collect();
        assert_eq!(again.read().expect("it is whole"), expected);
        assert!(!again.is_cut_short);
    }

    #[test]
    fn a_record_that_is_no_entry_is_an_error() {
        let disk = SimDisk::new(1);
        let written = ledger(&disk);
        let (timestamp, topic, is_replayed, bytes) = (0, None, false, &[9][..]);
        let object = Object { timestamp, topic, schema: SCHEMA, version: 2, bytes, is_replayed };
        let appended = written.committed.log().append_object(&object);
        written.committed.commit(appended.expect("it has room") + 1).expect("the disk is whole");
        let read = ledger(&disk.settled()).read();
        assert!(matches!(read, Err(StoreError::Corrupt { sequence: 0, .. })), "{read:?}");
    }
}
