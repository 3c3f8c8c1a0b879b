//! `publish` and `recv` against the C interface, for the calls in which nothing has to be decided.
//! What PyO3 does around a call (counting attachments, taking arguments apart, catching panics)
//! costs as much as these calls do themselves.
//!
//! The methods of `#[pymethods]` stay behind them: they have the documentation, and everything
//! that is not quick is passed on to them.

use crate::awaitable::{Job, awaitable};
use crate::bus::EventBus;
use crate::subscription::AsyncEventSubscription;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use smallvec::SmallVec;
use std::ptr;

static PUBLISH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// Puts the quick methods in front of those of the classes.
pub(crate) fn install(py: Python<'_>) -> PyResult<()> {
    let publish = ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: publish };
    let behind = put_in_front(&py.get_type::<EventBus>(), "publish", publish)?;
    // A second import of the module finds the quick method already there.
    let _ = PUBLISH.set(py, behind);
    let recv = ffi::PyMethodDefPointer { PyCFunction: recv };
    put_in_front(&py.get_type::<AsyncEventSubscription>(), "recv", recv)?;
    Ok(())
}

/// Replaces a method by a function of the same calling convention and returns the method.
fn put_in_front(
    class: &Bound<'_, PyType>,
    name: &str,
    function: ffi::PyMethodDefPointer,
) -> PyResult<Py<PyAny>> {
    let behind = class.getattr(name)?;
    // SAFETY: what a class has under the name of a `#[pymethods]` method is a method descriptor
    // with a definition that lives as long as the process; the copy does too.
    let quick = unsafe {
        debug_assert_eq!(ffi::Py_TYPE(behind.as_ptr()), &raw mut ffi::PyMethodDescr_Type);
        let mut definition = *(*behind.as_ptr().cast::<ffi::PyMethodDescrObject>()).d_method;
        definition.ml_meth = function;
        let definition = Box::leak(Box::new(definition));
        let quick = ffi::PyDescr_NewMethod(class.as_type_ptr(), definition);
        Bound::from_owned_ptr_or_err(class.py(), quick)?
    };
    class.setattr(name, quick)?;
    Ok(behind.unbind())
}

/// `EventBus.publish(event, topic=None)`.
unsafe extern "C" fn publish(
    bus: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    keywords: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: methods are called attached, on an object of the class that has them, with `count`
    // borrowed references and those of the keywords behind them.
    unsafe {
        let py = Python::assume_attached();
        if keywords.is_null() && (count == 1 || count == 2) {
            let this = Bound::from_borrowed_ptr(py, bus).cast_into_unchecked::<EventBus>();
            let event = Bound::from_borrowed_ptr(py, *arguments);
            let topic = (count == 2).then(|| Bound::from_borrowed_ptr(py, *arguments.add(1)));
            if let Some(taken) = this.get().publish_quickly(py, event, topic.as_ref()) {
                return ffi::PyLong_FromSize_t(taken);
            }
        }
        let named = if keywords.is_null() { 0 } else { ffi::PyTuple_GET_SIZE(keywords) };
        let mut all: SmallVec<[*mut ffi::PyObject; 4]> = SmallVec::new();
        all.push(bus);
        all.extend((0..count + named).map(|index| *arguments.offset(index)));
        match PUBLISH.get(py) {
            Some(behind) => {
                let positional = 1 + count as usize;
                ffi::PyObject_Vectorcall(behind.as_ptr(), all.as_ptr(), positional, keywords)
            }
            None => unreachable!("the module is initialized before its methods are called"),
        }
    }
}

/// `AsyncEventSubscription.recv()`.
unsafe extern "C" fn recv(
    subscription: *mut ffi::PyObject,
    _nothing: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: methods are called attached, on an object of the class that has them.
    unsafe {
        let py = Python::assume_attached();
        let subscription = Bound::from_borrowed_ptr(py, subscription);
        let job = Job::Recv(subscription.cast_into_unchecked().unbind());
        match awaitable(py, job) {
            Ok(awaitable) => awaitable.into_ptr(),
            Err(error) => {
                error.restore(py);
                ptr::null_mut()
            }
        }
    }
}
