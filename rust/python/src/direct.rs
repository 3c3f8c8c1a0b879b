//! `publish`, `recv`, how tasks wait for a wake-up, and making and reading compact events, against
//! the C interface, for the calls in which nothing has to be decided.
//! What PyO3 does around a call (counting attachments, taking arguments apart, catching panics)
//! costs as much as these calls do themselves.
//!
//! The methods of `#[pymethods]` stay behind them: they have the documentation, and everything
//! that is not quick is passed on to them.

use crate::awaitable::{Job, awaitable};
use crate::bus::EventBus;
use crate::event::{self, PyEvent, assemble};
use crate::names::{source_text, symbol_text};
use crate::queue::LockFreeEventQueue;
use crate::subscription::AsyncEventSubscription;
use crate::wakeup::Wakeup;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyType};
use smallvec::SmallVec;
use std::ffi::{CStr, c_void};
use std::ptr;

static PUBLISH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
static ENQUEUE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
static ADD_DONE_CALLBACK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// Makes a getter of an event's field out of an expression for an object.
macro_rules! reader {
    (|$event:ident, $py:ident| $object:expr) => {{
        unsafe extern "C" fn read(
            event: *mut ffi::PyObject,
            _nothing: *mut c_void,
        ) -> *mut ffi::PyObject {
            // SAFETY: getters are called attached, on an object of the class that has them.
            unsafe {
                let $py = Python::assume_attached();
                let event = Bound::from_borrowed_ptr($py, event).cast_into_unchecked::<PyEvent>();
                let $event = event.get();
                $object
            }
        }
        read
    }};
}

/// Puts the quick methods in front of those of the classes.
pub(crate) fn install(py: Python<'_>) -> PyResult<()> {
    let publish = ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: publish };
    let behind = put_in_front(&py.get_type::<EventBus>(), "publish", publish)?;
    // The module is initialized once in a process.
    let _ = PUBLISH.set(py, behind);
    let recv = ffi::PyMethodDefPointer { PyCFunction: recv };
    put_in_front(&py.get_type::<AsyncEventSubscription>(), "recv", recv)?;

    let queue = py.get_type::<LockFreeEventQueue>();
    let enqueue = ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: enqueue };
    let _ = ENQUEUE.set(py, put_in_front(&queue, "enqueue", enqueue)?);
    let dequeue_async = ffi::PyMethodDefPointer { PyCFunction: dequeue_async };
    put_in_front(&queue, "dequeue_async", dequeue_async)?;

    let wakeup = py.get_type::<Wakeup>();
    let add = ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: add_done_callback };
    let _ = ADD_DONE_CALLBACK.set(py, put_in_front(&wakeup, "add_done_callback", add)?);

    let class = py.get_type::<PyEvent>();
    // SAFETY: the class is PyO3's own, has no subclasses, and has no instance yet.
    unsafe { event::make_plain(class.as_type_ptr(), construct) };
    let readers: [(&CStr, &CStr, ffi::getter); 9] = [
        (
            c"timestamp",
            c"When it happened: nanoseconds since the Unix epoch, UTC; 0 is unknown.",
            reader!(|event, py| unsigned(event.0.timestamp)),
        ),
        (
            c"event_type",
            c"What it tells.",
            reader!(|event, py| event.event_type_object(py).clone().into_ptr()),
        ),
        (
            c"priority",
            c"How urgent it is among those of its kind.",
            reader!(|event, py| event.priority_object(py).clone().into_ptr()),
        ),
        (
            c"source_id",
            c"The number of who made it; 0 is nobody.",
            reader!(|event, py| unsigned(event.0.source_id.0.into())),
        ),
        (
            c"source",
            c"The name of who made it; None if there is none or this process does not know it.",
            reader!(|event, py| text(py, source_text(py, event.0.source_id))),
        ),
        (
            c"symbol_id",
            c"The number of what it is about; 0 is nothing.",
            reader!(|event, py| unsigned(event.0.symbol.0.into())),
        ),
        (
            c"symbol",
            c"The name of what it is about; None if there is none or this process does not know it.",
            reader!(|event, py| text(py, symbol_text(py, event.0.symbol))),
        ),
        (
            c"value",
            c"A number that depends on the type; no money.",
            reader!(|event, py| ffi::PyFloat_FromDouble(event.0.value)),
        ),
        (
            c"metadata",
            c"Whatever the type and the source agreed on.",
            reader!(|event, py| unsigned(event.0.metadata)),
        ),
    ];
    readers.into_iter().try_for_each(|(name, doc, read)| add_reader(&class, name, doc, read))
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

/// Gives a class a property.
fn add_reader(
    class: &Bound<'_, PyType>,
    name: &'static CStr,
    doc: &'static CStr,
    read: ffi::getter,
) -> PyResult<()> {
    let definition = Box::leak(Box::new(ffi::PyGetSetDef {
        name: name.as_ptr(),
        get: Some(read),
        set: None,
        doc: doc.as_ptr(),
        closure: ptr::null_mut(),
    }));
    // SAFETY: attached; the definition lives as long as the process.
    let property = unsafe {
        let property = ffi::PyDescr_NewGetSet(class.as_type_ptr(), definition);
        Bound::from_owned_ptr_or_err(class.py(), property)?
    };
    class.setattr(PyString::intern(class.py(), &name.to_string_lossy()), property)
}

