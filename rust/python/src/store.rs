//! `EventStore`: the log on a disk, and its readers.
//!
//! Whatever waits for the disk is done detached. A few events are not: they go into memory, and who
//! lets go of the global interpreter lock may not get it back for long. Objects become bytes in
//! `tickbus.records`, which is imported with the first of them.

use crate::attachment::{Appended, Delivered, append_delivered};
use crate::awaitable::{Job, Progress, awaitable};
use crate::batch::{self, EventBatch};
use crate::bus::Waking;
use crate::error;
use crate::event::PyEvent;
use crate::gil::GilCell;
use crate::line::Streak;
use crate::loop_bridge::{FromAnyThread, LoopBridge, on_a_loop, running_loop};
use crate::process::{Own, Process, no_pickle};
use crate::query::{StoreQuery, TakenObject, query};
use crate::subscription::{SIGNAL_SLICE, warn_unclosed};
use parking_lot::Mutex;
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyInt, PyList, PyRange, PyString, PyTuple};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tickbus::{
    AppendError, Batch, Durability, Event, EventStore as Core, Gap, NewRecords, Object, Records,
    Recovery, Replay as CoreReplay, ReplayOptions, Retention, Salvage, SegmentReport, StoreConfig,
    StoreError, StoreReader as CoreReader, Ticket as CoreTicket,
};

/// Stores that are alive, to be closed at exit.
static STORES: GilCell<Vec<Weak<Core>>> = GilCell::new(Vec::new());

/// Closes every store, so that nothing of what they hold in memory is lost when the interpreter
/// ends.
pub(crate) fn close_all(py: Python<'_>) {
    for store in STORES.with(std::mem::take).iter().filter_map(Weak::upgrade) {
        // Nobody is left to be told.
        _ = py.detach(|| store.close());
    }
}

/// Leaves every store to the parent, in a child by `fork`.
pub(crate) fn forget_all() {
    for store in STORES.with(std::mem::take) {
        if let Some(store) = store.upgrade() {
            store.leave_to_parent();
            std::mem::forget(store);
        }
        std::mem::forget(store);
    }
}

/// Numbers of a log, as Python gets them.
type StatsRow = (u64, u64, u64, usize, u64, Option<u64>, (u64, u64, u64, u64, f64, bool));

/// Fewer records than these are appended attached.
const FEW: usize = 256;

/// An event log in a folder. `tickbus.EventStore` is its public face.
#[pyclass(frozen, subclass, weakref, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct EventStore {
    access: Access,
    path: PathBuf,
    recovery: Recovery,
    ready_in_a_row: Streak,
}

#[derive(Debug)]
enum Access {
    Write {
        core: Own<Arc<Core>>,
        /// Each append waits for the disk.
        is_slow: bool,
    },
    Read {
        process: Process,
        is_closed: crate::gil::GilFlag,
    },
}

