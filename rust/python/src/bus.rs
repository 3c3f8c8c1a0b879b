//! `EventBus`: publishing Python objects, and making subscriptions.

use crate::awaitable::{Job, Progress, awaitable};
use crate::calls;
use crate::error;
use crate::gil::{Gil, GilCell, GilFlag};
use crate::keys::key_function;
use crate::ledger::{Ledger, Stamp};
use crate::line::{ReadByTasks, Streak};
use crate::loop_bridge::{LoopBridge, Wakeable, Woken, on_a_loop, running_loop, settle};
use crate::process::{Own, Process, no_pickle};
use crate::slab::{Handle, Mark, Slab};
use crate::store;
use crate::subscription::{AsyncEventSubscription, EventSubscription, Inner, SIGNAL_SLICE};
use crate::system;
use crate::wakeup::Wakeup;
use crate::warnings;
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString, PyWeakref, PyWeakrefMethods};
use smallvec::SmallVec;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};
use tickbus::{
    Backend, BackpressureConfig, Bus, BusConfig, Entry, EventBusMetrics, OnLag, Patience, Pattern,
    Policy, Publication, PublishError, Shared, Start, SubscribeOptions, SubscriptionMetrics,
    Topic as CoreTopic, WeakBus,
};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

pub(crate) type Core = Bus<Handle, Gil>;

/// A topic known to a bus: publishing on it is cheaper than on its name.
#[pyclass(frozen, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct Topic(CoreTopic);

#[pymethods]
impl Topic {
    /// The topic's name.
    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    fn __repr__(&self) -> String {
        format!("Topic({:?})", self.0.name())
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("Topic", "send its name, and make it with topic() of the bus there"))
    }
}

/// Names seen lately, by their hash: a direct-mapped cache in front of the bus's table.
#[derive(Debug, Default)]
struct TopicCache(Vec<Option<(isize, Arc<CoreTopic>)>>);

const CACHED_TOPICS: usize = 4_096;

/// Buses that are alive, to be closed at exit.
static BUSES: GilCell<Vec<WeakBus<Handle, Gil>>> = GilCell::new(Vec::new());

/// Closes every bus and every store, so that threads that wait inside can leave before the interpreter ends.
#[pyfunction]
pub(crate) fn _close_all(py: Python<'_>) {
    let buses = BUSES.with(std::mem::take);
    for bus in buses.iter().filter_map(WeakBus::upgrade) {
        bus.close();
        settle(py);
    }
    system::close_all(py);
    store::close_all(py);
}

/// Leaves every bus to the parent, in a child by `fork`.
pub(crate) fn forget_all() {
    std::mem::forget(BUSES.with(std::mem::take));
    system::forget_all();
}

/// Carries Python objects by reference. `tickbus.EventBus` is its public face.
#[pyclass(frozen, subclass, weakref, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct EventBus {
    /// Declared first: its handles end before the slab may.
    core: Own<Core>,
    slab: Py<Slab>,
    topics: GilCell<TopicCache>,
    ready_in_a_row: Streak,
    /// Those that tasks read, by id.
    on_loops: GilCell<Vec<(u64, Py<PyWeakref>)>>,
    /// Whether a publish on a loop's thread that had no room was already reported.
    warned_on_loop: AtomicBool,
}

