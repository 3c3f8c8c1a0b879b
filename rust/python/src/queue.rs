//! `LockFreeEventQueue`: a bus with one subscription that threads and tasks of any loops read.
//!
//! ```text
//!  enqueue ─► bus, policy reject ─► subscription ─► dequeue
//!             │ no room: the bus's line                │ none: the line of the subscription's gate,
//!             ▼                                        ▼ threads and tasks together
//!             threads, tasks                           threads, tasks (`Sleeper`)
//! ```
//!
//! A subscription of a bus belongs to one loop and so needs no place in line for each of its tasks.
//! Here each has one of its own, and whoever enqueues lets go of those whose loop has ended.

use crate::awaitable::{Job, Progress, awaitable};
use crate::bus::{EventBus, PublishTask, Waking};
use crate::error;
use crate::gil::{GilCell, GilFlag};
use crate::line::Streak;
use crate::loop_bridge::{LoopBridge, on_a_loop, running_loop, settle};
use crate::process::{Own, no_pickle};
use crate::slab::Handle;
use crate::subscription::Inner;
use crate::wakeup::Wakeup;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Instant;
use tickbus::PlaceInLine;

/// A task that waits for an event.
#[derive(Debug)]
struct Sleeper {
    waking: Arc<Waking>,
    /// Its place in line.
    place: Own<PlaceInLine>,
    /// Whether somebody has looked after it since it was woken.
    seen: GilFlag,
}

/// A bounded queue of Python objects between any threads and tasks: many producers, many
/// consumers, each event to exactly one of them.
///
/// Events of one producer are dequeued in its order. Waiting consumers, threads and tasks of any
/// event loops together, are served in the order in which they came; so are waiting producers. One
/// that comes to a queue with events takes one at once. Waiting in a thread releases the global
/// interpreter lock and answers Ctrl-C. Cancelling loses nothing and doubles nothing. The garbage
/// collector sees the events.
///
/// Args:
///     capacity: The most events that it holds, at least 1, rounded up to 2^n.
///
/// Raises:
///     ConfigError: The capacity is out of range.
///
/// Example:
///     >>> import tickbus
///     >>> queue = tickbus.LockFreeEventQueue[str](capacity=2)
///     >>> queue.enqueue("a")
///     >>> queue.size, queue.capacity, queue.is_empty
///     (1, 2, False)
///     >>> queue.dequeue(), queue.try_dequeue()
///     ('a', None)
#[pyclass(frozen, weakref, generic, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct LockFreeEventQueue {
    /// Declared first: its handles end before the slab may.
    reading: Inner,
    bus: Py<EventBus>,
    line: GilCell<VecDeque<Sleeper>>,
    /// That of the loop in which a task last waited.
    bridge: GilCell<Option<Py<LoopBridge>>>,
    ready_in_a_row: Streak,
}

