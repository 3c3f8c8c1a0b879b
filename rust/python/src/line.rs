//! What tasks of one event loop read: where they stand in line, and how they are woken.

use crate::awaitable::{Progress, READY_IN_A_ROW};
use crate::error;
use crate::gil::{GilCell, GilFlag};
use crate::loop_bridge::{LoopBridge, Wakeable, Woken, running_loop, settle};
use crate::process::Own;
use crate::subscription::AsyncEventSubscription;
use crate::system::AsyncSystemSubscription;
use crate::wakeup::Wakeup;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyWeakref, PyWeakrefMethods, PyWeakrefReference};
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Wake;
use tickbus::AnySubscription;

/// The sleepers of one subscription, as its publishers see them.
#[derive(Debug, Default)]
pub(crate) struct Sleepers {
    /// What suspended readers wait for, first come first.
    line: GilCell<VecDeque<Py<Wakeup>>>,
    bridge: GilCell<Option<Py<LoopBridge>>>,
    scheduled: GilFlag,
    /// Knows how many may be woken.
    subscription: GilCell<Option<Py<PyWeakref>>>,
}

impl Wake for Sleepers {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.scheduled.set() {
            return;
        }
        // SAFETY: an object bus is used by attached threads only, so its readers are woken by them.
        let py = unsafe { Python::assume_attached() };
        match self.bridge.with(|bridge| bridge.as_ref().map(|bridge| bridge.clone_ref(py))) {
            Some(bridge) => {
                LoopBridge::schedule(&bridge, py, self.clone());
                // Not the last reference: the sleepers have one.
                bridge.drop_ref(py);
            }
            None => _ = self.scheduled.clear(),
        }
    }
}

impl Wakeable for Sleepers {
    fn collect(&self, py: Python<'_>, woken: &mut Woken) {
        // Cleared before looking: what comes from here on schedules again.
        self.scheduled.clear();
        let Some(subscription) = self.weak(py).and_then(|weak| weak.bind(py).upgrade()) else {
            return;
        };
        let due = match subscription.cast::<AsyncEventSubscription>() {
            Ok(subscription) => subscription.get().due(),
            Err(_) => match subscription.cast::<AsyncSystemSubscription>() {
                Ok(subscription) => subscription.get().due_or_sleep_on(),
                Err(_) => 0,
            },
        };
        self.line.with(|line| {
            let waking = line.iter().filter(|wakeup| wakeup.get().wake()).take(due);
            woken.wakeups.extend(waking.map(|wakeup| wakeup.clone_ref(py)));
        });
        woken.kept.push(subscription.unbind());
    }
}

impl Sleepers {
    /// Remembers whose they are, without keeping it alive.
    pub(crate) fn belong_to(&self, subscription: &Bound<'_, PyAny>) -> PyResult<()> {
        let weak = PyWeakrefReference::new(subscription)?;
        let weak = weak.into_any().cast_into::<PyWeakref>()?.unbind();
        self.subscription.with(|kept| *kept = Some(weak));
        Ok(())
    }

    /// Returns a weak reference to the subscription.
    pub(crate) fn weak(&self, py: Python<'_>) -> Option<Py<PyWeakref>> {
        self.subscription.with(|weak| weak.as_ref().map(|weak| weak.clone_ref(py)))
    }

    /// Returns the bridge of the loop to which the subscription is bound.
    fn bridge<'py>(&self, py: Python<'py>) -> Option<Bound<'py, LoopBridge>> {
        self.bridge.with(|bridge| bridge.as_ref().map(|b| b.clone_ref(py).into_bound(py)))
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.line.with(|line| line.iter().try_for_each(|wakeup| visit.call(wakeup)))
    }
}

/// A count that only attached threads touch.
#[derive(Debug, Default)]
pub(crate) struct Streak(Cell<u32>);

// SAFETY: access is serialized by the global interpreter lock.
unsafe impl Sync for Streak {}

impl Streak {
    /// Counts a ready completion; true if the loop must have a turn first.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        let is_over = self.is_at_end();
        if is_over {
            self.interrupt()
        } else {
            self.count()
        }
        is_over
    }

    #[inline]
    pub(crate) fn is_at_end(&self) -> bool {
        self.0.get() >= READY_IN_A_ROW
    }

    #[inline]
    pub(crate) fn count(&self) {
        self.0.set(self.0.get() + 1);
    }

    pub(crate) fn interrupt(&self) {
        self.0.set(0);
    }
}

/// A subscription that tasks of one event loop read. It belongs to the loop that first waits for it
/// until that one is closed.
pub(crate) trait ReadByTasks {
    type Core: AnySubscription;

    fn core(&self) -> &Own<Self::Core>;

    fn sleepers(&self) -> &Sleepers;

    fn ready_in_a_row(&self) -> &Streak;

    /// Wakes as a publisher would. Called attached.
    fn wake(&self);