#[pymethods]
impl EventBus {
    #[new]
    #[pyo3(
        signature = (
            capacity = None, backpressure = None, *, backend, max_topics = None, keep_last = None,
            latency_sampling, producers = "shared", clock = None
        ),
        text_signature = "(capacity=10000, backpressure=None, *, backend, max_topics=65536, \
            keep_last=None, latency_sampling, producers='shared', clock=None)"
    )]
    #[expect(clippy::too_many_arguments, reason = "all but two are named by their callers")]
    fn new(
        py: Python<'_>,
        capacity: Option<&Bound<'_, PyAny>>,
        backpressure: Option<&Bound<'_, PyAny>>,
        backend: &str,
        max_topics: Option<&Bound<'_, PyAny>>,
        keep_last: Option<&str>,
        latency_sampling: Option<&Bound<'_, PyAny>>,
        producers: &str,
        clock: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let backend: Backend = backend.parse().map_err(|error| error::config(&error))?;
        let mut config = BusConfig::default();
        if let Some(capacity) = capacity {
            config.capacity = error::count("capacity", capacity)?;
        }
        if let Some(backpressure) = backpressure {
            config.backpressure = backpressure_config(backpressure)?;
        }
        if let Some(max_topics) = max_topics {
            config.max_topics = error::count("max_topics", max_topics)?;
        }
        config.keep_last = pattern(keep_last)?;
        config.latency_sampling = latency_sampling
            .map(|gap| error::count("latency_sampling", gap))
            .transpose()?
            .map(|gap| u32::try_from(gap).unwrap_or(u32::MAX));
        config.producers = producers.parse().map_err(|error| error::config(&error))?;
        let bus = Self::open(py, backend, config, Ledger::new(clock))?;
        if bus.core.backpressure().warn_threshold.is_some() {
            bus.core.on_warning(warnings::push);
        }
        Ok(bus)
    }

    /// The name of the backend.
    #[getter]
    fn backend(&self) -> &'static str {
        self.core.backend().name()
    }

    /// The default capacity of a subscription in events, a power of two.
    #[getter]
    fn capacity(&self) -> usize {
        self.core.capacity()
    }

    /// Whether the bus was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    /// The bus's number, unique in the process.
    #[getter]
    fn id(&self) -> u64 {
        self.core.id()
    }

    /// What tells the time of publishing: an object with `time_ns()`, in ns since the Unix epoch.
    #[getter]
    fn clock(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.ledger().clock() {
            Some(clock) => Ok(clock.clone_ref(py)),
            None => Ok(py.import("time")?.into_any().unbind()),
        }
    }

    /// Publishes an event and returns how many matching subscriptions took it.
    ///
    /// Waits at most `max_block_duration` for subscriptions whose policy is `block`, with the
    /// global interpreter lock released; on a thread that runs an event loop it does not wait.
    ///
    /// Args:
    ///     event: Any object but `None`.
    ///     topic: A name such as "trades.BTCUSDT", or a `Topic`; without one only subscriptions
    ///         without a pattern get the event.
    ///
    /// Raises:
    ///     Full: A `reject` subscription has no room; nobody has the event.
    ///     Closed: The bus is closed; nobody has the event.
    ///     ConfigError: The topic is not a topic's name, or one too many.
    ///     TypeError: The event is `None`.
    #[pyo3(signature = (event, topic = None))]
    pub(crate) fn publish(
        &self,
        py: Python<'_>,
        event: Py<PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        self.publish_until(py, event, topic, &mut None)
    }

    /// Publishes an event, waiting at most `timeout` seconds for subscriptions whose policy is
    /// `block` or `reject`.
    ///
    /// Raises:
    ///     PublishTimeout: A `reject` subscription still had no room; nobody has the event.
    ///     Closed: The bus is closed; nobody has the event.
    ///     RuntimeError: The thread runs an event loop; nobody has the event.
    #[pyo3(signature = (event, timeout, topic = None))]
    pub(crate) fn publish_timeout(
        &self,
        py: Python<'_>,
        event: Py<PyAny>,
        timeout: &Bound<'_, PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let timeout = error::duration("timeout", timeout)?;
        if on_a_loop(py)? {
            return Err(error::on_a_loop("publish_timeout()", "publish_async()"));
        }
        let topic = self.resolve(py, topic)?;
        let (handle, note) = self.insert(py, event, topic.as_deref())?;
        let mut publication = Own::new(self.core.publication(handle, topic.as_deref(), true));
        let deadline = Instant::now() + timeout;
        let result = self.wait_for_room(py, &mut publication, note, deadline);
        drop(publication);
        self.finish(py, result)
    }

    /// Publishes events in order, with one patience for all, and returns how many.
    ///
    /// The iterable is read to its end before anything is published.
    ///
    /// Raises:
    ///     Full, Closed: As `publish`, and so what a key function raises; `.accepted` says how
    ///         many were published before.
    #[pyo3(signature = (events, topic = None))]
    fn publish_many(
        &self,
        py: Python<'_>,
        events: &Bound<'_, PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let list = calls::make(&py.get_type::<PyList>(), [events.clone()])?;
        let published = self.publish_each(py, list.cast::<PyList>()?, topic);
        calls::release(py, list.unbind());
        published
    }

    /// Returns an awaitable that publishes an event and gives the number of subscriptions that
    /// took it. It waits its turn while the loop runs, at most `max_block_duration`. Cancelled,
    /// nobody has the event.
    ///
    /// Raises:
    ///     PublishTimeout: A `reject` subscription still had no room; nobody has the event.
    ///     Closed: The bus is closed; nobody has the event.
    #[pyo3(signature = (event, topic = None))]
    fn publish_async(
        slf: &Bound<'_, Self>,
        event: Py<PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        awaitable(slf.py(), Job::Publish(Box::new(Self::publish_task(slf, event, topic)?)))
    }

    /// Returns the named topic; publishing on it looks nothing up.
    ///
    /// Raises:
    ///     ConfigError: The name is no topic's, or the bus knows `max_topics` already.
    fn topic(&self, name: &str) -> PyResult<Topic> {
        self.process().check()?;
        let topic = self.core.topic(name).map_err(|error| error::config(&error))?;
        self.ledger().learn(&topic);
        Ok(Topic(topic))
    }

    /// Returns the last event that was published on a topic, or `None` if there was none yet.
    ///
    /// Nobody has to subscribe to it, and it stays readable after `close()`.
    ///
    /// Args:
    ///     topic: A name such as "quotes.BTCUSDT", or a `Topic`.
    ///
    /// Raises:
    ///     ConfigError: The topic is not a topic's name, or the bus was made without a `keep_last`
    ///         that matches it.
    fn last(&self, py: Python<'_>, topic: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyAny>>> {
        self.process().check()?;
        let last = match topic.cast_exact::<Topic>() {
            Ok(topic) => self.core.last(self.own(topic)?.name()),
            Err(_) => self.core.last(topic_name(topic)?.to_str()?),
        };
        let last = last.map_err(|error| error::config(&error))?;
        Ok(last.and_then(|handle| handle.into_object(py)))
    }

    /// Returns a subscription read by threads.
    ///
    /// Args:
    ///     pattern: The topics it wants, "trades.*" or "trades.>"; `None` wants everything.
    ///     capacity: The most events it holds, rounded up to 2^n; `None` is the bus's.
    ///     policy: block, reject, drop_newest, drop_oldest or conflate; `None` is the bus's.
    ///     on_lag: Whether missed events are told by `Lagged` ("raise") or only counted ("count").
    ///     key: For `conflate`, a function of the event whose hashable result is the key of which
    ///         the newest event is kept; `None` is the topic. It runs inside `publish`, before
    ///         anybody has the event; what it raises, `publish` raises.
    ///     snapshot: Whether it begins with the last events of the topics it wants, as far as the
    ///         bus keeps them; live events go on exactly where they end.
    ///     start: On `ring`, the first event that it wants: "now", "oldest" for the oldest that is
    ///         kept, or a sequence; if that is no longer kept it is told how many are missing.
    ///     name: What metrics and explanations call it, unique among the bus's subscriptions.
    ///     envelope: Whether it gives each event in a `tickbus.Envelope`, with its number on the
    ///         bus, its topic and the time of publishing. From the first such subscription on,
    ///         publishing reads the clock.
    ///
    /// Raises:
    ///     ConfigError: The backend cannot keep what was asked for.
    ///     Closed: The bus is closed.
    #[expect(clippy::too_many_arguments, reason = "all but two are named by their callers")]
    #[pyo3(signature = (
        pattern = None, capacity = None, *, policy = None, on_lag = "raise", key = None,
        snapshot = false, start = None, name = None, envelope = false,
    ))]
    fn subscribe(
        &self,
        py: Python<'_>,
        pattern: Option<&str>,
        capacity: Option<&Bound<'_, PyAny>>,
        policy: Option<&str>,
        on_lag: &str,
        key: Option<Py<PyAny>>,
        snapshot: bool,
        start: Option<&Bound<'_, PyAny>>,
        name: Option<String>,
        envelope: bool,
    ) -> PyResult<EventSubscription> {
        let wishes =
            Wishes { pattern, capacity, policy, on_lag, key, snapshot, start, name, envelope };
        self.join(py, wishes).map(EventSubscription::new)
    }

    /// Returns a subscription read by tasks of an event loop; the arguments are `subscribe`'s.
    ///
    /// Raises:
    ///     ConfigError: The backend cannot keep what was asked for.
    ///     Closed: The bus is closed.
    #[expect(clippy::too_many_arguments, reason = "all but two are named by their callers")]
    #[pyo3(signature = (
        pattern = None, capacity = None, *, policy = None, on_lag = "raise", key = None,
        snapshot = false, start = None, name = None, envelope = false,
    ))]
    fn subscribe_async(
        &self,
        py: Python<'_>,
        pattern: Option<&str>,
        capacity: Option<&Bound<'_, PyAny>>,
        policy: Option<&str>,
        on_lag: &str,
        key: Option<Py<PyAny>>,
        snapshot: bool,
        start: Option<&Bound<'_, PyAny>>,
        name: Option<String>,
        envelope: bool,
    ) -> PyResult<Py<AsyncEventSubscription>> {
        let wishes =
            Wishes { pattern, capacity, policy, on_lag, key, snapshot, start, name, envelope };
        let subscription = AsyncEventSubscription::create(py, self.join(py, wishes)?)?;
        self.watch(subscription.bind(py))?;
        Ok(subscription)
    }

    /// Ends publishing at once; readers first read what is pending. Again does nothing.
    pub(crate) fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.process().check()?;
        self.core.close();
        self.settle_and_bury(py);
        Ok(())
    }

    /// Returns how many events were published on the topic of that name and on those below it.
    fn _published_below(&self, name: &str) -> PyResult<u64> {
        self.process().check()?;
        Ok(self.ledger().published_below(name))
    }

    fn _metrics(&self) -> PyResult<BusRow> {
        self.process().check()?;
        Ok(bus_row(self.core.metrics()))
    }

    fn _explain(&self) -> PyResult<ExplanationRow> {
        self.process().check()?;
        let explanation = self.core.explain();
        let text = explanation.to_string();
        let rows = explanation.subscriptions.into_iter().map(row).collect();
        Ok((explanation.bus, explanation.closed, explanation.gating, rows, text))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let core = &slf.get().core;
        Ok(format!(
            "<{} id={} backend={} capacity={}{}>",
            slf.get_type().name()?,
            core.id(),
            core.backend().name(),
            core.capacity(),
            if core.is_closed() { " closed" } else { "" },
        ))
    }

    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<()> {
        let class = slf.get_type().name()?;
        Err(no_pickle(&class.to_string_lossy(), "make a bus in each, and send it what to publish"))
    }

    fn __enter__(slf: Py<Self>) -> PyResult<Py<Self>> {
        slf.get().process().check()?;
        Ok(slf)
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) {
        let _ = (exc_type, exc_value, traceback);
        self.leave_block(py);
    }

    fn __aenter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        slf.get().process().check()?;
        awaitable(py, Job::Ready(slf.into_any()))
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __aexit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let _ = (exc_type, exc_value, traceback);
        self.leave_block(py);
        awaitable(py, Job::Ready(py.None()))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.slab)
    }
}

