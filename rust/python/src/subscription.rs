//! `EventSubscription` for threads and `AsyncEventSubscription` for event loops.

use crate::awaitable::{Job, Progress, awaitable};
use crate::error;
use crate::gil::{Gil, GilCell};
use crate::line::{ReadByTasks, Sleepers, Streak};
use crate::loop_bridge::{on_a_loop, settle};
use crate::process::{Own, Process, no_pickle};
use crate::slab::{Handle, Slab};
use crate::tally::Tally;
use crate::wakeup::Wakeup;
use pyo3::exceptions::PyResourceWarning;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};
use tickbus::{EventSubscription as CoreSubscription, OnLag, Parking, TryRecvError};

/// The longest that a blocked thread stays away from pending signals.
pub(crate) const SIGNAL_SLICE: Duration = Duration::from_millis(40);

pub(crate) type Core = CoreSubscription<Handle, Gil>;

/// What both kinds of subscription are made of. The core goes first: its handles end before the
/// slab may.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) core: Own<Core>,
    slab: Py<Slab>,
    on_lag: OnLag,
    /// Whether events are given in envelopes.
    envelope: bool,
    /// Who counts what it reads.
    tally: GilCell<Option<Py<Tally>>>,
}

impl Inner {
    pub(crate) fn new(core: Core, slab: Py<Slab>, on_lag: OnLag, envelope: bool) -> Self {
        Self { core: Own::new(core), slab, on_lag, envelope, tally: GilCell::default() }
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.slab)?;
        self.tally.with(|tally| visit.call(&*tally))
    }

    /// Has what it reads counted.
    pub(crate) fn count_in(&self, tally: Py<Tally>) {
        drop(self.tally.with(|known| known.replace(tally)));
    }

    /// Returns the object that a reader gets; `None` if the garbage collector has ended the bus.
    #[inline]
    fn object(&self, py: Python<'_>, handle: Handle) -> PyResult<Option<Py<PyAny>>> {
        match self.envelope {
            false => Ok(handle.into_object(py)),
            true => handle.into_envelope(py),
        }
    }

    #[inline]
    pub(crate) fn process(&self) -> Process {
        self.core.process()
    }

    /// Takes the next event; `None` if there is none yet.
    #[inline]
    pub(crate) fn take(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.process().check()?;
        let result = self.core.try_recv();
        settle(py);
        match result {
            Ok(handle) => self.object(py, handle)?.map(Some).ok_or_else(|| error::closed(py)),
            Err(TryRecvError::Empty) => {
                self.slab.get().bury(py);
                Ok(None)
            }
            Err(TryRecvError::Lagged(lagged)) => Err(error::lagged(py, lagged)),
            Err(_) => Err(error::closed(py)),
        }
    }

    /// Takes up to `limit` events; `None` if there is none yet.
    fn take_many(&self, py: Python<'_>, limit: usize) -> PyResult<Option<Py<PyAny>>> {
        self.process().check()?;
        let mut batch = Vec::with_capacity(limit.min(self.core.pending()));
        let result = self.core.try_recv_batch(&mut batch, limit);
        settle(py);
        match result {
            Ok(_) => {
                // An object is missing only where the garbage collector has ended the bus.
                let or_none = |object: Option<Py<PyAny>>| object.unwrap_or_else(|| py.None());
                let list = match self.envelope {
                    false => {
                        PyList::new(py, batch.into_iter().map(|h| or_none(h.into_object(py))))?
                    }
                    true => {
                        let all = batch.into_iter().map(|h| h.into_envelope(py).map(or_none));
                        PyList::new(py, all.collect::<PyResult<Vec<_>>>()?)?
                    }
                };
                Ok(Some(list.into_any().unbind()))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Lagged(lagged)) => Err(error::lagged(py, lagged)),
            Err(_) => Err(error::closed(py)),
        }
    }

    /// Waits in the thread until `take` gives something; `None` if the deadline passed.
    pub(crate) fn wait<O>(
        &self,
        py: Python<'_>,
        deadline: Option<Instant>,
        take: impl FnMut() -> PyResult<Option<O>>,
    ) -> PyResult<Option<O>> {
        wait(py, &self.core, deadline, take)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.process().check()?;
        self.core.close();
        settle(py);
        self.slab.get().bury(py);
        Ok(())
    }

    /// Ends it with its last handle, and hands its numbers over to who counts them.
    fn end(&self, class: &str) {
        self.warn_if_open(class);
        if self.process().is_current()
            && let Some(tally) = self.tally.with(Option::take)
        {
            self.core.close();
            tally.get().left(&self.core);
        }
    }

    /// Closes at the end of a `with`. A forked child leaves the subscription to its parent, so
    /// that the exception that ends the child passes.
    fn leave_block(&self, py: Python<'_>) {
        let _ = self.close(py);
    }

    /// Warns about a subscription that goes without having been closed, as files do.
    fn warn_if_open(&self, class: &str) {
        if !self.process().is_current() || self.core.is_closed() {
            return;
        }
        warn_unclosed(&self.describe(class));
    }

    fn describe(&self, class: &str) -> String {
        let pattern = self.core.pattern().map_or(String::new(), |p| format!(" pattern={p}"));
        format!(
            "<{class} id={}{pattern} policy={} pending={}/{}{}>",
            self.core.id(),
            self.core.policy().name(),
            self.core.pending(),
            self.core.capacity(),
            if self.core.is_closed() { " closed" } else { "" },
        )
    }
}