#[pymethods]
impl LockFreeEventQueue {
    #[new]
    #[pyo3(
        signature = (capacity = None),
        text_signature = "(capacity=10000)"
    )]
    fn new(py: Python<'_>, capacity: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let bus = EventBus::for_queue(py, capacity)?;
        let reading = bus.read_all(py)?;
        let (line, bridge, ready_in_a_row) = Default::default();
        Ok(Self { reading, bus: Py::new(py, bus)?, line, bridge, ready_in_a_row })
    }

    /// Events that wait to be dequeued.
    #[getter]
    fn size(&self) -> usize {
        self.reading.core.pending()
    }

    /// Whether none waits.
    #[getter]
    fn is_empty(&self) -> bool {
        self.size() == 0
    }

    /// The most events that it holds, a power of two.
    #[getter]
    fn capacity(&self) -> usize {
        self.reading.core.capacity()
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.bus.get().is_closed()
    }

    /// Appends an event. Never waits for room.
    ///
    /// Args:
    ///     event: Any object but `None`.
    ///
    /// Raises:
    ///     Full: There is no room, or producers that came before wait for it; nobody has the event.
    ///     Closed: The queue is closed; nobody has the event.
    ///     TypeError: The event is `None`.
    fn enqueue(&self, py: Python<'_>, event: Py<PyAny>) -> PyResult<()> {
        self.bus.get().publish(py, event, None).map_err(|error| self.told(py, error))?;
        self.look_after_woken(py);
        Ok(())
    }

    /// Appends an event, waiting for room at most `timeout` seconds.
    ///
    /// Raises:
    ///     PublishTimeout: There was no room in time; nobody has the event.
    ///     Closed: The queue is closed; nobody has the event.
    ///     RuntimeError: The thread runs an event loop; nobody has the event.
    fn enqueue_timeout(
        &self,
        py: Python<'_>,
        event: Py<PyAny>,
        timeout: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        refuse_on_a_loop(py, "enqueue_timeout()", "enqueue_async()")?;
        let bus = self.bus.get();
        bus.publish_timeout(py, event, timeout, None).map_err(|error| self.told(py, error))?;
        self.look_after_woken(py);
        Ok(())
    }

    /// Returns an awaitable that appends an event, waiting its turn for room while the loop runs.
    /// Cancelled, nobody has the event.
    ///
    /// Raises:
    ///     Closed: The queue is closed; nobody has the event.
    fn enqueue_async(slf: Py<Self>, py: Python<'_>, event: Py<PyAny>) -> PyResult<Py<PyAny>> {
        let task = EventBus::publish_task(slf.get().bus.bind(py), event, None)?;
        awaitable(py, Job::Enqueue(slf, Box::new(task)))
    }

    /// Takes the oldest event, waiting for one.
    ///
    /// Raises:
    ///     Closed: The queue is closed and everything was dequeued.
    ///     RuntimeError: The thread runs an event loop.
    fn dequeue(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        refuse_on_a_loop(py, "dequeue()", "dequeue_async()")?;
        let taken = self.reading.wait(py, None, || self.take(py))?;
        taken.ok_or_else(closed_and_empty)
    }

    /// Takes the oldest event, or returns `None` if there is none. Never waits.
    ///
    /// Raises:
    ///     Closed: The queue is closed and everything was dequeued.
    fn try_dequeue(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.take(py)
    }

    /// Takes the oldest event, waiting for one at most `timeout` seconds.
    ///
    /// Raises:
    ///     ReceiveTimeout: None came in time.
    ///     Closed: The queue is closed and everything was dequeued.
    ///     RuntimeError: The thread runs an event loop.
    fn dequeue_timeout(&self, py: Python<'_>, timeout: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        refuse_on_a_loop(py, "dequeue_timeout()", "dequeue_async()")?;
        let deadline = Instant::now() + error::duration("timeout", timeout)?;
        self.reading.wait(py, Some(deadline), || self.take(py))?.ok_or_else(|| {
            error::ReceiveTimeout::new_err(format!(
                "no event came within {timeout} s; the queue is unchanged"
            ))
        })
    }

    /// Returns an awaitable for the oldest event, which waits for one while the loop runs.
    ///
    /// Raises:
    ///     Closed: The queue is closed and everything was dequeued.
    fn dequeue_async(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<PyAny>> {
        awaitable(py, Job::Dequeue(slf))
    }

    /// Ends enqueueing at once; consumers first dequeue what is there. Again does nothing.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.bus.get().close(py)
    }

    fn __repr__(&self) -> String {
        let closed = if self.closed() { " closed" } else { "" };
        format!("<LockFreeEventQueue size={}/{}{closed}>", self.size(), self.capacity())
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("LockFreeEventQueue", "make one in each, and send it what to enqueue"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.reading.traverse(&visit)?;
        visit.call(&self.bus)?;
        self.bridge.with(|bridge| visit.call(&*bridge))?;
        self.line.with(|line| line.iter().try_for_each(|sleeper| sleeper.waking.traverse(&visit)))
    }
}

impl LockFreeEventQueue {
    /// Appends an event where nothing has to be decided; `None` decides nothing.
    #[inline]
    pub(crate) fn enqueue_quickly(&self, py: Python<'_>, event: Bound<'_, PyAny>) -> Option<()> {
        self.bus.get().publish_quickly(py, event, None)?;
        self.look_after_woken(py);
        Some(())
    }

    fn take(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.reading.take(py).map_err(|error| match error::is_end(py, &error) {
            true => closed_and_empty(),
            false => error,
        })
    }

    pub(crate) fn poll_enqueue(
        &self,
        py: Python<'_>,
        task: &mut PublishTask,
    ) -> PyResult<Progress> {
        match task.poll(py).map_err(|error| self.told(py, error))? {
            Progress::Done(taken) => {
                taken.drop_ref(py);
                self.look_after_woken(py);
                Ok(Progress::Done(py.None()))
            }
            progress => Ok(progress),
        }
    }

    pub(crate) fn poll_dequeue(&self, py: Python<'_>) -> PyResult<Progress> {
        if self.ready_in_a_row.is_over() {
            return Ok(Progress::Yield);
        }
        loop {
            if let Some(taken) = self.take(py)? {
                return Ok(Progress::Done(taken));
            }
            if let Some(wakeup) = self.stand_in_line(py)? {
                self.ready_in_a_row.interrupt();
                return Ok(Progress::Wait(wakeup));
            }
        }
    }

