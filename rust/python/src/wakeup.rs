//! What a suspended awaitable gives its task to wait for: the part of `asyncio.Future` that tasks
//! use. A future of our own may step its task directly in the loop's reader callback, one loop
//! iteration earlier, and needs no look-up of the running loop.

use crate::calls;
use crate::gil::GilCell;
use pyo3::exceptions::PyBaseException;
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Pending,
    Woken,
    Cancelled,
}

/// A function to be called with the wake-up, in a context.
#[derive(Debug)]
struct Callback {
    function: Py<PyAny>,
    context: Py<PyAny>,
}

#[derive(Debug)]
struct Parts {
    state: State,
    /// Part of the protocol between tasks and futures.
    blocking: bool,
    /// The task's.
    first: Option<Callback>,
    more: Vec<Callback>,
    message: Option<Py<PyAny>>,
}

/// Looks like an `asyncio.Future` without a result. Only tasks see it.
#[pyclass(frozen, freelist = 64, module = "tickbus._core", name = "_Wakeup")]
#[derive(Debug)]
pub(crate) struct Wakeup {
    event_loop: Py<PyAny>,
    parts: GilCell<Parts>,
}

#[pymethods]
impl Wakeup {
    #[getter(_asyncio_future_blocking)]
    fn blocking(&self) -> bool {
        self.parts.with(|parts| parts.blocking)
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, blocking: bool) {
        self.parts.with(|parts| parts.blocking = blocking);
    }

    pub(crate) fn get_loop(&self, py: Python<'_>) -> Py<PyAny> {
        self.event_loop.clone_ref(py)
    }

    fn done(&self) -> bool {
        self.state() != State::Pending
    }

    fn cancelled(&self) -> bool {
        self.state() == State::Cancelled
    }

    fn result(&self, py: Python<'_>) -> PyResult<()> {
        match self.state() {
            State::Woken => Ok(()),
            State::Pending => {
                let class = asyncio_class(py, &INVALID_STATE, "InvalidStateError")?;
                Err(PyErr::from_value(class.call1(("the wake-up has not come",))?))
            }
            State::Cancelled => {
                let class = asyncio_class(py, &CANCELLED, "CancelledError")?;
                let message =
                    self.parts.with(|parts| parts.message.as_ref().map(|m| m.clone_ref(py)));
                Err(PyErr::from_value(match message {
                    Some(message) => class.call1((message,))?,
                    None => class.call0()?,
                }))
            }
        }
    }

    fn exception(&self, py: Python<'_>) -> PyResult<Option<Py<PyBaseException>>> {
        self.result(py).map(|()| None)
    }

    #[pyo3(signature = (msg = None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        if !slf.get().leave_pending(State::Cancelled) {
            return Ok(false);
        }
        let old = slf.get().parts.with(|parts| std::mem::replace(&mut parts.message, msg));
        drop(old);
        Self::step_soon(slf)?;
        Ok(true)
    }

    #[pyo3(signature = (function, /, *, context = None))]
    fn add_done_callback(
        slf: &Bound<'_, Self>,
        function: Py<PyAny>,
        context: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let py = slf.py();
        let context = match context {
            Some(context) => context,
            None => copy_context(py)?,
        };
        let callback = Callback { function, context };
        if slf.get().done() {
            return callback.call_soon(slf);
        }
        slf.get().parts.with(|parts| match &parts.first {
            None => parts.first = Some(callback),
            Some(_) => parts.more.push(callback),
        });
        Ok(())
    }

    fn remove_done_callback(&self, function: &Bound<'_, PyAny>) -> PyResult<usize> {
        let all = self.take_callbacks();
        let before = all.len();
        let mut kept = Vec::with_capacity(before);
        for callback in all {
            if !callback.function.bind(function.py()).eq(function)? {
                kept.push(callback);
            }
        }
        let removed = before - kept.len();
        self.parts.with(|parts| {
            let mut kept = kept.into_iter();
            parts.first = kept.next();
            parts.more.extend(kept);
        });
        Ok(removed)
    }

    fn __repr__(&self) -> &'static str {
        match self.state() {
            State::Pending => "<tickbus wake-up pending>",
            State::Woken => "<tickbus wake-up done>",
            State::Cancelled => "<tickbus wake-up cancelled>",
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        self.parts.with(|parts| {
            visit.call(&parts.message)?;
            parts.first.iter().chain(&parts.more).try_for_each(|callback| {
                visit.call(&callback.function)?;
                visit.call(&callback.context)
            })
        })
    }

    fn __clear__(&self) {
        drop(self.take_callbacks());
    }
}

