//! `EventSystem`: compact events in three lanes.
//!
//! Events are bytes, so the lanes are locked by locks and not by the global interpreter lock: Rust
//! threads publish and read without it.

use crate::awaitable::{Job, Progress, awaitable};
use crate::batch::{self, EventBatch};
use crate::bus::{BusRow, Sleep, bus_row, on_lag};
use crate::error;
use crate::event::{self, PyEvent};
use crate::gil::GilCell;
use crate::line::{ReadByTasks, Sleepers, Streak};
use crate::loop_bridge::{FromAnyThread, LoopBridge, on_a_loop, running_loop, settle};
use crate::process::{Own, Process, no_pickle};
use crate::subscription::{
    Awaited, SIGNAL_SLICE, on_lag_name, refuse_on_a_loop, wait, warn_unclosed,
};
use crate::wakeup::Wakeup;
use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyStopAsyncIteration, PyTypeError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyList, PyString, PyWeakref, PyWeakrefMethods};
use std::ptr;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};
use tickbus::{
    CriticalOverflow, CriticalPublication, Event, EventSystem as Core, EventSystemConfig, Lane,
    OnLag, Parking, Patience, Pattern, SystemError, SystemSubscribeOptions,
    SystemSubscription as CoreSubscription, TakeError, WeakEventSystem,
};

/// Systems that are alive, to be closed at exit.
static SYSTEMS: GilCell<Vec<WeakEventSystem>> = GilCell::new(Vec::new());

/// Closes every system, so that threads that wait inside can leave before the interpreter ends.
pub(crate) fn close_all(py: Python<'_>) {
    let systems = SYSTEMS.with(std::mem::take);
    for system in systems.iter().filter_map(WeakEventSystem::upgrade) {
        system.close();
        settle(py);
    }
}

/// Leaves every system to the parent, in a child by `fork`.
pub(crate) fn forget_all() {
    std::mem::forget(SYSTEMS.with(std::mem::take));
}

/// Events that are published in one go: then others get a turn, and signals are looked at.
const STRETCH: usize = 16_384;

/// Carries compact events. `tickbus.EventSystem` is its public face.
#[pyclass(frozen, subclass, weakref, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct EventSystem {
    core: Own<Core>,
    /// What is called with each overflow of the critical lane.
    handler: GilCell<Option<Py<PyAny>>>,
    /// Subscriptions that tasks read, by id.
    on_loops: GilCell<Vec<(u64, Py<PyWeakref>)>>,
    ready_in_a_row: Streak,
}