#[pymethods]
impl EventStore {
    #[new]
    #[pyo3(signature = (path, durability, interval, segment_bytes, max_bytes, read_only))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        durability: &str,
        interval: Option<&Bound<'_, PyAny>>,
        segment_bytes: &Bound<'_, PyAny>,
        max_bytes: Option<&Bound<'_, PyAny>>,
        read_only: bool,
    ) -> PyResult<Self> {
        let durability = match (durability, interval) {
            ("none", _) => Durability::None,
            ("interval", Some(seconds)) => {
                Durability::Interval(error::duration("interval", seconds)?)
            }
            ("always", _) => Durability::Always,
            ("double", _) => Durability::Double,
            _ => Durability::Group,
        };
        let ready_in_a_row = Streak::default();
        if read_only {
            let looked = py.detach(|| Core::look(&path));
            let (recovery, _) = looked.map_err(|error| error::store(py, &error))?;
            let (process, is_closed) = (Process::current(), Default::default());
            let access = Access::Read { process, is_closed };
            return Ok(Self { access, path, recovery, ready_in_a_row });
        }
        let mut config = StoreConfig::default();
        config.durability = durability;
        config.segment_bytes = error::unsigned("segment_bytes", segment_bytes)?;
        config.max_bytes =
            max_bytes.map(|bytes| error::unsigned("max_bytes", bytes)).transpose()?;
        let opened = py.detach(|| Core::open(&path, config));
        let (core, recovery) = opened.map_err(|error| error::store(py, &error))?;
        let core = Arc::new(core);
        STORES.with(|stores| {
            stores.retain(|store| store.strong_count() > 0);
            stores.push(Arc::downgrade(&core));
        });
        let is_slow = matches!(durability, Durability::Always | Durability::Double);
        let access = Access::Write { core: Own::new(core), is_slow };
        Ok(Self { access, path, recovery, ready_in_a_row })
    }

    /// The folder.
    #[getter(_path)]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// (oldest_sequence, next_sequence, segments, scanned_bytes, cut_bytes, cut_records)
    #[getter]
    fn _recovery(&self) -> (u64, u64, usize, u64, u64, u64) {
        let Recovery { oldest_sequence, next_sequence, segments, .. } = self.recovery;
        let Recovery { scanned_bytes, cut_bytes, cut_records, .. } = self.recovery;
        (oldest_sequence, next_sequence, segments, scanned_bytes, cut_bytes, cut_records)
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self) -> bool {
        match &self.access {
            // A forked child has none that is open.
            Access::Write { core, .. } => !core.process().is_current() || core.is_closed(),
            Access::Read { is_closed, .. } => is_closed.is_set(),
        }
    }

    /// Whether it was opened with `read_only=True`.
    #[getter]
    fn read_only(&self) -> bool {
        matches!(self.access, Access::Read { .. })
    }

    /// The last sequence up to which all records are durable; `None` if none is.
    ///
    /// Opened with `read_only=True`, it is what the log says: the writer notes the newest commit a
    /// moment later.
    ///
    /// Raises:
    ///     Corrupt, StoreIO: As `open`, of a log that another process writes.
    #[getter]
    fn durable_sequence(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        Ok(self._stats(py)?.2.checked_sub(1))
    }

    /// Appends an event or an object, and returns its sequence.
    ///
    /// When it is durable depends on the durability. It may be written to a file, but waits for the
    /// disk with `always` and `double` only.
    ///
    /// Args:
    ///     event: A compact `Event`, a typed event, or anything else that msgspec encodes but `None`.
    ///     topic: The topic of a typed event or an object, on which it is replayed; that of a compact
    ///         event is its own. A `TypedEventBus` publishes a `Fill` on `fill.BTCUSDT`: without a
    ///         topic its subscribers do not get it when it is replayed.
    ///
    /// Raises:
    ///     TypeError: msgspec cannot encode it, or a topic was given for a compact event; nothing
    ///         was stored.
    ///     ConfigError: The topic is not one; nothing was stored.
    ///     StoreError: It has more than 1,048,552 bytes; nothing of it was stored.
    ///     StoreFull: There is no room; free some and try again.
    ///     Poisoned, StoreIO: A write failed; open the log again.
    ///     ReadOnly: It was opened to read only.
    ///     Closed: It is closed.
    #[pyo3(signature = (event, topic = None))]
    fn append(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        topic: Option<&Bound<'_, PyString>>,
    ) -> PyResult<u64> {
        let core = self.writer()?;
        let appended = match Item::of(event, topic)? {
            Item::Event(event) => self.run(py, 1, || core.append(&[event])),
            Item::Object(object) => {
                // Encoding has run Python code.
                let (core, object) = (self.writer()?, object.borrowed()?);
                self.run(py, 1, || core.append_object(&object))
            }
        };
        appended.map_err(|error| error::store(py, &error))
    }

    /// Appends events and objects in order, with nothing of others between them, and returns the
    /// range of their sequences.
    ///
    /// Args:
    ///     events: An `EventBatch`, an array of shape (n,) whose dtype is `EVENT_DTYPE`, or what
    ///         `append` takes, from anything that can be iterated over.
    ///     topic: As for `append`.
    ///
    /// Raises:
    ///     TypeError, ConfigError: As `append`; nothing was stored.
    ///     StoreFull, Poisoned, StoreIO: As `append`; the first `.accepted` of them were stored, so
    ///         go on with the rest.
    ///     ReadOnly, Closed: As `append`.
    #[pyo3(signature = (events, topic = None))]
    fn append_many<'py>(
        &self,
        py: Python<'py>,
        events: &Bound<'py, PyAny>,
        topic: Option<&Bound<'py, PyString>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.writer()?;
        let records = NewBatch::of(events, topic)?;
        let sequences =
            self.append_batch(py, &records, |core, records| core.append_many(records))?;
        py.get_type::<PyRange>().call1((sequences.start, sequences.end))
    }

    /// Appends an event, or events, and returns a ticket that waits until all of them are durable.
    ///
    /// Args:
    ///     event_or_events: An `EventBatch`, an array whose dtype is `EVENT_DTYPE`, a list or a tuple
    ///         is many, as for `append_many`; everything else is one, as for `append`.
    ///     topic: As for `append`.
    ///
    /// Raises:
    ///     ConfigError: There are no events; otherwise as `append`.
    ///     TypeError, StoreFull, Poisoned, StoreIO, ReadOnly, Closed: As `append_many`.
    #[pyo3(signature = (event_or_events, topic = None))]
    fn append_durable(
        slf: &Bound<'_, Self>,
        event_or_events: &Bound<'_, PyAny>,
        topic: Option<&Bound<'_, PyString>>,
    ) -> PyResult<StoreTicket> {
        let (py, this) = (slf.py(), slf.get());
        this.writer()?;
        let is_many = event_or_events.is_exact_instance_of::<PyList>()
            || event_or_events.is_exact_instance_of::<PyTuple>()
            || event_or_events.is_exact_instance_of::<EventBatch>()
            || is_array(event_or_events)?;
        let records = match is_many {
            true => NewBatch::of(event_or_events, topic)?,
            false => NewBatch::Items(vec![Item::of(event_or_events, topic)?]),
        };
        if records.len() == 0 {
            return Err(error::ConfigError::new_err(
                "there were no events; give at least one, or call sync() to wait for earlier ones",
            ));
        }
        let append = |core: &Core, records: &[NewRecords<'_>]| core.append_many_durable(records);
        let ticket = this.append_batch(py, &records, append)?;
        Ok(StoreTicket { ticket: Own::new(ticket), store: slf.clone().unbind() })
    }

    /// Notes that events were lost here, which is a record by itself, and returns its sequence.
    ///
    /// Args:
    ///     missed: How many, at least 1.
    ///     exact: Whether it is known exactly; otherwise there were at most so many.
    ///
    /// Raises:
    ///     ConfigError: `missed` is less than 1, or far too large.
    ///     StoreFull, Poisoned, StoreIO, ReadOnly, Closed: As `append`.
    #[pyo3(signature = (missed, exact = true))]
    fn append_gap(&self, py: Python<'_>, missed: &Bound<'_, PyAny>, exact: bool) -> PyResult<u64> {
        let core = self.writer()?;
        let missed = error::whole("missed", missed, 1..=u64::MAX)?;
        let appended = py.detach(|| core.append_gap(missed, exact));
        appended.map_err(|error| error::store(py, &error))
    }

    /// Waits until everything that was appended is durable.
    ///
    /// Raises:
    ///     Poisoned, StoreIO: A write or a sync failed, now or earlier; open the log again, which
    ///         recovers all that was acknowledged.
    ///     ReadOnly, Closed: As `append`.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        let core = self.writer()?;
        py.detach(|| core.sync()).map_err(|error| error::store(py, &error))
    }

    /// Makes everything durable and finishes the current segment, so that it can be copied.
    ///
    /// Raises:
    ///     Poisoned, StoreIO, ReadOnly, Closed: As `sync`.
    fn seal(&self, py: Python<'_>) -> PyResult<()> {
        let core = self.writer()?;
        py.detach(|| core.seal()).map_err(|error| error::store(py, &error))
    }

    /// Writes what waits in memory into files, as long as it is open for that.
    fn _flush(&self, py: Python<'_>) -> PyResult<()> {
        match &self.access {
            Access::Write { core, .. } if !self.closed() => {
                py.detach(|| core.flush()).map_err(|error| error::store(py, &error))
            }
            _ => Ok(()),
        }
    }

    /// Retires the oldest segments, and returns (segments, records, bytes) of them.
    fn _retain(
        &self,
        py: Python<'_>,
        size: Option<&Bound<'_, PyAny>>,
        count: Option<&Bound<'_, PyAny>>,
        age: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(usize, u64, u64)> {
        let core = self.writer()?;
        let retention = Retention {
            bytes: size.map(|size| error::unsigned("size", size)).transpose()?,
            records: count.map(|count| error::unsigned("count", count)).transpose()?,
            age: age.map(|age| error::duration("age", age)).transpose()?,
        };
        let retired = py.detach(|| core.retain(&retention));
        let retired = retired.map_err(|error| error::store(py, &error))?;
        Ok((retired.segments, retired.records, retired.bytes))
    }

    /// Compresses finished segments, and returns (segments, bytes_before, bytes_after).
    fn _compress(
        &self,
        py: Python<'_>,
        older_than: &Bound<'_, PyAny>,
    ) -> PyResult<(usize, u64, u64)> {
        let core = self.writer()?;
        let older_than = error::duration("older_than", older_than)?;
        let compressed = py.detach(|| core.compress(older_than));
        let compressed = compressed.map_err(|error| error::store(py, &error))?;
        Ok((compressed.segments, compressed.bytes_before, compressed.bytes_after))
    }

    /// Appends what a bus has delivered, in order. Returns how many events were stored, for how many
    /// that no log can hold gaps stand, why the first one does, and why there are no more.
    fn _append_delivered<'py>(
        &self,
        py: Python<'py>,
        delivered: Vec<Delivered<'py>>,
    ) -> PyResult<Appended> {
        append_delivered(py, self, &delivered)
    }

    /// Counts a source from which the log has detached itself, and what it therefore misses.
    fn _count_detached(&self, missed: u64) -> PyResult<()> {
        self.writer()?.count_detached(missed);
        Ok(())
    }

    /// (oldest_sequence, next_sequence, durable_end, segments, bytes, held_from, (detached, missed,
    /// refused, syncs, sync_seconds, poisoned))
    fn _stats(&self, py: Python<'_>) -> PyResult<StatsRow> {
        self.process().check()?;
        let stats = py.detach(|| match &self.access {
            Access::Write { core, .. } => Ok(core.stats()),
            Access::Read { .. } => Core::look(&self.path).map(|(_, stats)| stats),
        });
        let stats = stats.map_err(|error| error::store(py, &error))?;
        let (oldest, next) = (stats.oldest_sequence, stats.next_sequence);
        let (segments, bytes) = (stats.segments, stats.bytes);
        let (detached, missed, refused) = (stats.detached, stats.missed, stats.refused);
        let sync_seconds = stats.sync_time.as_secs_f64();
        let since = (detached, missed, refused, stats.syncs, sync_seconds, stats.is_poisoned);
        Ok((oldest, next, stats.durable_end, segments, bytes, stats.held_from, since))
    }

    /// Returns what finds the records of some times, types and symbols.
    fn _query(
        &self,
        py: Python<'_>,
        start: Option<&Bound<'_, PyAny>>,
        stop: Option<&Bound<'_, PyAny>>,
        types: Option<&Bound<'_, PyAny>>,
        symbols: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<StoreQuery> {
        self.process().check()?;
        if self.closed() {
            return Err(closed());
        }
        let query = query(start, stop, types, symbols)?;
        let found = py.detach(|| match &self.access {
            Access::Write { core, .. } => core.query(&query),
            Access::Read { .. } => Core::query_only(&self.path, &query),
        });
        Ok(StoreQuery::new(found.map_err(|error| error::store(py, &error))?))
    }

    /// Returns what reads from a sequence on.
    fn _reader(&self, py: Python<'_>, from_sequence: &Bound<'_, PyAny>) -> PyResult<StoreReader> {
        self.process().check()?;
        let from_sequence = error::unsigned("from_sequence", from_sequence)?;
        if self.closed() {
            return Err(closed());
        }
        let reader = match &self.access {
            Access::Write { core, .. } => py.detach(|| Ok(core.read(from_sequence))),
            Access::Read { .. } => py.detach(|| Core::read_only(&self.path, from_sequence)),
        };
        let reader = reader.map_err(|error| error::store(py, &error))?;
        Ok(StoreReader { core: Own::new(Mutex::new(Ahead { reader, held: None })) })
    }

    /// Makes everything durable and ends the log. Again does nothing.
    ///
    /// Raises:
    ///     Poisoned, StoreIO: As `sync`; it is closed all the same.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.process().check()?;
        match &self.access {
            Access::Write { core, .. } => {
                py.detach(|| core.close()).map_err(|error| error::store(py, &error))
            }
            Access::Read { is_closed, .. } => {
                is_closed.set();
                Ok(())
            }
        }
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (exc_type, exc_value, traceback);
        match self.process().is_current() {
            true => self.close(py),
            // A forked child leaves the log to its parent.
            false => Ok(()),
        }
    }

    fn __repr__(&self) -> String {
        let path = self.path.display();
        if !self.process().is_current() {
            return format!("<EventStore {path} of another process>");
        }
        let read_only = if self.read_only() { " read_only" } else { "" };
        let closed = if self.closed() { " closed" } else { "" };
        format!("<EventStore {path}{read_only}{closed}>")
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("EventStore", "open it with read_only=True in each of the others"))
    }
}

