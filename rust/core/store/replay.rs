//! Replay: what a log has, published again in its order.
//!
//! ```text
//!  EventStore or folder ─► all of it, or what a query wants ─► what is due ─► next_batch, or a sink
//!                                                  Transport: pause, step, seek, stop ─┘
//! ```
//!
//! A sink is published to only as far as everybody has room: what is replayed is lost by nobody,
//! however slow, but by those that conflate or only count what they miss.

use super::error::StoreError;
use super::event_store::EventStore;
use super::holds::Hold;
use super::log::Object;
use super::query::{Filter, Found, Query};
use super::reader::Records;
use super::store_reader::{StoreQuery, StoreReader};
use super::transport::{Order, Pace, ReplayProgress, Transport, VirtualClock};
use crate::bus::{Bus, EventBus};
use crate::error::{ConfigError, PublishError, ReplayRefused};
use crate::event::{Event, Lane, Priority};
use crate::event_type::EventType;
use crate::names::{SourceId, Symbol};
use crate::system::{EventSystem, SystemError};
use crate::topic::Topic;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Events that are read before any of them is replayed, if there are so many.
const CHUNK: usize = 1_024;
/// Events that are published at once: so far the clock is ahead of them at most.
const STRETCH: usize = 1_024;
/// How long it waits until it looks again for room: readers tell nobody, which would cost each of them
/// a fence. From the shortest on, each time twice as long.
const NAPS: Range<Duration> = Duration::from_micros(20)..Duration::from_millis(5);

/// What is replayed, and how.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ReplayOptions {
    /// The records that are wanted. Gaps belong to no time, type or symbol.
    pub query: Query,
    /// Recorded time per real time: 1 as recorded, 10 ten times faster, 0 as fast as it goes.
    pub speed: f64,
    /// Longer gaps of recorded time are not waited for; `None` is an hour.
    pub longest_gap: Option<Duration>,
    /// Whether others may publish into the same bus and stores may be attached to it.
    pub is_mixed: bool,
    /// The clock that the replay moves.
    pub clock: VirtualClock,
    /// What tells it to pause, to step, to seek and to stop.
    pub transport: Transport,
}

/// Why a replay did not go on.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The log could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The bus is not the replay's alone.
    #[error(transparent)]
    Refused(#[from] ReplayRefused),
    /// The log has an object, where only events can go.
    #[error(
        "record {sequence} is an object of schema {schema:?}; only compact events can be replayed \
         here: name the types that are wanted, or replay into a bus of objects"
    )]
    Object {
        /// The object's sequence.
        sequence: u64,
        /// What it is.
        schema: String,
    },
    /// What was replayed into is closed.
    #[error("what was to be replayed into is closed")]
    Closed,
    /// A setting that cannot be kept, or an event of one topic too many.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// An object of a log, with its sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayedObject {
    /// Its sequence.
    pub sequence: u64,
    /// When it happened, in nanoseconds since the Unix epoch, UTC; 0 is unknown.
    pub timestamp: u64,
    /// Its topic.
    pub topic: Option<String>,
    /// What the bytes are.
    pub schema: String,
    /// The schema's version.
    pub version: u32,
    /// What it is made of.
    pub bytes: Vec<u8>,
}

impl ReplayedObject {
    fn of(sequence: u64, object: &Object<'_>) -> Self {
        Self {
            sequence,
            timestamp: object.timestamp,
            topic: object.topic.map(str::to_owned),
            schema: object.schema.to_owned(),
            version: object.version,
            bytes: object.bytes.to_vec(),
        }
    }

    fn borrowed(&self) -> Object<'_> {
        Object {
            timestamp: self.timestamp,
            topic: self.topic.as_deref(),
            schema: &self.schema,
            version: self.version,
            bytes: &self.bytes,
            is_replayed: false,
        }
    }
}

/// Records that are due.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReplayBatch<'a> {
    /// Events.
    Events(&'a [Event]),
    /// Objects.
    Objects(&'a [ReplayedObject]),
}

impl ReplayBatch<'_> {
    /// Returns how many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Events(events) => events.len(),
            Self::Objects(objects) => objects.len(),
        }
    }

    /// Returns false: there is at least one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where events are replayed into: an [`EventSystem`], or a bus of events.