#[pymethods]
impl EventSystem {
    #[new]
    #[pyo3(
        signature = (
            critical_capacity = None, high_capacity = None, normal_capacity = None, *,
            max_block_duration = None, max_topics = None, latency_sampling,
        ),
        text_signature = "(critical_capacity=1024, high_capacity=8192, normal_capacity=65536, *, \
            max_block_duration=1.0, max_topics=65536, latency_sampling)"
    )]
    fn new(
        critical_capacity: Option<&Bound<'_, PyAny>>,
        high_capacity: Option<&Bound<'_, PyAny>>,
        normal_capacity: Option<&Bound<'_, PyAny>>,
        max_block_duration: Option<&Bound<'_, PyAny>>,
        max_topics: Option<&Bound<'_, PyAny>>,
        latency_sampling: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let mut config = EventSystemConfig::default();
        for (name, given, number) in [
            ("critical_capacity", critical_capacity, &mut config.critical_capacity),
            ("high_capacity", high_capacity, &mut config.high_capacity),
            ("normal_capacity", normal_capacity, &mut config.normal_capacity),
            ("max_topics", max_topics, &mut config.max_topics),
        ] {
            if let Some(given) = given {
                *number = error::count(name, given)?;
            }
        }
        if let Some(seconds) = max_block_duration {
            config.max_block_duration = error::duration("max_block_duration", seconds)?;
        }
        config.latency_sampling = latency_sampling
            .map(|gap| error::count("latency_sampling", gap))
            .transpose()?
            .map(|gap| u32::try_from(gap).unwrap_or(u32::MAX));
        let core = Core::new(config).map_err(|error| error::config(&error))?;
        let weak = core.downgrade();
        SYSTEMS.with(|systems| {
            systems.retain(WeakEventSystem::is_alive);
            systems.push(weak);
        });
        let (handler, on_loops, ready_in_a_row) = Default::default();
        Ok(Self { core: Own::new(core), handler, on_loops, ready_in_a_row })
    }

    /// Events published so far in all lanes, wanted or not.
    #[getter]
    fn total_events(&self) -> u64 {
        self.core.total_events()
    }

    /// Events that wait to be read, over all subscriptions and lanes.
    #[getter]
    fn pending(&self) -> PyResult<u64> {
        self.process().check()?;
        Ok(self.core.pending())
    }

    /// Whether the system was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    /// Publishes an event and returns how many subscriptions took it.
    ///
    /// A critical event goes at once to every subscription with room. For the others it waits at
    /// most `max_block_duration`, with the global interpreter lock released; on a thread that runs
    /// an event loop it does not wait. High and normal events never wait.
    ///
    /// Raises:
    ///     CriticalOverflow: Some subscriptions miss a critical event; the others have it.
    ///     Closed: The system is closed; nobody has the event.
    ///     ConfigError: It is of one type and symbol too many; nobody has it.
    #[pyo3(signature = (event, /))]
    fn publish(&self, py: Python<'_>, event: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.process().check()?;
        let event = batch::event(event)?;
        let published = self.core.publish_ready(event);
        settle(py);
        match published {
            Ok(Some(taken)) => Ok(taken),
            Ok(None) => self.publish_slowly(py, event, &mut None),
            Err(error) => Err(error::system(py, error)),
        }
    }

    /// Publishes an event; for a critical one it waits at most `timeout` seconds for subscriptions
    /// without room.
    ///
    /// Raises:
    ///     CriticalOverflow: Some subscriptions miss a critical event; the others have it.
    ///     Closed: The system is closed; nobody has the event.
    ///     RuntimeError: The thread runs an event loop; nobody has the event.
    #[pyo3(signature = (event, /, timeout))]
    fn publish_timeout(
        &self,
        py: Python<'_>,
        event: &Bound<'_, PyAny>,
        timeout: &Bound<'_, PyAny>,
    ) -> PyResult<usize> {
        self.process().check()?;
        let (event, timeout) = (batch::event(event)?, error::duration("timeout", timeout)?);
        if on_a_loop(py)? {
            return Err(error::on_a_loop("publish_timeout()", "publish()"));
        }
        self.publish_slowly(py, event, &mut Some(Instant::now() + timeout))
    }

    /// Returns an awaitable that publishes an event and gives the number of subscriptions that
    /// took it. For a critical one it waits for those without room while the loop runs, at most
    /// `max_block_duration`. Cancelled before anybody has it, nobody will; otherwise those without
    /// room are told that they miss it.
    ///
    /// Raises:
    ///     CriticalOverflow: Some subscriptions miss a critical event; the others have it.
    ///     Closed: The system is closed; nobody has the event.
    #[pyo3(signature = (event, /))]
    fn publish_async(slf: &Bound<'_, Self>, event: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        slf.get().process().check()?;
        let task = CompactTask {
            event: Some(batch::event(event)?),
            publication: None,
            system: slf.clone().unbind(),
            deadline: None,
            sleep: None,
        };
        awaitable(slf.py(), Job::PublishCompact(Box::new(task)))
    }

    /// Publishes events in order, with one patience for all, and returns how many: all.
    ///
    /// Args:
    ///     events: An array whose dtype is `EVENT_DTYPE`, an `EventBatch`, or events.
    ///
    /// Raises:
    ///     CriticalOverflow: As `publish`; `.accepted` events were published before this one. Go on
    ///         with those after it: some have it.
    ///     Closed, ConfigError: As `publish`; `.accepted` says how many were published.
    #[pyo3(signature = (events, /))]
    fn publish_batch(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<usize> {
        self.process().check()?;
        let events = batch::in_memory(events)?;
        let mut deadline = None;
        let mut accepted = 0;
        loop {
            let (stretch, is_last) = batch::with_events(&events, |events| {
                let left = &events[accepted.min(events.len())..];
                let stretch = &left[..left.len().min(STRETCH)];
                (self.publish_ready(stretch), left.len() == stretch.len())
            })?;
            accepted += stretch.accepted;
            settle(py);
            let published = match stretch.stopped_at {
                None if is_last => return Ok(accepted),
                None => py.detach(|| Ok(())).and_then(|()| py.check_signals()),
                Some(Ok(event)) => self.publish_slowly(py, event, &mut deadline).map(|_| {
                    accepted += 1;
                }),
                Some(Err(error)) => Err(error::system(py, error)),
            };
            if let Err(error) = published {
                let _ = error.value(py).setattr(intern!(py, "accepted"), accepted);
                return Err(error);
            }
            self.process().check()?;
        }
    }

    /// Returns a subscription read by threads. An event is wanted if it meets each argument that is
    /// given, by any item of it.
    ///
    /// Args:
    ///     types: Event types that it wants, by name or code.
    ///     topics: Patterns over topics that it wants, as in "price_update.*".
    ///     symbols: Symbols that it wants, by name or number.
    ///     on_lag: Whether missed events are told by `Lagged` ("raise") or only counted ("count").
    ///     name: What metrics call it, unique among the system's subscriptions.
    ///
    /// Raises:
    ///     ConfigError: An argument has no items, or one without a name, or is no pattern.
    ///     Closed: The system is closed.
    #[pyo3(signature = (
        types = None, topics = None, symbols = None, *, on_lag = "raise", name = None
    ))]
    fn subscribe(
        &self,
        types: Option<&Bound<'_, PyAny>>,
        topics: Option<&Bound<'_, PyAny>>,
        symbols: Option<&Bound<'_, PyAny>>,
        on_lag: &str,
        name: Option<String>,
    ) -> PyResult<SystemSubscription> {
        let inner = self.join(types, topics, symbols, on_lag, name)?;
        Ok(SystemSubscription { inner })
    }

    /// Returns a subscription read by tasks of an event loop; the arguments are `subscribe`'s.
    ///
    /// Raises:
    ///     ConfigError: An argument has no items, or one without a name, or is no pattern.
    ///     Closed: The system is closed.
    #[pyo3(signature = (
        types = None, topics = None, symbols = None, *, on_lag = "raise", name = None
    ))]
    fn subscribe_async(
        &self,
        py: Python<'_>,
        types: Option<&Bound<'_, PyAny>>,
        topics: Option<&Bound<'_, PyAny>>,
        symbols: Option<&Bound<'_, PyAny>>,
        on_lag: &str,
        name: Option<String>,
    ) -> PyResult<Py<AsyncSystemSubscription>> {
        let inner = self.join(types, topics, symbols, on_lag, name)?;
        let subscription = AsyncSystemSubscription::create(py, inner)?;
        self.watch(subscription.bind(py))?;
        Ok(subscription)
    }

    /// Has `handler` called with every `CriticalOverflow` instead of raising it in the publisher.
    ///
    /// The handler runs in the publisher's thread. What it returns, a number or `None`, is added to
    /// what `publish` returns; what it raises, `publish` raises.
    ///
    /// Args:
    ///     handler: A function of the overflow; `None` raises again.
    #[pyo3(signature = (handler, /))]
    fn handle_critical_overflow(&self, handler: Option<Py<PyAny>>) -> PyResult<()> {
        self.process().check()?;
        drop(self.handler.with(|known| std::mem::replace(known, handler)));
        Ok(())
    }

    /// Closes the system and waits until everything pending was read.
    ///
    /// Args:
    ///     timeout: The longest wait in seconds; `None` waits for ever.
    ///
    /// Returns:
    ///     Events that are still pending; 0 means drained.
    ///
    /// Raises:
    ///     RuntimeError: The thread runs an event loop; the system is as it was.
    #[pyo3(signature = (timeout = None))]
    fn drain(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        self.process().check()?;
        if on_a_loop(py)? {
            return Err(error::on_a_loop("drain()", "aclose(drain=...)"));
        }
        let timeout = timeout.map(|seconds| error::duration("timeout", seconds)).transpose()?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        self.close(py)?;
        loop {
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            let slice = left.map_or(SIGNAL_SLICE, |left| left.min(SIGNAL_SLICE));
            let pending = py.detach(|| self.core.drain(Some(slice)));
            if pending == 0 || left == Some(Duration::ZERO) {
                return Ok(pending);
            }
            py.check_signals().and_then(|()| self.process().check())?;
        }
    }

    /// Ends publishing at once; readers first read what is pending. Again does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.process().check()?;
        self.core.close();
        settle(py);
        Ok(())
    }

    fn _metrics(&self) -> PyResult<[BusRow; 3]> {
        self.process().check()?;
        let metrics = self.core.metrics();
        Ok([metrics.critical, metrics.high, metrics.normal].map(bus_row))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let core = &slf.get().core;
        let class = slf.get_type().name()?;
        if !core.process().is_current() {
            return Ok(format!("<{class} of another process>"));
        }
        let closed = if core.is_closed() { " closed" } else { "" };
        let (total, pending) = (core.total_events(), core.pending());
        Ok(format!("<{class} total_events={total} pending={pending}{closed}>"))
    }

    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<()> {
        let class = slf.get_type().name()?;
        Err(no_pickle(&class.to_string_lossy(), "make one in each, and send it what to publish"))
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
        // A forked child leaves the system to its parent.
        let _ = self.close(py);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.handler.with(|handler| visit.call(&*handler))
    }

    fn __clear__(&self) {
        drop(self.handler.with(Option::take));
    }
}

