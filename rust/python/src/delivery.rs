//! Groups of an event log, and its risk events. `tickbus.groups` and `tickbus.risk` are their public
//! faces, which decode objects.

use crate::error;
use crate::event::PyEvent;
use crate::loop_bridge::on_a_loop;
use crate::process::{Own, no_pickle};
use crate::store::{Answer, EventStore, Item, StoreTask, Taken, answer, given};
use crate::subscription::SIGNAL_SLICE;
use parking_lot::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};
use std::sync::Arc;
use std::time::Instant;
use tickbus::{
    ConsumerStats, CriticalDelivery, DeliveryClock, DeliveryError, Group as CoreGroup,
    GroupBatch as CoreBatch, GroupConfig, GroupStart, GroupStats, Notice, Payload,
    PublishCriticalError, RiskConfig, RiskConsumer as CoreConsumer, RiskEventSystem, StoredObject,
    Token,
};

/// What becomes of an event in Python: a compact `Event`, or (timestamp, topic, schema, version,
/// bytes).
fn event_object(py: Python<'_>, payload: &Payload) -> PyResult<Py<PyAny>> {
    match payload {
        Payload::Event(event) => Ok(PyEvent(*event).object(py)?.into_any().unbind()),
        Payload::Object(object) => {
            let StoredObject { timestamp, topic, schema, version, bytes } = object;
            let bytes = PyBytes::new(py, bytes);
            let object = (timestamp, topic, schema, version, bytes).into_pyobject(py)?;
            Ok(object.into_any().unbind())
        }
        _ => unreachable!("there are no others"),
    }
}

/// Runs what waits until a deadline, and looks at signals meanwhile; `None` once the timeout has
/// passed.
fn blocking<O: Send>(
    py: Python<'_>,
    call: &str,
    instead: &str,
    timeout: Option<&Bound<'_, PyAny>>,
    wait: impl Fn(Instant) -> Result<Option<O>, DeliveryError> + Sync,
) -> PyResult<Option<O>> {
    if on_a_loop(py)? {
        return Err(error::on_a_loop(call, instead));
    }
    let timeout = timeout.map(|timeout| error::duration("timeout", timeout)).transpose()?;
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        let slice = Instant::now() + SIGNAL_SLICE;
        let until = deadline.map_or(slice, |deadline| deadline.min(slice));
        let waited = py.detach(|| wait(until)).map_err(|error| error::delivery(py, &error))?;
        if waited.is_some() || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Ok(waited);
        }
        py.check_signals()?;
    }
}

/// Returns what a task gets that has waited for something without a value.
fn nothing(waited: Result<(), DeliveryError>) -> Answer {
    answer(move |py| match waited {
        Ok(()) => Ok(py.None()),
        Err(error) => Err(error::delivery(py, &error)),
    })
}

fn start(start: &Bound<'_, PyAny>) -> PyResult<GroupStart> {
    let wanted = "'oldest', 'newest' or a sequence of at least 0";
    let Ok(name) = start.cast::<PyString>() else {
        return error::number("start", start, wanted, Some).map(GroupStart::At);
    };
    match &*name.to_cow()? {
        "oldest" => Ok(GroupStart::Oldest),
        "newest" => Ok(GroupStart::Newest),
        _ => Err(error::ConfigError::new_err(format!("start was {start:?}; it must be {wanted}"))),
    }
}

/// (name, cursor, lag, in_flight, redelivered, stalled, expirations, expired)
type GroupRow = (String, u64, u64, u64, u64, u64, u64, bool);

fn group_row(stats: &GroupStats) -> GroupRow {
    let GroupStats { cursor, lag, in_flight, redelivered, stalled, expired, .. } = *stats;
    (
        stats.name.to_string(),
        cursor,
        lag,
        in_flight,
        redelivered,
        stalled,
        expired,
        stats.is_expired,
    )
}

/// A consumer of a group.
#[pyclass(frozen, module = "tickbus._core", name = "_Group")]
#[derive(Debug)]
pub(crate) struct Group {
    core: Own<Arc<CoreGroup>>,
    store: Py<EventStore>,
}