impl EventStore {
    /// Returns a replay of what it has now.
    pub(crate) fn replay(&self, py: Python<'_>, options: ReplayOptions) -> PyResult<CoreReplay> {
        self.process().check()?;
        if self.closed() {
            return Err(closed());
        }
        let replay = py.detach(|| match &self.access {
            Access::Write { core, .. } => CoreReplay::of(core, options),
            Access::Read { .. } => CoreReplay::open(&self.path, options),
        });
        replay.map_err(|error| error::replay(py, &error))
    }

    pub(crate) fn process(&self) -> Process {
        match &self.access {
            Access::Write { core, .. } => core.process(),
            Access::Read { process, .. } => *process,
        }
    }

    /// Returns the log, to be written.
    pub(crate) fn writer(&self) -> PyResult<&Arc<Core>> {
        self.process().check()?;
        match &self.access {
            Access::Write { core, .. } => Ok(core),
            Access::Read { .. } => Err(error::ReadOnly::new_err(format!(
                "{} was opened with read_only=True; open it without, in the one process that \
                 writes it",
                self.path.display()
            ))),
        }
    }

    /// Runs what appends so many records.
    #[inline]
    pub(crate) fn run<O: Send>(
        &self,
        py: Python<'_>,
        records: usize,
        append: impl FnOnce() -> O + Send,
    ) -> O {
        match self.access {
            Access::Write { is_slow: false, .. } if records < FEW => append(),
            _ => py.detach(append),
        }
    }