/// How far a stretch of events came.
struct Stretch {
    accepted: usize,
    /// The event for which it would have to wait, or why it could not go on.
    stopped_at: Option<Result<Event, SystemError>>,
}

impl EventSystem {
    #[inline]
    pub(crate) fn process(&self) -> Process {
        self.core.process()
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// Publishes events up to one that decides something.
    fn publish_ready(&self, events: &[Event]) -> Stretch {
        let mut accepted = 0;
        let stopped_at = loop {
            let Some(&next) = events.get(accepted) else { break None };
            match self.core.publish_stretch(&events[accepted..]) {
                Ok(0) => break Some(Ok(next)),
                Ok(published) => accepted += published,
                Err(error) => break Some(Err(error)),
            }
        };
        Stretch { accepted, stopped_at }
    }

    /// Publishes an event, waiting as long as is configured if there is no deadline yet.
    #[inline(never)]
    fn publish_slowly(
        &self,
        py: Python<'_>,
        event: Event,
        deadline: &mut Option<Instant>,
    ) -> PyResult<usize> {
        if event.lane() != Lane::Critical {
            let published = self.core.publish(event);
            settle(py);
            return published.map_err(|error| error::system(py, error));
        }
        let publication = self.core.publication(event);
        let mut publication = Own::new(publication.map_err(|error| error::system(py, error))?);
        self.close_abandoned(py, &publication);
        let patience = publication.patience();
        let end = || *deadline.get_or_insert_with(|| Instant::now() + patience);
        match wait_for_room(py, &mut publication, end) {
            Err(Failure::Told(error)) => self.overflowed(py, error),
            result => result.map_err(|failure| failure.into_error(py)),
        }
    }

    /// Hands an overflow to its handler, if there is one.
    #[cold]
    fn overflowed(&self, py: Python<'_>, error: SystemError) -> PyResult<usize> {
        let taken = match &error {
            SystemError::Overflow(overflow) => Some(overflow.taken()),
            _ => None,
        };
        let error = error::system(py, error);
        let handler = self.handler.with(|handler| handler.as_ref().map(|h| h.clone_ref(py)));
        let (Some(taken), Some(handler)) = (taken, handler) else { return Err(error) };
        let more = handler.bind(py).call1((error.value(py),))?;
        if more.is_none() {
            return Ok(taken);
        }
        let more = error::whole("what the handler returned", &more, 0..=usize::MAX - taken)?;
        Ok(taken + more)
    }

    /// Closes the subscriptions without room for an event whose event loop has ended: nobody is
    /// left to read them, and nothing shall wait for them.
    fn close_abandoned(&self, py: Python<'_>, publication: &CriticalPublication) {
        if self.on_loops.with(|known| known.is_empty()) {
            return;
        }
        let full = publication.without_room();
        let full: Vec<Py<PyWeakref>> = self.on_loops.with(|known| {
            let full = known.iter().filter(|(id, _)| full.contains(id));
            full.map(|(_, weak)| weak.clone_ref(py)).collect()
        });
        for subscription in full.iter().filter_map(|weak| weak.bind(py).upgrade()) {
            if let Ok(subscription) = subscription.cast_into::<AsyncSystemSubscription>() {
                subscription.get().close_if_loop_is_over(py);
            }
        }
    }

    /// Keeps a subscription in sight without keeping it alive, and forgets those that are gone.
    fn watch(&self, subscription: &Bound<'_, AsyncSystemSubscription>) -> PyResult<()> {
        let py = subscription.py();
        let Some(weak) = subscription.get().sleepers().weak(py) else { return Ok(()) };
        let mut known = self.on_loops.with(std::mem::take);
        known.retain(|(_, weak)| weak.bind(py).upgrade().is_some());
        known.push((subscription.get().core().id(), weak));
        // Looking runs no Python code, dropping may: another thread may have added some.
        self.on_loops.with(|others| {
            known.append(others);
            *others = known;
        });
        Ok(())
    }

    fn join(
        &self,
        types: Option<&Bound<'_, PyAny>>,
        topics: Option<&Bound<'_, PyAny>>,
        symbols: Option<&Bound<'_, PyAny>>,
        lag: &str,
        name: Option<String>,
    ) -> PyResult<Inner> {
        self.process().check()?;
        let on_lag = on_lag(lag)?;
        let pattern = |item: &Bound<'_, PyAny>| {
            let text = item.cast::<PyString>().map_err(|_| {
                PyTypeError::new_err(format!("topics had {item:?}; it must be a pattern, a str"))
            })?;
            Pattern::new(text.to_str()?).map_err(|error| error::config(&error))
        };
        let options = SystemSubscribeOptions {
            types: items("types", types, event::event_type)?,
            topics: items("topics", topics, pattern)?,
            symbols: items("symbols", symbols, event::symbol)?,
            name,
            on_lag,
        };
        let core = self.core.subscribe(options).map_err(|error| error::subscribe(&error))?;
        Ok(Inner { core: Own::new(core), on_lag })
    }
}