#[pymethods]
impl Group {
    #[new]
    fn new(
        py: Python<'_>,
        store: &Bound<'_, EventStore>,
        name: &str,
        start_at: &Bound<'_, PyAny>,
        lease: &Bound<'_, PyAny>,
        max_idle: Option<&Bound<'_, PyAny>>,
        max_in_flight: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let core = store.get().writer()?;
        let mut config = GroupConfig::default();
        config.start = start(start_at)?;
        config.lease = error::duration("lease", lease)?;
        config.max_idle = max_idle.map(|idle| error::duration("max_idle", idle)).transpose()?;
        config.max_in_flight = error::unsigned("max_in_flight", max_in_flight)?;
        let group = py.detach(|| core.group(name, config));
        let group = group.map_err(|error| error::delivery(py, &error))?;
        Ok(Self { core: Own::new(Arc::new(group)), store: store.clone().unbind() })
    }

    /// Returns the next records; `None` once the timeout has passed.
    fn fetch(
        &self,
        py: Python<'_>,
        limit: &Bound<'_, PyAny>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<GroupBatch>> {
        self.core.process().check()?;
        let limit = error::unsigned("limit", limit)?;
        let wait = |until| self.core.fetch(limit, Some(until));
        let batch = blocking(py, "fetch()", "fetch_async()", timeout, wait)?;
        Ok(batch.map(|batch| GroupBatch::new(batch, self.store.clone_ref(py))))
    }

    fn fetch_async(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let limit = error::unsigned("limit", limit)?;
        let (core, store) = ((*self.core).clone(), self.store.clone_ref(py));
        StoreTask::awaitable(py, &self.store, async move {
            let fetched = core.fetch_async(limit).await;
            answer(move |py| match fetched {
                Ok(batch) => Ok(Py::new(py, GroupBatch::new(batch, store))?.into_any()),
                Err(error) => Err(error::delivery(py, &error)),
            })
        })
    }

    fn try_fetch(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Option<GroupBatch>> {
        self.core.process().check()?;
        let limit = error::unsigned("limit", limit)?;
        let batch = py.detach(|| self.core.try_fetch(limit));
        let batch = batch.map_err(|error| error::delivery(py, &error))?;
        Ok(batch.map(|batch| GroupBatch::new(batch, self.store.clone_ref(py))))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<GroupRow> {
        self.core.process().check()?;
        let stats = self.core.stats().map_err(|error| error::delivery(py, &error))?;
        Ok(group_row(&stats))
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("Group", "one process writes a log, and reads it in groups"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.store)
    }
}

/// Records that a consumer has.
#[pyclass(frozen, module = "tickbus._core", name = "_GroupBatch")]
#[derive(Debug)]
pub(crate) struct GroupBatch {
    core: Own<Arc<Mutex<CoreBatch>>>,
    store: Py<EventStore>,
}

impl GroupBatch {
    fn new(batch: CoreBatch, store: Py<EventStore>) -> Self {
        Self { core: Own::new(Arc::new(Mutex::new(batch))), store }
    }
}

#[pymethods]
impl GroupBatch {
    /// (from, end, attempt)
    #[getter]
    fn lent(&self) -> PyResult<(u64, u64, u32)> {
        self.core.process().check()?;
        let batch = self.core.lock();
        Ok((batch.sequences().start, batch.sequences().end, batch.attempt()))
    }

    /// As `_StoreReader.next_batch`.
    fn next_batch<'py>(&self, py: Python<'py>) -> PyResult<Option<(u64, Bound<'py, PyAny>)>> {
        self.core.process().check()?;
        let taken = py.detach(|| Ok(self.core.lock().next_batch()?.map(Taken::of)));
        given(py, taken)
    }

    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.core.process().check()?;
        let committed = py.detach(|| self.core.lock().commit());
        committed.map_err(|error| error::delivery(py, &error))
    }

    fn commit_async(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let committing = self.core.lock().committing();
        StoreTask::awaitable(py, &self.store, async move { nothing(committing.await) })
    }

    fn give_back(&self, py: Python<'_>) -> PyResult<()> {
        self.core.process().check()?;
        self.core.lock().give_back().map_err(|error| error::delivery(py, &error))
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("GroupBatch", "send its records"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.store)
    }
}

/// Returns the numbers of all groups of a log.
#[pyfunction]
pub(crate) fn _group_stats(
    py: Python<'_>,
    store: &Bound<'_, EventStore>,
) -> PyResult<Vec<GroupRow>> {
    let core = store.get().writer()?;
    let stats = py.detach(|| core.groups()).map_err(|error| error::store(py, &error))?;
    Ok(stats.iter().map(group_row).collect())
}