pub(crate) fn on_lag_name(on_lag: OnLag) -> &'static str {
    match on_lag {
        OnLag::Raise => "raise",
        OnLag::Count => "count",
    }
}

/// Refuses to block the loop that the thread runs.
pub(crate) fn refuse_on_a_loop(py: Python<'_>, call: &str) -> PyResult<()> {
    match on_a_loop(py)? {
        true => Err(error::on_a_loop(call, "subscribe_async()")),
        false => Ok(()),
    }
}

/// Warns about a subscription that goes without having been closed, as files do.
pub(crate) fn warn_unclosed(subscription: &str) {
    Python::attach(|py| {
        let raised = PyErr::take(py);
        let message = format!("unclosed {subscription}; call close() or use with");
        let category = py.get_type::<PyResourceWarning>();
        let message = std::ffi::CString::new(message).unwrap_or_default();
        if let Err(error) = PyErr::warn(py, &category, &message, 1) {
            error.write_unraisable(py, None);
        }
        if let Some(raised) = raised {
            raised.restore(py);
        }
    });
}

/// What a thread can wait for.
pub(crate) trait Awaited {
    /// Runs `sleep` unless there is something to receive.
    fn sleep_unless_ready(&self, sleep: impl FnOnce(&mut Parking<'_, '_>));

    /// Wakes another sleeper if there is something for it.
    fn pass_on(&self);
}

impl Awaited for Core {
    fn sleep_unless_ready(&self, sleep: impl FnOnce(&mut Parking<'_, '_>)) {
        self.sleep_unless_ready(sleep);
    }

    fn pass_on(&self) {
        self.pass_on();
    }
}

/// Waits in the thread until `take` gives something; `None` if the deadline passed.
pub(crate) fn wait<O>(
    py: Python<'_>,
    awaited: &Own<impl Awaited>,
    deadline: Option<Instant>,
    mut take: impl FnMut() -> PyResult<Option<O>>,
) -> PyResult<Option<O>> {
    loop {
        if let Some(taken) = take()? {
            return Ok(Some(taken));
        }
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Ok(None);
        }
        let slice = now + SIGNAL_SLICE;
        let until = deadline.map_or(slice, |deadline| deadline.min(slice));
        awaited.sleep_unless_ready(|parking| {
            py.detach(|| parking.park(until));
        });
        py.check_signals().inspect_err(|_| {
            // A signal handler may have forked.
            if awaited.process().is_current() {
                awaited.pass_on();
            }
        })?;
    }
}