pub trait Sink {
    /// Begins to be replayed into.
    #[doc(hidden)]
    fn begin(&self, is_mixed: bool) -> Result<(), ReplayRefused>;

    /// Publishes the first ones as far as everybody has room, and returns how many; 0 is none now.
    #[doc(hidden)]
    fn publish(&self, events: &[Event]) -> Result<usize, ReplayError>;

    /// Counts what was published.
    #[doc(hidden)]
    fn count(&self, events: u64, is_mixed: bool) -> Result<(), ReplayRefused>;

    /// Returns whether nothing can be published any more.
    #[doc(hidden)]
    fn is_over(&self) -> bool;

    /// Ends being replayed into.
    #[doc(hidden)]
    fn end(&self);
}

impl Sink for EventSystem {
    fn begin(&self, is_mixed: bool) -> Result<(), ReplayRefused> {
        self.begin_replay(is_mixed)
    }

    fn publish(&self, events: &[Event]) -> Result<usize, ReplayError> {
        let Some(first) = events.first() else { return Ok(0) };
        let lane = first.lane();
        let alike = events.iter().take_while(|event| event.lane() == lane).count();
        let room = self.room(lane).min(if lane == Lane::Critical { 1 } else { alike });
        let mut published = 0;
        while published < room {
            match self.publish_stretch(&events[published..room]) {
                Ok(0) => break,
                Ok(count) => published += count,
                // It is told when nothing was published.
                Err(_) if published > 0 => break,
                Err(SystemError::TooManyTopics { error, .. }) => return Err(error.into()),
                Err(_) => return Err(ReplayError::Closed),
            }
        }
        Ok(published)
    }

    fn count(&self, events: u64, is_mixed: bool) -> Result<(), ReplayRefused> {
        self.count_replayed(events, is_mixed)
    }

    fn is_over(&self) -> bool {
        self.is_closed()
    }

    fn end(&self) {
        self.end_replay();
    }
}

impl<B: EventBus<Event>> Sink for B {
    fn begin(&self, is_mixed: bool) -> Result<(), ReplayRefused> {
        self.bus().begin_replay(is_mixed)
    }

    fn publish(&self, events: &[Event]) -> Result<usize, ReplayError> {
        let bus: &Bus<Event> = self.bus();
        let room = bus.room().min(events.len());
        let mut topics: HashMap<(EventType, Symbol), Option<Topic>> = HashMap::new();
        for (published, event) in events[..room].iter().enumerate() {
            let topic = match topics.entry((event.event_type, event.symbol)) {
                std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::hash_map::Entry::Vacant(place) => {
                    let topic = event.topic().map(|name| bus.topic(&name)).transpose()?;
                    place.insert(topic)
                }
            };
            match bus.publish_as_configured(*event, topic.as_ref()) {
                Ok(_) => {}
                Err(PublishError::Closed(_)) if published == 0 => return Err(ReplayError::Closed),
                // Others have taken the room, or it was closed meanwhile.
                Err(_) => return Ok(published),
            }
        }
        Ok(room)
    }

    fn count(&self, events: u64, is_mixed: bool) -> Result<(), ReplayRefused> {
        self.bus().count_replayed(events, is_mixed)
    }

    fn is_over(&self) -> bool {
        self.bus().is_closed()
    }

    fn end(&self) {
        self.bus().end_replay();
    }
}