/// As good as no end: what waits for a queue waits until there is room.
const A_HUNDRED_YEARS: Duration = Duration::from_secs(100 * 365 * 86_400);

impl EventBus {
    /// Returns a bus that carries the events of a queue.
    pub(crate) fn for_queue(py: Python<'_>, capacity: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let mut config = BusConfig { latency_sampling: None, ..BusConfig::default() };
        config.backpressure.max_block_duration = A_HUNDRED_YEARS;
        if let Some(capacity) = capacity {
            config.capacity = error::count("capacity", capacity)?;
        }
        Self::open(py, Backend::LockFree, config, Ledger::new(None))
    }

    /// Returns the reading half of a queue.
    pub(crate) fn read_all(&self, py: Python<'_>) -> PyResult<Inner> {
        self.join(
            py,
            Wishes {
                pattern: None,
                capacity: None,
                policy: Some(Policy::Reject.name()),
                on_lag: "raise",
                key: None,
                snapshot: false,
                start: None,
                name: None,
                envelope: false,
            },
        )
    }

    fn open(py: Python<'_>, backend: Backend, config: BusConfig, ledger: Ledger) -> PyResult<Self> {
        let core = Core::new(backend, config).map_err(|error| error::config(&error))?;
        let weak = core.downgrade();
        BUSES.with(|buses| {
            buses.retain(WeakBus::is_alive);
            buses.push(weak);
        });
        Ok(Self {
            core: Own::new(core),
            slab: Py::new(py, Slab::new(ledger))?,
            topics: GilCell::default(),
            ready_in_a_row: Streak::default(),
            on_loops: GilCell::default(),
            warned_on_loop: AtomicBool::new(false),
        })
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.core.is_closed()
    }