/// Returns what an argument wants: one item, or each of several.
pub(crate) fn items<'py, O>(
    argument: &str,
    given: Option<&Bound<'py, PyAny>>,
    item: impl Fn(&Bound<'py, PyAny>) -> PyResult<O>,
) -> PyResult<Vec<O>> {
    let Some(given) = given else { return Ok(Vec::new()) };
    // What no field of an event can hold is out of range here.
    let item = |each: &Bound<'py, PyAny>| {
        item(each).map_err(|error| match error.is_instance_of::<PyOverflowError>(each.py()) {
            true => error::ConfigError::new_err(error.value(each.py()).to_string()),
            false => error,
        })
    };
    // A name is not iterated over.
    if given.is_instance_of::<PyString>() || given.is_instance_of::<PyInt>() {
        return Ok(vec![item(given)?]);
    }
    let found = given.try_iter()?.map(|each| item(&each?)).collect::<PyResult<Vec<O>>>()?;
    match found.is_empty() {
        true => Err(error::ConfigError::new_err(format!(
            "{argument} had no items; leave it out to want them all"
        ))),
        false => Ok(found),
    }
}

/// Why a critical event did not come to all.
enum Failure {
    Told(SystemError),
    /// A signal handler raised, or Python failed otherwise.
    Interrupted(PyErr),
}

impl Failure {
    #[cold]
    fn into_error(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Told(error) => error::system(py, error),
            Self::Interrupted(error) => error,
        }
    }
}

