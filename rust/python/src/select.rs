//! `select` and `Shutdown`: waiting for the first of several subscriptions.

use crate::error;
use crate::loop_bridge::on_a_loop;
use crate::process::{Own, Process, no_pickle};
use crate::subscription::{EventSubscription, SIGNAL_SLICE};
use crate::system::SystemSubscription;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tickbus::{AnySubscription, Selected, Selector};

/// A signal that is given once and seen by everybody, for ending loops.
#[pyclass(frozen, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct Shutdown {
    core: Own<tickbus::Shutdown>,
}

#[pymethods]
impl Shutdown {
    #[new]
    fn new() -> Self {
        Self { core: Own::new(tickbus::Shutdown::new()) }
    }

    /// Gives the signal; again does nothing.
    fn set(&self) -> PyResult<()> {
        self.core.process().check()?;
        self.core.set();
        Ok(())
    }

    /// Returns whether the signal was given.
    fn is_set(&self) -> bool {
        self.core.is_set()
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("Shutdown", "use a multiprocessing.Event between processes"))
    }
}

/// Waits until one of the subscriptions has an event, a hole to tell, or is closed, and returns
/// it; `None` if the shutdown signal was given or the timeout passed.
///
/// Nothing is taken: call `try_recv()` of what is returned. Calls take turns in where they look
/// first, so that a busy subscription cannot hide the others.
///
/// Args:
///     subscriptions: At least one, all read by threads, of any buses and event systems.
///     shutdown: A signal that ends the wait.
///     timeout: The longest wait in seconds; `None` waits for ever.
///
/// Raises:
///     ConfigError: There is no subscription, or the timeout is negative or not finite.
///     RuntimeError: The thread runs an event loop.
#[pyfunction]
#[pyo3(signature = (subscriptions, shutdown = None, timeout = None))]
pub(crate) fn select(
    py: Python<'_>,
    subscriptions: Vec<Py<PyAny>>,
    shutdown: Option<Py<Shutdown>>,
    timeout: Option<&Bound<'_, PyAny>>,
) -> PyResult<Option<Py<PyAny>>> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    if on_a_loop(py)? {
        return Err(error::on_a_loop("select()", "a task for each subscription"));
    }
    if subscriptions.is_empty() {
        return Err(error::ConfigError::new_err(
            "subscriptions was empty; select() needs at least one",
        ));
    }
    let cores =
        subscriptions.iter().map(|each| core(each.bind(py))).collect::<PyResult<Vec<_>>>()?;
    if let Some(shutdown) = &shutdown {
        shutdown.get().core.process().check()?;
    }
    let process = Process::current();
    let timeout = timeout.map(|timeout| error::duration("timeout", timeout)).transpose()?;
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let shutdown = shutdown.as_ref().map(|shutdown| &*shutdown.get().core);
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    let mut selector = Own::new(Selector::new(&cores, shutdown, turn));
    loop {
        match selector.ready() {
            Some(Selected::Ready(place)) => return Ok(Some(subscriptions[place].clone_ref(py))),
            Some(_) => return Ok(None),
            None => {}
        }
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Ok(None);
        }
        let slice = now + SIGNAL_SLICE;
        let until = deadline.map_or(slice, |deadline| deadline.min(slice));
        let parked = &mut *selector;
        py.detach(|| parked.park(Some(until)));
        // A signal handler may have forked.
        py.check_signals().and_then(|()| process.check())?;
    }
}

/// Returns what to wait for.
fn core<'a>(subscription: &'a Bound<'_, PyAny>) -> PyResult<&'a (dyn AnySubscription + Sync)> {
    if let Ok(subscription) = subscription.cast::<EventSubscription>() {
        let core = &subscription.get().inner.core;
        core.process().check().map(|()| &**core as _)
    } else if let Ok(subscription) = subscription.cast::<SystemSubscription>() {
        let core = &subscription.get().inner.core;
        core.process().check().map(|()| &**core as _)
    } else {
        Err(PyTypeError::new_err(format!(
            "subscriptions had {subscription:?}; select() waits for what subscribe() returned"
        )))
    }
}
