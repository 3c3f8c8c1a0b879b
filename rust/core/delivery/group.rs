//! Groups: consumers that share a place in a log, which survives them.

use super::desk::Books;
use super::entry::{Entry, GroupId};
use super::error::DeliveryError;
use super::groups::{Lent, Offer, Serving};
use super::{Delivery, FOLDER};
use crate::error::{ConfigError, Lagged};
use crate::store::{Batch, Directory, EventStore, LogReader, StoreError};
use parking_lot::Mutex;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a group begins that nobody has registered before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GroupStart {
    /// With the oldest record that the log has.
    #[default]
    Oldest,
    /// With what becomes durable from now on.
    Newest,
    /// With the record of a sequence.
    At(u64),
}

/// How a group reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupConfig {
    /// Where it begins if it is new.
    pub start: GroupStart,
    /// How long a consumer may have records before another one gets them.
    pub lease: Duration,
    /// After so long without a consumer it expires: the log may lose what it has not read. `None` is
    /// never.
    pub max_idle: Option<Duration>,
    /// The most records that its consumers have at a time.
    pub max_in_flight: u64,
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            start: GroupStart::default(),
            lease: Duration::from_secs(30),
            max_idle: Some(Duration::from_secs(7 * 24 * 3600)),
            max_in_flight: 1 << 16,
        }
    }
}

/// The most bytes of the name of a group or a consumer.
pub(super) const MAX_NAME: usize = 255;

/// Returns an error if nothing can be named so.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), ConfigError> {
    match name.len() {
        1..=MAX_NAME => Ok(()),
        bytes => Err(ConfigError::new(format!(
            "the name of the {what} had {bytes} bytes; it must have from 1 to {MAX_NAME}"
        ))),
    }
}

/// Returns a duration in nanoseconds; a longer one never ends.
pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl GroupConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.lease.is_zero() {
            return Err(ConfigError::new("the lease was 0; it must be longer"));
        }
        if self.max_idle.is_some_and(|max_idle| max_idle.is_zero()) {
            return Err(ConfigError::new("max_idle was 0; it must be longer, or none"));
        }
        if self.max_in_flight == 0 {
            return Err(ConfigError::new("max_in_flight was 0; it must be at least 1"));
        }
        Ok(())
    }
}

/// Numbers of a group at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStats {
    /// Its name.
    pub name: Arc<str>,
    /// All records below are done.
    pub cursor: u64,
    /// Durable records that are not done.
    pub lag: u64,
    /// Records that consumers have.
    pub in_flight: u64,
    /// Records that were given to a consumer again since the log was opened.
    pub redelivered: u64,
    /// How often its consumers had as many records as they may, and more were there.
    pub stalled: u64,
    /// How often it has expired and returned since the log was opened.
    pub expired: u64,
    /// It has expired: the log may lose what it has not read.
    pub is_expired: bool,
}

impl EventStore {
    /// Returns a consumer of a group, which is registered durably if nobody has registered it before.
    /// Its consumers share the records of the log: each record goes to one of them, and again to
    /// one of them until one has committed it. It is read up to what is durable.
    ///
    /// Lease and limit of a group are those that were given last.
    ///
    /// # Errors
    ///
    /// `Config` if a setting cannot be kept; otherwise as [`EventStore::sync`].
    ///
    /// # Examples
    ///
    /// ```
    /// use tickbus::{DeliveryError, Event, EventStore, GroupConfig, StoreConfig};
    ///
    /// # let folder = std::env::temp_dir().join(format!("tickbus-group-{}", std::process::id()));
    /// let (store, _) = EventStore::open(&folder, StoreConfig::default())?;
    /// let audit = store.group("audit", GroupConfig::default())?;
    /// store.append(&[Event::from_bytes([0; 32])])?;
    /// if let Some(mut batch) = audit.fetch(1_000, None)? {
    ///     while let Some(records) = batch.next_batch()? {
    ///         println!("{} records from {}", records.len(), records.sequence);
    ///     }
    ///     batch.commit()?; // durable
    /// }
    /// # store.close()?;
    /// # std::fs::remove_dir_all(&folder).ok();
    /// # Ok::<(), DeliveryError>(())
    /// ```
    pub fn group(&self, name: &str, config: GroupConfig) -> Result<Group, DeliveryError> {
        config.check().and_then(|()| check_name("group", name)).map_err(StoreError::from)?;
        let delivery = self.delivery()?;
        // Nothing is retired that it may begin with.
        let hold = self.hold(0);
        let stats = self.stats();
        let (oldest, next) = (stats.oldest_sequence, stats.next_sequence);
        let start = match config.start {
            GroupStart::Oldest => oldest,
            GroupStart::Newest => stats.durable_end,
            GroupStart::At(sequence) if sequence <= next => sequence,
            GroupStart::At(sequence) => {
                let message = format!(
                    "start was {sequence}; the log ends before {next}: give a sequence up to that"
                );
                return Err(StoreError::from(ConfigError::new(message)).into());
            }
        };
        let max_idle = config.max_idle.map(nanoseconds);
        let times = delivery.real_times();
        let (id, end) = delivery.desk.decide::<_, DeliveryError>(times, |books| {
            let first = start.max(oldest);
            let is_new = books.groups.id(name).is_none();
            let (id, entry) = books.groups.join(name, first, max_idle, oldest, times.wall);
            let missed = if is_new { first - start } else { 0 };
            Ok((entry.into_iter().collect(), (id, missed)))
        })?;
        let (id, missed) = id;
        let serving =
            Serving { lease: nanoseconds(config.lease), max_in_flight: config.max_in_flight };
        delivery.desk.books().groups.serve(id, serving, missed);
        delivery.desk.commit(end)?;
        drop(hold);
        Ok(Group { delivery, id, name: name.into(), max_idle, reader: Arc::default() })
    }