macro_rules! common {
    ($name:ident $(, $extra:item)*) => {
        #[pymethods]
        impl $name {
            /// The subscription's number, unique in its bus.
            #[getter]
            fn id(&self) -> u64 {
                self.inner.core.id()
            }

            /// What metrics and explanations call it, if it was given a name.
            #[getter]
            fn name(&self) -> Option<&str> {
                self.inner.core.name()
            }

            /// The pattern over topics; `None` wants everything.
            #[getter]
            fn pattern(&self) -> Option<String> {
                self.inner.core.pattern().map(ToString::to_string)
            }

            /// The most events it can hold, a power of two.
            #[getter]
            fn capacity(&self) -> usize {
                self.inner.core.capacity()
            }

            /// What happens when it has no room.
            #[getter]
            fn policy(&self) -> &'static str {
                self.inner.core.policy().name()
            }

            /// What the reader is told about missed events: `raise` or `count`.
            #[getter]
            fn on_lag(&self) -> &'static str {
                on_lag_name(self.inner.on_lag)
            }

            /// Events waiting to be read.
            #[getter]
            fn pending(&self) -> usize {
                self.inner.core.pending()
            }

            /// Whether the subscription or its bus was closed.
            #[getter]
            fn closed(&self) -> bool {
                self.inner.core.is_closed()
            }

            /// Returns the next event, or `None` if none is pending.
            ///
            /// Raises:
            ///     Lagged: Events are missing here; receive again to go on.
            ///     Closed: Everything was read.
            #[inline]
            fn try_recv(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
                self.inner.take(py)
            }

            fn __repr__(&self) -> String {
                self.inner.describe(stringify!($name))
            }

            fn __reduce__(&self) -> PyResult<()> {
                Err(no_pickle(stringify!($name), "make a bus in each and subscribe there"))
            }

            $($extra)*
        }
    };
}

/// A subscription read by threads.
///
/// Waiting releases the global interpreter lock and answers Ctrl-C. Readers in several threads
/// compete: each event goes to exactly one of them. Iterating ends when the subscription is closed
/// and read.
#[pyclass(frozen, weakref, generic, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct EventSubscription {
    pub(crate) inner: Inner,
}

impl Drop for EventSubscription {
    fn drop(&mut self) {
        self.inner.end("EventSubscription");
    }
}

impl EventSubscription {
    pub(crate) fn new(inner: Inner) -> Self {
        Self { inner }
    }
}

common!(
    EventSubscription,
    /// Waits for the next event.
    ///
    /// Raises:
    ///     Lagged: Events are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        refuse_on_a_loop(py, "recv()")?;
        let taken = self.inner.wait(py, None, || self.inner.take(py))?;
        taken.ok_or_else(|| error::closed(py))
    },
    /// Waits for the next event, at most `timeout` seconds.
    ///
    /// Raises:
    ///     ReceiveTimeout: No event came in time.
    ///     Lagged: Events are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv_timeout(&self, py: Python<'_>, timeout: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        refuse_on_a_loop(py, "recv_timeout()")?;
        let deadline = Instant::now() + error::duration("timeout", timeout)?;
        self.inner.wait(py, Some(deadline), || self.inner.take(py))?.ok_or_else(|| {
            error::ReceiveTimeout::new_err(format!(
                "no event came within {timeout} s; the subscription is unchanged"
            ))
        })
    },
    /// Waits for an event, then takes what is there, up to `limit` events, into a list. A batch
    /// ends before a hole.
    ///
    /// Raises:
    ///     Lagged: Events are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     RuntimeError: The thread runs an event loop.
    fn recv_many(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let limit = error::count("limit", limit)?;
        refuse_on_a_loop(py, "recv_many()")?;
        let taken = self.inner.wait(py, None, || self.inner.take_many(py, limit))?;
        taken.ok_or_else(|| error::closed(py))
    },
    /// Notes that a store takes what it receives.
    fn _feed_store(&self) -> PyResult<()> {
        self.inner.process().check()?;
        self.inner.core.feed_store();
        Ok(())
    },
    /// Leaves the bus; pending events are counted as `closed`. Again does nothing.
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
        self.inner.leave_block(py);
    },
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.inner.traverse(&visit)
    }
);