    fn append_batch<O: Send>(
        &self,
        py: Python<'_>,
        batch: &NewBatch<'_>,
        append: impl FnOnce(&Core, &[NewRecords<'_>]) -> Result<O, AppendError> + Send,
    ) -> PyResult<O> {
        let records = match batch {
            NewBatch::Batch(batch) => vec![NewRecords::Events(batch.get().events())],
            NewBatch::Events(events) => vec![NewRecords::Events(events)],
            NewBatch::Items(items) => items.iter().map(Item::record).collect::<PyResult<_>>()?,
        };
        // Collecting them has run Python code.
        let core = self.writer()?;
        let appended = self.run(py, batch.len(), || append(core, &records));
        appended.map_err(|AppendError { accepted, error }| error::not_all(py, &error, accepted))
    }
}

impl Drop for EventStore {
    fn drop(&mut self) {
        if self.process().is_current() && !self.closed() && !self.read_only() {
            warn_unclosed(&self.__repr__());
            if let Access::Write { core, .. } = &self.access {
                // Nobody is left to be told of an error.
                _ = Python::attach(|py| py.detach(|| core.close()));
            }
        }
    }
}

#[cold]
fn closed() -> PyErr {
    error::Closed::new_err(StoreError::Closed.to_string())
}

#[cold]
fn two_topics(event: &Bound<'_, PyAny>) -> PyErr {
    let event = event.repr().map_or_else(|_| "an event".to_owned(), |event| event.to_string());
    PyTypeError::new_err(format!(
        "a topic was given for {event}; the topic of a compact event is that of its type and symbol"
    ))
}

fn is_array(events: &Bound<'_, PyAny>) -> PyResult<bool> {
    // SAFETY: attached, and an object.
    let has_buffer = unsafe { ffi::PyObject_CheckBuffer(events.as_ptr()) } != 0;
    Ok(has_buffer && events.hasattr(intern!(events.py(), "dtype"))?)
}

/// An object as it is stored.
pub(crate) struct Encoded<'py> {
    timestamp: u64,
    topic: Option<Bound<'py, PyString>>,
    schema: Bound<'py, PyString>,
    version: u32,
    bytes: Bound<'py, PyBytes>,
}

impl Encoded<'_> {
    pub(crate) fn borrowed(&self) -> PyResult<Object<'_>> {
        Ok(Object {
            timestamp: self.timestamp,
            topic: self.topic.as_ref().map(|topic| topic.to_str()).transpose()?,
            schema: self.schema.to_str()?,
            version: self.version,
            bytes: self.bytes.as_bytes(),
            is_replayed: false,
        })
    }
}

