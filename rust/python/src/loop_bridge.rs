//! Waking asyncio: one bridge per event loop, signalled through one eventfd.
//!
//! ```text
//!  publisher ─► wake ─► bridge.pending ─┬─ other thread: write(eventfd) once ─► loop: drain
//!                                       └─ the loop's own thread: drain after the call
//! ```
//!
//! A wake-up carries no event. Loops without `add_reader` are woken by `call_soon_threadsafe`.
//! The core wakes in places where Python code must not run; what needs Python is put on the list of
//! [`DUE`] bridges and done by [`settle`] once the core has returned.

use crate::gil::GilCell;
use parking_lot::Mutex;
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyWeakref, PyWeakrefMethods, PyWeakrefReference};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Something that a loop's thread does when it is woken.
pub(crate) trait Wakeable: Send + Sync {
    /// Resolves the futures that are due. Runs on the loop's thread, attached.
    fn resolve(&self, py: Python<'_>);
}

/// The part of a bridge that any thread may touch.
#[derive(Default)]
pub(crate) struct Signal {
    pending: Mutex<Vec<Arc<dyn Wakeable>>>,
    signalled: AtomicBool,
    /// The thread that ran the loop when somebody last went to sleep there.
    thread: AtomicUsize,
    #[cfg(target_os = "linux")]
    eventfd: Option<std::os::fd::OwnedFd>,
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signal").field("signalled", &self.signalled).finish_non_exhaustive()
    }
}

impl Signal {
    /// Has the loop resolve `wakeable` soon. Runs no Python code.
    pub(crate) fn schedule(self: &Arc<Self>, wakeable: Arc<dyn Wakeable>) {
        self.pending.lock().push(wakeable);
        if self.thread.load(Ordering::Relaxed) == thread_mark() || !self.has_eventfd() {
            DUE.with(|due| due.push(self.clone()));
        } else if !self.signalled.swap(true, Ordering::AcqRel) {
            self.write();
        }
    }

    /// Resolves everything pending, in the order in which it was scheduled.
    fn drain(&self, py: Python<'_>) {
        let pending = std::mem::take(&mut *self.pending.lock());
        for wakeable in pending {
            wakeable.resolve(py);
        }
    }

    #[cfg(target_os = "linux")]
    fn has_eventfd(&self) -> bool {
        self.eventfd.is_some()
    }

    #[cfg(not(target_os = "linux"))]
    fn has_eventfd(&self) -> bool {
        false
    }