/// A subscription read by tasks of one event loop.
///
/// What `recv()` returns can be awaited, and given to `asyncio.create_task`, `TaskGroup`,
/// `wait_for` and `gather` directly. Cancelling it loses nothing. Tasks compete: each event goes
/// to exactly one of them, first come first served. It can be made outside a loop, and belongs to
/// the loop that first waits for it until that one is closed.
#[pyclass(frozen, weakref, generic, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct AsyncEventSubscription {
    pub(crate) inner: Inner,
    sleepers: Arc<Sleepers>,
    ready_in_a_row: Streak,
}

impl Drop for AsyncEventSubscription {
    fn drop(&mut self) {
        self.inner.end("AsyncEventSubscription");
    }
}

impl ReadByTasks for AsyncEventSubscription {
    type Core = Core;

    #[inline]
    fn core(&self) -> &Own<Core> {
        &self.inner.core
    }

    #[inline]
    fn sleepers(&self) -> &Sleepers {
        &self.sleepers
    }

    #[inline]
    fn ready_in_a_row(&self) -> &Streak {
        &self.ready_in_a_row
    }

    fn wake(&self) {
        self.sleepers.wake_by_ref();
    }

    fn close(&self, py: Python<'_>) {
        // Publishers have checked the process.
        let _ = self.inner.close(py);
    }
}

impl AsyncEventSubscription {
    pub(crate) fn create(py: Python<'_>, inner: Inner) -> PyResult<Py<Self>> {
        let sleepers = Arc::<Sleepers>::default();
        let is_set = inner.core.set_waker(Waker::from(sleepers.clone()));
        is_set.map_err(|refused| error::config(&refused))?;
        let this = Self { inner, sleepers: sleepers.clone(), ready_in_a_row: Streak::default() };
        let subscription = Py::new(py, this)?;
        sleepers.belong_to(subscription.bind(py).as_any())?;
        Ok(subscription)
    }

    /// Takes the next event where nothing has to be decided; `None` decides nothing.
    #[inline]
    pub(crate) fn take_quickly(&self, py: Python<'_>) -> Option<Handle> {
        if !self.inner.process().is_current()
            || self.ready_in_a_row.is_at_end()
            || self.inner.envelope
        {
            return None;
        }
        let handle = self.inner.core.take_ready()?;
        self.ready_in_a_row.count();
        self.wake_next(py);
        settle(py);
        Some(handle)
    }

    #[inline]
    pub(crate) fn poll_one(&self, py: Python<'_>, end: impl Fn() -> PyErr) -> PyResult<Progress> {
        self.poll(py, || match self.inner.take(py) {
            Err(error) if error::is_end(py, &error) => Err(end()),
            result => result,
        })
    }

    pub(crate) fn poll_many(&self, py: Python<'_>, limit: usize) -> PyResult<Progress> {
        self.poll(py, || self.inner.take_many(py, limit))
    }
}

common!(
    AsyncEventSubscription,
    /// Returns an awaitable for the next event.
    ///
    /// Raises:
    ///     Lagged: Events are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    #[inline]
    fn recv(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Recv(slf))
    },
    /// Returns an awaitable for a list: it waits for an event, then takes what is there, up to
    /// `limit` events. A batch ends before a hole.
    ///
    /// Raises:
    ///     Lagged: Events are missing here; receive again to go on.
    ///     Closed: Everything was read.
    ///     WrongLoop: Another live loop waits for this subscription.
    fn recv_many(slf: Py<Self>, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let limit = error::count("limit", limit)?;
        awaitable(py, Job::RecvMany(slf, limit))
    },
    /// Leaves the bus; pending events are counted as `closed`. Again does nothing.
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
    #[inline]
    fn __anext__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Next(slf))
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
        self.inner.leave_block(py);
        awaitable(py, Job::Ready(py.None()))
    },
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.inner.traverse(&visit)?;
        self.sleepers.traverse(&visit)
    }
);