/// What becomes one record.
pub(crate) enum Item<'py> {
    Event(Event),
    Object(Encoded<'py>),
}

impl<'py> Item<'py> {
    pub(crate) fn of(
        item: &Bound<'py, PyAny>,
        topic: Option<&Bound<'py, PyString>>,
    ) -> PyResult<Self> {
        if let Ok(event) = item.cast_exact::<PyEvent>() {
            return match topic {
                None => Ok(Self::Event(event.get().0)),
                Some(_) => Err(two_topics(item)),
            };
        }
        let encoded = encoder(item.py())?.call1((item,))?;
        let (timestamp, schema, version, bytes) = encoded.extract()?;
        Ok(Self::Object(Encoded { timestamp, topic: topic.cloned(), schema, version, bytes }))
    }

    /// Returns it as the log takes it.
    pub(crate) fn record(&self) -> PyResult<NewRecords<'_>> {
        match self {
            Self::Event(event) => Ok(NewRecords::Events(std::slice::from_ref(event))),
            Self::Object(object) => object.borrowed().map(NewRecords::Object),
        }
    }
}

/// Returns `tickbus.records.encode`, imported on first use.
fn encoder(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static ENCODER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Some(encoder) = ENCODER.get(py) {
        return Ok(encoder.bind(py));
    }
    // Imported before the cell is touched, so that a `fork` meanwhile does not leave it half made.
    let encoder = py.import("tickbus.records")?.getattr("encode")?.unbind();
    Ok(ENCODER.get_or_init(py, || encoder).bind(py))
}

