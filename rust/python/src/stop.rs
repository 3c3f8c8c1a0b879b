//! How an awaitable finishes for a caller that knows only `tp_iternext`: by `StopIteration`.
//!
//! On CPython 3.12 to 3.14 `await` is such a caller, and making an instance costs more than the
//! rest of a ready `await`. So one instance is kept and raised again. `await` takes the value out
//! and lets the instance go; the awaitable is freed next and calls [`forget`], so that an event is
//! not held longer than its awaitable. Whoever keeps the instance, or has left something in it (a
//! traceback, a context, attributes), has it for good, and the next finish makes another one.
//!
//! Before 3.12 exceptions are raised in three parts, and since 3.15 `await` asks `am_send` again.

#[cfg(not(all(Py_3_12, not(Py_3_15))))]
pub(crate) use fresh::{forget, raise};
#[cfg(all(Py_3_12, not(Py_3_15)))]
pub(crate) use kept::{forget, raise};

#[cfg(not(all(Py_3_12, not(Py_3_15))))]
mod fresh {
    use pyo3::exceptions::PyStopIteration;
    use pyo3::prelude::*;

    /// Raises `StopIteration` with a value.
    pub(crate) fn raise(py: Python<'_>, value: Py<PyAny>) {
        // An instance is made first: a bare tuple would be taken for its arguments.
        match py.get_type::<PyStopIteration>().call1((value,)) {
            Ok(stop) => PyErr::from_value(stop).restore(py),
            Err(error) => error.restore(py),
        }
    }

    /// There is nothing to forget.
    #[inline]
    pub(crate) fn forget(_py: Python<'_>) {}
}

#[cfg(all(Py_3_12, not(Py_3_15)))]
mod kept {
    use crate::gil::GilCell;
    use pyo3::exceptions::PyStopIteration;
    use pyo3::ffi;
    use pyo3::prelude::*;
    use std::ptr;

    static KEPT: GilCell<Option<Stop>> = GilCell::new(None);

    /// An instance of `StopIteration`.
    struct Stop(Py<PyAny>);

    impl Stop {
        #[inline]
        fn fields(&self) -> *mut ffi::PyStopIterationObject {
            self.0.as_ptr().cast()
        }

        /// Returns whether nobody else has it and nobody left anything in it but the value.
        #[inline]
        fn is_ours(&self) -> bool {
            let stop = self.fields();
            // SAFETY: it is an exact `StopIteration`, whose fields only attached threads touch;
            // `args` is always a tuple, and `suppress_context` is a `char` of C.
            unsafe {
                ffi::Py_REFCNT(self.0.as_ptr()) == 1
                    && (*stop).traceback.is_null()
                    && (*stop).context.is_null()
                    && (*stop).cause.is_null()
                    && (&raw const (*stop).suppress_context).cast::<u8>().read() == 0
                    && (*stop).dict.is_null()
                    && ffi::PyTuple_GET_SIZE((*stop).args) == 0
            }
        }

        /// Puts in an owned value, or null for none, and returns the one before.
        #[inline]
        fn replace_value(&self, value: *mut ffi::PyObject) -> *mut ffi::PyObject {
            // SAFETY: as above; a null value reads as `None`.
            unsafe { ptr::replace(&raw mut (*self.fields()).value, value) }
        }
    }

    /// Raises `StopIteration` with a value.
    #[inline]
    pub(crate) fn raise(py: Python<'_>, value: Py<PyAny>) {
        // It is out of its place meanwhile, because dropping the value before may run Python code
        // that finishes another awaitable.
        let stop = match KEPT.with(Option::take) {
            Some(stop) if stop.is_ours() => stop,
            other => match replacement(py, other) {
                Ok(stop) => stop,
                Err(error) => return error.restore(py),
            },
        };
        let raised = stop.0.clone_ref(py).into_ptr();
        // SAFETY: the value that was in the instance belonged to it.
        unsafe { ffi::Py_XDECREF(stop.replace_value(value.into_ptr())) };
        keep(py, stop);
        // SAFETY: an owned reference to an exception is given away.
        unsafe { ffi::PyErr_SetRaisedException(raised) };
    }

    #[cold]
    fn replacement(py: Python<'_>, before: Option<Stop>) -> PyResult<Stop> {
        if let Some(before) = before {
            before.0.drop_ref(py);
        }
        Ok(Stop(py.get_type::<PyStopIteration>().call0()?.unbind()))
    }

    #[inline]
    fn keep(py: Python<'_>, stop: Stop) {
        if let Some(before) = KEPT.with(|kept| kept.replace(stop)) {
            before.0.drop_ref(py);
        }
    }

    /// Lets go of the value that was raised last.
    #[inline]
    pub(crate) fn forget(py: Python<'_>) {
        let holds_value = KEPT.with(|kept| {
            // SAFETY: as in `is_ours`.
            kept.as_ref().is_some_and(|stop| unsafe { !(*stop.fields()).value.is_null() })
        });
        if !holds_value {
            return;
        }
        let Some(stop) = KEPT.with(Option::take) else { return };
        if stop.is_ours() {
            let value = stop.replace_value(ptr::null_mut());
            keep(py, stop);
            // SAFETY: the value that was in the instance belonged to it.
            unsafe { ffi::Py_XDECREF(value) };
        } else {
            stop.0.drop_ref(py);
        }
    }
}
