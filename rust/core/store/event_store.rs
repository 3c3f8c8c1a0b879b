//! The store: a log in a folder, its durability, and the thread that syncs it.

use super::attachment::{Attached, Detached};
use super::commit::Committed;
use super::compress::{Compression, compress, replace};
use super::directory::{Directory, Lock};
use super::durability::{Appender, Durability, Ticket, run};
use super::error::StoreError;
use super::holds::{Hold, Holds};
use super::listing::Segment;
use super::log::{Limits, Log, MAX_SCHEMA_BYTES, Object};
use super::query::{Indexes, LogQuery, Query};
use super::reader::{Gap, LogReader};
use super::recovery::{Findings, Recovery, age};
use super::retire::{Retention, Retired};
use super::store_reader::{End, StoreQuery, StoreReader};
use crate::error::ConfigError;
use crate::event::Event;
use crate::sync::Flag;
use crate::topic::check_exact;
use parking_lot::Mutex;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

/// How a log is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreConfig {
    /// What may be lost.
    pub durability: Durability,
    /// Bytes of a segment, from 64 KiB to 4 GiB; what does not fit into one makes it longer.
    pub segment_bytes: u64,
    /// The most bytes of all segments; at least two. `None` is no limit.
    pub max_bytes: Option<u64>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { durability: Durability::default(), segment_bytes: 64 << 20, max_bytes: None }
    }
}

impl StoreConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let Self { durability, segment_bytes, max_bytes } = *self;
        if !(64 << 10..=4 << 30).contains(&segment_bytes) {
            return Err(ConfigError::new(format!(
                "segment_bytes was {segment_bytes}; it must be from 65536 to 4294967296"
            )));
        }
        if let Some(max_bytes) = max_bytes.filter(|max_bytes| *max_bytes < 2 * segment_bytes) {
            return Err(ConfigError::new(format!(
                "max_bytes was {max_bytes}; it must be at least two segments of {segment_bytes} bytes"
            )));
        }
        if durability == Durability::Interval(Duration::ZERO) {
            return Err(ConfigError::new(
                "the interval was 0; it must be longer, or the durability group",
            ));
        }
        Ok(())
    }
}

/// A crash-safe log of events and objects in a folder.
///
/// One process writes it; any number of readers, in this process or in others, read it meanwhile.
///
/// # Examples
///
/// ```
/// use tickbus::{Event, EventStore, Records, StoreConfig, StoreError};
///
/// # let folder = std::env::temp_dir().join(format!("tickbus-doc-{}", std::process::id()));
/// let (store, recovery) = EventStore::open(&folder, StoreConfig::default())?;
/// let event = Event::from_bytes([0; 32]);
/// let ticket = store.append_durable(&[event, event])?;
/// assert_eq!(ticket.wait()?, recovery.next_sequence + 1);
///
/// let mut reader = store.read(recovery.next_sequence);
/// while let Some(batch) = reader.next_batch()? {
///     let Records::Events(events) = batch.records else { continue };
///     println!("{} events from {}", events.len(), batch.sequence);
/// }
/// store.close()?;
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok::<(), StoreError>(())
/// ```
pub struct EventStore {
    path: PathBuf,
    durability: Durability,
    committed: Arc<Committed<Directory>>,
    /// Until it is closed.
    held: Mutex<Option<(JoinHandle<()>, Lock)>>,
    is_closed: Flag,
    attached: Mutex<Vec<Weak<Attached>>>,
    detached: Arc<Detached>,
    indexes: Arc<Indexes<Directory>>,
    holds: Arc<Holds>,
    /// One thread at a time retires segments.
    retiring: Mutex<()>,
    /// One thread at a time compresses them.
    compressing: Mutex<()>,
}