/// Publishes a critical event, parking the thread without the global interpreter lock while some
/// have no room; where an event loop would stand still, not at all.
#[cold]
fn wait_for_room(
    py: Python<'_>,
    publication: &mut Own<CriticalPublication>,
    deadline: impl FnOnce() -> Instant,
) -> Result<usize, Failure> {
    let waits = !on_a_loop(py).map_err(Failure::Interrupted)?;
    let deadline = if waits { deadline() } else { Instant::now() };
    loop {
        let now = Instant::now();
        let patience = if waits && now < deadline { Patience::Left } else { Patience::Spent };
        let published = publication.poll(patience);
        settle(py);
        if let Some(taken) = published.map_err(Failure::Told)? {
            return Ok(taken);
        }
        let until = deadline.min(now + SIGNAL_SLICE);
        let parked = &**publication;
        py.detach(|| parked.park(Some(until)));
        // A signal handler may have forked.
        let checked = py.check_signals().and_then(|()| publication.process().check());
        checked.map_err(Failure::Interrupted)?;
    }
}

/// What is left of a critical event: behind `tickbus.CriticalOverflow`.
#[pyclass(frozen, module = "tickbus._core", name = "_Overflow")]
#[derive(Debug)]
pub(crate) struct Overflow {
    core: Own<CriticalOverflow>,
}

impl Overflow {
    pub(crate) fn new(core: CriticalOverflow) -> Self {
        Self { core: Own::new(core) }
    }
}

#[pymethods]
impl Overflow {
    /// Publishes the event again to those that miss it, and returns how many took it.
    fn retry(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
        self.core.process().check()?;
        let timeout = timeout.map(|seconds| error::duration("timeout", seconds)).transpose()?;
        let timeout = timeout.unwrap_or(self.core.patience());
        let mut publication = Own::new(self.core.publication());
        wait_for_room(py, &mut publication, || Instant::now() + timeout)
            .map_err(|failure| failure.into_error(py))
    }
}

/// What both kinds of subscription are made of.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) core: Own<CoreSubscription>,
    on_lag: OnLag,
}

impl Awaited for CoreSubscription {
    fn sleep_unless_ready(&self, sleep: impl FnOnce(&mut Parking<'_, '_>)) {
        self.sleep_unless_ready(sleep);
    }

    fn pass_on(&self) {
        self.pass_on();
    }
}

impl Inner {
    #[inline]
    fn process(&self) -> Process {
        self.core.process()
    }

    /// Takes the next event; `None` if there is none yet.
    #[inline]
    fn take(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.process().check()?;
        match told(py, self.core.try_recv())? {
            Some(event) => Ok(Some(PyEvent(event).object(py)?.into_any().unbind())),
            None => Ok(None),
        }
    }

    /// Gives up to `limit` events to `sink`; `None` if there is none yet.
    fn take_each(
        &self,
        py: Python<'_>,
        limit: usize,
        sink: impl FnMut(Event),
    ) -> PyResult<Option<usize>> {
        self.process().check()?;
        told(py, self.core.try_recv_each(limit, sink))
    }

    /// Takes up to `limit` events; `None` if there is none yet.
    fn take_batch(&self, py: Python<'_>, limit: usize) -> PyResult<Option<Vec<Event>>> {
        let mut events = Vec::with_capacity(limit.min(self.core.pending()));
        let taken = self.take_each(py, limit, |event| events.push(event))?;
        Ok(taken.map(|_| events))
    }