/// A log that is replayed.
///
/// What [`Replay::next_batch`] returns, or a sink is given, are the records up to the end that the log
/// has when the replay is made: what is appended meanwhile is not replayed.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use tickbus::{Event, EventStore, EventSystem, Replay, ReplayOptions, StoreConfig};
///
/// # let folder = std::env::temp_dir().join(format!("tickbus-replay-{}", std::process::id()));
/// let (store, _) = EventStore::open(&folder, StoreConfig::default())?;
/// store.append(&[Event::from_bytes([0; 32]); 3])?;
/// let system = EventSystem::new(Default::default())?;
/// let reader = system.subscribe(Default::default())?;
/// let mut replay = Replay::of(&Arc::new(store), ReplayOptions::default())?;
/// replay.into_sink(&system)?;
/// assert_eq!(replay.transport().progress().replayed, 3);
/// assert!(reader.recv()?.is_replayed());
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Replay {
    feed: Feed,
    transport: Transport,
    pace: Pace,
    is_mixed: bool,
    chunk: Chunk,
    /// Those of the chunk that were replayed.
    at: usize,
    /// Those behind them that are due.
    admitted: usize,
    clock: VirtualClock,
    /// The next record sets the clock, also back.
    is_fresh: bool,
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").field("transport", &self.transport).finish_non_exhaustive()
    }
}

impl EventStore {
    /// Returns a replay of what the log has now.
    ///
    /// # Errors
    ///
    /// As [`Replay::of`].
    pub fn replay(self: &Arc<Self>, options: ReplayOptions) -> Result<Replay, ReplayError> {
        Replay::of(self, options)
    }
}

impl Replay {
    /// Returns a replay of what a store has now.
    ///
    /// # Errors
    ///
    /// `Store` if it cannot be read, `Config` if the speed is none.
    pub fn of(store: &Arc<EventStore>, options: ReplayOptions) -> Result<Self, ReplayError> {
        Self::new(Origin::Store(store.clone()), options)
    }

    /// Returns a replay of what the log in a folder has now, which another process may be writing.
    ///
    /// # Errors
    ///
    /// As [`Replay::of`].
    pub fn open(path: impl AsRef<Path>, options: ReplayOptions) -> Result<Self, ReplayError> {
        Self::new(Origin::Folder(path.as_ref().to_owned()), options)
    }

    /// Returns a replay of events in memory, with sequences from 0 on.
    ///
    /// # Errors
    ///
    /// As [`Replay::of`].
    pub fn of_events(events: Vec<Event>, options: ReplayOptions) -> Result<Self, ReplayError> {
        Self::new(Origin::Memory(events.into()), options)
    }

    fn new(origin: Origin, options: ReplayOptions) -> Result<Self, ReplayError> {
        let ReplayOptions { query, speed, longest_gap, is_mixed, clock, transport } = options;
        let pace = Pace::new(speed, longest_gap)?;
        let feed = Feed::new(origin, query)?;
        transport.count(0, feed.sequences.start, |_| ());
        Ok(Self {
            feed,
            transport,
            pace,
            is_mixed,
            chunk: Chunk::default(),
            at: 0,
            admitted: 0,
            clock,
            is_fresh: true,
        })
    }

    /// Returns what pauses, steps, seeks and stops it, and tells how far it is.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Returns the sequences of all records that the log has.
    pub fn sequences(&self) -> Range<u64> {
        self.feed.sequences.clone()
    }

    /// Returns the clock.
    pub fn clock(&self) -> &VirtualClock {
        &self.clock
    }