    /// Returns the numbers of all groups of this log.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`].
    pub fn groups(&self) -> Result<Vec<GroupStats>, StoreError> {
        self.check()?;
        // To ask makes nothing in the folder of a log.
        if !self.path().join(FOLDER).is_dir() {
            return Ok(Vec::new());
        }
        let delivery = self.delivery()?;
        let books = delivery.desk.books();
        Ok(books.groups.all().filter_map(|(id, _)| stats(&books, id)).collect())
    }

    /// Forgets a group durably: its consumers get an error, and the log may lose what it has not read.
    /// Returns whether there was one.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`].
    pub fn remove_group(&self, name: &str) -> Result<bool, StoreError> {
        let delivery = self.delivery()?;
        let (is_there, end) =
            delivery.desk.decide::<_, StoreError>(delivery.real_times(), |books| {
                let group = books.groups.id(name);
                let entries: Vec<_> =
                    group.map(|group| Entry::GroupRemoved { group }).into_iter().collect();
                Ok((entries, group.is_some()))
            })?;
        delivery.desk.commit(end)?;
        Ok(is_there)
    }
}

fn stats(books: &Books<Directory>, id: GroupId) -> Option<GroupStats> {
    let group = books.groups.get(id)?;
    Some(GroupStats {
        name: group.name.clone(),
        cursor: group.cursor,
        lag: group.lag(books.durable),
        in_flight: group.in_flight(),
        redelivered: group.numbers.redelivered,
        stalled: group.numbers.stalled,
        expired: group.numbers.expired,
        is_expired: group.is_expired,
    })
}

/// A consumer of a group. Clones share what it read ahead; each thread should have one of its own.
#[derive(Clone)]
pub struct Group {
    delivery: Arc<Delivery>,
    id: GroupId,
    name: Arc<str>,
    max_idle: Option<u64>,
    /// It stands behind what was read last.
    reader: Arc<Mutex<Option<LogReader<Directory>>>>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("name", &self.name).finish_non_exhaustive()
    }
}

/// While it lives, the group counts as used.
struct Waiting<'a>(&'a Group);

impl<'a> Waiting<'a> {
    fn new(group: &'a Group) -> Self {
        let now = group.delivery.real_times().real;
        group.delivery.desk.books().groups.wait(group.id, true, now);
        Self(group)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Group { delivery, id, .. } = self.0;
        let mut books = delivery.desk.books();
        books.groups.wait(*id, false, delivery.real_times().real);
        // From now on it may expire.
        delivery.desk.tell(&mut books);
    }
}

impl Group {
    /// Returns the name of the group.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns at most `limit` records, and has them until the lease ends; `None` if there are none
    /// now.
    ///
    /// # Errors
    ///
    /// `Lagged` if the group had expired and records are gone; `Removed`; `Store`.
    pub fn try_fetch(&self, limit: u64) -> Result<Option<GroupBatch>, DeliveryError> {
        let times = self.delivery.real_times();
        let desk = &self.delivery.desk;
        let (offer, _) = desk.decide::<_, DeliveryError>(times, |books| {
            let offer = books.groups.lend(self.id, limit.max(1), books.durable, times.real);
            Ok::<_, DeliveryError>((Vec::new(), offer))
        })?;
        match offer {
            Some(Offer::Lent(lent)) => {
                Ok(Some(GroupBatch { group: self.clone(), lent, reader: None }))
            }
            Some(Offer::Lagged(missed)) => {
                Err(DeliveryError::Lagged(Lagged { missed, exact: true }))
            }
            Some(Offer::Nothing | Offer::TooMany) => Ok(None),
            None => {
                // It does not expire meanwhile.
                let _waiting = Waiting::new(self);
                self.return_from_expiry()?;
                self.try_fetch(limit)
            }
        }
    }

    /// Goes on where the group was, or with the oldest record that the log still has.
    fn return_from_expiry(&self) -> Result<(), DeliveryError> {
        let times = self.delivery.real_times();
        let (_, end) = self.delivery.desk.decide::<_, DeliveryError>(times, |books| {
            if books.groups.get(self.id).is_none() {
                return Err(DeliveryError::Removed { name: self.name.clone() });
            }
            let oldest = self.delivery.oldest()?;
            let (_, entry) = books.groups.join(&self.name, 0, self.max_idle, oldest, times.wall);
            Ok((entry.into_iter().collect(), ()))
        })?;
        Ok(self.delivery.desk.commit(end)?)
    }