/// Forgets a group.
#[pyfunction]
pub(crate) fn _remove_group(
    py: Python<'_>,
    store: &Bound<'_, EventStore>,
    name: &str,
) -> PyResult<bool> {
    let core = store.get().writer()?;
    py.detach(|| core.remove_group(name)).map_err(|error| error::store(py, &error))
}

/// The risk events of a log.
#[pyclass(frozen, module = "tickbus._core", name = "_RiskSystem")]
#[derive(Debug)]
pub(crate) struct RiskSystem {
    core: Own<Arc<RiskEventSystem>>,
    store: Py<EventStore>,
}

#[pymethods]
impl RiskSystem {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "they have names in Python")]
    fn new(
        py: Python<'_>,
        store: &Bound<'_, EventStore>,
        lease: &Bound<'_, PyAny>,
        max_attempts: &Bound<'_, PyAny>,
        retry_base: &Bound<'_, PyAny>,
        retry_cap: &Bound<'_, PyAny>,
        escalate_after: &Bound<'_, PyAny>,
        max_in_flight: &Bound<'_, PyAny>,
        seed: Option<&Bound<'_, PyAny>>,
        clock: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let core = store.get().writer()?;
        let mut config = RiskConfig::default();
        config.lease = error::duration("lease", lease)?;
        config.max_attempts = error::whole("max_attempts", max_attempts, 0..=u32::MAX)?;
        config.retry_base = error::duration("retry_base", retry_base)?;
        config.retry_cap = error::duration("retry_cap", retry_cap)?;
        config.escalate_after = error::duration("escalate_after", escalate_after)?;
        config.max_in_flight = error::whole("max_in_flight", max_in_flight, 0..=usize::MAX)?;
        config.seed = seed.map(|seed| error::unsigned("seed", seed)).transpose()?;
        config.clock = clock.map(own_clock);
        let system = py.detach(|| RiskEventSystem::new(core, config));
        let system = system.map_err(|error| error::store(py, &error))?;
        Ok(Self { core: Own::new(Arc::new(system)), store: store.clone().unbind() })
    }

    fn publish_critical(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        key: Option<&str>,
        topic: Option<&Bound<'_, PyString>>,
    ) -> PyResult<u64> {
        self.core.process().check()?;
        if on_a_loop(py)? {
            return Err(error::on_a_loop("publish_critical()", "publish_critical_async()"));
        }
        let event = payload(event, topic)?;
        py.detach(|| self.core.publish_critical(event, key)).map_err(|error| refused(py, &error))
    }

    fn publish_critical_async(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        key: Option<String>,
        topic: Option<&Bound<'_, PyString>>,
    ) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let (core, event) = ((*self.core).clone(), payload(event, topic)?);
        StoreTask::awaitable(py, &self.store, async move {
            let published = core.publish_critical_async(event, key.as_deref()).await;
            answer(move |py| match published {
                Ok(id) => Ok(id.into_pyobject(py)?.into_any().unbind()),
                Err(error) => Err(refused(py, &error)),
            })
        })
    }

    fn register(&self, py: Python<'_>, name: &str, ordered: bool) -> PyResult<RiskConsumer> {
        self.core.process().check()?;
        let consumer = py.detach(|| self.core.register(name, ordered));
        let consumer = consumer.map_err(|error| error::store(py, &error))?;
        let store = self.store.clone_ref(py);
        Ok(RiskConsumer { core: Own::new(Arc::new(consumer)), store })
    }

    fn unregister(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        self.core.process().check()?;
        py.detach(|| self.core.unregister(name)).map_err(|error| error::store(py, &error))
    }

    /// `None` once the timeout has passed.
    fn wait_ack(
        &self,
        py: Python<'_>,
        id: &Bound<'_, PyAny>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<bool>> {
        self.core.process().check()?;
        let id = error::unsigned("event_id", id)?;
        let wait = |until| self.core.wait_ack(id, Some(until));
        blocking(py, "wait_ack()", "wait_ack_async()", timeout, wait)
    }

    fn wait_ack_async(&self, py: Python<'_>, id: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let id = error::unsigned("event_id", id)?;
        let core = (*self.core).clone();
        StoreTask::awaitable(py, &self.store, async move {
            let waited = core.wait_ack_async(id).await;
            answer(move |py| match waited {
                Ok(is_acked) => Ok(is_acked.into_pyobject(py)?.to_owned().into_any().unbind()),
                Err(error) => Err(error::delivery(py, &error)),
            })
        })
    }

    fn attempts(&self, id: u64) -> PyResult<Option<u32>> {
        self.core.process().check()?;
        Ok(self.core.attempts(id))
    }

    /// ("escalated", id, consumer, attempts), ("dead", id, consumer, reason) or ("limit", consumer,
    /// in_flight); `Closed` at the end. Called by a thread that has nothing else to do.
    fn next_notice(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let notice = py.detach(|| self.core.next_notice(None));
        let notice = match notice.map_err(|error| error::store(py, &error))? {
            Some(Notice::Escalated { id, consumer, attempts }) => {
                ("escalated", id, consumer.as_deref(), attempts).into_pyobject(py)?
            }
            Some(Notice::DeadLettered { id, consumer, reason }) => {
                ("dead", id, consumer.as_deref(), &*reason).into_pyobject(py)?
            }
            Some(Notice::TooManyInFlight { consumer, in_flight }) => {
                ("limit", &*consumer, in_flight).into_pyobject(py)?
            }
            _ => unreachable!("it waits for ever, and there are no others"),
        };
        Ok(notice.into_any().unbind())
    }

    /// Rows of (id, consumer, key, reason, [(attempt, reason)]).
    #[expect(clippy::type_complexity, reason = "it is a row")]
    fn dead_letters(
        &self,
    ) -> PyResult<Vec<(u64, Option<String>, Option<String>, String, Vec<(u32, String)>)>> {
        self.core.process().check()?;
        let letters = self.core.dead_letters().into_iter().map(|letter| {
            let attempts = letter.attempts.iter();
            let attempts = attempts.map(|failed| (failed.attempt, failed.reason.to_string()));
            let text = |text: Option<Arc<str>>| text.map(|text| text.to_string());
            let (consumer, key) = (text(letter.consumer), text(letter.key));
            (letter.id, consumer, key, letter.reason.to_string(), attempts.collect())
        });
        Ok(letters.collect())
    }

    fn redeliver(
        &self,
        py: Python<'_>,
        id: &Bound<'_, PyAny>,
        consumer: Option<&str>,
    ) -> PyResult<()> {
        self.core.process().check()?;
        let id = error::unsigned("letter.event_id", id)?;
        let done = py.detach(|| self.core.redeliver(id, consumer));
        done.map_err(|error| error::delivery(py, &error))
    }

    fn discard(
        &self,
        py: Python<'_>,
        id: &Bound<'_, PyAny>,
        consumer: Option<&str>,
    ) -> PyResult<()> {
        self.core.process().check()?;
        let id = error::unsigned("letter.event_id", id)?;
        let done = py.detach(|| self.core.discard(id, consumer));
        done.map_err(|error| error::delivery(py, &error))
    }

    /// The event, as consumers get it.
    fn event(&self, py: Python<'_>, id: u64) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let event = py.detach(|| self.core.event(id));
        event_object(py, &*event.map_err(|error| error::delivery(py, &error))?)
    }

    fn check_deadlines(&self, py: Python<'_>) -> PyResult<()> {
        self.core.process().check()?;
        py.detach(|| self.core.check_deadlines());
        Ok(())
    }

    /// (published, acked, failed, escalated, dead_lettered, limited, refused, dead_letters, [(name,
    /// ordered, pending, in_flight)])
    #[expect(clippy::type_complexity, reason = "it is a row")]
    fn stats(
        &self,
    ) -> PyResult<(u64, u64, u64, u64, u64, u64, u64, usize, Vec<(String, bool, usize, usize)>)>
    {
        self.core.process().check()?;
        let stats = self.core.stats();
        let rows = stats.consumers.iter().map(|consumer| {
            let ConsumerStats { name, is_ordered, pending, in_flight, .. } = consumer;
            (name.to_string(), *is_ordered, *pending, *in_flight)
        });
        Ok((
            stats.published,
            stats.acked,
            stats.failed,
            stats.escalated,
            stats.dead_lettered,
            stats.limited,
            stats.refused,
            stats.dead_letters,
            rows.collect(),
        ))
    }

    #[getter]
    fn closed(&self) -> bool {
        !self.core.process().is_current() || self.core.is_closed()
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.core.process().check()?;
        py.detach(|| self.core.close());
        Ok(())
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("RiskEventSystem", "one process writes a log, and delivers its risk events"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.store)
    }
}