    /// Returns what publishes an event while a loop runs.
    pub(crate) fn publish_task(
        slf: &Bound<'_, Self>,
        event: Py<PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PublishTask> {
        let py = slf.py();
        let bus = slf.get();
        let topic = bus.resolve(py, topic)?;
        let (handle, note) = bus.insert(py, event, topic.as_deref())?;
        let publication = bus.core.owned_publication(handle, topic.as_deref(), true);
        Ok(PublishTask {
            publication: Some(Own::new(publication)),
            note,
            bus: slf.clone().unbind(),
            deadline: None,
            sleep: None,
        })
    }

    #[inline]
    fn process(&self) -> Process {
        self.core.process()
    }

    /// Closes at the end of a `with`. A forked child leaves the bus to its parent, so that the
    /// exception that ends the child passes.
    fn leave_block(&self, py: Python<'_>) {
        let _ = self.close(py);
    }

    #[inline]
    fn ledger(&self) -> &Ledger {
        self.slab.get().ledger()
    }

    /// Takes an event over, and the time at which it came if the clock is not the system's.
    #[inline]
    fn insert(
        &self,
        py: Python<'_>,
        event: Py<PyAny>,
        topic: Option<&CoreTopic>,
    ) -> PyResult<(Handle, Note)> {
        self.process().check()?;
        if event.is_none(py) {
            return Err(none_is_no_event());
        }
        let called_at = self.ledger().time_of_call(py)?;
        let handle = self.slab.get().insert(event);
        let (mark, topic) = (handle.mark(), topic.map(CoreTopic::id));
        Ok((handle, Note { mark, topic, called_at, is_replayed: false }))
    }

    /// Notes a publication that was just pushed.
    fn note(&self, Note { mark, topic, called_at, is_replayed }: Note) {
        if let Some(topic) = topic {
            self.ledger().count(topic);
        }
        if let Some(stamp) =
            self.ledger().stamp(self.core.published(), topic, called_at, is_replayed)
        {
            mark.stamp(stamp);
        }
    }

    /// Polls a publication, and notes it when it is done.
    #[inline(always)] // else the compiler makes one of it for all callers
    fn poll<S: Deref<Target = Shared<Handle, Gil>>>(
        &self,
        publication: &mut Publication<S, Handle, Gil>,
        patience: Patience,
        note: Note,
    ) -> Result<Option<usize>, PublishError<Handle>> {
        let taken = publication.poll(patience)?;
        if taken.is_some() {
            self.note(note);
        }
        Ok(taken)
    }

    /// The list keeps its events until they are all published: none ends in between.
    fn publish_each(
        &self,
        py: Python<'_>,
        list: &Bound<'_, PyList>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let is_none = |place| item_at(list, place).is_some_and(|event| event.is_none());
        if (0..list.len()).any(is_none) {
            return Err(none_is_no_event());
        }
        let mut deadline = None;
        let mut accepted = 0;
        while accepted < list.len() {
            let published = self.publish_stretch(py, list, accepted, topic);
            if published > 0 {
                accepted += published;
                continue;
            }
            let Ok(event) = list.get_item(accepted) else { break };
            match self.publish_until(py, event.unbind(), topic, &mut deadline) {
                Ok(_) => accepted += 1,
                Err(error) => {
                    // An exception of a key function may take no attributes.
                    let _ = error.value(py).setattr(intern!(py, "accepted"), accepted);
                    return Err(error);
                }
            }
        }
        Ok(accepted)
    }

    /// Publishes events of a list from a place on, as many at once as can be, and returns how many.
    #[inline]
    fn publish_stretch(
        &self,
        py: Python<'_>,
        list: &Bound<'_, PyList>,
        from: usize,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> usize {
        let Some(topic) = self.ready_topic(topic) else { return 0 };
        let slab = self.slab.get();
        let mut places = from..list.len();
        let count = places.len();
        let next = || match places.next().and_then(|place| item_at(list, place)) {
            Some(event) => slab.insert(event.to_owned().unbind()),
            None => unreachable!("there are as many as were counted"),
        };
        let published = self.core.publish_ready_batch(topic, count, next);
        if published > 0 {
            if let Some(topic) = topic {
                self.ledger().count_many(topic.id(), published as u64);
            }
            self.settle_and_bury(py);
        }
        published
    }

    /// Returns the topic of an event for which no stamp is kept, if it needs no look-up.
    #[inline]
    fn ready_topic<'a>(
        &self,
        topic: Option<&'a Bound<'_, PyAny>>,
    ) -> Option<Option<&'a CoreTopic>> {
        if !self.process().is_current() || !self.ledger().only_counts() {
            return None;
        }
        let topic = match topic {
            None => None,
            Some(topic) => Some(&topic.cast_exact::<Topic>().ok()?.get().0),
        };
        topic.is_none_or(|topic| topic.bus() == self.core.id()).then_some(topic)
    }

    #[inline]
    fn publish_until(
        &self,
        py: Python<'_>,
        event: Py<PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
        deadline: &mut Option<Instant>,
    ) -> PyResult<usize> {
        let entry = self.core.enter();
        let topic = self.resolve(py, topic)?;
        let (handle, note) = self.insert(py, event, topic.as_deref())?;
        match self.core.publish_ready(handle, topic.as_deref(), entry) {
            Ok(taken) => {
                self.note(note);
                self.settle_and_bury(py);
                Ok(taken)
            }
            Err(handle) => self.publish_slowly(py, handle, topic.as_deref(), entry, note, deadline),
        }
    }

    /// Publishes an event that is replayed, whose topic belongs to the bus.
    pub(crate) fn publish_replayed(
        &self,
        py: Python<'_>,
        event: Py<PyAny>,
        topic: Option<&CoreTopic>,
    ) -> PyResult<()> {
        let entry = self.core.enter();
        let (handle, mut note) = self.insert(py, event, topic)?;
        note.is_replayed = true;
        match self.core.publish_ready(handle, topic, entry) {
            Ok(_) => {
                self.note(note);
                self.settle_and_bury(py);
                Ok(())
            }
            Err(handle) => {
                self.publish_slowly(py, handle, topic, entry, note, &mut None).map(|_| ())
            }
        }
    }