    fn close(&self, py: Python<'_>);

    /// Is told of the bridge of the loop to which it belongs from now on.
    fn bound_to(&self, bridge: &LoopBridge) {
        let _ = bridge;
    }

    /// Returns how many tasks have a reason to be woken.
    fn due(&self) -> usize {
        match self.core().is_ready() {
            false => 0,
            true if self.core().is_closed() => usize::MAX,
            true => self.core().pending().max(1),
        }
    }

    /// As `due`; if none has, those that sleep say so again: a ring without the global interpreter
    /// lock has forgotten who it has woken.
    fn due_or_sleep_on(&self) -> usize {
        let mut due = self.due();
        if due == 0 && self.sleepers().line.with(|line| !line.is_empty()) {
            self.core().arm();
            self.core().disarm();
            due = self.due();
        }
        due
    }

    /// Takes something, or waits for it.
    #[inline]
    fn poll(
        &self,
        py: Python<'_>,
        mut take: impl FnMut() -> PyResult<Option<Py<PyAny>>>,
    ) -> PyResult<Progress> {
        if self.ready_in_a_row().is_over() {
            return Ok(Progress::Yield);
        }
        loop {
            let taken = take().transpose();
            if let Some(taken) = taken {
                // Also after a hole: what stands behind it is for who was not woken for it.
                self.wake_next(py);
                return taken.map(Progress::Done);
            }
            if let Some(wakeup) = self.join_line(py)? {
                self.ready_in_a_row().interrupt();
                return Ok(Progress::Wait(wakeup));
            }
        }
    }

    /// Puts a new wake-up in line; `None` if something has come meanwhile.
    fn join_line(&self, py: Python<'_>) -> PyResult<Option<Py<Wakeup>>> {
        // Looking up the running loop is dear, and a task refuses the wake-up of another loop than
        // its own: see `rebind`.
        let known = self.sleepers().bridge(py);
        let bridge = match known.filter(|bridge| bridge.get().is_alive_here(py)) {
            Some(bridge) => bridge,
            None => self.bind(&running_loop(py)?)?,
        };
        self.stand_in_line(&bridge)
    }

    /// As `join_line`, in the loop to which the subscription is bound.
    fn stand_in_line(&self, bridge: &Bound<'_, LoopBridge>) -> PyResult<Option<Py<Wakeup>>> {
        let py = bridge.py();
        let wakeup = bridge.get().wakeup(py)?;
        let kept = wakeup.clone_ref(py);
        self.sleepers().line.with(|line| line.push_back(kept));
        self.core().arm();
        if self.core().is_ready() {
            self.leave_line(py, &wakeup);
            return Ok(None);
        }
        Ok(Some(wakeup))
    }

    /// Binds the subscription to the running loop, whose task has refused a wake-up of the loop
    /// that it was bound to. Returns false if that is the running one.
    fn rebind(&self, py: Python<'_>) -> PyResult<bool> {
        let event_loop = running_loop(py)?;
        let known = self.sleepers().bridge(py);
        if known.is_some_and(|b| b.get().event_loop(py).is_some_and(|b| b.is(&event_loop))) {
            return Ok(false);
        }
        self.bind(&event_loop).map(|_| true)
    }

    /// Binds the subscription to the loop, unless a live loop has it, and returns the bridge.
    fn bind<'py>(&self, event_loop: &Bound<'py, PyAny>) -> PyResult<Bound<'py, LoopBridge>> {
        let py = event_loop.py();
        if let Some(bound) = self.sleepers().bridge(py) {
            if bound.get().event_loop(py).is_some_and(|bound| bound.is(event_loop)) {
                bound.get().runs_here();
                return Ok(bound);
            }
            if !bound.get().is_over(py) {
                return Err(error::WrongLoop::new_err(format!(
                    "subscription {} is awaited from two event loops that are both alive; \
                     subscribe once in each loop",
                    self.core().id()
                )));
            }
        }
        let bridge = LoopBridge::of(event_loop)?;
        bridge.get().runs_here();
        let kept = bridge.clone_ref(py);
        let old = self.sleepers().bridge.with(|bound| bound.replace(kept));
        self.sleepers().scheduled.clear();
        self.bound_to(bridge.get());
        // Who still stands in line waited in a loop that has ended, and will not look again.
        let gone = self.sleepers().line.with(std::mem::take);
        gone.iter().for_each(|_| self.core().disarm());
        drop((old, gone));
        Ok(bridge.into_bound(py))
    }

    /// Closes the subscription if it was read on an event loop that has ended.
    fn close_if_loop_is_over(&self, py: Python<'_>) {
        if self.sleepers().bridge(py).is_some_and(|bridge| bridge.get().is_over(py)) {
            self.close(py);
        }
    }

    fn leave_line(&self, py: Python<'_>, wakeup: &Py<Wakeup>) {
        let left = self.sleepers().line.with(|line| {
            let place = line.iter().position(|other| other.is(wakeup))?;
            line.remove(place)
        });
        if let Some(left) = left {
            self.core().disarm();
            left.drop_ref(py);
        }
    }

    /// Passes the baton: what is still there is for the next in line.
    #[inline]
    fn wake_next(&self, py: Python<'_>) {
        if self.sleepers().line.with(|line| !line.is_empty()) {
            self.wake_first(py);
        }
    }

    #[cold]
    fn wake_first(&self, py: Python<'_>) {
        // In a forked child it would wake the parent's loop.
        if self.core().process().is_current() && self.core().is_ready() {
            self.wake();
            settle(py);
        }
    }
}