    /// Writes what is there into an array; `None` if there is nothing yet.
    fn take_into(&self, py: Python<'_>, places: &batch::Array) -> PyResult<Option<usize>> {
        let mut place = 0;
        self.take_each(py, places.length, |event| {
            places.write(place, event);
            place += 1;
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.process().check()?;
        self.core.close();
        settle(py);
        Ok(())
    }

    fn describe(&self, class: &str) -> String {
        if !self.process().is_current() {
            return format!("<{class} of another process>");
        }
        let pattern = self.core.pattern().map_or(String::new(), |p| format!(" pattern={p}"));
        let closed = if self.core.is_closed() { " closed" } else { "" };
        format!("<{class} id={}{pattern} pending={}{closed}>", self.core.id(), self.core.pending())
    }

    fn end(&self, class: &str) {
        if self.process().is_current() && !self.core.is_closed() {
            warn_unclosed(&self.describe(class));
        }
    }
}

/// Returns what was taken; `None` if there is nothing yet.
#[inline]
fn told<O>(py: Python<'_>, taken: Result<O, TakeError>) -> PyResult<Option<O>> {
    // A publisher in line was told of room.
    settle(py);
    match taken {
        Ok(taken) => Ok(Some(taken)),
        Err(TakeError::Empty) => Ok(None),
        Err(TakeError::Lagged(lagged)) => Err(error::lane_lagged(py, lagged)),
        Err(_) => Err(error::closed(py)),
    }
}

/// Returns the places of an array that events can be written into.
fn places_of(array: &Bound<'_, PyAny>) -> PyResult<batch::Array> {
    let places = batch::Array::of(array, ffi::PyBUF_STRIDES | ffi::PyBUF_WRITABLE)?;
    match places.length {
        0 => Err(error::ConfigError::new_err("the array had no places; it must have at least 1")),
        _ => Ok(places),
    }
}

fn batch(py: Python<'_>, events: Vec<Event>) -> PyResult<Py<PyAny>> {
    Ok(Bound::new(py, EventBatch::of(events))?.into_any().unbind())
}

fn array(py: Python<'_>, events: Vec<Event>) -> PyResult<Py<PyAny>> {
    EventBatch::to_numpy(&Bound::new(py, EventBatch::of(events))?).map(Bound::unbind)
}

fn list(py: Python<'_>, events: Vec<Event>) -> PyResult<Py<PyAny>> {
    let events: Vec<_> =
        events.into_iter().map(|event| PyEvent(event).object(py)).collect::<PyResult<_>>()?;
    Ok(PyList::new(py, events)?.into_any().unbind())
}

macro_rules! common {
    ($name:ident $(, $extra:item)*) => {
        #[pymethods]
        impl $name {
            /// The subscription's number, unique in its system and the same in all lanes.
            #[getter]
            fn id(&self) -> u64 {
                self.inner.core.id()
            }

            /// What metrics call it, if it was given a name.
            #[getter]
            fn name(&self) -> Option<&str> {
                self.inner.core.name()
            }

            /// What it wants, as a pattern over the topics of events; `None` wants everything.
            #[getter]
            fn pattern(&self) -> Option<String> {
                self.inner.core.pattern().map(ToString::to_string)
            }

            /// What the reader is told about missed events: `raise` or `count`.
            #[getter]
            fn on_lag(&self) -> &'static str {
                on_lag_name(self.inner.on_lag)
            }

            /// Events waiting to be read, in all lanes.
            #[getter]
            fn pending(&self) -> PyResult<usize> {
                self.inner.process().check()?;
                Ok(self.inner.core.pending())
            }

            /// Whether the subscription or its system was closed.
            #[getter]
            fn closed(&self) -> bool {
                self.inner.core.is_closed()
            }

            /// Returns the next event, or `None` if none is pending.
            ///
            /// Raises:
            ///     Lagged: Events of a lane are missing here; receive again to go on.
            ///     Closed: Everything was read.
            fn try_recv(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
                self.inner.take(py)
            }

            fn __repr__(&self) -> String {
                self.inner.describe(stringify!($name))
            }

            fn __reduce__(&self) -> PyResult<()> {
                Err(no_pickle(stringify!($name), "make a system in each and subscribe there"))
            }

            $($extra)*
        }
    };
}

/// A subscription of an event system, read by threads: what is critical comes first, then what is
/// high, then the rest.
///
/// Waiting releases the global interpreter lock and answers Ctrl-C. Readers in several threads
/// compete: each event goes to exactly one of them. Iterating ends when the subscription is closed
/// and read.
#[pyclass(frozen, weakref, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct SystemSubscription {
    pub(crate) inner: Inner,
}

impl Drop for SystemSubscription {
    fn drop(&mut self) {
        self.inner.end("SystemSubscription");
    }
}

impl SystemSubscription {
    /// Waits until `take` gives something.
    fn wait<O>(
        &self,
        py: Python<'_>,
        call: &str,
        take: impl FnMut() -> PyResult<Option<O>>,
    ) -> PyResult<O> {
        refuse_on_a_loop(py, call)?;
        wait(py, &self.inner.core, None, take)?.ok_or_else(|| error::closed(py))
    }

    fn wait_for_batch(
        &self,
        py: Python<'_>,
        call: &str,
        limit: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<Event>> {
        let limit = error::count("limit", limit)?;
        self.wait(py, call, || self.inner.take_batch(py, limit))
    }
}

common!(
    SystemSubscription,
    /// Waits for the next event.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.wait(py, "recv()", || self.inner.take(py))
    },
    /// Waits for the next event, at most `timeout` seconds.
    ///
    /// Raises:
    ///     ReceiveTimeout: No event came in time.
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv_timeout(&self, py: Python<'_>, timeout: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        refuse_on_a_loop(py, "recv_timeout()")?;
        let deadline = Instant::now() + error::duration("timeout", timeout)?;
        let taken = wait(py, &self.inner.core, Some(deadline), || self.inner.take(py))?;
        taken.ok_or_else(|| {
            error::ReceiveTimeout::new_err(format!(
                "no event came within {timeout} s; the subscription is unchanged"
            ))
        })
    },
    /// Waits for an event, then takes what is there, up to `limit` events, into a list. A batch
    /// ends before a hole.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv_many(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        list(py, self.wait_for_batch(py, "recv_many()", limit)?)
    },
    /// As `recv_many`, into an `EventBatch`.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv_batch(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        batch(py, self.wait_for_batch(py, "recv_batch()", limit)?)
    },
    /// As `recv_many`, into a read-only array of shape (n,) whose dtype is `EVENT_DTYPE`.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv_array(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        array(py, self.wait_for_batch(py, "recv_array()", limit)?)
    },
    /// Waits for an event, then writes what is there into an array, from its begin, and returns how
    /// many it wrote. A batch ends before a hole.
    ///
    /// Args:
    ///     array: A writable array of shape (n,), n at least 1, whose dtype is `EVENT_DTYPE`.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    #[pyo3(signature = (array, /))]
    fn recv_into(&self, py: Python<'_>, array: &Bound<'_, PyAny>) -> PyResult<usize> {
        let places = places_of(array)?;
        self.wait(py, "recv_into()", || self.inner.take_into(py, &places))
    },
    /// Leaves the system; pending events are counted as `closed`. Again does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.close(py)
    },
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    },
    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        match self.recv(py) {
            Ok(event) => Ok(Some(event)),
            Err(error) if error::is_end(py, &error) => Ok(None),
            Err(error) => Err(error),
        }
    },
    fn __enter__(slf: Py<Self>) -> PyResult<Py<Self>> {
        slf.get().inner.process().check()?;
        Ok(slf)
    },
    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) {
        let _ = (exc_type, exc_value, traceback);
        // A forked child leaves the subscription to its parent.
        let _ = self.inner.close(py);
    }
);