    /// Returns the named topic for [`EventBus::publish_replayed`].
    pub(crate) fn core_topic(&self, name: &str) -> PyResult<CoreTopic> {
        self.topic(name).map(|topic| topic.0)
    }

    /// Returns how many events can be published before somebody misses one.
    pub(crate) fn room(&self, py: Python<'_>) -> usize {
        let room = self.core.room();
        settle(py);
        room
    }

    pub(crate) fn core(&self) -> &Own<Core> {
        &self.core
    }

    /// Publishes where nothing has to be decided; `None` decides nothing.
    #[inline]
    pub(crate) fn publish_quickly(
        &self,
        py: Python<'_>,
        event: Bound<'_, PyAny>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> Option<usize> {
        if event.is_none() {
            return None;
        }
        let topic = self.ready_topic(topic)?;
        let entry = self.core.enter();
        let handle = self.slab.get().insert(event.unbind());
        match self.core.publish_ready(handle, topic, entry) {
            Ok(taken) => {
                if let Some(topic) = topic {
                    self.ledger().count(topic.id());
                }
                self.settle_and_bury(py);
                Some(taken)
            }
            Err(handle) => {
                // The caller still has it: this reference is not the last.
                handle.into_object(py)?.drop_ref(py);
                None
            }
        }
    }

    #[inline(never)]
    fn publish_slowly(
        &self,
        py: Python<'_>,
        handle: Handle,
        topic: Option<&CoreTopic>,
        entry: Entry,
        note: Note,
        deadline: &mut Option<Instant>,
    ) -> PyResult<usize> {
        let publication = self.core.publication_since(entry, handle, topic, false);
        let mut publication = Own::new(publication);
        self.close_abandoned(py, &publication);
        let result = match self.poll(&mut publication, Patience::Left, note) {
            Ok(Some(taken)) => Ok(taken),
            Ok(None) => self.wait_as_configured(py, &mut publication, note, deadline),
            Err(error) => Err(Failure::Publish(error)),
        };
        drop(publication);
        self.finish(py, result)
    }