    /// Puts a new wake-up in line; `None` if something has come meanwhile.
    fn stand_in_line(&self, py: Python<'_>) -> PyResult<Option<Py<Wakeup>>> {
        // Looking up the running loop is dear, and a task refuses the wake-up of another loop than
        // its own: see `rebind`.
        let known = self.bridge.with(|bridge| bridge.as_ref().map(|bridge| bridge.clone_ref(py)));
        let bridge = match known.filter(|bridge| bridge.get().is_alive_here(py)) {
            Some(bridge) => bridge,
            None => self.bind(py)?,
        };
        let wakeup = bridge.get().wakeup(py)?;
        let waking = Arc::new(Waking::new(wakeup.clone_ref(py), bridge));
        let core = &self.reading.core;
        let Some(mut place) = core.place_in_line() else { return Ok(None) };
        let waker = Waker::from(waking.clone());
        if Pin::new(&mut place).poll(&mut Context::from_waker(&waker)).is_ready() {
            return Ok(None);
        }
        core.arm();
        let (place, seen) = (Own::new(place), GilFlag::default());
        let sleeper = Sleeper { waking, place, seen };
        self.line.with(|line| line.push_back(sleeper));
        if core.is_ready() {
            self.leave_line(&wakeup);
            return Ok(None);
        }
        Ok(Some(wakeup))
    }

    /// Returns the bridge of the running loop, and remembers it.
    fn bind(&self, py: Python<'_>) -> PyResult<Py<LoopBridge>> {
        let event_loop = running_loop(py)?;
        let bridge = LoopBridge::of(&event_loop)?;
        bridge.get().runs_here();
        let kept = bridge.clone_ref(py);
        drop(self.bridge.with(|known| known.replace(kept)));
        Ok(bridge)
    }

    /// Remembers the running loop, whose task has refused a wake-up of another one. Returns false
    /// if that was of the running one.
    pub(crate) fn rebind(&self, py: Python<'_>, wakeup: &Py<Wakeup>) -> PyResult<bool> {
        let bridge = self.bind(py)?;
        Ok(!bridge.get().is_of(wakeup.get()))
    }

    /// Takes the next event where nothing has to be decided; `None` decides nothing.
    #[inline]
    pub(crate) fn take_quickly(&self, py: Python<'_>) -> Option<Handle> {
        if !self.reading.process().is_current() || self.ready_in_a_row.is_at_end() {
            return None;
        }
        let handle = self.reading.core.take_ready()?;
        self.ready_in_a_row.count();
        settle(py);
        Some(handle)
    }

    /// Takes a wake-up out of the line, with the wake that may have come for it.
    pub(crate) fn leave_line(&self, wakeup: &Py<Wakeup>) {
        let left = self.line.with(|line| {
            let place = line.iter().position(|other| other.waking.wakeup().is(wakeup))?;
            line.remove(place)
        });
        if let Some(mut left) = left
            && self.reading.process().is_current()
        {
            let _ = Pin::new(&mut *left.place).poll(&mut Context::from_waker(Waker::noop()));
            self.reading.core.disarm();
        }
    }

    /// Passes the baton: what is still there is for the next in line.
    pub(crate) fn wake_next(&self, py: Python<'_>) {
        if self.reading.process().is_current() {
            self.reading.core.pass_on();
            settle(py);
        }
    }

    /// Looks after the tasks that were woken: one whose loop has ended does not notice, so the next
    /// in line is woken instead.
    #[inline]
    fn look_after_woken(&self, py: Python<'_>) {
        if self.line.with(|line| !line.is_empty()) {
            self.look_after_each_woken(py);
        }
    }

    #[inline(never)]
    fn look_after_each_woken(&self, py: Python<'_>) {
        while let Some(wakeup) = self.line.with(|line| {
            // They are woken in the order of the line.
            let mut woken = line.iter().take_while(|sleeper| sleeper.waking.was_called());
            let unseen = woken.find(|sleeper| sleeper.seen.set())?;
            Some((unseen.waking.wakeup().clone_ref(py), unseen.waking.bridge().clone_ref(py)))
        }) {
            let (wakeup, bridge) = wakeup;
            if bridge.get().is_over(py) {
                self.leave_line(&wakeup);
                self.wake_next(py);
            }
        }
    }

    /// Says of a queue what the error says of its bus.
    #[cold]
    fn told(&self, py: Python<'_>, error: PyErr) -> PyErr {
        let capacity = self.capacity();
        if error.is_instance_of::<error::PublishTimeout>(py) {
            return error::PublishTimeout::new_err(format!(
                "the queue held {capacity} events until the timeout; nobody has the event: enqueue \
                 it again once some were dequeued"
            ));
        }
        if error.is_instance_of::<error::Full>(py) {
            return error::Full::new_err(format!(
                "the queue holds {capacity} events, and no more; nobody has the event: enqueue it \
                 again once some were dequeued, or wait with enqueue_timeout() or enqueue_async()"
            ));
        }
        match error::is_end(py, &error) {
            true => error::Closed::new_err(
                "the queue is closed; events can be enqueued only before close()",
            ),
            false => error,
        }
    }
}

#[cold]
fn closed_and_empty() -> PyErr {
    error::Closed::new_err("the queue is closed and everything was dequeued")
}

fn refuse_on_a_loop(py: Python<'_>, call: &str, instead: &str) -> PyResult<()> {
    match on_a_loop(py)? {
        true => Err(error::on_a_loop(call, instead)),
        false => Ok(()),
    }
}