/// An event being published by a task.
pub(crate) struct CompactTask {
    /// Not published yet.
    event: Option<Event>,
    /// It is critical, and has to wait.
    publication: Option<Own<CriticalPublication>>,
    system: Py<EventSystem>,
    deadline: Option<Instant>,
    sleep: Option<Sleep>,
}

impl CompactTask {
    pub(crate) fn poll(&mut self, py: Python<'_>) -> PyResult<Progress> {
        let system = self.system.get();
        system.process().check()?;
        let done = |taken: usize| Ok(Progress::Done(taken.into_pyobject(py)?.into_any().unbind()));
        if let Some(event) = self.event {
            if system.ready_in_a_row.is_over() {
                return Ok(Progress::Yield);
            }
            self.event = None;
            let published = system.core.publish_ready(event);
            settle(py);
            match published.map_err(|error| error::system(py, error))? {
                Some(taken) => return done(taken),
                None => {
                    let publication = system.core.publication(event);
                    let publication = publication.map_err(|error| error::system(py, error))?;
                    self.publication = Some(Own::new(publication));
                }
            }
        }
        let Some(publication) = &mut self.publication else {
            return Err(PyRuntimeError::new_err("this publish_async() was ended before"));
        };
        loop {
            system.close_abandoned(py, publication);
            let expired = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let patience = if expired { Patience::Spent } else { Patience::Left };
            let published = publication.poll(patience);
            settle(py);
            match published {
                Ok(Some(taken)) => {
                    self.publication = None;
                    return done(taken);
                }
                Err(error) => {
                    self.publication = None;
                    return done(system.overflowed(py, error)?);
                }
                Ok(None) => {}
            }
            let event_loop = running_loop(py)?;
            let bridge = LoopBridge::of(&event_loop)?;
            bridge.get().runs_here();
            let patience = publication.patience();
            let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + patience);
            let Some(notify) = publication.notify() else { continue };
            // Whoever reads may be a thread that is not attached.
            let signal = bridge.clone_ref(py);
            let sleep = Sleep::start(notify, event_loop, bridge, deadline, |waking| {
                let waker = FromAnyThread::new(waking);
                waker.bind(signal.get());
                Waker::from(waker)
            })?;
            let Some(sleep) = sleep else { continue };
            let wakeup = sleep.wakeup(py);
            self.sleep = Some(sleep);
            system.ready_in_a_row.interrupt();
            return Ok(Progress::Wait(wakeup));
        }
    }

    pub(crate) fn stop_waiting(&mut self, py: Python<'_>) {
        if let Some(sleep) = self.sleep.take() {
            sleep.end(py);
        }
    }

    /// Ends it: nobody else gets the event.
    pub(crate) fn abandon(&mut self, py: Python<'_>) {
        self.stop_waiting(py);
        self.event = None;
        if self.publication.take().is_some() {
            settle(py);
        }
    }

    /// Returns what the garbage collector must see.
    pub(crate) fn references(&self) -> [*mut ffi::PyObject; 2] {
        let timer = self.sleep.as_ref().map_or(ptr::null_mut(), Sleep::timer);
        [self.system.as_ptr(), timer]
    }
}

/// In which form a task wants what comes.
pub(crate) enum Form {
    /// One event; `Closed` at the end.
    One,
    /// One event; `StopAsyncIteration` at the end.
    Next,
    /// A list of up to so many.
    Many(usize),
    /// A batch of up to so many.
    Batch(usize),
    /// An array of up to so many.
    Array(usize),
    /// As many as have a place in this array.
    Into(Py<PyAny>),
}

impl Form {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::One => "recv",
            Self::Next => "__anext__",
            Self::Many(_) => "recv_many",
            Self::Batch(_) => "recv_batch",
            Self::Array(_) => "recv_array",
            Self::Into(_) => "recv_into",
        }
    }
}

/// A subscription of an event system, read by tasks of one event loop: what is critical comes first,
/// then what is high, then the rest.
///
/// What `recv()` and its like return can be awaited, and given to `asyncio.create_task`, `TaskGroup`,
/// `wait_for` and `gather` directly. Cancelling it loses nothing. Tasks compete: each event goes to
/// exactly one of them, first come first served. It can be made outside a loop, and belongs to the
/// loop that first waits for it until that one is closed. A Rust thread that publishes wakes its
/// loop without the global interpreter lock.
#[pyclass(frozen, weakref, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct AsyncSystemSubscription {
    inner: Inner,
    sleepers: Arc<Sleepers>,
    waker: Arc<FromAnyThread<Arc<Sleepers>>>,
    ready_in_a_row: Streak,
}

impl Drop for AsyncSystemSubscription {
    fn drop(&mut self) {
        self.inner.end("AsyncSystemSubscription");
    }
}