    /// Waits as a plain `publish` may: not at all where an event loop would stand still.
    #[cold]
    fn wait_as_configured(
        &self,
        py: Python<'_>,
        publication: &mut Own<BorrowedPublication<'_>>,
        note: Note,
        deadline: &mut Option<Instant>,
    ) -> Result<usize, Failure> {
        if on_a_loop(py).map_err(Failure::Interrupted)? {
            let taken = self.poll(publication, Patience::Spent, note)?.unwrap_or_default();
            if !self.warned_on_loop.swap(true, Ordering::Relaxed) {
                warn_on_loop(py, self.core.id());
            }
            return Ok(taken);
        }
        let patience = self.core.backpressure().max_block_duration;
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience);
        self.wait_for_room(py, publication, note, deadline)
    }

    /// Publishes, parking the thread without the global interpreter lock while there is no room.
    #[cold]
    fn wait_for_room(
        &self,
        py: Python<'_>,
        publication: &mut Own<BorrowedPublication<'_>>,
        note: Note,
        deadline: Instant,
    ) -> Result<usize, Failure> {
        loop {
            self.close_abandoned(py, publication);
            let now = Instant::now();
            let patience = if now >= deadline { Patience::Spent } else { Patience::Left };
            if let Some(taken) = self.poll(publication, patience, note)? {
                return Ok(taken);
            }
            settle(py);
            let until = deadline.min(now + SIGNAL_SLICE);
            let parked = &**publication;
            py.detach(|| parked.park(Some(until)));
            // A signal handler may have forked.
            let checked = py.check_signals().and_then(|()| self.process().check());
            checked.map_err(Failure::Interrupted)?;
        }
    }

    /// Closes the subscriptions without room for an event whose event loop has ended: nobody is
    /// left to read them, and nothing shall wait for them.
    #[inline]
    fn close_abandoned<S: Deref<Target = Shared<Handle, Gil>>>(
        &self,
        py: Python<'_>,
        publication: &Publication<S, Handle, Gil>,
    ) {
        if self.on_loops.with(|known| !known.is_empty()) {
            self.close_those_abandoned(py, &publication.without_room());
        }
    }

    #[inline(never)]
    fn close_those_abandoned(&self, py: Python<'_>, ids: &[u64]) {
        if ids.is_empty() {
            return;
        }
        let full: SmallVec<[Py<PyWeakref>; 2]> = self.on_loops.with(|known| {
            let full = known.iter().filter(|(id, _)| ids.contains(id));
            full.map(|(_, weak)| weak.clone_ref(py)).collect()
        });
        for weak in full {
            if let Some(subscription) = weak.bind(py).upgrade()
                && let Ok(subscription) = subscription.cast_into::<AsyncEventSubscription>()
            {
                subscription.get().close_if_loop_is_over(py);
            }
        }
    }

    /// Keeps a subscription in sight without keeping it alive, and forgets those that are gone.
    fn watch(&self, subscription: &Bound<'_, AsyncEventSubscription>) -> PyResult<()> {
        let py = subscription.py();
        let Some(weak) = subscription.get().sleepers().weak(py) else { return Ok(()) };
        let mut known = self.on_loops.with(std::mem::take);
        known.retain(|(_, weak)| weak.bind(py).upgrade().is_some());
        known.push((subscription.get().inner.core.id(), weak));
        // Looking runs no Python code, dropping may: another thread may have added some.
        self.on_loops.with(|others| {
            known.append(others);
            *others = known;
        });
        Ok(())
    }

    /// What is done after every publication, with the core out of the way.
    #[inline]
    fn finish(&self, py: Python<'_>, result: Result<usize, Failure>) -> PyResult<usize> {
        let result = result.map_err(|failure| failure.into_error(py));
        self.settle_and_bury(py);
        result
    }

    /// Wakes, and drops objects whose last handle is gone: what may run Python code.
    #[inline]
    fn settle_and_bury(&self, py: Python<'_>) {
        settle(py);
        self.slab.get().bury(py);
    }

    #[inline]
    fn resolve(
        &self,
        py: Python<'_>,
        topic: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<ResolvedTopic>> {
        match topic {
            None => Ok(None),
            Some(topic) => self.resolve_some(py, topic).map(Some),
        }
    }

    fn resolve_some(&self, py: Python<'_>, topic: &Bound<'_, PyAny>) -> PyResult<ResolvedTopic> {
        if let Ok(topic) = topic.cast_exact::<Topic>() {
            self.own(topic)?;
            return Ok(ResolvedTopic::Object(topic.clone().unbind()));
        }
        let name = topic_name(topic)?;
        let text = name.to_str()?;
        // Text hashes by its content, whatever a subclass says.
        let hash = match name.is_exact_instance_of::<PyString>() {
            true => name.hash()?,
            false => PyString::new(py, text).hash()?,
        };
        let place = hash as usize % CACHED_TOPICS;
        let cached = self.topics.with(|cache| match cache.0.get(place) {
            Some(Some((known, topic))) if *known == hash && topic.name() == text => {
                Some(topic.clone())
            }
            _ => None,
        });
        if let Some(topic) = cached {
            return Ok(ResolvedTopic::Name(topic));
        }
        let topic = Arc::new(self.topic(text)?.0);
        self.topics.with(|cache| {
            if cache.0.is_empty() {
                cache.0.resize(CACHED_TOPICS, None);
            }
            cache.0[place] = Some((hash, topic.clone()));
        });
        Ok(ResolvedTopic::Name(topic))
    }

    /// Returns a topic of this bus.
    fn own<'a>(&self, topic: &'a Bound<'_, Topic>) -> PyResult<&'a CoreTopic> {
        let topic = &topic.get().0;
        match topic.bus() == self.core.id() {
            true => Ok(topic),
            false => Err(error::ConfigError::new_err(format!(
                "topic {:?} belongs to another bus; make it with topic() of this one",
                topic.name()
            ))),
        }
    }

    fn join(&self, py: Python<'_>, wishes: Wishes<'_, '_>) -> PyResult<Inner> {
        self.process().check()?;
        let on_lag = on_lag(wishes.on_lag)?;
        let slab = self.slab.get();
        if let Some(key) = wishes.key.as_ref().filter(|key| !key.bind(py).is_callable()) {
            return Err(PyTypeError::new_err(format!(
                "key was {:?}; it must be a function of the event, or None for the topic",
                key.bind(py)
            )));
        }
        let policy = wishes.policy.map(str::parse::<Policy>).transpose();
        let options = SubscribeOptions {
            name: wishes.name,
            pattern: pattern(wishes.pattern)?,
            capacity: wishes.capacity.map(|given| error::count("capacity", given)).transpose()?,
            policy: policy.map_err(|error| error::config(&error))?,
            on_lag,
            key: wishes.key.map(|key| key_function(slab, key)),
            snapshot: wishes.snapshot,
            start: wishes.start.map_or(Ok(Start::Now), start)?,
        };
        let joined = self.core.subscribe_with(options);
        if joined.is_ok() && wishes.envelope && self.ledger().begin_to_stamp() {
            // What a snapshot or a ring begins with was published before; nobody looked at the clock then.
            self.core.each_last(|topic, sequence, handle| {
                handle.mark().stamp(Stamp { sequence, topic, ..Stamp::default() });
            });
            self.core.each_kept(|topic, sequence, handle| {
                handle.mark().stamp(Stamp { sequence, topic, ..Stamp::default() });
            });
        }
        slab.bury(py);
        let core = joined.map_err(|error| error::subscribe(&error))?;
        let slab = self.slab.clone_ref(py);
        Ok(Inner::new(core, slab, on_lag, wishes.envelope))
    }
}

/// What `subscribe` and `subscribe_async` are asked for.
struct Wishes<'a, 'py> {
    pattern: Option<&'a str>,
    capacity: Option<&'a Bound<'py, PyAny>>,
    policy: Option<&'a str>,
    on_lag: &'a str,
    key: Option<Py<PyAny>>,
    snapshot: bool,
    start: Option<&'a Bound<'py, PyAny>>,
    name: Option<String>,
    envelope: bool,
}

pub(crate) fn on_lag(name: &str) -> PyResult<OnLag> {
    match name {
        "raise" => Ok(OnLag::Raise),
        "count" => Ok(OnLag::Count),
        other => Err(error::ConfigError::new_err(format!(
            "on_lag was {other:?}; it must be \"raise\" or \"count\""
        ))),
    }
}

fn start(given: &Bound<'_, PyAny>) -> PyResult<Start> {
    let wanted = "\"now\", \"oldest\" or a sequence, an int from 0 on";
    let Ok(name) = given.cast::<PyString>() else {
        return error::number("start", given, wanted, Some).map(Start::Sequence);
    };
    match name.to_str()? {
        "now" => Ok(Start::Now),
        "oldest" => Ok(Start::OldestKept),
        _ => Err(error::ConfigError::new_err(format!("start was {given:?}; it must be {wanted}"))),
    }
}

fn pattern(text: Option<&str>) -> PyResult<Option<Pattern>> {
    text.map(Pattern::new).transpose().map_err(|error| error::config(&error))
}

fn topic_name<'a, 'py>(topic: &'a Bound<'py, PyAny>) -> PyResult<&'a Bound<'py, PyString>> {
    topic.cast::<PyString>().map_err(|_| {
        PyTypeError::new_err(format!("topic was {topic:?}; it must be a str, a Topic or None"))
    })
}