/// Returns a clock that asks an object with `time_ns()`. One that raises stands still.
fn own_clock(clock: Py<PyAny>) -> DeliveryClock {
    DeliveryClock::new(move || {
        let now = Python::try_attach(|py| {
            let now = clock.bind(py).call_method0(intern!(py, "time_ns"));
            now.and_then(|now| now.extract::<u64>()).unwrap_or_else(|error| {
                error.write_unraisable(py, Some(clock.bind(py)));
                0
            })
        });
        now.unwrap_or(0)
    })
}

fn payload<'py>(
    event: &Bound<'py, PyAny>,
    topic: Option<&Bound<'py, PyString>>,
) -> PyResult<Payload> {
    match Item::of(event, topic)? {
        Item::Event(event) => Ok(Payload::Event(event)),
        Item::Object(object) => {
            let object = object.borrowed()?;
            Ok(Payload::Object(StoredObject {
                timestamp: object.timestamp,
                topic: object.topic.map(str::to_owned),
                schema: object.schema.to_owned(),
                version: object.version,
                bytes: object.bytes.to_vec(),
            }))
        }
    }
}

/// What a log says of a risk event that is not durable.
fn refused(py: Python<'_>, refused: &PublishCriticalError) -> PyErr {
    let error = error::store(py, &refused.error);
    _ = error.value(py).setattr(intern!(py, "delivered_live"), refused.delivered_live);
    error
}

