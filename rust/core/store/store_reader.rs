//! Reading a log in a folder: one that this process writes, or another one.

use super::commit::Committed;
use super::directory::Directory;
use super::error::StoreError;
use super::query::{Found, LogQuery};
use super::reader::{Batch, LogReader};
use super::recovery::Findings;
use std::fmt;
use std::sync::Arc;

/// The records that a query has wanted.
pub struct StoreQuery(pub(super) LogQuery<Directory>);

impl fmt::Debug for StoreQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreQuery").finish_non_exhaustive()
    }
}

impl StoreQuery {
    /// Returns the next records that are wanted, in the order of the log; `None` at its end.
    ///
    /// # Errors
    ///
    /// As [`StoreReader::next_batch`].
    pub fn next_found(&mut self) -> Result<Option<Found<'_>>, StoreError> {
        self.0.next_found()
    }
}

/// Reads a log in order.
pub struct StoreReader {
    pub(super) end: End,
    pub(super) reader: LogReader<Directory>,
}

/// Up to where a log is read.
pub(super) enum End {
    /// What was appended to a store of this process.
    Appended(Arc<Committed<Directory>>),
    /// What was durable when it was looked at.
    Durable { storage: Arc<Directory>, durable: u64 },
}

impl fmt::Debug for StoreReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreReader").field("sequence", &self.sequence()).finish_non_exhaustive()
    }
}

impl StoreReader {
    /// Returns the sequence of the next record.
    pub fn sequence(&self) -> u64 {
        self.reader.sequence()
    }

    /// Returns the next records; `None` if there are none now.
    ///
    /// # Errors
    ///
    /// `Corrupt` if what is there is not what was written; nothing is ever stepped over. `Io`; `Name`
    /// and `EventType` if a name of the log finds no place in this process.
    pub fn next_batch(&mut self) -> Result<Option<Batch<'_>>, StoreError> {
        let next = self.reader.sequence();
        let limit = match &mut self.end {
            End::Appended(committed) => {
                let mut log = committed.log();
                // What waits in memory is read from the file too; where it cannot be written, it
                // is not there to be read.
                if log.written() <= next {
                    _ = log.flush();
                }
                log.written()
            }
            End::Durable { storage, durable } => {
                if *durable <= next {
                    *durable = Findings::of_live(&**storage)?.durable;
                }
                *durable
            }
        };
        self.reader.next_below(limit)
    }
}