enum ResolvedTopic {
    Object(Py<Topic>),
    Name(Arc<CoreTopic>),
}

impl std::ops::Deref for ResolvedTopic {
    type Target = CoreTopic;

    fn deref(&self) -> &CoreTopic {
        match self {
            Self::Object(topic) => &topic.get().0,
            Self::Name(topic) => topic,
        }
    }
}

/// A bus's numbers as `tickbus._metrics` reads them: published, dropped, mean depth, the buckets and
/// the sum of the publish latencies in nanoseconds, and the subscriptions.
pub(crate) type BusRow = (u64, u64, f64, Vec<(u64, u64)>, u64, Vec<SubscriptionRow>);

pub(crate) fn bus_row(metrics: EventBusMetrics) -> BusRow {
    let buckets = metrics.publish_latency.buckets.iter();
    (
        metrics.total_published,
        metrics.total_dropped,
        metrics.avg_queue_depth,
        buckets.map(|bucket| (nanoseconds(bucket.upper), bucket.count)).collect(),
        nanoseconds(metrics.publish_latency.sum),
        metrics.subscriptions.into_iter().map(row).collect(),
    )
}

/// An explanation as `tickbus._metrics` reads it: bus, closed, gating, the subscriptions, the text.
type ExplanationRow = (u64, bool, Vec<u64>, Vec<SubscriptionRow>, String);

/// A subscription's numbers as `tickbus._metrics` reads them: what it is, what it counts, what it
/// dropped, and how publishers stand to it; times in seconds.
pub(crate) type SubscriptionRow = (
    (u64, Option<String>, Option<String>, &'static str, usize),
    (u64, u64, u64, u64),
    (u64, u64, u64, u64, u64),
    bool,
    (Option<f64>, usize, Option<f64>, bool, bool),
);

fn row(row: SubscriptionMetrics) -> SubscriptionRow {
    let tickbus::Dropped { overwritten, refused, block_expired, conflated, closed } = row.dropped;
    let seconds = |duration: Option<Duration>| duration.as_ref().map(Duration::as_secs_f64);
    let is_gating = row.is_gating();
    (
        (row.id, row.name, row.pattern, row.policy.name(), row.capacity),
        (row.pending, row.peak_pending, row.offered, row.delivered),
        (overwritten, refused, block_expired, conflated, closed),
        row.exact,
        (
            seconds(row.oldest_age),
            row.waiting_publishers,
            seconds(row.full_for),
            row.is_passed_over,
            is_gating,
        ),
    )
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Why a publication ended without having been published.
enum Failure {
    Publish(PublishError<Handle>),
    /// A signal handler raised, or Python failed otherwise.
    Interrupted(PyErr),
}

impl From<PublishError<Handle>> for Failure {
    fn from(error: PublishError<Handle>) -> Self {
        Self::Publish(error)
    }
}

impl Failure {
    #[cold]
    fn into_error(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Publish(error) => error::publish(py, error),
            Self::Interrupted(error) => error,
        }
    }
}

#[cold]
fn warn_on_loop(py: Python<'_>, bus: u64) {
    let logged = py.import("logging").and_then(|logging| {
        logging.call_method1("getLogger", ("tickbus",))?.call_method1(
            "warning",
            (
                "bus %d had no room for a publish() on the thread of a running event loop, which \
                 never waits there: await publish_async() instead (reported once per bus)",
                bus,
            ),
        )
    });
    if let Err(error) = logged {
        error.write_unraisable(py, None);
    }
}

/// Returns what a list has at a place, without counting a reference to it.
#[inline]
fn item_at<'a, 'py>(
    list: &'a Bound<'py, PyList>,
    place: usize,
) -> Option<Borrowed<'a, 'py, PyAny>> {
    if place >= list.len() {
        return None;
    }
    // SAFETY: the list is as long as that, and holds the object until other Python code runs, which
    // no caller does as long as it has it.
    let item = unsafe {
        let item = ffi::PyList_GET_ITEM(list.as_ptr(), place.cast_signed());
        Borrowed::from_ptr(list.py(), item)
    };
    Some(item)
}

#[cold]
fn none_is_no_event() -> PyErr {
    PyTypeError::new_err("event was None; publish any other object: None means \"no event\"")
}

fn backpressure_config(config: &Bound<'_, PyAny>) -> PyResult<BackpressureConfig> {
    let py = config.py();
    let threshold = config.getattr(intern!(py, "warn_threshold"))?;
    let seconds = config.getattr(intern!(py, "max_block_duration"))?;
    Ok(BackpressureConfig {
        drop_oldest: config.getattr(intern!(py, "drop_oldest"))?.extract()?,
        warn_threshold: match threshold.is_none() {
            true => None,
            false => Some(error::count("warn_threshold", &threshold)?),
        },
        max_block_duration: error::duration("max_block_duration", &seconds)?,
    })
}

type BorrowedPublication<'a> = Publication<&'a Shared<Handle, Gil>, Handle, Gil>;
type OwnedPublication = Publication<Arc<Shared<Handle, Gil>>, Handle, Gil>;

/// What is known of a publication before it is pushed.
#[derive(Clone, Copy)]
struct Note {
    mark: Mark,
    topic: Option<u32>,
    called_at: Option<u64>,
    is_replayed: bool,
}

/// An event being published by a task.
pub(crate) struct PublishTask {
    /// Declared first: its handle ends before the bus, which holds the slab, may.
    publication: Option<Own<OwnedPublication>>,
    note: Note,
    bus: Py<EventBus>,
    deadline: Option<Instant>,
    sleep: Option<Sleep>,
}

/// A task waiting for room.
pub(crate) struct Sleep {
    /// The place in line; it holds the waker as long as it is kept.
    _notified: Own<Pin<Box<OwnedNotified>>>,
    waking: Arc<Waking>,
    timer: Py<PyAny>,
}

/// Wakes one task that waits for room, or for an event of a queue.
#[derive(Debug)]
pub(crate) struct Waking {
    wakeup: Py<Wakeup>,
    bridge: Py<LoopBridge>,
    called: GilFlag,
}

impl Waking {
    pub(crate) fn new(wakeup: Py<Wakeup>, bridge: Py<LoopBridge>) -> Self {
        Self { wakeup, bridge, called: GilFlag::default() }
    }

    /// Returns whether the loop was asked to wake it.
    pub(crate) fn was_called(&self) -> bool {
        self.called.is_set()
    }

    pub(crate) fn wakeup(&self) -> &Py<Wakeup> {
        &self.wakeup
    }

    pub(crate) fn bridge(&self) -> &Py<LoopBridge> {
        &self.bridge
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.wakeup)?;
        visit.call(&self.bridge)
    }
}

