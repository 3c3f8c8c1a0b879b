//! Hands crossings of `warn_threshold` to a Python thread that logs them.
//!
//! Publishers only put numbers into a bounded queue: logging may be slow or may publish itself.
//! The queue lives under the global interpreter lock and its reader parks without any other lock,
//! so that a `fork` never finds one held.

use crate::gil::GilCell;
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::thread::Thread;
use std::time::Instant;
use tickbus::Warning;

/// The most crossings that wait to be logged; more than that are not logged.
const WAITING: usize = 1_024;

struct Queue {
    crossings: VecDeque<Warning>,
    /// The thread that logs, once it waited.
    reader: Option<Thread>,
    stopped: bool,
}

static QUEUE: GilCell<Queue> =
    GilCell::new(Queue { crossings: VecDeque::new(), reader: None, stopped: false });

/// Hands a crossing over; runs no Python code.
pub(crate) fn push(warning: Warning) {
    QUEUE.with(|queue| {
        if queue.crossings.len() < WAITING {
            queue.crossings.push_back(warning);
            queue.wake();
        }
    });
}

impl Queue {
    fn wake(&self) {
        self.reader.iter().for_each(Thread::unpark);
    }
}

/// Returns the next crossing as (bus, subscription, pending, threshold), waiting at most `timeout`
/// seconds.
#[pyfunction]
pub(crate) fn _recv_warning(
    py: Python<'_>,
    timeout: &Bound<'_, PyAny>,
) -> PyResult<Option<(u64, u64, usize, usize)>> {
    let deadline = Instant::now() + crate::error::duration("timeout", timeout)?;
    loop {
        let (warning, stopped) = QUEUE.with(|queue| {
            queue.reader = Some(std::thread::current());
            (queue.crossings.pop_front(), queue.stopped)
        });
        let left = deadline.saturating_duration_since(Instant::now());
        if warning.is_some() || stopped || left.is_zero() {
            return Ok(warning.map(|w| (w.bus, w.subscription, w.pending, w.threshold)));
        }
        py.detach(|| std::thread::park_timeout(left));
    }
}

/// Ends waiting for crossings for good.
#[pyfunction]
pub(crate) fn _stop_warnings() {
    QUEUE.with(|queue| {
        queue.stopped = true;
        queue.wake();
    });
}

/// Forgets what was to be logged and who was to log it, in a child that has not that thread.
pub(crate) fn forget_reader() {
    QUEUE.with(|queue| {
        queue.crossings.clear();
        queue.reader = None;
    });
}