/// A consumer of risk events.
#[pyclass(frozen, module = "tickbus._core", name = "_RiskConsumer")]
#[derive(Debug)]
pub(crate) struct RiskConsumer {
    core: Own<Arc<CoreConsumer>>,
    store: Py<EventStore>,
}

/// (id, attempt, key, event)
fn delivery_row(py: Python<'_>, delivery: &CriticalDelivery) -> PyResult<Py<PyAny>> {
    let Token { id, attempt } = delivery.token;
    let event = event_object(py, &delivery.event)?;
    let row = (id, attempt, delivery.key.as_deref(), event).into_pyobject(py)?;
    Ok(row.into_any().unbind())
}

#[pymethods]
impl RiskConsumer {
    /// (id, attempt, key, event); `None` once the timeout has passed.
    fn take(
        &self,
        py: Python<'_>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Py<PyAny>>> {
        self.core.process().check()?;
        let wait = |until| self.core.take(Some(until));
        let delivery = blocking(py, "take()", "take_async()", timeout, wait)?;
        delivery.map(|delivery| delivery_row(py, &delivery)).transpose()
    }

    fn take_async(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let core = (*self.core).clone();
        StoreTask::awaitable(py, &self.store, async move {
            let taken = core.take_async().await;
            answer(move |py| match taken {
                Ok(delivery) => delivery_row(py, &delivery),
                Err(error) => Err(error::delivery(py, &error)),
            })
        })
    }

    fn try_take(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.core.process().check()?;
        let delivery = py.detach(|| self.core.try_take());
        let delivery = delivery.map_err(|error| error::delivery(py, &error))?;
        delivery.map(|delivery| delivery_row(py, &delivery)).transpose()
    }

    /// Waits a moment for an event without a record, while none can be written.
    fn wait_live(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.core.process().check()?;
        let delivery = py.detach(|| self.core.wait_live());
        let delivery = delivery.map_err(|error| error::store(py, &error))?;
        delivery.map(|delivery| delivery_row(py, &delivery)).transpose()
    }

    fn ack(&self, py: Python<'_>, id: u64, attempt: u32) -> PyResult<()> {
        self.core.process().check()?;
        let acked = py.detach(|| self.core.ack(Token { id, attempt }));
        acked.map_err(|error| error::delivery(py, &error))
    }

    fn ack_async(&self, py: Python<'_>, id: u64, attempt: u32) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let core = (*self.core).clone();
        let ack = async move { nothing(core.ack_async(Token { id, attempt }).await) };
        StoreTask::awaitable(py, &self.store, ack)
    }

    fn nack(&self, py: Python<'_>, id: u64, attempt: u32, reason: &str) -> PyResult<()> {
        self.core.process().check()?;
        let nacked = py.detach(|| self.core.nack(Token { id, attempt }, reason));
        nacked.map_err(|error| error::delivery(py, &error))
    }

    fn nack_async(
        &self,
        py: Python<'_>,
        id: u64,
        attempt: u32,
        reason: String,
    ) -> PyResult<Py<PyAny>> {
        self.core.process().check()?;
        let core = (*self.core).clone();
        let nack = async move { nothing(core.nack_async(Token { id, attempt }, &reason).await) };
        StoreTask::awaitable(py, &self.store, nack)
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("RiskConsumer", "register it in the one process that writes the log"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.store)
    }
}
