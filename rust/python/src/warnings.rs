//! Hands crossings of `warn_threshold` to a Python thread that logs them.
//!
//! Publishers only put numbers into a bounded queue: logging may be slow or may publish itself.

use parking_lot::{Condvar, Mutex};
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::time::Instant;
use tickbus::Warning;

/// The most crossings that wait to be logged; more than that are not logged.
const WAITING: usize = 1_024;

struct Queue {
    crossings: VecDeque<Warning>,
    stopped: bool,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue { crossings: VecDeque::new(), stopped: false });
static ARRIVED: Condvar = Condvar::new();

/// Hands a crossing over; runs no Python code.
pub(crate) fn push(warning: Warning) {
    let mut queue = QUEUE.lock();
    if queue.crossings.len() < WAITING {
        queue.crossings.push_back(warning);
        ARRIVED.notify_one();
    }
}

/// Returns the next crossing as (bus, subscription, pending, threshold), waiting at most `timeout`
/// seconds.
#[pyfunction]
pub(crate) fn _recv_warning(
    py: Python<'_>,
    timeout: f64,
) -> PyResult<Option<(u64, u64, usize, usize)>> {
    let deadline = Instant::now() + crate::error::duration("timeout", timeout)?;
    let warning = py.detach(|| {
        let mut queue = QUEUE.lock();
        while queue.crossings.is_empty() && !queue.stopped {
            if ARRIVED.wait_until(&mut queue, deadline).timed_out() {
                break;
            }
        }
        queue.crossings.pop_front()
    });
    Ok(warning.map(|w| (w.bus, w.subscription, w.pending, w.threshold)))
}

/// Ends waiting for crossings for good.
#[pyfunction]
pub(crate) fn _stop_warnings() {
    QUEUE.lock().stopped = true;
    ARRIVED.notify_all();
}