impl fmt::Debug for EventStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStore").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Numbers of a store at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreStats {
    /// The oldest sequence that the log has.
    pub oldest_sequence: u64,
    /// The sequence that the next record gets.
    pub next_sequence: u64,
    /// Records from this sequence on may be lost by a power cut.
    pub durable_end: u64,
    /// Segments, the one that is written included.
    pub segments: usize,
    /// Bytes in them.
    pub bytes: u64,
    /// The lowest sequence that is held ([`EventStore::hold`]), for which older segments stay.
    pub held_from: Option<u64>,
    /// Sources from which the store has detached itself, because it had no room or failed.
    pub detached: u64,
    /// Events for which gaps stand that were appended since it was opened, and those that the store had
    /// taken or were pending when it has detached itself from their source.
    pub missed: u64,
    /// Appends since it was opened that had no room for all that they were given.
    pub refused: u64,
    /// How often it waited for the disk since it was opened.
    pub syncs: u64,
    /// How long that took.
    pub sync_time: Duration,
    /// A write or a sync has failed: nothing is stored until the log is opened again.
    pub is_poisoned: bool,
}

impl EventStore {
    /// As [`EventStore::open`], without what stands on it.
    pub(crate) fn open_alone(
        path: &Path,
        config: StoreConfig,
    ) -> Result<(Self, Recovery), StoreError> {
        config.check()?;
        let (storage, lock) = Directory::lock(path)?;
        let storage = Arc::new(storage);
        let (continuation, recovery) = Findings::of(&*storage)?.mend(&*storage)?;
        let StoreConfig { durability, segment_bytes, max_bytes } = config;
        let log = Log::new(storage, Limits { segment_bytes, max_bytes }, continuation);
        let committed = Arc::new(Committed::new(log, durability == Durability::Double));
        let committer = {
            let committed = committed.clone();
            std::thread::Builder::new()
                .name("tickbus-store".to_owned())
                .spawn(move || run(&committed, durability))
                .map_err(StoreError::io("starting a thread for", &path.display().to_string()))?
        };
        let store = Self {
            path: path.to_owned(),
            durability,
            committed,
            held: Mutex::new(Some((committer, lock))),
            is_closed: Flag::default(),
            attached: Mutex::default(),
            detached: Arc::default(),
            indexes: Arc::new(Indexes::kept()),
            holds: Arc::default(),
            retiring: Mutex::default(),
            compressing: Mutex::default(),
        };
        Ok((store, recovery))
    }

    /// Returns the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends events in order and returns the sequence of the first. When they are durable depends on
    /// the durability.
    ///
    /// # Errors
    ///
    /// `Full`, `Poisoned`, `Io`, `Closed`: none of them is stored, or the log is poisoned and nobody was
    /// told that they are.
    pub fn append(&self, events: &[Event]) -> Result<u64, StoreError> {
        self.appending(|log| log.append_events(events))
    }

    /// Appends an object and returns its sequence, as [`EventStore::append`].
    ///
    /// # Errors
    ///
    /// As [`EventStore::append`]; `TooLarge`.
    pub fn append_object(&self, object: &Object<'_>) -> Result<u64, StoreError> {
        self.appending(|log| append_object(log, object))
    }

    /// Notes that events were lost here: a record by itself, whose sequence is returned.
    ///
    /// # Errors
    ///
    /// As [`EventStore::append`].
    pub fn append_gap(&self, missed: u64, is_exact: bool) -> Result<u64, StoreError> {
        self.appending(|log| log.append_gap(missed, is_exact))
    }