impl Wakeup {
    pub(crate) fn new(event_loop: Bound<'_, PyAny>) -> PyResult<Py<Self>> {
        let parts = Parts {
            state: State::Pending,
            blocking: true,
            first: None,
            more: Vec::new(),
            message: None,
        };
        let py = event_loop.py();
        let parts = GilCell::new(parts);
        let wakeup = Py::new(py, Self { event_loop: event_loop.unbind(), parts })?;
        // PyO3 tracks new memory only, not what comes from its list of free objects.
        track(wakeup.as_ptr());
        Ok(wakeup)
    }

    pub(crate) fn is_woken(&self) -> bool {
        self.state() == State::Woken
    }

    /// Has the first that waits called back; false if it is not the first, or need not wait.
    pub(crate) fn wait(&self, function: Py<PyAny>, context: Py<PyAny>) -> bool {
        let callback = Callback { function, context };
        let refused = self.parts.with(|parts| match parts.first {
            None if parts.state == State::Pending => {
                parts.first = Some(callback);
                None
            }
            _ => Some(callback),
        });
        refused.is_none()
    }

    fn state(&self) -> State {
        self.parts.with(|parts| parts.state)
    }

    /// Ends the waiting and returns whether it had not ended. Runs no Python code: call
    /// [`Wakeup::step`] or [`Wakeup::step_soon`] next.
    pub(crate) fn wake(&self) -> bool {
        self.leave_pending(State::Woken)
    }

    fn leave_pending(&self, next: State) -> bool {
        self.parts.with(|parts| {
            let pending = parts.state == State::Pending;
            if pending {
                parts.state = next;
            }
            pending
        })
    }

    /// Returns whether a task has begun to wait for it. A task of another loop refuses to.
    pub(crate) fn has_waiter(&self) -> bool {
        self.parts.with(|parts| parts.first.is_some())
    }

    /// Runs the task that waits for it, here and now. The caller is called by the loop itself, so
    /// no other task is running.
    pub(crate) fn step(slf: &Bound<'_, Self>) -> PyResult<()> {
        let first = slf.get().parts.with(|parts| match parts.more.is_empty() {
            true => parts.first.take(),
            false => None,
        });
        match first {
            Some(callback) => callback.call(slf),
            None => Self::step_soon(slf),
        }
    }

    /// Has the loop run the task that waits for it in its next iteration.
    pub(crate) fn step_soon(slf: &Bound<'_, Self>) -> PyResult<()> {
        slf.get().take_callbacks().iter().try_for_each(|callback| callback.call_soon(slf))
    }

    fn take_callbacks(&self) -> Vec<Callback> {
        self.parts.with(|parts| {
            let more = std::mem::take(&mut parts.more);
            parts.first.take().into_iter().chain(more).collect()
        })
    }
}

impl Callback {
    fn call(self, wakeup: &Bound<'_, Wakeup>) -> PyResult<()> {
        let py = wakeup.py();
        // SAFETY: attached; the context is one, as everything that calls `add_done_callback` with a
        // context gives, and if it is not or was entered already, this fails and changes nothing.
        if unsafe { ffi::PyContext_Enter(self.context.as_ptr()) } != 0 {
            let _entered_already = PyErr::take(py);
            return self.call_soon(wakeup);
        }
        let result = calls::call(&self.function, wakeup).map(drop);
        // SAFETY: it was entered above, and what was called has left every context it entered.
        if unsafe { ffi::PyContext_Exit(self.context.as_ptr()) } != 0 {
            return Err(PyErr::fetch(py));
        }
        result
    }

    fn call_soon(&self, wakeup: &Bound<'_, Wakeup>) -> PyResult<()> {
        let py = wakeup.py();
        let event_loop = wakeup.get().event_loop.bind(py);
        let arguments = [event_loop, self.function.bind(py), wakeup.as_any()];
        calls::call_method(intern!(py, "call_soon"), arguments, Some(&self.context)).map(drop)
    }
}

/// Shows an object to the garbage collector.
pub(crate) fn track(object: *mut ffi::PyObject) {
    // SAFETY: the object is alive and of a GC type.
    unsafe {
        if ffi::PyObject_GC_IsTracked(object) == 0 {
            ffi::PyObject_GC_Track(object.cast());
        }
    }
}

static INVALID_STATE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static CANCELLED: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// Makes what would else be made on first use; see `process::prepare`.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    py.get_type::<Wakeup>();
    asyncio_class(py, &INVALID_STATE, "InvalidStateError")?;
    asyncio_class(py, &CANCELLED, "CancelledError").map(drop)
}

fn asyncio_class<'py>(
    py: Python<'py>,
    cell: &'static PyOnceLock<Py<PyType>>,
    name: &str,
) -> PyResult<&'py Bound<'py, PyType>> {
    cell.import(py, "asyncio", name)
}

fn copy_context(py: Python<'_>) -> PyResult<Py<PyAny>> {
    // SAFETY: attached; the result is an owned reference or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyContext_CopyCurrent()).map(Bound::unbind) }
}
