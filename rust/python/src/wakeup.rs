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
use pyo3::types::{IntoPyDict, PyBool, PyType, PyWeakref, PyWeakrefMethods};

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
    /// The loop's weak reference: called, it gives the loop, and asking for it makes no method.
    #[pyo3(get)]
    get_loop: Py<PyWeakref>,
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
        visit.call(&self.get_loop)?;
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
    /// Returns one of the loop to which the reference is.
    pub(crate) fn new(py: Python<'_>, event_loop: &Py<PyWeakref>) -> PyResult<Py<Self>> {
        let parts = Parts {
            state: State::Pending,
            blocking: true,
            first: None,
            more: Vec::new(),
            message: None,
        };
        let get_loop = event_loop.clone_ref(py);
        let wakeup = Py::new(py, Self { get_loop, parts: GilCell::new(parts) })?;
        // PyO3 tracks new memory only, not what comes from its list of free objects.
        track(wakeup.as_ptr());
        Ok(wakeup)
    }

    /// Returns whether it was made with this reference to its loop.
    pub(crate) fn is_for(&self, event_loop: &Py<PyWeakref>) -> bool {
        self.get_loop.is(event_loop)
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
        let argument = self.argument(wakeup)?;
        // SAFETY: attached; the context is one, as everything that calls `add_done_callback` with a
        // context gives, and if it is not or was entered already, this fails and changes nothing.
        if unsafe { ffi::PyContext_Enter(self.context.as_ptr()) } != 0 {
            let _entered_already = PyErr::take(py);
            return self.call_soon(wakeup);
        }
        let result = calls::call(py, &self.function, [argument]).map(drop);
        // SAFETY: it was entered above, and what was called has left every context it entered.
        if unsafe { ffi::PyContext_Exit(self.context.as_ptr()) } != 0 {
            return Err(PyErr::fetch(py));
        }
        result
    }

    fn call_soon(&self, wakeup: &Bound<'_, Wakeup>) -> PyResult<()> {
        let py = wakeup.py();
        // Who waits in a loop that is gone is gone too.
        let Some(event_loop) = wakeup.get().get_loop.bind(py).upgrade() else { return Ok(()) };
        let arguments = [&event_loop, self.function.bind(py), self.argument(wakeup)?];
        calls::call_method(intern!(py, "call_soon"), arguments, Some(&self.context)).map(drop)
    }

    /// Returns what the function is called with: the wake-up, but a task written in C is told of a
    /// future that is done, whose result it reads and does not ask for by the name of a method.
    fn argument<'a, 'py>(&self, wakeup: &'a Bound<'py, Wakeup>) -> PyResult<&'a Bound<'py, PyAny>> {
        let py = wakeup.py();
        if !wakeup.get().is_woken() {
            return Ok(wakeup);
        }
        let done = Done::get(py)?;
        let function = self.function.as_ptr();
        // SAFETY: attached; what is asked of a function of C is asked after the check that it is one.
        let is_of_a_task = unsafe {
            ffi::PyCFunction_CheckExact(function) != 0 && {
                let task = ffi::PyCFunction_GetSelf(function);
                !task.is_null() && ffi::PyObject_TypeCheck(task, done.task.as_ptr().cast()) != 0
            }
        };
        Ok(if is_of_a_task { done.future.bind(py) } else { wakeup })
    }
}

/// What tasks that were woken are told: one future without a loop, for all.
struct Done {
    task: Py<PyType>,
    future: Py<PyAny>,
}

impl Done {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        static DONE: PyOnceLock<Done> = PyOnceLock::new();
        DONE.get_or_try_init(py, || {
            let asyncio = py.import("asyncio")?;
            // In place of a loop: a future asks it only whether it debugs.
            let no_loop = [("get_debug", py.get_type::<PyBool>())].into_py_dict(py)?;
            let no_loop = py.import("types")?.call_method("SimpleNamespace", (), Some(&no_loop))?;
            let arguments = [("loop", no_loop)].into_py_dict(py)?;
            let future = asyncio.call_method("Future", (), Some(&arguments))?;
            future.call_method1("set_result", (py.None(),))?;
            let task = asyncio.getattr("Task")?.cast_into::<PyType>()?.unbind();
            Ok(Self { task, future: future.unbind() })
        })
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
    Done::get(py)?;
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