    /// Appends events and objects in order, with nothing of others between them, and returns their
    /// sequences.
    ///
    /// # Errors
    ///
    /// As [`EventStore::append_object`], with how many of the first ones were stored.
    pub fn append_many(&self, records: &[NewRecords<'_>]) -> Result<Range<u64>, AppendError> {
        let mut accepted = 0;
        let mut end = 0;
        let appended = self.appending(|log| {
            let first = log.next();
            let all = records.iter().try_for_each(|records| match records {
                NewRecords::Events(events) => log.append_events(events).map(|_| ()),
                NewRecords::Object(object) => append_object(log, object).map(|_| ()),
                NewRecords::Gap(gap) => log.append_gap(gap.missed, gap.is_exact).map(|_| ()),
            });
            end = log.next();
            accepted = end.saturating_sub(first);
            all.map(|()| first)
        });
        match appended {
            Ok(first) => Ok(first..end),
            Err(error) => Err(AppendError { accepted, error }),
        }
    }

    /// As [`EventStore::append_many`], to wait until they are durable.
    ///
    /// # Errors
    ///
    /// As [`EventStore::append_many`].
    pub fn append_many_durable(&self, records: &[NewRecords<'_>]) -> Result<Ticket, AppendError> {
        self.append_many(records).map(|sequences| self.ticket(sequences.end))
    }

    /// Appends events in order, to wait until they are durable.
    ///
    /// # Errors
    ///
    /// As [`EventStore::append`].
    pub fn append_durable(&self, events: &[Event]) -> Result<Ticket, StoreError> {
        let first = {
            self.check()?;
            self.committed.note(self.committed.log().append_events(events))?
        };
        Ok(self.ticket(first + events.len() as u64))
    }

    /// Appends an object, to wait until it is durable.
    ///
    /// # Errors
    ///
    /// As [`EventStore::append_object`].
    pub fn append_object_durable(&self, object: &Object<'_>) -> Result<Ticket, StoreError> {
        let first = {
            self.check()?;
            self.committed.note(append_object(&mut self.committed.log(), object))?
        };
        Ok(self.ticket(first + 1))
    }

    fn ticket(&self, end: u64) -> Ticket {
        if self.durability == Durability::Group {
            self.committed.want();
        }
        Ticket { committed: self.committed.clone(), end }
    }

    #[inline]
    fn appending(
        &self,
        append: impl FnOnce(&mut Log<Directory>) -> Result<u64, StoreError>,
    ) -> Result<u64, StoreError> {
        self.check()?;
        self.appender().append(append)
    }

    /// Returns what appends without the store itself.
    pub(super) fn appender(&self) -> Appender {
        Appender { committed: self.committed.clone(), durability: self.durability }
    }

    /// Waits until everything that was appended is durable.
    ///
    /// # Errors
    ///
    /// `Full`, `Poisoned`, `Io`, `Closed`: nobody was told that it is.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.check()?;
        let next = self.committed.log().next();
        self.committed.commit(next)
    }

    /// Writes what waits in memory into files, where other readers of the folder see it.
    ///
    /// # Errors
    ///
    /// `Full`, `Poisoned`, `Io`, `Closed`.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.check()?;
        self.committed.log().flush()
    }

    /// Returns the last sequence up to which all records are durable; `None` if there is none.
    pub fn durable_sequence(&self) -> Option<u64> {
        self.committed.durable().checked_sub(1)
    }

    /// Makes everything durable and finishes the current segment, so that it can be copied or
    /// compressed.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`].
    pub fn seal(&self) -> Result<(), StoreError> {
        self.check()?;
        self.committed.seal()
    }

    /// Keeps the records from a sequence on in the log, or from the oldest one on, until what is
    /// returned is dropped or advanced.
    pub fn hold(&self, from: u64) -> Hold {
        // What is being retired is gone.
        let _alone = self.retiring.lock();
        let oldest = self.committed.log().oldest();
        self.holds.hold(from.max(oldest))
    }

    /// Retires the oldest segments, as far as they are not wanted and nobody holds them. The last
    /// one with records stays. Readers that are behind get a [`Gap`](crate::Gap).
    ///
    /// # Errors
    ///
    /// `Io`, `Poisoned`, `Closed`, `Corrupt`.
    pub fn retain(&self, retention: &Retention) -> Result<Retired, StoreError> {
        self.check()?;
        let _alone = self.retiring.lock();
        let (storage, segments, end) = {
            let mut log = self.committed.log();
            log.measure()?;
            (log.storage().clone(), log.segments().to_vec(), log.next())
        };
        let wanted = retention.first_kept(&*storage, &segments, end)?;
        let upto = wanted.min(self.holds.lowest().unwrap_or(u64::MAX));
        let Some(job) = self.committed.log().begin_retire(upto)? else {
            return Ok(Retired::default());
        };
        let result = job.run();
        self.committed.log().end_retire(&job, result)?;
        Ok(job.retired())
    }