    /// Waits until records are due and returns them; `None` at the end, or when it was stopped.
    ///
    /// # Errors
    ///
    /// As [`StoreReader::next_batch`].
    pub fn next_batch(&mut self) -> Result<Option<ReplayBatch<'_>>, StoreError> {
        let Some(count) = self.due(CHUNK)?.map(|due| due.len()) else { return Ok(None) };
        self.show(count);
        self.done(count);
        Ok(Some(self.chunk.part(self.at - count, count)))
    }

    /// Waits until records are due and returns them, at most `limit`; those that [`Replay::done`] was
    /// not told of are returned again.
    ///
    /// # Errors
    ///
    /// As [`StoreReader::next_batch`].
    pub fn due(&mut self, limit: usize) -> Result<Option<ReplayBatch<'_>>, StoreError> {
        if self.transport.is_stopped() {
            return Ok(None);
        }
        if self.admitted == 0 {
            match self.admit(limit)? {
                Some(count) => self.admitted = count,
                None => return Ok(None),
            }
        }
        Ok(Some(self.chunk.part(self.at, self.admitted)))
    }

    /// Has the clock show the first ones of what is due.
    pub fn show(&mut self, count: usize) {
        let latest = match self.chunk.part(self.at, count) {
            ReplayBatch::Events(events) => events.iter().map(|event| event.timestamp).max(),
            ReplayBatch::Objects(objects) => objects.iter().map(|object| object.timestamp).max(),
        };
        let latest = latest.unwrap_or_default();
        if std::mem::take(&mut self.is_fresh) {
            self.clock.set(latest);
        } else {
            self.clock.advance(latest);
        }
    }

    /// Says that the first ones of what is due were replayed.
    pub fn done(&mut self, count: usize) {
        let Some(last) = count.checked_sub(1) else { return };
        let next = self.chunk.sequence(self.at + last) + 1;
        let chunk = &self.chunk;
        self.transport.count(count as u64, next, |digest| match chunk.part(self.at, count) {
            ReplayBatch::Events(events) => digest.add_events(events),
            ReplayBatch::Objects(objects) => {
                objects.iter().for_each(|object| digest.add_object(&object.borrowed()));
            }
        });
        self.at += count;
        self.admitted -= count;
    }

    /// Returns the event that tells the end.
    pub fn end(&self) -> Event {
        let end = Event {
            timestamp: self.clock.time_ns(),
            event_type: EventType::ReplayEnded,
            priority: Priority::Normal,
            source_id: SourceId::NONE,
            symbol: Symbol::NONE,
            value: 0.0,
            metadata: self.transport.progress().replayed,
        };
        end.with_replayed(true)
    }

    /// Publishes everything when it is due, and then an event of the type
    /// [`EventType::ReplayEnded`], unless it was stopped. It waits wherever a subscription has no room.
    ///
    /// # Errors
    ///
    /// [`ReplayError`]: it does not go on; what was published stays so.
    pub fn into_sink(&mut self, sink: &impl Sink) -> Result<ReplayProgress, ReplayError> {
        sink.begin(self.is_mixed)?;
        self.go_on_into(sink)
    }

    /// As [`Replay::into_sink`], of a sink that has begun.
    #[doc(hidden)]
    pub fn go_on_into(&mut self, sink: &impl Sink) -> Result<ReplayProgress, ReplayError> {
        let published = self.publish_all(sink);
        sink.end();
        if published.is_err() {
            self.transport.stop();
        }
        published.map(|()| self.transport.progress())
    }

    fn publish_all(&mut self, sink: &impl Sink) -> Result<(), ReplayError> {
        let mut replayed = Vec::with_capacity(STRETCH);
        let mut nap = NAPS.start;
        while let Some(due) = self.due(STRETCH)? {
            let events = match due {
                ReplayBatch::Events(events) => events,
                ReplayBatch::Objects(objects) => {
                    let ReplayedObject { sequence, schema, .. } = &objects[0];
                    return Err(ReplayError::Object {
                        sequence: *sequence,
                        schema: schema.clone(),
                    });
                }
            };
            replayed.clear();
            replayed.extend(events.iter().map(|event| event.with_replayed(true)));
            self.show(replayed.len());
            let published = sink.publish(&replayed)?;
            if published > 0 {
                sink.count(published as u64, self.is_mixed)?;
                self.done(published);
                nap = NAPS.start;
            } else {
                self.wait_for_room(sink, &mut nap)?;
            }
        }
        while !self.transport.is_stopped() && sink.publish(&[self.end()])? == 0 {
            self.wait_for_room(sink, &mut nap)?;
        }
        // What is counted too late is only counted.
        _ = sink.count(1, true);
        Ok(())
    }

    /// Waits a while.
    fn wait_for_room(&self, sink: &impl Sink, nap: &mut Duration) -> Result<(), ReplayError> {
        if sink.is_over() {
            return Err(ReplayError::Closed);
        }
        self.transport.nap(*nap);
        *nap = (*nap * 2).min(NAPS.end);
        Ok(())
    }

    /// Waits until some of the chunk are due, and returns how many.
    fn admit(&mut self, limit: usize) -> Result<Option<usize>, StoreError> {
        loop {
            if self.at == self.chunk.len() {
                self.at = 0;
                self.feed.read(&mut self.chunk, &self.transport)?;
            }
            let times = (self.at..self.chunk.len()).take(limit).map(|at| self.chunk.time(at));
            match self.transport.order(&mut self.pace, times) {
                Order::Go(0) if self.transport.end() => return Ok(None),
                Order::Go(0) => {}
                Order::Go(count) => return Ok(Some(count)),
                Order::Seek(time) => {
                    self.feed.seek(time)?;
                    self.chunk.clear();
                    (self.at, self.is_fresh) = (0, true);
                }
                Order::Stop => return Ok(None),
            }
        }
    }
}