/// What becomes records that follow one another.
enum NewBatch<'py> {
    Batch(Bound<'py, EventBatch>),
    /// Copies: an array may change while it is written.
    Events(Vec<Event>),
    Items(Vec<Item<'py>>),
}

impl<'py> NewBatch<'py> {
    fn of(events: &Bound<'py, PyAny>, topic: Option<&Bound<'py, PyString>>) -> PyResult<Self> {
        let refused = |len: usize| match topic {
            Some(_) if len > 0 => Err(two_topics(events)),
            _ => Ok(()),
        };
        if let Ok(batch) = events.cast_exact::<EventBatch>() {
            refused(batch.get().events().len())?;
            return Ok(Self::Batch(batch.clone()));
        }
        if is_array(events)? {
            let events = batch::collect(events)?;
            refused(events.len())?;
            return Ok(Self::Events(events));
        }
        let items = events.try_iter()?.map(|item| Item::of(&item?, topic));
        let items = items.collect::<PyResult<Vec<_>>>()?;
        // Compact events alone are written as one slice.
        let only_events: Option<Vec<Event>> = items
            .iter()
            .map(|item| match item {
                Item::Event(event) => Some(*event),
                Item::Object(_) => None,
            })
            .collect();
        Ok(only_events.map_or(Self::Items(items), Self::Events))
    }

    fn len(&self) -> usize {
        match self {
            Self::Batch(batch) => batch.get().events().len(),
            Self::Events(events) => events.len(),
            Self::Items(items) => items.len(),
        }
    }
}

/// Says when appended records are durable: `wait()` in a thread, `await` in a task. Both may be done
/// more than once; giving up takes nothing back.
#[pyclass(frozen, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct StoreTicket {
    ticket: Own<CoreTicket>,
    /// Kept open.
    store: Py<EventStore>,
}

#[pymethods]
impl StoreTicket {
    /// The sequence of the last record.
    #[getter]
    fn sequence(&self) -> PyResult<u64> {
        self.ticket.process().check()?;
        Ok(self.ticket.sequence())
    }

    /// Whether the records are durable by now.
    #[getter]
    fn durable(&self) -> PyResult<bool> {
        self.ticket.process().check()?;
        Ok(self.ticket.is_durable())
    }

    /// Waits until the records are durable, and returns the sequence of the last one.
    ///
    /// Args:
    ///     timeout: The longest wait in seconds; `None` waits for as long as the disk takes.
    ///
    /// Raises:
    ///     SyncTimeout: They are not durable yet; wait again.
    ///     Poisoned, StoreIO: A write or a sync failed, so that nobody knows whether they are;
    ///         open the log again, which recovers all that was acknowledged.
    ///     RuntimeError: The thread runs an event loop.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        self.ticket.process().check()?;
        if on_a_loop(py)? {
            return Err(error::on_a_loop("wait()", "await"));
        }
        let told = |error: StoreError| error::store(py, &error);
        let Some(timeout) = timeout else {
            return py.detach(|| self.ticket.wait()).map_err(told);
        };
        let deadline = Instant::now() + error::duration("timeout", timeout)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let slice = left.min(SIGNAL_SLICE);
            if let Some(last) = py.detach(|| self.ticket.wait_timeout(slice)).map_err(told)? {
                return Ok(last);
            }
            if left == Duration::ZERO {
                return Err(error::SyncTimeout::new_err(format!(
                    "the records up to {} were not durable within {timeout} s; they are stored: \
                     wait again",
                    self.ticket.sequence()
                )));
            }
            py.check_signals().and_then(|()| self.ticket.process().check())?;
        }
    }

    fn __await__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.ticket.process().check()?;
        let ticket = (*self.ticket).clone();
        StoreTask::awaitable(py, &self.store, async move {
            let waited = ticket.wait_async().await;
            answer(move |py| match waited {
                Ok(last) => Ok(last.into_pyobject(py)?.into_any().unbind()),
                Err(error) => Err(error::store(py, &error)),
            })
        })
    }

    fn __repr__(&self) -> String {
        if !self.ticket.process().is_current() {
            return "<StoreTicket of another process>".to_owned();
        }
        let durable = if self.ticket.is_durable() { " durable" } else { "" };
        format!("<StoreTicket sequence={}{durable}>", self.ticket.sequence())
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("StoreTicket", "wait for it there, and send the sequence"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.store)
    }
}