fn unsigned(number: u64) -> *mut ffi::PyObject {
    // SAFETY: getters are called attached.
    unsafe { ffi::PyLong_FromUnsignedLongLong(number) }
}

fn text(py: Python<'_>, text: Option<Py<PyString>>) -> *mut ffi::PyObject {
    text.map_or_else(|| py.None().into_ptr(), Py::into_ptr)
}

/// Returns what the interpreter wants of a function: an object, or null with the exception set.
fn returned<T>(py: Python<'_>, result: PyResult<Py<T>>) -> *mut ffi::PyObject {
    match result {
        Ok(object) => object.into_ptr(),
        Err(error) => {
            error.restore(py);
            ptr::null_mut()
        }
    }
}

/// `Event(timestamp, event_type, ...)`.
unsafe extern "C" fn construct(
    _class: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: usize,
    keywords: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: classes are called attached, with `count` borrowed references and behind them those
    // of the keywords, all of which outlive the call.
    unsafe {
        let py = Python::assume_attached();
        let count = ffi::PyVectorcall_NARGS(count) as usize;
        let named = if keywords.is_null() { 0 } else { ffi::PyTuple_GET_SIZE(keywords) as usize };
        let argument = |place: usize| Borrowed::from_ptr(py, *arguments.add(place));
        let name =
            |place: usize| Borrowed::from_ptr(py, ffi::PyTuple_GET_ITEM(keywords, place as isize));
        let named = (0..named).map(|place| (name(place), argument(count + place)));
        returned(
            py,
            assemble((0..count).map(argument), named)
                .and_then(|event| event.object(py))
                .map(Bound::unbind),
        )
    }
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
        call_behind(py, &PUBLISH, bus, arguments, count, keywords)
    }
}

/// Calls the method that a quick one stands in front of.
///
/// # Safety
///
/// The arguments are those of the quick one.
#[cold]
unsafe fn call_behind(
    py: Python<'_>,
    method: &PyOnceLock<Py<PyAny>>,
    this: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    keywords: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    let Some(behind) = method.get(py) else {
        unreachable!("the module is initialized before its methods are called")
    };
    // SAFETY: the caller's promise: `count` references, and behind them those of the keywords.
    unsafe {
        let named = if keywords.is_null() { 0 } else { ffi::PyTuple_GET_SIZE(keywords) };
        let mut all: SmallVec<[*mut ffi::PyObject; 4]> = SmallVec::new();
        all.push(this);
        all.extend((0..count + named).map(|index| *arguments.offset(index)));
        ffi::PyObject_Vectorcall(behind.as_ptr(), all.as_ptr(), 1 + count as usize, keywords)
    }
}

/// `Wakeup.add_done_callback(function, *, context=None)`, as tasks call it.
unsafe extern "C" fn add_done_callback(
    wakeup: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    keywords: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: as above, with `count` borrowed references and those of the keywords behind them.
    unsafe {
        let py = Python::assume_attached();
        let this = Bound::from_borrowed_ptr(py, wakeup).cast_into_unchecked::<Wakeup>();
        if count == 1 && !keywords.is_null() && ffi::PyTuple_GET_SIZE(keywords) == 1 {
            let name = ffi::PyTuple_GET_ITEM(keywords, 0);
            let context = *arguments.add(1);
            let is_context = ffi::PyUnicode_CompareWithASCIIString(name, c"context".as_ptr()) == 0;
            if is_context && context != ffi::Py_None() {
                let function = Bound::from_borrowed_ptr(py, *arguments).unbind();
                let context = Bound::from_borrowed_ptr(py, context).unbind();
                if this.get().wait(function, context) {
                    return py.None().into_ptr();
                }
            }
        }
        call_behind(py, &ADD_DONE_CALLBACK, wakeup, arguments, count, keywords)
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
        returned(py, awaitable(py, job))
    }
}

/// `LockFreeEventQueue.enqueue(event)`.
unsafe extern "C" fn enqueue(
    queue: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    keywords: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: as above, with `count` borrowed references and those of the keywords behind them.
    unsafe {
        let py = Python::assume_attached();
        if keywords.is_null() && count == 1 {
            let this = Bound::from_borrowed_ptr(py, queue);
            let this = this.cast_into_unchecked::<LockFreeEventQueue>();
            let event = Bound::from_borrowed_ptr(py, *arguments);
            if this.get().enqueue_quickly(py, event).is_some() {
                return py.None().into_ptr();
            }
        }
        call_behind(py, &ENQUEUE, queue, arguments, count, keywords)
    }
}

/// `LockFreeEventQueue.dequeue_async()`.
unsafe extern "C" fn dequeue_async(
    queue: *mut ffi::PyObject,
    _nothing: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: methods are called attached, on an object of the class that has them.
    unsafe {
        let py = Python::assume_attached();
        let queue = Bound::from_borrowed_ptr(py, queue);
        returned(py, awaitable(py, Job::Dequeue(queue.cast_into_unchecked().unbind())))
    }
}