impl Wake for Waking {
    fn wake(self: Arc<Self>) {
        // SAFETY: an object bus is used by attached threads only, so its publishers are woken by
        // them.
        let py = unsafe { Python::assume_attached() };
        self.called.set();
        LoopBridge::schedule(&self.bridge, py, self.clone());
    }
}

impl Wakeable for Waking {
    fn collect(&self, py: Python<'_>, woken: &mut Woken) {
        if self.wakeup.get().wake() {
            woken.wakeups.push(self.wakeup.clone_ref(py));
        }
    }
}

impl PublishTask {
    pub(crate) fn poll(&mut self, py: Python<'_>) -> PyResult<Progress> {
        let bus = self.bus.get();
        bus.process().check()?;
        if self.deadline.is_none() && bus.ready_in_a_row.is_over() {
            return Ok(Progress::Yield);
        }
        let Some(publication) = &mut self.publication else {
            return Err(pyo3::exceptions::PyRuntimeError::new_err(
                "this publish_async() was ended before",
            ));
        };
        loop {
            let expired = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let patience = if expired { Patience::Spent } else { Patience::Left };
            bus.close_abandoned(py, publication);
            let result = match bus.poll(publication, patience, self.note) {
                Ok(Some(taken)) => Ok(taken),
                Ok(None) => {
                    settle(py);
                    let event_loop = running_loop(py)?;
                    let bridge = LoopBridge::of(&event_loop)?;
                    bridge.get().runs_here();
                    let patience = bus.core.backpressure().max_block_duration;
                    let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + patience);
                    let Some(notify) = publication.notify() else { continue };
                    let sleep = Sleep::start(notify, event_loop, bridge, deadline, Waker::from)?;
                    let Some(sleep) = sleep else { continue };
                    let wakeup = sleep.wakeup(py);
                    self.sleep = Some(sleep);
                    bus.ready_in_a_row.interrupt();
                    return Ok(Progress::Wait(wakeup));
                }
                Err(error) => Err(Failure::Publish(error)),
            };
            self.publication = None;
            let taken = bus.finish(py, result)?;
            return Ok(Progress::Done(taken.into_pyobject(py)?.into_any().unbind()));
        }
    }

    pub(crate) fn stop_waiting(&mut self, py: Python<'_>) {
        if let Some(sleep) = self.sleep.take() {
            sleep.end(py);
        }
    }

    /// Ends it: nobody has the event.
    pub(crate) fn abandon(&mut self, py: Python<'_>) {
        self.stop_waiting(py);
        if self.publication.take().is_some() {
            self.bus.get().settle_and_bury(py);
        }
    }

    /// Returns what the garbage collector must see.
    pub(crate) fn references(&self) -> [*mut pyo3::ffi::PyObject; 2] {
        let timer = self.sleep.as_ref().map_or(std::ptr::null_mut(), Sleep::timer);
        [self.bus.as_ptr(), timer]
    }
}

impl Sleep {
    /// Prepares to sleep until there may be room; `None` if that is already the case. `waker` makes
    /// what whoever frees the room wakes.
    pub(crate) fn start(
        notify: &Arc<Notify>,
        event_loop: Bound<'_, PyAny>,
        bridge: Py<LoopBridge>,
        deadline: Instant,
        waker: impl FnOnce(Arc<Waking>) -> Waker,
    ) -> PyResult<Option<Self>> {
        let py = event_loop.py();
        let wakeup = bridge.get().wakeup(py)?;
        let left = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        let left = left.into_pyobject(py)?.into_any();
        let ring = pyo3::wrap_pyfunction!(_ring, py)?.into_any();
        let arguments = [&event_loop, &left, &ring, wakeup.bind(py).as_any()];
        let timer = calls::call_method(intern!(py, "call_later"), arguments, None)?.unbind();
        let waking = Arc::new(Waking::new(wakeup, bridge));
        let mut notified = Box::pin(notify.clone().notified_owned());
        let waker = waker(waking.clone());
        match notified.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => {
                calls::call_method(intern!(py, "cancel"), [timer.bind(py)], None)?;
                Ok(None)
            }
            Poll::Pending => Ok(Some(Self { _notified: Own::new(notified), waking, timer })),
        }
    }

    pub(crate) fn wakeup(&self, py: Python<'_>) -> Py<Wakeup> {
        self.waking.wakeup.clone_ref(py)
    }

    pub(crate) fn timer(&self) -> *mut pyo3::ffi::PyObject {
        self.timer.as_ptr()
    }

    pub(crate) fn end(self, py: Python<'_>) {
        // Cancelling a timer of a closed loop fails; it will not ring either.
        let _ = calls::call_method(intern!(py, "cancel"), [self.timer.bind(py)], None);
    }
}

/// Wakes a task that waits for room, because its patience has ended.
#[pyfunction]
fn _ring(wakeup: &Bound<'_, Wakeup>) -> PyResult<()> {
    if wakeup.get().wake() { Wakeup::step(wakeup) } else { Ok(()) }
}
