//! How a log forgets: its oldest segments are retired, whole ones only.
//!
//! An empty file whose name says from where on records are kept is made durable first, so that
//! segments that are gone on purpose are never taken for lost ones. One file is kept to be a segment
//! again: its blocks are written already, and syncing those takes half as long.

use super::error::StoreError;
use super::format::{SEGMENT_HEADER, index_name, oldest_name, segment_name};
use super::listing::{SPARE, Segment, of_either_form};
use super::mutants::{Mutant, is_broken};
use super::recovery::age;
use super::storage::{Storage, StorageFile, uninterrupted, write_all};
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

/// What of a log is kept at least. Of what is given, any one is reason enough to retire a segment;
/// `None` is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// So many of the last bytes.
    pub bytes: Option<u64>,
    /// So many of the last records.
    pub records: Option<u64>,
    /// What was written in so long a time, by the wall clock.
    pub age: Option<Duration>,
}

/// What was retired.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retired {
    /// Segments.
    pub segments: usize,
    /// Records in them.
    pub records: u64,
    /// Bytes of them.
    pub bytes: u64,
}

impl Retention {
    /// Returns the first sequence that is kept of these segments, `end` being the next one.
    pub(crate) fn first_kept<S: Storage>(
        &self,
        storage: &S,
        segments: &[Segment],
        end: u64,
    ) -> Result<u64, StoreError> {
        let mut bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
        let mut first = segments.first().map_or(end, |first| first.base);
        for pair in segments.windows(2) {
            let (segment, next) = (pair[0], pair[1].base);
            bytes -= segment.bytes;
            let is_beyond = |kept: Option<u64>, left: u64| kept.is_some_and(|kept| left >= kept);
            if !is_beyond(self.bytes, bytes)
                && !is_beyond(self.records, end - next)
                && !self.is_aged(storage, segment.base)?
            {
                break;
            }
            first = next;
        }
        Ok(first)
    }

    /// Returns whether the last record of a segment was written too long ago.
    fn is_aged<S: Storage>(&self, storage: &S, base: u64) -> Result<bool, StoreError> {
        let Some(kept) = self.age else { return Ok(false) };
        Ok(age(storage, base)?.is_some_and(|age| age >= kept))
    }
}

/// What has to be done so that a log has no records below a sequence.
pub(crate) struct RetireJob<S: Storage> {
    pub(super) storage: Arc<S>,
    pub(super) retired: Vec<Segment>,
    /// The segment whose file is kept, and how many bytes it has to have then.
    pub(super) spare: Option<(Segment, u64)>,
    /// What was retired before.
    pub(super) before: u64,
    /// The first sequence that is kept.
    pub(super) oldest: u64,
}

/// How it fails to retire or to compress segments.
#[derive(Debug)]
pub(crate) enum UpkeepError {
    /// Nothing has happened.
    Refused(StoreError),
    /// Nobody knows what the folder is.
    Sync(io::Error),
    /// All has happened, and files that are none of the log any more are left.
    Left(StoreError),
}

impl<S: Storage> RetireJob<S> {
    /// Returns what it retires.
    pub(crate) fn retired(&self) -> Retired {
        Retired {
            segments: self.retired.len(),
            records: self.oldest - self.retired.first().map_or(self.oldest, |first| first.base),
            bytes: self.retired.iter().map(|segment| segment.bytes).sum(),
        }
    }

    /// Does it, and returns how many bytes were written of the spare file that there is then.
    pub(crate) fn run(&self) -> Result<Option<u64>, UpkeepError> {
        let note = oldest_name(self.oldest);
        if !is_broken(Mutant::RetiresWithoutNote) {
            uninterrupted(|| self.storage.create(&note))
                .map_err(|error| UpkeepError::Refused(StoreError::io("creating", &note)(error)))?;
        }
        if !is_broken(Mutant::NoSyncOfNote) {
            uninterrupted(|| self.storage.sync_names()).map_err(UpkeepError::Sync)?;
        }
        let mut spare = None;
        let mut failed = Ok(());
        for Segment { base, .. } in &self.retired {
            // One that is left is none of the log's, and removed when that is opened the next time.
            _ = self.storage.remove(&index_name(*base));
            if let Some((kept, bytes)) = self.spare.filter(|(kept, _)| kept.base == *base) {
                let name = segment_name(*base);
                match self.keep(&name, bytes).map_err(StoreError::io("keeping", &name)) {
                    Ok(()) => {
                        spare = Some(kept.bytes);
                        continue;
                    }
                    error => failed = failed.and(error),
                }
            }
            let removed = of_either_form("removing", *base, |name, _| self.storage.remove(name));
            failed = failed.and(removed);
        }
        if (1..self.oldest).contains(&self.before) {
            failed = failed.and(self.remove(&oldest_name(self.before)));
        }
        failed.map_err(UpkeepError::Left).map(|()| spare)
    }

    /// Keeps a file, without the header of its segment, for another one.
    fn keep(&self, name: &str, bytes: u64) -> io::Result<()> {
        let file = uninterrupted(|| self.storage.open(name, true))?;
        if !is_broken(Mutant::NoWipe) {
            write_all(&file, &mut [IoSlice::new(&[0; SEGMENT_HEADER])], 0)?;
        }
        uninterrupted(|| file.allocate(bytes))?;
        uninterrupted(|| file.sync_data())?;
        uninterrupted(|| self.storage.rename(name, SPARE))
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        uninterrupted(|| self.storage.remove(name)).map_err(StoreError::io("removing", name))
    }
}