/// What becomes of something that was waited for; called attached.
pub(crate) type Answer = Box<dyn for<'py> FnOnce(Python<'py>) -> PyResult<Py<PyAny>> + Send>;

pub(crate) fn answer(
    answer: impl for<'py> FnOnce(Python<'py>) -> PyResult<Py<PyAny>> + Send + 'static,
) -> Answer {
    Box::new(answer)
}

type Waiting = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A task that waits for something of a store.
pub(crate) struct StoreTask {
    waiting: Own<Waiting>,
    /// Kept open.
    store: Py<EventStore>,
}

impl StoreTask {
    /// Returns an awaitable of what a future gives.
    pub(crate) fn awaitable(
        py: Python<'_>,
        store: &Py<EventStore>,
        waiting: impl Future<Output = Answer> + Send + 'static,
    ) -> PyResult<Py<PyAny>> {
        let waiting: Waiting = Box::pin(waiting);
        let task = Self { waiting: Own::new(waiting), store: store.clone_ref(py) };
        awaitable(py, Job::Store(Box::new(task)))
    }

    pub(crate) fn poll(&mut self, py: Python<'_>) -> PyResult<Progress> {
        self.waiting.process().check()?;
        let ready_in_a_row = &self.store.get().ready_in_a_row;
        if ready_in_a_row.is_over() {
            return Ok(Progress::Yield);
        }
        let bridge = LoopBridge::of(&running_loop(py)?)?;
        bridge.get().runs_here();
        let wakeup = bridge.get().wakeup(py)?;
        let waker = FromAnyThread::new(Waking::new(wakeup.clone_ref(py), bridge.clone_ref(py)));
        waker.bind(bridge.get());
        let waker = Waker::from(waker);
        match self.waiting.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => answer(py).map(Progress::Done),
            Poll::Pending => {
                ready_in_a_row.interrupt();
                Ok(Progress::Wait(wakeup))
            }
        }
    }

    /// Returns what the garbage collector must see.
    pub(crate) fn reference(&self) -> *mut ffi::PyObject {
        self.store.as_ptr()
    }
}

/// Reads a log in order.
#[pyclass(frozen, module = "tickbus._core", name = "_StoreReader")]
#[derive(Debug)]
pub(crate) struct StoreReader {
    core: Own<Mutex<Ahead>>,
}

/// Events that are returned together, if they follow one another: a frame has a few, and each answer
/// takes a microsecond of Python. So many stay in a core's cache until they are looked at.
const TOGETHER: usize = 4_096;

/// A reader, and what it came upon behind the events that were returned last.
#[derive(Debug)]
struct Ahead {
    reader: CoreReader,
    held: Option<Result<(u64, Taken), StoreError>>,
}

impl Ahead {
    fn next(&mut self) -> Result<Option<(u64, Taken)>, StoreError> {
        if let Some(held) = self.held.take() {
            return held.map(Some);
        }
        let mut first = self.reader.next_batch()?.map(Taken::of);
        if let Some((_, Taken::Events(events))) = &mut first {
            while events.len() < TOGETHER && self.held.is_none() {
                match self.reader.next_batch() {
                    Ok(Some(Batch { records: Records::Events(more), .. })) => {
                        // All that may still come is moved only once.
                        events.reserve(TOGETHER - events.len() + more.len());
                        events.extend(more);
                    }
                    Ok(Some(other)) => self.held = Some(Ok(Taken::of(other))),
                    Ok(None) => break,
                    // What is before it is sound.
                    Err(error) => self.held = Some(Err(error)),
                }
            }
            // Whoever keeps a batch keeps little more than its events.
            events.shrink_to(2 * events.len());
        }
        Ok(first)
    }
}

/// Records of one kind, taken out of the reader.
#[derive(Debug)]
pub(crate) enum Taken {
    Events(Vec<Event>),
    Objects(Vec<TakenObject>),
    Gap(Gap),
}

#[pymethods]
impl StoreReader {
    /// Returns the next records with the sequence of the first: an `EventBatch`, a list of (sequence,
    /// timestamp, topic, schema, version, bytes, replayed), or a pair (missed, exact). `None` if there
    /// are none now.
    fn next_batch<'py>(&self, py: Python<'py>) -> PyResult<Option<(u64, Bound<'py, PyAny>)>> {
        self.core.process().check()?;
        let taken = py.detach(|| self.core.lock().next());
        given(py, taken)
    }
}