/// Whose log it is.
enum Origin {
    Store(Arc<EventStore>),
    Folder(PathBuf),
    Memory(Arc<[Event]>),
}

/// What is read of a log.
struct Feed {
    origin: Origin,
    query: Query,
    /// What is wanted of events in memory.
    filter: Filter,
    /// Those that the log has.
    sequences: Range<u64>,
    reading: Reading,
    /// Objects that were read behind the events of a chunk.
    held: Vec<ReplayedObject>,
    /// Whoever seeks back finds it all.
    _hold: Option<Hold>,
}

enum Reading {
    All(StoreReader),
    Some(StoreQuery),
    Memory { events: Arc<[Event]>, next: usize },
}

impl Feed {
    fn new(origin: Origin, query: Query) -> Result<Self, StoreError> {
        let sequences = match &origin {
            Origin::Store(store) => {
                let stats = store.stats();
                stats.oldest_sequence..stats.next_sequence
            }
            Origin::Folder(path) => {
                let (_, stats) = EventStore::look(path)?;
                stats.oldest_sequence.min(stats.durable_end)..stats.durable_end
            }
            Origin::Memory(events) => 0..events.len() as u64,
        };
        let hold = match &origin {
            Origin::Store(store) => Some(store.hold(sequences.start)),
            Origin::Folder(_) | Origin::Memory(_) => None,
        };
        let (reading, filter) = (Self::begin(&origin, &query)?, Filter::new(&query));
        Ok(Self { origin, query, filter, sequences, reading, held: Vec::new(), _hold: hold })
    }

    fn begin(origin: &Origin, query: &Query) -> Result<Reading, StoreError> {
        Ok(match (origin, *query == Query::default()) {
            (Origin::Store(store), true) => Reading::All(store.read(0)),
            (Origin::Folder(path), true) => Reading::All(EventStore::read_only(path, 0)?),
            (Origin::Store(store), false) => Reading::Some(store.query(query)?),
            (Origin::Folder(path), false) => Reading::Some(EventStore::query_only(path, query)?),
            (Origin::Memory(events), _) => Reading::Memory { events: events.clone(), next: 0 },
        })
    }

    /// Goes on at the first record that is not earlier than a time.
    fn seek(&mut self, time: u64) -> Result<(), StoreError> {
        let mut query = self.query.clone();
        query.times.start = query.times.start.max(time);
        self.reading = Self::begin(&self.origin, &query)?;
        self.filter = Filter::new(&query);
        self.held.clear();
        Ok(())
    }