impl AsyncSystemSubscription {
    fn create(py: Python<'_>, inner: Inner) -> PyResult<Py<Self>> {
        let sleepers = Arc::<Sleepers>::default();
        let waker = FromAnyThread::new(sleepers.clone());
        let is_set = inner.core.set_waker(Waker::from(waker.clone()));
        is_set.map_err(|refused| error::config(&refused))?;
        let this =
            Self { inner, sleepers: sleepers.clone(), waker, ready_in_a_row: Streak::default() };
        let subscription = Py::new(py, this)?;
        sleepers.belong_to(subscription.bind(py).as_any())?;
        Ok(subscription)
    }

    pub(crate) fn poll_form(&self, py: Python<'_>, form: &Form) -> PyResult<Progress> {
        let batched = |limit: usize, make: fn(Python<'_>, Vec<Event>) -> PyResult<Py<PyAny>>| {
            self.poll(py, || {
                self.inner.take_batch(py, limit)?.map(|events| make(py, events)).transpose()
            })
        };
        match form {
            Form::One => self.poll(py, || self.inner.take(py)),
            Form::Next => self.poll(py, || match self.inner.take(py) {
                Err(error) if error::is_end(py, &error) => Err(PyStopAsyncIteration::new_err(())),
                result => result,
            }),
            Form::Many(limit) => batched(*limit, list),
            Form::Batch(limit) => batched(*limit, batch),
            Form::Array(limit) => batched(*limit, array),
            Form::Into(places) => self.poll(py, || {
                // Looked at anew: while it waited the array could change its size.
                let Some(taken) = self.inner.take_into(py, &places_of(places.bind(py))?)? else {
                    return Ok(None);
                };
                Ok(Some(taken.into_pyobject(py)?.into_any().unbind()))
            }),
        }
    }
}

impl ReadByTasks for AsyncSystemSubscription {
    type Core = CoreSubscription;

    fn core(&self) -> &Own<CoreSubscription> {
        &self.inner.core
    }

    fn sleepers(&self) -> &Sleepers {
        &self.sleepers
    }

    fn ready_in_a_row(&self) -> &Streak {
        &self.ready_in_a_row
    }

    fn wake(&self) {
        std::task::Wake::wake_by_ref(&self.waker);
    }

    fn close(&self, py: Python<'_>) {
        // Publishers have checked the process.
        let _ = self.inner.close(py);
    }

    fn bound_to(&self, bridge: &LoopBridge) {
        self.waker.bind(bridge);
    }
}

common!(
    AsyncSystemSubscription,
    /// Returns an awaitable for the next event.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    fn recv(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Take(slf, Form::One))
    },
    /// Returns an awaitable for a list: it waits for an event, then takes what is there, up to
    /// `limit` events. A batch ends before a hole.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    fn recv_many(slf: Py<Self>, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Take(slf, Form::Many(error::count("limit", limit)?)))
    },
    /// As `recv_many`, for an `EventBatch`.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    fn recv_batch(slf: Py<Self>, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Take(slf, Form::Batch(error::count("limit", limit)?)))
    },
    /// As `recv_many`, for a read-only array of shape (n,) whose dtype is `EVENT_DTYPE`.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    fn recv_array(slf: Py<Self>, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Take(slf, Form::Array(error::count("limit", limit)?)))
    },
    /// Returns an awaitable that waits for an event, then writes what is there into an array, from
    /// its begin, and gives how many it wrote. A batch ends before a hole.
    ///
    /// Args:
    ///     array: A writable array of shape (n,), n at least 1, whose dtype is `EVENT_DTYPE`.
    ///
    /// Raises:
    ///     Lagged: Events of a lane are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    #[pyo3(signature = (array, /))]
    fn recv_into(slf: Py<Self>, array: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        places_of(array)?;
        awaitable(array.py(), Job::Take(slf, Form::Into(array.clone().unbind())))
    },
    /// Leaves the system; pending events are counted as `closed`. Again does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.close(py)
    },
    /// For other loops than those of asyncio: returns a wake-up to wait for, which the loop's
    /// `call_soon_threadsafe` brings, or `None` if something has come. Leave it afterwards.
    fn _join(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<Option<Py<Wakeup>>> {
        self.stand_in_line(&self.bind(event_loop)?)
    },
    /// Leaves the line; whoever stands next is woken if there is something for it.
    fn _leave(&self, py: Python<'_>, wakeup: Py<Wakeup>) {
        self.leave_line(py, &wakeup);
        self.wake_next(py);
    },
    /// Closes, for `async` code.
    fn aclose(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.inner.close(py)?;
        awaitable(py, Job::Ready(py.None()))
    },
    fn __aiter__(slf: Py<Self>) -> Py<Self> {
        slf
    },
    fn __anext__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Take(slf, Form::Next))
    },
    fn __aenter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        slf.get().inner.process().check()?;
        awaitable(py, Job::Ready(slf.into_any()))
    },
    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __aexit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let _ = (exc_type, exc_value, traceback);
        // A forked child leaves the subscription to its parent.
        let _ = self.inner.close(py);
        awaitable(py, Job::Ready(py.None()))
    },
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.sleepers.traverse(&visit)
    }
);