    /// Compresses what nothing is appended to any more and was finished so long ago; the segment that is
    /// written is left alone, see [`EventStore::seal`]. What was compressed is read again and
    /// compared before the original is removed. Everything reads as before.
    ///
    /// # Errors
    ///
    /// `Corrupt` if a segment is damaged, which stays as it is; `Full`, `Io`, `Poisoned`, `Closed`.
    pub fn compress(&self, older_than: Duration) -> Result<Compression, StoreError> {
        self.check()?;
        let _alone = self.compressing.lock();
        let (storage, finished) = {
            let mut log = self.committed.log();
            log.measure()?;
            (log.storage().clone(), log.finished())
        };
        let mut compression = Compression::default();
        for Segment { base, bytes, .. } in finished.iter().filter(|found| !found.is_compressed) {
            {
                let _alone = self.retiring.lock();
                let is_old = |age: Option<Duration>| age.is_some_and(|age| age >= older_than);
                if !self.is_there(*base) || !is_old(age(&*storage, *base)?) {
                    continue;
                }
            }
            let compressed = compress(&*storage, *base);
            let _alone = self.retiring.lock();
            if !self.is_there(*base) {
                // It was retired meanwhile, and what was made of it is written over or removed.
                continue;
            }
            let compressed = compressed?;
            self.check()?;
            let result = replace(&*storage, *base);
            self.committed.log().end_replace(*base, compressed, result)?;
            compression.segments += 1;
            compression.bytes_before += bytes;
            compression.bytes_after += compressed;
        }
        Ok(compression)
    }

    /// Returns whether the log has the segment that begins with a sequence.
    fn is_there(&self, base: u64) -> bool {
        self.committed.log().segments().iter().any(|segment| segment.base == base)
    }

    /// Returns a reader of the records from a sequence on, up to what is appended when it is asked.
    pub fn read(&self, from: u64) -> StoreReader {
        let storage = self.committed.log().storage().clone();
        let end = End::Appended(self.committed.clone());
        StoreReader { end, reader: LogReader::new(storage, from) }
    }

