//! Busy-polling: an event loop that looks for events of other threads itself, for a while, before
//! it sleeps.
//!
//! ```text
//!  spinning ── fewer than 16 hits in 64 spins ──► resting (adaptive)
//!      ▲─────── 4 short gaps in a row ◄──────────────┘
//! ```

use crate::awaitable::{Job, awaitable};
use crate::calls;
use crate::error;
use crate::gil::GilCell;
use crate::loop_bridge::{LoopBridge, running_loop};
use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use std::time::{Duration, Instant};

/// Spins over which hits are counted.
const WINDOW: u32 = 64;
/// Hits in a window that are worth going on for.
const WORTHWHILE: u32 = WINDOW / 4;
/// Gaps shorter than a spin, in a row, after which spinning is worthwhile again.
const SHORT_GAPS: u32 = 4;
/// The longest spin: other callbacks of the loop wait as long.
const LONGEST: f64 = 0.01;

#[derive(Debug, Default)]
struct State {
    bridge: Option<Py<LoopBridge>>,
    resting: bool,
    spins: u64,
    hits: u64,
    /// Of the spins since the window began.
    window_spins: u32,
    window_hits: u32,
    short_gaps: u32,
    woken_at: Option<Instant>,
}

/// Has the running event loop look for events of other threads before it sleeps:
/// `async with tickbus.BusyPoll():`.
///
/// A wake-up then costs no system call and no scheduling of a sleeping thread. The price is a CPU:
/// the loop's thread spins for up to `max_spin` seconds in each iteration, with the global
/// interpreter lock released, and the loop's other callbacks, timers and sockets wait as long.
/// It pays only where the gaps between events are mostly shorter than `max_spin`.
///
/// Args:
///     max_spin: The longest spin in seconds, at most 0.01.
///     adaptive: Whether to rest while fewer than a quarter of the last 64 spins saw an event, and
///         to go on when events come closer together than `max_spin` again.
///
/// Raises:
///     ConfigError: `max_spin` is out of its range, or, on entering, the machine has one CPU only
///         or the loop is not woken through an eventfd (Linux, a loop with `add_reader`).
///     RuntimeError: On entering: the loop is busy-polled already, or none is running.
#[pyclass(frozen, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct BusyPoll {
    longest: Duration,
    adaptive: bool,
    state: GilCell<State>,
}

#[pymethods]
impl BusyPoll {
    #[new]
    #[pyo3(signature = (max_spin = 0.00005, *, adaptive = true))]
    fn new(max_spin: f64, adaptive: bool) -> PyResult<Self> {
        if !(max_spin > 0.0 && max_spin <= LONGEST) {
            return Err(error::ConfigError::new_err(format!(
                "max_spin was {max_spin}; it must be more than 0 and at most {LONGEST} seconds"
            )));
        }
        let longest = Duration::from_secs_f64(max_spin);
        Ok(Self { longest, adaptive, state: GilCell::default() })
    }

    /// The longest spin in seconds.
    #[getter]
    fn max_spin(&self) -> f64 {
        self.longest.as_secs_f64()
    }

    /// Whether it rests where spinning does not pay.
    #[getter]
    fn adaptive(&self) -> bool {
        self.adaptive
    }

    /// How often the loop has spun.
    #[getter]
    fn spins(&self) -> u64 {
        self.state.with(|state| state.spins)
    }

    /// How many of the spins saw an event.
    #[getter]
    fn hits(&self) -> u64 {
        self.state.with(|state| state.hits)
    }