    /// Waits until there are records, and returns at most `limit` of them; `None` once the deadline has
    /// passed.
    ///
    /// # Errors
    ///
    /// As [`Group::try_fetch`]; `Closed` once the log is.
    pub fn fetch(
        &self,
        limit: u64,
        deadline: Option<Instant>,
    ) -> Result<Option<GroupBatch>, DeliveryError> {
        if let Some(batch) = self.try_fetch(limit)? {
            return Ok(Some(batch));
        }
        let _waiting = Waiting::new(self);
        self.delivery.desk.wait(deadline, || self.try_fetch(limit))
    }

    /// As [`Group::fetch`], in a task, without a deadline. Cancelling it loses nothing.
    ///
    /// # Errors
    ///
    /// As [`Group::fetch`].
    pub async fn fetch_async(&self, limit: u64) -> Result<GroupBatch, DeliveryError> {
        if let Some(batch) = self.try_fetch(limit)? {
            return Ok(batch);
        }
        let _waiting = Waiting::new(self);
        self.delivery.desk.wait_async(|| self.try_fetch(limit)).await
    }

    /// Returns the numbers of this moment.
    ///
    /// # Errors
    ///
    /// `Removed`.
    pub fn stats(&self) -> Result<GroupStats, DeliveryError> {
        let books = self.delivery.desk.books();
        stats(&books, self.id).ok_or_else(|| DeliveryError::Removed { name: self.name.clone() })
    }
}

/// Records that a consumer has until it commits them, or its lease ends.
pub struct GroupBatch {
    group: Group,
    lent: Lent,
    reader: Option<LogReader<Directory>>,
}

impl fmt::Debug for GroupBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("GroupBatch");
        debug.field("sequences", &self.sequences()).finish_non_exhaustive()
    }
}

impl GroupBatch {
    /// Returns the sequences of the records.
    pub fn sequences(&self) -> Range<u64> {
        self.lent.from..self.lent.end
    }

    /// Returns how often they were given to a consumer since the log was opened, from 1.
    pub fn attempt(&self) -> u32 {
        self.lent.attempt
    }

    /// Returns the next records, as many as lie together; `None` at the end.
    ///
    /// # Errors
    ///
    /// As [`StoreReader::next_batch`](crate::StoreReader::next_batch).
    pub fn next_batch(&mut self) -> Result<Option<Batch<'_>>, StoreError> {
        let Lent { from, end, .. } = self.lent;
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(self.group.reader_at(from)?),
        };
        reader.next_below(end)
    }

    /// Says durably that the records are done: nobody gets them again.
    ///
    /// # Errors
    ///
    /// `Stale` if others have them by now, or they are done; `Store`: nobody was told that they are.
    pub fn commit(&self) -> Result<(), DeliveryError> {
        let end = self.finish()?;
        Ok(self.group.delivery.desk.commit(end)?)
    }

    /// As [`GroupBatch::commit`], in a task. Dropping what it returns takes nothing back.
    ///
    /// # Errors
    ///
    /// As [`GroupBatch::commit`].
    pub fn committing(&self) -> impl Future<Output = Result<(), DeliveryError>> + Send + use<> {
        let end = self.finish();
        let delivery = self.group.delivery.clone();
        async move { Ok(delivery.desk.commit_async(end?).await?) }
    }

    fn finish(&self) -> Result<u64, DeliveryError> {
        let Group { delivery, id, .. } = &self.group;
        let times = delivery.real_times();
        let (_, end) = delivery.desk.decide::<_, DeliveryError>(times, |books| {
            let entry = books.groups.finish(*id, self.lent, times.wall);
            Ok((vec![entry.ok_or_else(|| self.stale())?], ()))
        })?;
        Ok(end)
    }

    /// Gives the records back, to be delivered again at once.
    ///
    /// # Errors
    ///
    /// `Stale` if others have them by now, or they are done.
    pub fn give_back(&self) -> Result<(), DeliveryError> {
        let Group { delivery, id, .. } = &self.group;
        let mut books = delivery.desk.books();
        if !books.groups.give_back(*id, self.lent) {
            return Err(self.stale());
        }
        delivery.desk.tell(&mut books);
        Ok(())
    }

    fn stale(&self) -> DeliveryError {
        let Lent { from, end, attempt } = self.lent;
        let what = format!("records {from} to {} of the group {:?}", end - 1, self.group.name);
        DeliveryError::Stale { what, attempt }
    }
}

impl Group {
    /// Returns a reader at a sequence.
    fn reader_at(&self, from: u64) -> Result<LogReader<Directory>, StoreError> {
        let near = self.reader.lock().take().filter(|reader| reader.is_near(from));
        let Some(mut reader) = near else {
            return Ok(LogReader::new(self.delivery.storage.clone(), from));
        };
        while reader.next_below(from)?.is_some() {}
        Ok(reader)
    }
}

impl Drop for GroupBatch {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            *self.group.reader.lock() = Some(reader);
        }
    }
}