    /// Returns the records that a query wants among those that were appended so far. An index says
    /// which parts of the log need not be read; it is made when it is first asked for, and that of a
    /// finished segment is kept in a file, where others find it too.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn query(&self, query: &Query) -> Result<StoreQuery, StoreError> {
        let (storage, limit) = {
            let mut log = self.committed.log();
            // What cannot be written is not there to be read.
            _ = log.flush();
            (log.storage().clone(), log.written())
        };
        Ok(StoreQuery(LogQuery::new(storage, self.indexes.clone(), query, limit)?))
    }

    /// Returns the sequence that the next record gets, unless another thread is faster.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.committed.log().next()
    }

    /// Returns the numbers of this moment.
    pub fn stats(&self) -> StoreStats {
        let durable_end = self.committed.durable();
        let (syncs, sync_time) = self.committed.syncs();
        let mut log = self.committed.log();
        // A file that cannot be measured counts nothing.
        _ = log.measure();
        StoreStats {
            oldest_sequence: log.oldest(),
            next_sequence: log.next(),
            durable_end,
            segments: log.segments().len(),
            bytes: log.bytes(),
            held_from: self.holds.lowest(),
            detached: self.detached.sources.value(),
            missed: log.missed() + self.detached.missed.value(),
            refused: self.committed.refused(),
            syncs,
            sync_time,
            is_poisoned: log.is_poisoned(),
        }
    }

    /// Counts a source from which the store has detached itself, and the events that are therefore
    /// missing, for which no gap stands. Who takes from one by other means than
    /// [`EventStore::attach`] counts it here.
    #[doc(hidden)]
    pub fn count_detached(&self, missed: u64) {
        self.detached.count(missed);
    }

    /// Returns what counts the sources from which the store has detached itself.
    pub(super) fn detached(&self) -> &Arc<Detached> {
        &self.detached
    }

    /// Has an attachment end with the store.
    pub(super) fn remember(&self, attached: &Arc<Attached>) -> Result<(), StoreError> {
        let mut all = self.attached.lock();
        all.retain(|attached| attached.strong_count() > 0);
        all.push(Arc::downgrade(attached));
        drop(all);
        // Whoever closed it meanwhile may not have seen it.
        self.check().inspect_err(|_| attached.detach())
    }

    /// Stores what attached subscriptions hold, makes everything durable and ends the log. Closing
    /// again does nothing.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`]; the log is closed all the same.
    pub fn close(&self) -> Result<(), StoreError> {
        let attached = std::mem::take(&mut *self.attached.lock());
        attached.iter().filter_map(Weak::upgrade).for_each(|attached| attached.detach());
        if !self.is_closed.set() {
            return Ok(());
        }
        if let Some(tenant) = self.committed.tenancy().get() {
            tenant.close();
        }
        self.indexes.leave();
        self.committed.end();
        let held = self.held.lock().take();
        let lock = held.map(|(committer, lock)| {
            // It panics only if the log does, which the next line tells.
            _ = committer.join();
            lock
        });
        let closed = self.committed.close();
        if let Some(lock) = lock {
            lock.release();
        }
        closed
    }

    /// Leaves the log to the process that this one was forked from: here it is closed, and nothing is
    /// written or waited for. The lock lasts as long as the parent wants it, and not as long as its
    /// children live.
    pub fn leave_to_parent(&self) {
        self.is_closed.set();
        self.indexes.leave();
        if let Some(tenant) = self.committed.tenancy().try_get() {
            tenant.leave_to_parent();
        }
        // Somebody may have been in the middle of closing it, and is not here to end that.
        let held = self.held.try_lock().and_then(|mut held| held.take());
        if let Some((committer, lock)) = held {
            // The thread is the parent's.
            std::mem::forget(committer);
            drop(lock);
        }
    }

    /// Returns whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.is_closed.is_set()
    }

    /// Returns what has to stay in the log.
    pub(crate) fn holds(&self) -> &Arc<Holds> {
        &self.holds
    }

    /// Returns the log, to be waited for.
    pub(crate) fn committed(&self) -> &Arc<Committed<Directory>> {
        &self.committed
    }

    #[inline]
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        match self.is_closed.is_set() {
            true => Err(StoreError::Closed),
            false => Ok(()),
        }
    }
}

impl Drop for EventStore {
    /// As [`EventStore::close`], without anybody to tell an error.
    fn drop(&mut self) {
        _ = self.close();
    }
}

/// What can be appended.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum NewRecords<'a> {
    /// Events.
    Events(&'a [Event]),
    /// An object.
    Object(Object<'a>),
    /// The place where events are missing, a record by itself.
    Gap(Gap),
}

/// Not all of many records were stored.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub struct AppendError {
    /// How many of the first ones were stored; the rest were not.
    pub accepted: u64,
    /// What the one behind them met.
    pub error: StoreError,
}

fn append_object(log: &mut Log<Directory>, object: &Object<'_>) -> Result<u64, StoreError> {
    if let Some(topic) = object.topic {
        check_exact("topic", topic)?;
    }
    let bytes = object.schema.len();
    if !(1..=MAX_SCHEMA_BYTES).contains(&bytes) {
        let message =
            format!("schema had {bytes} bytes; it must have from 1 to {MAX_SCHEMA_BYTES}");
        return Err(ConfigError::new(message).into());
    }
    log.append_object(object)
}