    /// Reads the next records into a chunk, as many as it holds; none at the end.
    fn read(&mut self, chunk: &mut Chunk, transport: &Transport) -> Result<(), StoreError> {
        chunk.clear();
        if !self.held.is_empty() {
            chunk.records = Kind::Objects(std::mem::take(&mut self.held));
            return Ok(());
        }
        let end = self.sequences.end;
        while chunk.len() < CHUNK {
            let objects: Vec<ReplayedObject> = match &mut self.reading {
                Reading::All(reader) => {
                    if reader.sequence() >= end {
                        return Ok(());
                    }
                    let Some(batch) = reader.next_batch()? else { return Ok(()) };
                    let below = (end - batch.sequence) as usize;
                    match batch.records {
                        Records::Events(events) => {
                            let events = &events[..events.len().min(below)];
                            chunk.add(batch.sequence, events);
                            continue;
                        }
                        Records::Objects(objects) => (batch.sequence..end)
                            .zip(objects.iter())
                            .map(|(sequence, object)| ReplayedObject::of(sequence, &object))
                            .collect(),
                        Records::Gap(gap) => {
                            transport.miss(gap.missed);
                            continue;
                        }
                    }
                }
                Reading::Memory { events, next } => {
                    let Some(event) = events.get(*next) else { return Ok(()) };
                    if self.filter.wants(event) {
                        chunk.add(*next as u64, std::slice::from_ref(event));
                    }
                    *next += 1;
                    continue;
                }
                Reading::Some(query) => match query.next_found()? {
                    None => return Ok(()),
                    Some(Found::Events(sequences, events)) => {
                        let below = sequences.partition_point(|sequence| *sequence < end);
                        chunk.add_each(&sequences[..below], &events[..below]);
                        continue;
                    }
                    Some(Found::Objects(objects)) => objects
                        .iter()
                        .filter(|(sequence, _)| *sequence < end)
                        .map(|(sequence, object)| ReplayedObject::of(*sequence, object))
                        .collect(),
                },
            };
            if chunk.len() > 0 {
                self.held = objects;
                return Ok(());
            }
            chunk.records = Kind::Objects(objects);
            if chunk.len() > 0 {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Records that were read.
#[derive(Default)]
struct Chunk {
    records: Kind,
    sequences: Sequences,
}

enum Kind {
    Events(Vec<Event>),
    Objects(Vec<ReplayedObject>),
}

impl Default for Kind {
    fn default() -> Self {
        Self::Events(Vec::new())
    }
}

/// Those of the events of a chunk.
#[derive(Default)]
struct Sequences {
    /// The places from which on they follow one another, each with the sequence there.
    runs: Vec<(usize, u64)>,
}

impl Sequences {
    fn add(&mut self, place: usize, sequence: u64) {
        let follows =
            self.runs.last().is_some_and(|(from, first)| first + (place - from) as u64 == sequence);
        if !follows {
            self.runs.push((place, sequence));
        }
    }

    fn at(&self, place: usize) -> u64 {
        let run = self.runs.partition_point(|(from, _)| *from <= place);
        let (from, first) = self.runs[run - 1];
        first + (place - from) as u64
    }
}

impl Chunk {
    fn clear(&mut self) {
        match &mut self.records {
            Kind::Events(events) => events.clear(),
            Kind::Objects(_) => self.records = Kind::default(),
        }
        self.sequences.runs.clear();
    }

    fn len(&self) -> usize {
        match &self.records {
            Kind::Events(events) => events.len(),
            Kind::Objects(objects) => objects.len(),
        }
    }

    fn part(&self, from: usize, count: usize) -> ReplayBatch<'_> {
        match &self.records {
            Kind::Events(events) => ReplayBatch::Events(&events[from..from + count]),
            Kind::Objects(objects) => ReplayBatch::Objects(&objects[from..from + count]),
        }
    }

    fn time(&self, place: usize) -> u64 {
        match &self.records {
            Kind::Events(events) => events[place].timestamp,
            Kind::Objects(objects) => objects[place].timestamp,
        }
    }

    fn sequence(&self, place: usize) -> u64 {
        match &self.records {
            Kind::Events(_) => self.sequences.at(place),
            Kind::Objects(objects) => objects[place].sequence,
        }
    }

    /// Adds events that follow one another.
    fn add(&mut self, first: u64, added: &[Event]) {
        if let Kind::Events(events) = &mut self.records
            && !added.is_empty()
        {
            self.sequences.add(events.len(), first);
            events.extend_from_slice(added);
        }
    }

    /// Adds events with their sequences.
    fn add_each(&mut self, sequences: &[u64], added: &[Event]) {
        if let Kind::Events(events) = &mut self.records {
            for (place, sequence) in (events.len()..).zip(sequences) {
                self.sequences.add(place, *sequence);
            }
            events.extend_from_slice(added);
        }
    }
}