impl Taken {
    /// Takes records out of their reader, with the sequence of the first.
    pub(crate) fn of(batch: Batch<'_>) -> (u64, Self) {
        let taken = match batch.records {
            Records::Events(events) => Self::Events(events.to_vec()),
            Records::Objects(objects) => {
                Self::Objects(objects.iter().map(TakenObject::of).collect())
            }
            Records::Gap(gap) => Self::Gap(gap),
            _ => unreachable!("there are no others"),
        };
        (batch.sequence, taken)
    }
}

/// Returns records as Python gets them.
pub(crate) fn given(
    py: Python<'_>,
    taken: Result<Option<(u64, Taken)>, StoreError>,
) -> PyResult<Option<(u64, Bound<'_, PyAny>)>> {
    let Some((sequence, taken)) = taken.map_err(|error| error::store(py, &error))? else {
        return Ok(None);
    };
    let records = match taken {
        Taken::Events(events) => Bound::new(py, EventBatch::of(events))?.into_any(),
        Taken::Objects(objects) => {
            let rows = (sequence..).zip(objects).map(|(sequence, object)| object.row(py, sequence));
            PyList::new(py, rows.collect::<Vec<_>>())?.into_any()
        }
        Taken::Gap(Gap { missed, is_exact }) => (missed, is_exact).into_pyobject(py)?.into_any(),
    };
    Ok(Some((sequence, records)))
}

/// What is in each file of a log, as rows of (name, log, number, base, next_sequence, durable, created,
/// bytes, whole_bytes, sealed, frames, events, objects, gaps, index_bytes).
#[pyfunction]
pub(crate) fn _inspect_store<'py>(py: Python<'py>, path: PathBuf) -> PyResult<Bound<'py, PyList>> {
    let reports = py.detach(|| Core::inspect(path)).map_err(|error| error::store(py, &error))?;
    let rows = reports.into_iter().map(|report| {
        let SegmentReport { name, number, base, next_sequence, durable, created, .. } = report;
        let SegmentReport { bytes, whole_bytes, is_sealed, frames, .. } = report;
        let SegmentReport { events, objects, gaps, index_bytes, .. } = report;
        let log = format!("{:032x}", report.log);
        let head: [Bound<'py, PyAny>; 2] =
            [PyString::new(py, &name).into_any(), PyString::new(py, &log).into_any()];
        let numbers = [number, base, next_sequence, durable, created, bytes, whole_bytes];
        let sealed = PyBool::new(py, is_sealed).to_owned().into_any();
        let counts = [frames, events, objects, gaps, index_bytes];
        let int = |number: u64| PyInt::new(py, number).into_any();
        let row = head.into_iter().chain(numbers.map(int)).chain([sealed]).chain(counts.map(int));
        PyTuple::new(py, row.collect::<Vec<_>>())
    });
    PyList::new(py, rows.collect::<PyResult<Vec<_>>>()?)
}

/// Reads all of a log and compares it with its checksums: (oldest_sequence, next_sequence, segments,
/// bytes, torn_bytes, indexes, wrong_indexes).
#[pyfunction]
pub(crate) fn _verify_store(
    py: Python<'_>,
    path: PathBuf,
) -> PyResult<(u64, u64, usize, u64, u64, usize, usize)> {
    let found = py.detach(|| Core::verify(path)).map_err(|error| error::store(py, &error))?;
    let (oldest, next) = (found.oldest_sequence, found.next_sequence);
    let (segments, bytes, torn_bytes) = (found.segments, found.bytes, found.torn_bytes);
    Ok((oldest, next, segments, bytes, torn_bytes, found.indexes, found.wrong_indexes))
}

/// (oldest_sequence, next_sequence, kept, lost, foreign, is_damaged)
type SalvageRow = (u64, u64, u64, Vec<(u64, u64)>, Vec<String>, bool);

fn salvage_row(salvage: Salvage) -> SalvageRow {
    let Salvage { oldest_sequence, next_sequence, kept, lost, foreign, is_damaged } = salvage;
    let lost = lost.into_iter().map(|lost| (lost.start, lost.end)).collect();
    (oldest_sequence, next_sequence, kept, lost, foreign, is_damaged)
}

/// Returns what can be kept of a damaged log.
#[pyfunction]
pub(crate) fn _survey_store(py: Python<'_>, path: PathBuf) -> PyResult<SalvageRow> {
    let survey = py.detach(|| Core::survey(path));
    survey.map(salvage_row).map_err(|error| error::store(py, &error))
}

/// Writes what is whole of a damaged log into a new folder.
#[pyfunction]
pub(crate) fn _salvage_store(py: Python<'_>, path: PathBuf, to: PathBuf) -> PyResult<SalvageRow> {
    let salvage = py.detach(|| Core::salvage(path, to));
    salvage.map(salvage_row).map_err(|error| error::store(py, &error))
}