    fn __aenter__(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        let py = slf.py();
        let event_loop = running_loop(py)?;
        let bridge = LoopBridge::of(&event_loop)?;
        if !bridge.get().can_spin() {
            return Err(error::ConfigError::new_err(
                "busy-polling needs an eventfd, which is there on Linux with a loop that has \
                 add_reader()",
            ));
        }
        if machine_cpus() < 2 {
            return Err(error::ConfigError::new_err(
                "busy-polling needs at least 2 CPUs: with one the publisher cannot run meanwhile",
            ));
        }
        if slf.get().state.with(|state| state.bridge.is_some()) || !bridge.get().set_poller(slf) {
            return Err(PyRuntimeError::new_err("the loop is busy-polled already"));
        }
        slf.get().state.with(|state| *state = State { bridge: Some(bridge), ..State::default() });
        Self::spin_soon(slf, &event_loop)?;
        awaitable(py, Job::Ready(slf.clone().into_any().unbind()))
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
        let bridge = self.state.with(|state| state.bridge.take());
        if let Some(bridge) = bridge {
            bridge.get().clear_poller();
        }
        awaitable(py, Job::Ready(py.None()))
    }

    /// One spin; the loop calls it in every iteration.
    fn _spin(slf: &Bound<'_, Self>) -> PyResult<()> {
        let py = slf.py();
        let this = slf.get();
        let bridge = this.state.with(|state| state.bridge.as_ref().map(|b| b.clone_ref(py)));
        let Some(bridge) = bridge else { return Ok(()) };
        let Some(event_loop) = bridge.get().event_loop(py) else { return Ok(()) };
        let hit = py.detach(|| bridge.get().spin(this.longest));
        let goes_on = this.state.with(|state| {
            state.count(hit);
            state.resting = this.adaptive && state.is_not_worthwhile();
            !state.resting
        });
        let drained = if hit { bridge.get().drain(py) } else { Ok(()) };
        // Last, so that tasks get the event first and what they schedule goes before the spin.
        let spins = if goes_on { Self::spin_soon(slf, &event_loop) } else { Ok(()) };
        drained.and(spins)
    }

    fn __repr__(&self) -> String {
        let (spins, hits) = (self.spins(), self.hits());
        format!("<BusyPoll max_spin={} spins={spins} hits={hits}>", self.max_spin())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.state.with(|state| visit.call(&state.bridge))
    }
}

impl BusyPoll {
    fn spin_soon(slf: &Bound<'_, Self>, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = slf.py();
        let spin = slf.getattr(intern!(py, "_spin"))?;
        calls::call_method(intern!(py, "call_soon"), [event_loop, &spin], None).map(drop)
    }

    /// Takes note that the loop was woken from its sleep, and spins again if that was worth it.
    pub(crate) fn woken(slf: &Bound<'_, Self>, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
        let this = slf.get();
        let now = Instant::now();
        let resumes = this.state.with(|state| {
            let before = state.woken_at.replace(now);
            let is_short = before.is_some_and(|before| now - before < this.longest);
            state.short_gaps = if is_short { state.short_gaps + 1 } else { 0 };
            let resumes = state.resting && state.short_gaps >= SHORT_GAPS;
            if resumes {
                (state.resting, state.short_gaps) = (false, 0);
                (state.window_spins, state.window_hits) = (0, 0);
            }
            resumes
        });
        if resumes { Self::spin_soon(slf, event_loop) } else { Ok(()) }
    }
}

/// Returns how many CPUs the machine has. The thread may use fewer: a loop that is busy-polled is
/// best bound to a CPU of its own.
fn machine_cpus() -> usize {
    #[cfg(target_os = "linux")]
    // SAFETY: the call takes no pointers.
    return unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } as usize;
    #[cfg(not(target_os = "linux"))]
    return 1;
}

impl State {
    fn count(&mut self, hit: bool) {
        if self.window_spins == WINDOW {
            (self.window_spins, self.window_hits) = (0, 0);
        }
        self.spins += 1;
        self.hits += u64::from(hit);
        self.window_spins += 1;
        self.window_hits += u32::from(hit);
    }

    fn is_not_worthwhile(&self) -> bool {
        self.window_spins == WINDOW && self.window_hits < WORTHWHILE
    }
}