    #[cfg(target_os = "linux")]
    fn write(&self) {
        use std::os::fd::AsRawFd;
        if let Some(eventfd) = &self.eventfd {
            let one = 1_u64;
            // SAFETY: the descriptor is open and `one` has the eight bytes that are written. The
            // only failure left, a full counter, means that the loop is signalled already.
            unsafe { libc::write(eventfd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn write(&self) {}

    #[cfg(target_os = "linux")]
    fn read(&self) {
        use std::os::fd::AsRawFd;
        if let Some(eventfd) = &self.eventfd {
            let mut count = 0_u64;
            // SAFETY: the descriptor is open, non-blocking, and `count` has room for the eight
            // bytes that are read.
            unsafe { libc::read(eventfd.as_raw_fd(), (&raw mut count).cast(), 8) };
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn read(&self) {}
}

/// Bridges whose pending work is done when the core has returned.
static DUE: GilCell<Vec<Arc<Signal>>> = GilCell::new(Vec::new());

/// Does what had to wait for the core to return.
#[inline]
pub(crate) fn settle(_py: Python<'_>) {
    if DUE.with(|due| !due.is_empty()) {
        settle_due();
    }
}

#[cold]
fn settle_due() {
    // PyO3 is told that the thread is attached, so that references dropped below end at once.
    Python::attach(|py| {
        while let Some(signal) = DUE.with(|due| due.pop()) {
            if signal.thread.load(Ordering::Relaxed) == thread_mark() {
                signal.drain(py);
            } else if !signal.signalled.swap(true, Ordering::AcqRel) {
                call_soon_threadsafe(py, &signal);
            }
        }
    });
}

fn call_soon_threadsafe(py: Python<'_>, signal: &Arc<Signal>) {
    let table = BRIDGES.with(|bridges| bridges.iter().map(|bridge| bridge.clone_ref(py)).collect());
    let table: Vec<Py<LoopBridge>> = table;
    let Some(bridge) = table.into_iter().find(|b| Arc::ptr_eq(&b.get().signal, signal)) else {
        return;
    };
    let Some(event_loop) = bridge.get().event_loop(py) else { return };
    if let Err(error) = event_loop.call_method1("call_soon_threadsafe", (&bridge,))
        && !error.is_instance_of::<PyRuntimeError>(py)
    {
        error.write_unraisable(py, Some(&event_loop));
    }
}

/// Every bridge whose loop is alive.
static BRIDGES: GilCell<Vec<Py<LoopBridge>>> = GilCell::new(Vec::new());

/// Wakes the sleepers of one event loop. The loop's reader callback.
#[pyclass(frozen, module = "tickbus._core", name = "_LoopBridge")]
#[derive(Debug)]
pub(crate) struct LoopBridge {
    event_loop: Py<PyWeakref>,
    pub(crate) signal: Arc<Signal>,
}

#[pymethods]
impl LoopBridge {
    fn __call__(&self, py: Python<'_>) {
        self.signal.read();
        // Cleared before draining: what is scheduled from here on signals again.
        self.signal.signalled.store(false, Ordering::Release);
        self.signal.drain(py);
    }

    fn __repr__(&self) -> &'static str {
        "<tickbus wake-up of an event loop>"
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)
    }
}

impl LoopBridge {
    /// Returns the loop, unless it is gone.
    pub(crate) fn event_loop<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.event_loop.bind(py).upgrade()
    }

    /// Returns whether the loop is gone or closed.
    pub(crate) fn is_over(&self, py: Python<'_>) -> bool {
        self.event_loop(py).is_none_or(|event_loop| {
            event_loop
                .call_method0("is_closed")
                .and_then(|closed| closed.is_truthy())
                .unwrap_or(true)
        })
    }

    /// Remembers that the calling thread runs the loop.
    pub(crate) fn runs_here(&self) {
        self.signal.thread.store(thread_mark(), Ordering::Relaxed);
    }

    /// Returns the loop's bridge, made on first use.
    pub(crate) fn of(event_loop: &Bound<'_, PyAny>) -> PyResult<Py<Self>> {
        let py = event_loop.py();
        let known: Vec<Py<Self>> =
            BRIDGES.with(|bridges| bridges.iter().map(|bridge| bridge.clone_ref(py)).collect());
        for bridge in &known {
            if bridge.get().event_loop(py).is_some_and(|known| known.is(event_loop)) {
                return Ok(bridge.clone_ref(py));
            }
        }
        let over: Vec<_> = known.iter().filter(|bridge| bridge.get().is_over(py)).collect();
        let forgotten: Vec<Py<Self>> = BRIDGES.with(|bridges| {
            bridges.extract_if(.., |b| over.iter().any(|gone| gone.is(&*b))).collect()
        });
        drop(forgotten);
        let bridge = Self::new(event_loop)?;
        let kept = bridge.clone_ref(py);
        BRIDGES.with(|bridges| bridges.push(kept));
        Ok(bridge)
    }

    fn new(event_loop: &Bound<'_, PyAny>) -> PyResult<Py<Self>> {
        let py = event_loop.py();
        let weak = PyWeakrefReference::new(event_loop)?.into_any().cast_into::<PyWeakref>()?;
        #[cfg(target_os = "linux")]
        if let Some(eventfd) = open_eventfd() {
            use std::os::fd::AsRawFd;
            let descriptor = eventfd.as_raw_fd();
            let signal = Signal { eventfd: Some(eventfd), ..Signal::default() };
            let event_loop_ref = weak.clone().unbind();
            let bridge =
                Py::new(py, Self { event_loop: event_loop_ref, signal: Arc::new(signal) })?;
            match event_loop.call_method1("add_reader", (descriptor, &bridge)) {
                Ok(_) => return Ok(bridge),
                Err(error) if error.is_instance_of::<PyNotImplementedError>(py) => {}
                Err(error) => return Err(error),
            }
        }
        Py::new(py, Self { event_loop: weak.unbind(), signal: Arc::default() })
    }
}

#[cfg(target_os = "linux")]
fn open_eventfd() -> Option<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the call takes no pointers; a descriptor that it returns is open and nobody's yet.
    unsafe {
        let descriptor = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        (descriptor >= 0).then(|| std::os::fd::OwnedFd::from_raw_fd(descriptor))
    }
}

/// Returns a number that tells living threads apart.
fn thread_mark() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| std::ptr::from_ref(mark) as usize)
}

fn asyncio_function<'py>(
    py: Python<'py>,
    cell: &'static PyOnceLock<Py<PyAny>>,
    name: &str,
) -> PyResult<&'py Bound<'py, PyAny>> {
    cell.get_or_try_init(py, || Ok(py.import("asyncio")?.getattr(name)?.unbind()))
        .map(|function| function.bind(py))
}

/// Returns the running loop.
pub(crate) fn running_loop(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    asyncio_function(py, &FUNCTION, "get_running_loop")?.call0()
}

/// Returns whether the calling thread runs an event loop.
pub(crate) fn on_a_loop(py: Python<'_>) -> PyResult<bool> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Ok(!asyncio_function(py, &FUNCTION, "_get_running_loop")?.call0()?.is_none())
}

/// Resolves a future unless it is done, and returns whether it was resolved.
pub(crate) fn resolve(py: Python<'_>, future: &Py<PyAny>) -> bool {
    let future = future.bind(py);
    let resolved = future.call_method0("done").and_then(|done| {
        let pending = !done.is_truthy()?;
        if pending {
            future.call_method1("set_result", (py.None(),))?;
        }
        Ok(pending)
    });
    // The loop may be closed already: nobody is left to be woken.
    resolved.unwrap_or(false)
}
